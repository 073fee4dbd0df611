"""Compiles `check.cpp`, which compares the CPU kernels with plain loops, and runs it: beside pages that nobody may
touch, under sanitizers and under valgrind.

Instrumented AVX-512 code takes minutes to compile: what every run of the tests checks so are the portable kernels and
all that is common to them, and what was installed on the processor's own instruction sets.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lbc_cli.runtime.native import compile as build
from lbc_cli.runtime.native import library

NATIVE = Path(library.__file__).parent
CHECK = Path(__file__).with_name("check.cpp")
FOUND = build.find_compiler()
COMPILER, X86 = ([], False) if isinstance(FOUND, str) else FOUND
SANITIZERS = {
    "memory": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "threads": ("-fsanitize=thread",),
}
# Calls of the sanitizer instead of its code in place: these kernels are one long line of loads, which takes ages.
QUICK = {"memory": ("--param", "asan-instrumentation-with-call-threshold=0"), "threads": ()}

pytestmark = pytest.mark.skipif(isinstance(FOUND, str), reason="needs a C++ compiler")
built = pytest.mark.skipif(library.why_missing() is not None, reason=str(library.why_missing()))


def succeed(command: Sequence[str | Path], timeout: float = 1500) -> str:
    """What a command prints; its errors where it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=timeout)
    assert done.returncode == 0, (
        f"{command} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    )
    return done.stdout


def compiled(folder: Path, flags: Sequence[str], *, x86: bool) -> Path:
    """The check and the kernels in one program, all compiled with the same flags."""
    units = [CHECK, *build._units(NATIVE, x86)]

    def one(unit: Path) -> Path:
        own = build.X86_FLAGS.get(build._instructions(unit), ())
        made = folder / f"{unit.stem}.o"
        define = ["-DLBC_X86"] if x86 else []
        common = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", f"-I{NATIVE}", *define]
        succeed([*COMPILER, *common, *flags, *own, "-c", unit, "-o", made])
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(one, units))
    program = folder / "check"
    succeed([*COMPILER, *flags, *objects, "-lpthread", "-o", program])
    return program


def linked(source: Path, folder: Path) -> Path:
    """A check with the kernels that are installed here."""
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}", f"-Wl,-rpath,{NATIVE}"]
    succeed([*COMPILER, *flags, source, NATIVE / build.LIBRARY, "-lpthread", "-o", folder / "check"])
    return folder / "check"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`check.cpp` with the kernels that are installed here."""
    return linked(CHECK, tmp_path_factory.mktemp("installed"))


@pytest.fixture
def sanitizer(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """One that works here."""
    name: str = request.param
    source, program = tmp_path / "probe.cpp", tmp_path / "probe"
    source.write_text("#include <thread>\nint main() { std::thread([] {}).join(); }\n")
    for command in ([*COMPILER, *SANITIZERS[name], source, "-lpthread", "-o", program], [program]):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"the {name} sanitizer does not work here: {(done.stderr.strip() or 'no message')[:200]}")
    return name


@built
def test_installed_kernels_touch_nothing_beside_their_tensors(installed: Path) -> None:
    printed = succeed([installed, "--cases", "1500"])
    assert printed == f"ok: 1500 layers on {' '.join(reversed(library.isas()))}\n"


@built
@pytest.mark.parametrize(
    ("right", "wrong", "code"),
    [
        ("i < w.in; i++)\n", "i < w.in - 1; i++)\n", 1),
        ("index(lbc_index_bytes(&w), ", "index(lbc_index_bytes(&w) - 1, ", -signal.SIGSEGV),
    ],
    ids=["an oracle without the last weight", "an index that lacks its last byte"],
)
def test_the_check_finds_what_is_wrong(right: str, wrong: str, code: int, tmp_path: Path) -> None:
    text = CHECK.read_text()
    assert text.count(right) == 1
    (tmp_path / "wrong.cpp").write_text(text.replace(right, wrong))
    program = linked(tmp_path / "wrong.cpp", tmp_path)
    assert subprocess.run([program], capture_output=True, check=False).returncode == code


@pytest.mark.parametrize("sanitizer", SANITIZERS, indirect=True)
def test_portable_kernels_under_a_sanitizer(sanitizer: str, tmp_path: Path) -> None:
    program = compiled(tmp_path, [*SANITIZERS[sanitizer], *QUICK[sanitizer]], x86=False)
    assert succeed([program, "--heap", "--cases", "150", "--seed", "7", "--largest", "300000"]).startswith("ok: 150")


@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="needs a compiler for x86-64")
@pytest.mark.parametrize("sanitizer", SANITIZERS, indirect=True)
def test_all_kernels_under_a_sanitizer(sanitizer: str, tmp_path: Path) -> None:
    program = compiled(tmp_path, SANITIZERS[sanitizer], x86=True)
    for seed in ("11", "12"):
        assert succeed([program, "--heap", "--cases", "1000", "--seed", seed, "--largest", "500000"]).startswith("ok")


@pytest.mark.slow
@built
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
def test_installed_kernels_under_valgrind(installed: Path) -> None:
    # valgrind has no AVX-512.
    names = [name for name in library.isas() if name != "avx512"]
    command = ["valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full", installed, "--heap"]
    succeed([*command, "--cases", "300", "--seed", "5", "--largest", "300000", *names])


@pytest.mark.skipif(not X86, reason="needs a compiler for x86-64")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("name", ["avx2", pytest.param("avx512", marks=pytest.mark.slow)])
def test_no_function_of_an_instruction_set_can_take_the_place_of_a_portable_one(name: str, tmp_path: Path) -> None:
    """The linker takes any one of an inline function's copies, which may be one that the processor cannot run."""
    made = tmp_path / f"{name}.o"
    flags = [*build.FLAGS, *build.X86_FLAGS[name], "-DLBC_X86"]
    succeed([*COMPILER, *flags, "-c", NATIVE / f"{name}.cpp", "-o", made])
    defined = [line.split()[-2:] for line in succeed(["nm", "--defined-only", made]).splitlines()]
    assert [symbol for kind, symbol in defined if kind in "wWvVu"] == []
    assert [symbol for kind, symbol in defined if kind.isupper()] == [f"_ZN3lbc{len(name) + 4}{name}_isaE"]
