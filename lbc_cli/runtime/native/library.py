"""The compiled CPU kernels through ctypes: `kernels.h` in Python, which instruction set, and whose threads.

`kernels()` gives the library, `why_missing()` says why there is none. The environment variable LBC_CPU_ISA (avx512,
avx2 or portable) forces an instruction set. Pointers are plain addresses: a tensor's `data_ptr()`, or None.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, c_char_p, c_double, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

from lbc_cli.errors import UsageError, one_line
from lbc_cli.runtime.native.compile import LIBRARY, NOTE, digest

INTERFACE = 2
AUTO = -1
ISAS = {"avx512": 2, "avx2": 1, "portable": 0}
"""Instruction sets and their numbers in `kernels.h`, best first."""

ISA_VARIABLE = "LBC_CPU_ISA"
HERE = Path(__file__).resolve().parent
BUILD = "python -m lbc_cli.runtime.native.compile"


class Weight(ctypes.Structure):
    """`LbcWeight`: a weight [O, I, kh, kw] with at most n non-zeros in every m consecutive input channels."""

    _fields_ = [(name, c_int64) for name in ("out", "in", "kh", "kw", "n", "m", "vector", "chunk", "half")]


class Call(ctypes.Structure):
    """`LbcCall`: one call of a layer; strides count floats, `fork` is what `fork()` gives."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "values", "index", "bias", "residual", "out")),
        *((name, c_int64) for name in ("images", "in_h", "in_w", "out_h", "out_w")),
        *((name, c_int64) for name in ("x_image", "x_row", "x_pixel")),
        *((name, c_int64) for name in ("out_image", "out_row", "out_pixel")),
        *((name, c_int64) for name in ("residual_image", "residual_row", "residual_pixel")),
        *((name, c_int64) for name in ("stride_h", "stride_w", "dilation_h", "dilation_w")),
        *((name, c_int64) for name in ("pad_top", "pad_left", "relu", "isa", "threads")),
        ("fork", c_void_p),
    ]


FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "lbc_interface": (c_int32, ()),
    "lbc_sources": (c_char_p, ()),
    "lbc_isa_available": (c_int32, (c_int32,)),
    "lbc_plan": (c_int32, (POINTER(Weight), c_int64)),
    "lbc_values": (c_int64, (POINTER(Weight),)),
    "lbc_index_bytes": (c_int64, (POINTER(Weight),)),
    "lbc_pack": (c_int64, (POINTER(Weight), c_void_p, c_void_p, c_void_p)),
    "lbc_unpack": (None, (POINTER(Weight), c_void_p, c_void_p, c_void_p)),
    "lbc_run": (c_int32, (POINTER(Weight), POINTER(Call))),
    "lbc_run_all": (c_int32, (c_int64, POINTER(Weight), POINTER(Call))),
    "lbc_rate": (c_double, (c_int32, c_int32)),
}
"""Result and arguments of every function of `kernels.h`."""


def kernels() -> ctypes.CDLL:
    """The library, loaded once, with its functions' types declared.

    Raises:
        UsageError: if there is none, or one that does not belong to these sources; says why and what helps.
    """
    found = _found()
    if isinstance(found, str):
        raise UsageError(found)
    return found


def why_missing() -> str | None:
    """Why there are no CPU kernels and what helps, in one line; None if they are there."""
    found = _found()
    return found if isinstance(found, str) else None


def open_library(folder: Path) -> ctypes.CDLL | str:
    """The library in a folder that holds its sources too; else why it cannot be used, and what helps."""
    path = folder / LIBRARY
    note = _note(folder)
    if not path.is_file():
        return f"the CPU kernels are not built: {note or 'nothing has compiled them yet'}; to build them: {BUILD}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return one_line(f"the CPU kernels cannot be loaded: {error}; to build them again: {BUILD}")
    if reason := _declare(library, folder):
        tried = f" (the last attempt to build them ended so: {note})" if note else ""
        return f"the CPU kernels in {path} {reason}{tried}; to build them again: {BUILD}"
    return library


def isas() -> tuple[str, ...]:
    """The instruction sets that this processor and this build have, best first.

    Raises:
        UsageError: if there are no CPU kernels.
    """
    library = kernels()
    return tuple(name for name, number in ISAS.items() if library.lbc_isa_available(number))


def chosen_isa() -> int:
    """The number of the instruction set that LBC_CPU_ISA names; AUTO if it is not set.

    Raises:
        UsageError: for a name that is none, or that this processor or build has not; if there are no CPU kernels.
    """
    name = os.environ.get(ISA_VARIABLE, "")
    if not name:
        return AUTO
    if name not in ISAS:
        raise UsageError(f"{ISA_VARIABLE}={name!r} is no instruction set: it is one of {', '.join(isas())}, or not set")
    if name not in isas():
        raise UsageError(f"{ISA_VARIABLE}={name!r}: this processor has {', '.join(isas())}; set one of these, or none")
    return ISAS[name]


def fork() -> int | None:
    """The address of GOMP_parallel in the OpenMP library whose threads torch uses, for `Call.fork`; None if none."""
    found = _forked()
    return None if isinstance(found, str) else found


def why_single_threaded() -> str | None:
    """Why the kernels run on the calling thread alone; None where they share torch's threads."""
    found = _forked()
    return found if isinstance(found, str) else None


@functools.cache
def _found() -> ctypes.CDLL | str:
    return open_library(HERE)


def _note(folder: Path) -> str:
    """What the last attempt to compile left behind; "" if nothing, as after one that went well."""
    try:
        return one_line((folder / NOTE).read_text(encoding="utf-8", errors="replace").strip())
    except OSError:
        return ""


def _declare(library: ctypes.CDLL, folder: Path) -> str | None:
    """Declare the types of all functions; says why the library does not belong to a folder's sources, if so."""
    try:
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError:
        return f"have no function {name}: they are not those of this version of lbc"
    if library.lbc_interface() != INTERFACE:
        return f"have interface {library.lbc_interface()}, this version of lbc needs {INTERFACE}"
    if library.lbc_sources().decode() != digest(folder):
        return "were compiled from other sources than those beside them"
    return None


@functools.cache
def _forked() -> int | str:
    """Where torch's calls of GOMP_parallel lead; else why nowhere."""
    import torch

    if not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        return "torch was built without OpenMP: the CPU kernels run on one thread"
    folder = Path(torch.__file__).parent / "lib"
    libraries = [path for path in sorted(folder.glob("libtorch_cpu.*")) if path.suffix in (".so", ".dylib")]
    # As the dynamic linker looks it up for torch: what was loaded for everyone first (a preloaded library, too), then
    # what torch's own library needs. Another OpenMP library would bring a second pool of threads.
    for path in (None, *libraries) if os.name == "posix" else ():
        handle = ctypes.CDLL(None if path is None else str(path))
        if hasattr(handle, "GOMP_parallel"):
            return int(ctypes.cast(handle.GOMP_parallel, c_void_p).value or 0)
    return "torch's OpenMP library has no GOMP_parallel: the CPU kernels run on one thread"
