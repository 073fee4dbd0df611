"""The CPU kernels' way from sources to a loaded library, with small sources that stand in for the kernels."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lbc_cli.errors import UsageError
from lbc_cli.runtime.native import compile as compiling
from lbc_cli.runtime.native import library
from lbc_cli.runtime.native.compile import LIBRARY, NOTE, compile_kernels, digest, find_compiler

NATIVE = Path(library.__file__).parent
ROOT = NATIVE.parents[2]
HEADER = (NATIVE / "kernels.h").read_text()
FOUND = find_compiler()
BUILD = "python -m lbc_cli.runtime.native.compile"

compiled = pytest.mark.skipif(isinstance(FOUND, str), reason="needs a C++ compiler")
on_x86 = pytest.mark.skipif(isinstance(FOUND, str) or not FOUND[1], reason="needs a C++ compiler for x86-64")

# What a shared header's inline function looks like to each source; volatile keeps it a function.
LEVEL = """
#include <stdint.h>
inline __attribute__((noinline)) int32_t level() {
#if defined(__AVX512F__)
    volatile int32_t found = 2;
#elif defined(__AVX2__)
    volatile int32_t found = 1;
#else
    volatile int32_t found = 0;
#endif
    return found;
}
"""
DISPATCH = """
#include <stddef.h>
#include "kernels.h"
#include "level.h"
#ifdef LBC_X86
int32_t avx2_level(), avx512_level();
float avx2_sum(float a, float b, float c);
#endif
extern "C" {
int32_t lbc_interface(void) { return LBC_INTERFACE; }
const char *lbc_sources(void) { return LBC_SOURCES; }
int32_t lbc_isa_available(int32_t isa) { return isa <= 1; }
int32_t lbc_plan(LbcWeight *w, int64_t s) { w->chunk = 64 + s; return 0; }
int64_t lbc_values(const LbcWeight *w) { return w->out * w->half; }
int64_t lbc_index_bytes(const LbcWeight *w) { return sizeof(LbcWeight); }
int64_t lbc_pack(const LbcWeight *, const float *, void *, uint8_t *) { return -1; }
void lbc_unpack(const LbcWeight *, const void *, const uint8_t *, float *) {}
int32_t lbc_run(const LbcWeight *, const LbcCall *c) { return c->fork ? (int32_t)c->threads : (int32_t)c->relu; }
int32_t lbc_run_all(int64_t n, const LbcWeight *, const LbcCall *) { return (int32_t)n; }
double lbc_rate(int32_t, int32_t) { return 0.5; }
LBC_EXPORT int32_t levels() {
#ifdef LBC_X86
    return 100 * avx512_level() + 10 * avx2_level() + level();
#else
    return level();
#endif
}
#ifdef LBC_X86
LBC_EXPORT float sum(float a, float b, float c) { return avx2_sum(a, b, c); }
#endif
#ifdef FROM_CXX
LBC_EXPORT int32_t from_cxx() { return FROM_CXX; }
#endif
LBC_EXPORT int64_t call_bytes() { return sizeof(LbcCall); }
LBC_EXPORT int64_t threads_at() { return offsetof(LbcCall, threads); }
int32_t inner() { return 1; }
}
"""
SOURCES = {
    "kernels.h": HEADER,
    "level.h": LEVEL,
    "dispatch.cpp": DISPATCH,
    "avx2.cpp": '#include "level.h"\nint32_t avx2_level() { return level(); }\n',
    "avx2_more.cpp": "float avx2_sum(float a, float b, float c) { return a * b + c; }\n",
    "avx512.cpp": '#include "level.h"\nint32_t avx512_level() { return level(); }\n',
}


def write_sources(folder: Path, **changed: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {**SOURCES, **changed}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sources and the library that was compiled from them: copy it before you change it."""
    folder = write_sources(tmp_path_factory.mktemp("built"))
    outcome = compile_kernels(folder, folder)
    assert outcome.state == "built", outcome.text
    return folder


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty = tmp_path / "no-programs"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.delenv("CXX", raising=False)


def opened(folder: Path) -> ctypes.CDLL:
    found = library.open_library(folder)
    assert not isinstance(found, str), found
    return found


def refused(folder: Path) -> str:
    found = library.open_library(folder)
    assert isinstance(found, str)
    assert "\n" not in found
    return found


# ---------------------------------------------------------------------------------------------------- compiling


@compiled
def test_sources_become_a_library_with_declared_functions(built: Path) -> None:
    kernels = opened(built)
    weight = library.Weight(out=3, half=2)
    assert kernels.lbc_plan(weight, 5) == 0
    assert weight.chunk == 69
    assert kernels.lbc_values(weight) == 6
    assert kernels.lbc_rate(0, 0) == 0.5
    assert kernels.lbc_run(weight, library.Call(threads=7, relu=1, fork=None)) == 1
    assert kernels.lbc_run(weight, library.Call(threads=7, relu=1, fork=4096)) == 7
    assert sorted(path.name for path in built.iterdir()) == sorted([*SOURCES, LIBRARY])


@compiled
def test_only_what_the_interface_names_leaves_the_library(built: Path) -> None:
    kernels = opened(built)
    assert hasattr(kernels, "levels")
    assert not hasattr(kernels, "inner")


@on_x86
def test_a_shared_inline_function_is_the_one_that_every_processor_can_run(built: Path) -> None:
    assert opened(built).levels() == 0


@on_x86
def test_a_multiplication_and_an_addition_stay_two(built: Path) -> None:
    kernels = opened(built)
    kernels.sum.restype, kernels.sum.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    a = 1 + 2.0**-12
    assert kernels.sum(a, a, -1.0) == 2.0**-11  # fused it would end in + 2^-24


@compiled
def test_elsewhere_the_x86_sources_are_left_out(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isinstance(FOUND, str)
    monkeypatch.setenv("CXX", f"{FOUND[0][0]} -U__x86_64__")
    found = find_compiler()
    assert found == ([FOUND[0][0], "-U__x86_64__"], False)
    monkeypatch.setattr(compiling, "find_compiler", lambda: (FOUND[0], False))
    assert compile_kernels(built, tmp_path).state == "built"
    kernels = ctypes.CDLL(str(tmp_path / LIBRARY))
    assert kernels.levels() == 0
    assert not hasattr(kernels, "sum")


@compiled
def test_cxx_is_a_command_with_options(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isinstance(FOUND, str)
    monkeypatch.setenv("CXX", f"{FOUND[0][0]} -DFROM_CXX=41")
    assert compile_kernels(built, tmp_path).state == "built"
    assert ctypes.CDLL(str(tmp_path / LIBRARY)).from_cxx() == 41


@pytest.mark.parametrize("command", ["no-such-compiler -O2", "false"])
def test_a_cxx_that_does_not_work_is_not_replaced_by_another(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", command)
    outcome = compile_kernels(write_sources(tmp_path), tmp_path)
    assert outcome.state == "no compiler"
    assert f"CXX={command!r}" in outcome.text


def test_without_a_compiler_the_note_says_so(tmp_path: Path, no_compiler: None) -> None:
    folder = write_sources(tmp_path / "sources")
    outcome = compile_kernels(folder, folder)
    assert outcome.state == "no compiler"
    assert "no C++ compiler was found (c++, g++, clang++)" in outcome.text
    reason = refused(folder)
    assert outcome.text in reason
    assert "apt install g++" in reason
    assert reason.endswith(BUILD)


@compiled
def test_a_failure_gives_the_first_errors_and_keeps_the_old_library(built: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(built, tmp_path / "sources")
    before = (folder / LIBRARY).read_bytes()
    (folder / "dispatch.cpp").write_text(DISPATCH + "int broken( {\n")
    outcome = compile_kernels(folder, folder)
    assert outcome.state == "failed"
    assert re.search(r"dispatch\.cpp:\d+:\d+: error:", outcome.text)
    assert "\n" not in outcome.text
    assert (folder / LIBRARY).read_bytes() == before
    assert outcome.text in refused(folder)  # the old one is not of these sources

    (folder / "dispatch.cpp").write_text(DISPATCH)
    opened(folder)
    assert compile_kernels(folder, folder).state == "built"
    assert not (folder / NOTE).exists()


@compiled
def test_a_library_that_does_not_link_is_a_failure(tmp_path: Path) -> None:
    folder = write_sources(tmp_path, **{"twice.cpp": 'extern "C" int lbc_interface(void) { return 1; }\n'})
    outcome = compile_kernels(folder, folder)
    assert outcome.state == "failed"
    assert "lbc_interface" in outcome.text
    assert not (folder / LIBRARY).exists()


@compiled
def test_a_place_that_cannot_be_written_is_a_failure(built: Path, tmp_path: Path) -> None:
    outcome = compile_kernels(built, tmp_path / "missing")
    assert outcome.state == "failed"
    assert str(tmp_path / "missing") in outcome.text


@compiled
def test_no_sources_are_a_failure(tmp_path: Path) -> None:
    assert compile_kernels(tmp_path, tmp_path) == ("failed", f"{tmp_path} holds no C++ sources")


def test_the_digest_knows_contents_names_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [digest(write_sources(tmp_path))]
    (tmp_path / "level.h").write_text(LEVEL + "\n")
    found.append(digest(tmp_path))
    (tmp_path / "level.h").rename(tmp_path / "levels.h")
    found.append(digest(tmp_path))
    monkeypatch.setattr(compiling, "FLAGS", ("-O2",))
    found.append(digest(tmp_path))
    assert len(set(found)) == 4
    (tmp_path / NOTE).write_text("neither source nor header")
    assert digest(tmp_path) == found[-1]


@compiled
def test_the_command_compiles_beside_itself(built: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(built, tmp_path / "sources", ignore=shutil.ignore_patterns(LIBRARY))
    script = shutil.copy(NATIVE / "compile.py", folder)
    done = subprocess.run([sys.executable, "-I", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"built {folder / LIBRARY} with ")
    opened(folder)
    (folder / "dispatch.cpp").write_text("int broken( {\n")
    done = subprocess.run([sys.executable, "-I", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("the CPU kernels were not built: ")


# ------------------------------------------------------------------------------------------------------ loading


def test_nothing_compiled_yet(tmp_path: Path) -> None:
    reason = refused(write_sources(tmp_path))
    assert reason == f"the CPU kernels are not built: nothing has compiled them yet; to build them: {BUILD}"


@compiled
def test_a_library_of_other_sources_is_refused(built: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(built, tmp_path / "sources")
    opened(folder)
    (folder / "level.h").write_text(LEVEL + "\n")
    assert "were compiled from other sources" in refused(folder)


@compiled
def test_a_library_of_another_interface_is_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "INTERFACE", 7)
    assert "have interface 2, this version of lbc needs 7" in refused(built)


@compiled
def test_a_library_without_a_function_is_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library.FUNCTIONS, "lbc_nothing", (None, ()))
    assert "have no function lbc_nothing" in refused(built)


def test_a_damaged_library_is_refused(tmp_path: Path) -> None:
    (write_sources(tmp_path) / LIBRARY).write_bytes(b"\x7fELF and no more")
    assert "cannot be loaded" in refused(tmp_path)


def test_kernels_say_why_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_found", lambda: "no kernels today")
    assert library.why_missing() == "no kernels today"
    with pytest.raises(UsageError, match="no kernels today"):
        library.kernels()
    with pytest.raises(UsageError, match="no kernels today"):
        library.isas()


# --------------------------------------------------------------------------------------- the header, in Python


def declarations() -> dict[str, list[tuple[str, Any]]]:
    """Structures of kernels.h: fields as ctypes would have them."""
    text = re.sub(r"//.*", "", HEADER)
    found: dict[str, list[tuple[str, Any]]] = {}
    for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", text, re.DOTALL):
        fields = found.setdefault(name, [])
        for line in (part.strip() for part in body.split(";") if part.strip()):
            pointer = re.match(r"(?:const )?\w+ \*(\w+)$|void \(\*(\w+)\)\(.*\)$", line)
            if pointer:
                fields.append((pointer[1] or pointer[2], ctypes.c_void_p))
            else:
                names = re.fullmatch(r"int64_t ([\w, ]+)", line)
                assert names, line
                fields += [(one.strip(), ctypes.c_int64) for one in names[1].split(",")]
    return found


def test_structures_mirror_the_header() -> None:
    assert declarations() == {
        "LbcWeight": list(library.Weight._fields_),
        "LbcCall": list(library.Call._fields_),
    }


@compiled
def test_structures_have_the_compilers_layout(built: Path) -> None:
    kernels = opened(built)
    assert kernels.lbc_index_bytes(library.Weight()) == ctypes.sizeof(library.Weight)
    assert kernels.call_bytes() == ctypes.sizeof(library.Call)
    assert kernels.threads_at() == library.Call.threads.offset


def test_functions_mirror_the_header() -> None:
    plain = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "double": ctypes.c_double, "void": None}
    pointers = {"LbcWeight": ctypes.POINTER(library.Weight), "LbcCall": ctypes.POINTER(library.Call)}

    def kind(text: str) -> Any:
        words = text.replace("const ", "").strip()
        if "*" not in words:
            return plain[words.split()[0]]
        return pointers.get(words.split()[0], ctypes.c_char_p if words.startswith("char") else ctypes.c_void_p)

    found = {}
    for result, name, arguments in re.findall(r"^LBC_EXPORT ([\w ]+[ *]+)(\w+)\((.*?)\);", HEADER, re.MULTILINE):
        types = () if arguments == "void" else tuple(kind(one) for one in arguments.split(","))
        found[name] = (kind(result), types)
    assert found == library.FUNCTIONS


def test_numbers_mirror_the_header() -> None:
    assert re.search(r"#define LBC_INTERFACE (\d+)", HEADER)[1] == str(library.INTERFACE)  # type: ignore[index]
    numbers = dict(re.findall(r"LBC_(\w+) = (-?\d+)", HEADER))
    assert {name: int(number) for name, number in numbers.items()} == {
        "AUTO": library.AUTO,
        **{name.upper(): number for name, number in library.ISAS.items()},
    }


# --------------------------------------------------------------------------- instruction sets and threads


@compiled
def test_an_instruction_set_can_be_forced(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = opened(built)  # has avx2 and portable
    monkeypatch.setattr(library, "_found", lambda: stand_in)
    assert library.isas() == ("avx2", "portable")
    monkeypatch.delenv("LBC_CPU_ISA", raising=False)
    assert library.chosen_isa() == -1
    for name, number in {"avx2": 1, "portable": 0}.items():
        monkeypatch.setenv("LBC_CPU_ISA", name)
        assert library.chosen_isa() == number
    monkeypatch.setenv("LBC_CPU_ISA", "avx512")
    with pytest.raises(UsageError, match=r"LBC_CPU_ISA='avx512': this processor has avx2, portable"):
        library.chosen_isa()
    monkeypatch.setenv("LBC_CPU_ISA", "sse9")
    with pytest.raises(UsageError, match=r"LBC_CPU_ISA='sse9' is no instruction set: .* avx2, portable"):
        library.chosen_isa()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_kernels_share_the_threads_of_torch() -> None:
    code = """
        import ctypes, os, threading, torch
        from lbc_cli.runtime.native import library
        assert library.why_single_threaded() is None, library.why_single_threaded()
        torch.set_num_threads(3)
        alone = len(os.listdir("/proc/self/task"))
        torch.ones(1 << 22).add_(1)
        pooled = len(os.listdir("/proc/self/task"))
        seen = []
        body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: seen.append(threading.get_native_id()))
        pointers = [ctypes.c_void_p] * 2 + [ctypes.c_uint] * 2
        ctypes.CFUNCTYPE(None, *pointers)(library.fork())(body, None, 3, 0)
        print(pooled - alone, len(os.listdir("/proc/self/task")) - pooled, len(set(seen)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "0", "3"]


@compiled
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloads a library")
def test_a_preloaded_openmp_library_is_the_one(tmp_path: Path) -> None:
    (tmp_path / "omp.c").write_text("void GOMP_parallel(void) {}\n")
    preloaded = tmp_path / "libomp.so"
    assert not isinstance(FOUND, str)
    command = [*FOUND[0], "-x", "c", "-shared", "-fPIC", str(tmp_path / "omp.c"), "-o", str(preloaded)]
    subprocess.run(command, check=True)
    code = f"""
        import ctypes
        from lbc_cli.runtime.native import library
        own = ctypes.CDLL({str(preloaded)!r}).GOMP_parallel
        assert library.fork() == ctypes.cast(own, ctypes.c_void_p).value
    """
    environment = {**os.environ, "LD_PRELOAD": str(preloaded)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_torch_without_openmp_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: False)
    reason = library._forked.__wrapped__()
    assert isinstance(reason, str)
    monkeypatch.setattr(library, "_forked", lambda: reason)
    assert library.fork() is None
    assert "without OpenMP" in str(library.why_single_threaded())


# ---------------------------------------------------------------------------------------------- the build hook


class App:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def display_warning(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The hook's module, beside sources that stand in."""
    pytest.importorskip("hatchling")
    from lbc_cli.runtime.native import hook

    folder = write_sources(tmp_path / "package")
    shutil.copy(NATIVE / "compile.py", folder)
    monkeypatch.setattr(hook, "HERE", folder)
    monkeypatch.delenv("LBC_KERNELS", raising=False)
    return hook


def start(hook: ModuleType, version: str = "standard") -> tuple[Any, dict[str, Any], App]:
    """A hook that ran, what it put into the wheel, what it said."""
    app, data = App(), {"pure_python": True, "force_include": {}}
    instance = hook.KernelsHook(str(ROOT), {}, None, None, str(ROOT), "wheel", app=app)
    instance.initialize(version, data)
    return instance, data, app


def included(data: dict[str, Any], name: str) -> Path:
    """The one file that goes into the wheel under a name."""
    assert list(data["force_include"].values()) == [f"lbc_cli/runtime/native/{name}"]
    return Path(next(iter(data["force_include"])))


@compiled
@pytest.mark.parametrize("switch", ["", "require"])
def test_a_wheel_gets_the_library_and_a_platform(
    switch: str, hook: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LBC_KERNELS", switch)
    instance, data, app = start(hook)
    made = included(data, LIBRARY)
    assert made.is_file()
    assert not data["pure_python"]
    assert re.fullmatch(r"py3-none-(?!any|manylinux|musllinux)\w+", data["tag"])
    assert not app.warnings
    assert not (hook.HERE / LIBRARY).exists()
    instance.finalize("standard", data, "")
    assert not made.parent.exists()


def test_without_a_compiler_the_wheel_is_for_any_platform_and_says_why(hook: ModuleType, no_compiler: None) -> None:
    _, data, app = start(hook)
    assert "no C++ compiler was found" in included(data, NOTE).read_text()
    assert data["pure_python"]
    assert "tag" not in data
    assert len(app.warnings) == 1
    assert "no C++ compiler was found" in app.warnings[0]


@compiled
def test_a_failed_compile_is_a_warning_as_well(hook: ModuleType) -> None:
    (hook.HERE / "dispatch.cpp").write_text("int broken( {\n")
    _, data, app = start(hook)
    assert "error" in included(data, NOTE).read_text()
    assert "tag" not in data
    assert "error" in app.warnings[0]


def test_kernels_can_be_required(hook: ModuleType, no_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBC_KERNELS", "require")
    for version in ("standard", "editable"):
        with pytest.raises(RuntimeError, match=r"LBC_KERNELS=require, .* no C\+\+ compiler was found"):
            start(hook, version)


def test_kernels_can_be_left_out(hook: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBC_KERNELS", "off")
    _, data, app = start(hook)
    assert "LBC_KERNELS=off" in included(data, NOTE).read_text()
    assert "tag" not in data
    assert not app.warnings


def test_any_other_wish_is_an_error(hook: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBC_KERNELS", "on")
    with pytest.raises(ValueError, match="'require', 'off' or unset, not 'on'"):
        start(hook)


@compiled
def test_an_editable_install_compiles_beside_the_sources(hook: ModuleType) -> None:
    instance, data, _ = start(hook, "editable")
    opened(hook.HERE)
    assert data == {"pure_python": True, "force_include": {}}
    instance.finalize("editable", data, "")
    opened(hook.HERE)


# ----------------------------------------------------------------------------------------------- real wheels


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Builds the project, with stand-in sources, through hatchling as pip does; gives back what was built."""
    pytest.importorskip("hatchling")
    root = tmp_path / "project"
    left_out = shutil.ignore_patterns("__pycache__", "*.cpp", "*.h", "_kernels.*")
    shutil.copytree(ROOT / "lbc_cli", root / "lbc_cli", ignore=left_out)
    shutil.copytree(ROOT / "recipes", root / "recipes")
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, root)
    write_sources(root / "lbc_cli" / "runtime" / "native")
    monkeypatch.delenv("LBC_KERNELS", raising=False)

    def build(kind: str) -> Path:
        code = f"import hatchling.build; print(hatchling.build.build_{kind}({str(tmp_path)!r}))"
        done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return tmp_path / done.stdout.split()[-1]

    return build


@compiled
def test_the_wheel_carries_sources_and_kernels(project: Callable[[str], Path], tmp_path: Path) -> None:
    before = sorted(path for path in (tmp_path / "project").rglob("*") if "__pycache__" not in path.parts)
    wheel = project("wheel")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        (about,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: false" in archive.read(about).decode()
    site = tmp_path / "site" / "lbc_cli" / "runtime" / "native"
    assert {path.name for path in site.iterdir()} == {path.name for path in NATIVE.glob("*.py")} | {*SOURCES, LIBRARY}
    opened(site)
    assert sorted(path for path in (tmp_path / "project").rglob("*") if "__pycache__" not in path.parts) == before


def test_a_wheel_without_kernels_leaves_out_those_of_the_tree(
    project: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LBC_KERNELS", "off")
    (tmp_path / "project" / "lbc_cli" / "runtime" / "native" / LIBRARY).write_bytes(b"of an editable install")
    wheel = project("wheel")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name).name for name in archive.namelist()}
        assert NOTE in names
        assert LIBRARY not in names


def test_the_sdist_carries_sources_alone(project: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "project" / "lbc_cli" / "runtime" / "native" / LIBRARY).write_bytes(b"of an editable install")
    shutil.unpack_archive(project("sdist"), tmp_path / "unpacked", filter="data")
    (native,) = (tmp_path / "unpacked").glob("*/lbc_cli/runtime/native")
    assert {path.name for path in native.iterdir()} == {path.name for path in NATIVE.glob("*.py")} | {*SOURCES}
