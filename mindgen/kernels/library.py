"""The compiled kernels: whether they can run here, and how they are called.

They are compiled with the package, for x86 CPUs with AVX-512 and its bfloat16 products; where there was no compiler, or
the CPU has less, everything is computed by torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from mindgen.kernels.openmp import file_of, runtime_of
from mindgen.kernels.sources import fingerprint

_FOLDER = Path(__file__).parent
_NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}
_BETTER = "amx_bf16"  # matrix registers, which oneDNN uses and these kernels do not
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}

# The functions of cpu/*.cpp. Each letter is an argument: `p` the address of a tensor's numbers or of a structure
# (structures.py), or None, `i` a whole number, `f` a float32.
FUNCTIONS = {
    "attend": "piiipiipiipppiip",
    "feed_forward": "ppipipi",
    "gated_gelu_tanh": "ppiiii",
    "gated_silu": "ppiiii",
    "linear": "piipipppi",
    "pack": "piipi",
    "rms_norm": "pppiiiiipii",
    "rotate": "pppiiiiiiiii",
    "self_attention": "pppippiippipp",
    "stored": "piip",
    "unpack": "piip",
}
TAKE_MEMORY = {"attend", "feed_forward", "linear", "self_attention"}  # those that return whether there was enough


@cache
def unavailable() -> str | None:
    """Why the kernels cannot run in this process, in words; None if they can."""
    if (reason := unsuitable(_cpu_flags(), _FOLDER)) is not None:
        return reason
    try:
        load(_FOLDER)
    except OSError as error:
        return f"they cannot be loaded: {error}"
    return None


def unsuitable(flags: set[str], folder: Path) -> str | None:
    """Why a CPU with these flags does not run the kernels of this folder, in words; None if it does."""
    if missing := _NEEDED - flags:
        return f"the CPU lacks {', '.join(sorted(missing))}"
    if _BETTER in flags:
        return f"the CPU has {_BETTER}: matrix registers, which oneDNN uses and they do not"
    if _file(folder) is None:
        return "they were not compiled when mindgen was installed: install g++ 10 or newer, and mindgen again"
    return None


@cache
def kernel(name: str) -> Callable[..., None]:
    """One of FUNCTIONS; RuntimeError where memory ends, as torch raises it.

    Nothing about the arguments is checked: that is the caller's work, as it is to keep the tensors alive.
    """
    function = getattr(load(_FOLDER), f"mindgen_{name}")
    function.restype, function.argtypes = None, [_TYPES[letter] for letter in FUNCTIONS[name]]
    if name in TAKE_MEMORY:
        function.restype, function.errcheck = ctypes.c_int64, _raise_without_memory
    return function


@cache
def load(folder: Path) -> ctypes.CDLL:
    """The library of this folder, linked here with the OpenMP runtime of torch, as it names none of its own.

    OSError if it is not what the sources in the folder say, or if its threads would not be those of torch.
    """
    file, runtime = _file(folder), runtime_of(torch._C.__file__)
    assert file is not None, "ask `unavailable` first"
    if runtime is None:
        raise OSError("torch has no OpenMP runtime whose threads they could use")
    ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(file))
    sources, compiled = fingerprint(folder / "cpu"), _compiled_from(library)
    if compiled is None or sources not in (None, compiled):
        raise OSError(
            "they were compiled from other sources than those here: run `python setup.py build_ext --inplace`, or "
            "install mindgen again"
        )
    library.mindgen_threads.restype = ctypes.c_void_p
    if (other := file_of(library.mindgen_threads())) != runtime:
        raise OSError(f"two OpenMP runtimes were loaded for all libraries of this process: {other} and {runtime}")
    return library


def _compiled_from(library: ctypes.CDLL) -> int | None:
    """What `fingerprint` gave of the sources; None of a library that does not say."""
    try:
        function = library.mindgen_sources
    except AttributeError:
        return None
    function.restype = ctypes.c_int64
    number: int = function()
    return number


def _raise_without_memory(status: int, function: Any, arguments: Any) -> None:
    if status:
        raise RuntimeError(f"not enough memory: {function.__name__} could not allocate the room that it works in")


def _file(folder: Path) -> Path | None:
    return next((file for suffix in EXTENSION_SUFFIXES if (file := folder / f"_cpu{suffix}").exists()), None)


@cache
def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())
