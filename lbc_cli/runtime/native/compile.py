"""Compiles the CPU kernels into one shared library beside their sources: standard library only.

    python -m lbc_cli.runtime.native.compile

The build hook loads this file by its path, before lbc is installed, so it imports nothing of lbc. The instruction set
of a source file is the first word of its name: `avx2.cpp` and `avx2_vector.cpp` get AVX2's flags and are left out where
the compiler does not make x86-64 code; every other name is portable. Of the environment only CXX is read (a command,
possibly with options): CXXFLAGS often carries -march and -ffast-math, which would decide what the kernels compute and
where they run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

LIBRARY = "_kernels.so"
NOTE = "_kernels.txt"
"""Why there is no library, in one line: what a later run tells the user."""

COMPILERS = ("c++", "g++", "clang++")
# No contraction: the compiler's own choice of fused multiply-adds would change results from one compiler to the next.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off")
X86_FLAGS = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
}
# A wheel may land where another libstdc++ is; what is linked in statically stays hidden, or other libraries bind to it.
LINK_FLAGS = (("-static-libgcc", "-static-libstdc++", "-Wl,--exclude-libs,ALL"), ("-static-libgcc",), ())


class Outcome(NamedTuple):
    """How it went."""

    state: Literal["built", "no compiler", "failed"]
    text: str
    """The compiler's command if built, else the reason in one line."""


class _Failed(Exception):
    """A command that ended badly; says which, and the compiler's first lines about it."""


def compile_kernels(sources: Path, target: Path) -> Outcome:
    """Compile a folder's sources; leaves `_kernels.so` in another folder, or a note there that says why not.

    A library that is there already is replaced in one step, and kept when compiling fails.

    Args:
        sources: the folder of `*.cpp` and `*.h`.
        target: an existing folder; may be the same.
    """
    try:
        outcome = _compile(sources, target)
    except (_Failed, OSError) as error:
        outcome = Outcome("failed", str(error))
    leave_note(target, None if outcome.state == "built" else outcome.text)
    return outcome


def leave_note(target: Path, text: str | None) -> None:
    """Write into a folder why it has no library; None removes what was said before."""
    # Whoever compiles is told anyway: a folder that cannot be written must not hide that.
    with contextlib.suppress(OSError):
        if text is None:
            (target / NOTE).unlink(missing_ok=True)
        else:
            (target / NOTE).write_text(text + "\n", encoding="utf-8")


def digest(sources: Path) -> str:
    """SHA-256, in hex, of names and contents of `*.cpp` and `*.h`, and of the flags that they are compiled with."""
    found = hashlib.sha256(repr((FLAGS, X86_FLAGS)).encode())
    for path in sorted([*sources.glob("*.cpp"), *sources.glob("*.h")], key=lambda path: path.name):
        content = path.read_bytes()
        found.update(f"{path.name} {len(content)}\n".encode() + content)
    return found.hexdigest()


def find_compiler() -> tuple[list[str], bool] | str:
    """The first C++ compiler that works, as a command, and whether it makes x86-64 code; else why there is none."""
    chosen = os.environ.get("CXX", "").strip()
    tried = [shlex.split(chosen)] if chosen else [[name] for name in COMPILERS]
    for command in tried:
        path = shutil.which(command[0])
        macros = path and _macros([path, *command[1:]])
        if path and macros:
            return [path, *command[1:]], "#define __x86_64__ 1" in macros
    if chosen:
        return f"CXX={chosen!r} is no C++ compiler that works here: set it to one, or unset it"
    return f"no C++ compiler was found ({', '.join(COMPILERS)}): install one (for example: apt install g++) or set CXX"


def _macros(command: list[str]) -> str:
    """What a compiler defines for the machine that it compiles for; "" where it does not run."""
    try:
        return _run([*command, "-dM", "-E", "-x", "c++", "-"], Path.cwd())
    except (_Failed, OSError):
        return ""


def _compile(sources: Path, target: Path) -> Outcome:
    found = find_compiler()
    if isinstance(found, str):
        return Outcome("no compiler", found)
    command, x86 = found
    units = _units(sources, x86)
    if not units:
        raise _Failed(f"{sources} holds no C++ sources")
    with tempfile.TemporaryDirectory(prefix="lbc-kernels-") as folder:
        objects = _objects(command, sources, units, x86, Path(folder))
        library = _link(command, objects, Path(folder))
        # A rename replaces a library in one step, also under a process that has it mapped; not across file systems.
        temporary = target / f"{LIBRARY}.{os.getpid()}.tmp"
        try:
            shutil.copyfile(library, temporary)
            temporary.replace(target / LIBRARY)
        finally:
            temporary.unlink(missing_ok=True)
    return Outcome("built", shlex.join(command))


def _instructions(source: Path) -> str:
    """The instruction set that a source's name asks for."""
    word = source.stem.split("_")[0]
    return word if word in X86_FLAGS else "portable"


def _units(sources: Path, x86: bool) -> list[Path]:
    """The sources to compile, the least instruction set first.

    Inline functions of shared headers are compiled once per source, and the linker keeps the first: in this order it
    is never one with instructions that the processor of another caller lacks.
    """
    order = ("portable", *X86_FLAGS) if x86 else ("portable",)
    found = [path for path in sources.glob("*.cpp") if _instructions(path) in order]
    return sorted(found, key=lambda path: (order.index(_instructions(path)), path.name))


def _objects(command: list[str], sources: Path, units: list[Path], x86: bool, folder: Path) -> list[Path]:
    """Object files of all units, compiled side by side, in the units' order."""
    defines = [f'-DLBC_SOURCES="{digest(sources)}"', *(["-DLBC_X86"] if x86 else [])]

    def compiled(unit: Path) -> Path:
        made = folder / f"{unit.stem}.o"
        flags = [*FLAGS, *X86_FLAGS.get(_instructions(unit), ()), *defines]
        _run([*command, *flags, "-c", unit.name, "-o", str(made)], sources)
        return made

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(compiled, units))


def _link(command: list[str], objects: list[Path], folder: Path) -> Path:
    """The shared library, with as few needs as the linker allows."""
    made, names = folder / LIBRARY, [path.name for path in objects]
    for number, flags in enumerate(LINK_FLAGS, start=1):
        try:
            _run([*command, "-shared", "-fPIC", *flags, *names, "-o", str(made)], folder)
            break
        except _Failed:
            if number == len(LINK_FLAGS):
                raise
    return made


def _run(command: Sequence[str], folder: Path) -> str:
    """Run a command in a folder, with nothing to read; what it prints."""
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, cwd=folder, env=environment, input="", capture_output=True, text=True, check=False)
    if done.returncode:
        raise _Failed(f"{command[0]} failed with {done.returncode}: {_first_errors(done.stderr)}")
    return done.stdout


def _first_errors(text: str, *, most: int = 3) -> str:
    """The first lines that name an error, or simply the first, as one line."""
    # The driver's own closing line about its linker says nothing.
    lines = [line.strip() for line in text.splitlines() if line.strip() and "ld returned" not in line]
    return " | ".join(([line for line in lines if "error" in line] or lines or ["it printed nothing"])[:most])


def main() -> int:
    """Compile beside the sources, and print how it went; 0 if there is a library now, else 1."""
    here = Path(__file__).resolve().parent
    outcome = compile_kernels(here, here)
    if outcome.state == "built":
        print(f"built {here / LIBRARY} with {outcome.text}")
        return 0
    print(f"the CPU kernels were not built: {outcome.text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
