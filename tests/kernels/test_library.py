"""The kernels are compiled with the package, found, and run on torch's threads; without them there is torch."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from ctypes import CDLL, Structure, c_float, c_int64, c_void_p, cast
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from mindgen.kernels import library, structures
from mindgen.kernels.openmp import file_of, runtime_of

ROOT = Path(__file__).resolve().parents[2]
SUITED = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "sse2"}
NO_COMPILER = "/nonexistent/g++"

ANOTHER_RUNTIME = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
from mindgen.kernels import library, structures
print(library.unavailable())
"""
THREADS = """
import os, torch
from mindgen.kernels import elementwise
torch.set_num_threads(2)
wide = torch.ones(1024, 1024)
wide.exp()
before = len(os.listdir("/proc/self/task"))
elementwise.gated(wide.bfloat16(), "silu")
print(before, len(os.listdir("/proc/self/task")))
"""

EXPORTED = re.compile(r"^MINDGEN_EXPORT (.+?) ?mindgen_(\w+)\(([^)]*)\)", re.MULTILINE)
NO_MEMORY = """
import resource, torch
from types import SimpleNamespace
from mindgen.attention.backend import choose_backend
from mindgen.attention.scores import Scores
from mindgen.engine.kv_cache import KVCache
from mindgen.kernels.linear import multiply, pack

def with_room_for_a_little_more(compute):
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, resource.RLIM_INFINITY))
    try:
        return compute()
    except RuntimeError as error:
        print(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

rows, panels = torch.ones(500, 2**18, dtype=torch.bfloat16), pack(torch.ones(32, 2**18, dtype=torch.bfloat16))
with_room_for_a_little_more(lambda: multiply(rows, panels))
print(bool((multiply(rows[:2], panels) == 2**18).all()))

one = torch.tensor([1])
batch = SimpleNamespace(positions=one, is_long=one[:0], slots=one, query_starts=torch.tensor([0, 1]), context_lens=one,
                        block_tables=one[:, None] * 0)
attention = choose_backend("native", Scores(1.0, (None,)), dtype=torch.bfloat16)
head = torch.ones(1, 1, 64, dtype=torch.bfloat16)
attend = lambda: attention.prepare(batch, KVCache(1, 2, 4, 1, 64, torch.bfloat16, "cpu")).attend(0, head, head, head)
torch.set_num_threads(2000)  # each wants room
with_room_for_a_little_more(attend)
torch.set_num_threads(1)
print(attend().shape[0])
"""

needs_kernels = pytest.mark.skipif(library.unavailable() is not None, reason=str(library.unavailable()))


def run(source: str, *arguments: str) -> str:
    command = [sys.executable, "-c", source, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout.strip()


def build(tree: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What the kernels are compiled from, and a library that an earlier installation left."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    without = shutil.ignore_patterns("_cpu*", "__pycache__")
    shutil.copytree(ROOT / "mindgen/kernels", tmp_path / "mindgen/kernels", ignore=without)
    (tmp_path / f"mindgen/kernels/_cpu{EXTENSION_SUFFIXES[0]}").write_bytes(b"stale")
    return tmp_path


def test_without_a_compiler_the_installation_goes_on_and_says_what_to_do(tree: Path) -> None:
    result = build(tree, CXX=NO_COMPILER)
    assert result.returncode == 0 and NO_COMPILER in result.stderr
    assert not list(tree.rglob("_cpu*")), "an earlier library outlived its sources"
    reason = library.unsuitable(SUITED, tree / "mindgen/kernels")
    assert reason is not None and "install g++ 10 or newer" in reason


def test_sources_that_do_not_compile_are_no_failure_either(tree: Path) -> None:
    for source in (tree / "mindgen/kernels/cpu").glob("*.cpp"):
        source.write_text("not C++")
    assert build(tree).returncode == 0 and not list(tree.rglob("_cpu*.so"))


def test_a_cpu_that_lacks_instructions_or_has_better_ones_is_named() -> None:
    folder = Path(library.__file__).parent
    assert library.unsuitable(SUITED - {"avx512_bf16"}, folder) == "the CPU lacks avx512_bf16"
    assert "amx_bf16" in str(library.unsuitable(SUITED | {"amx_bf16"}, folder))


def knows_the_flags(compiler: str) -> bool:
    """Whether this is a g++ that can compile the kernels."""
    command = [compiler, "-mavx512bf16", "-x", "c++", "-std=c++17", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, timeout=120).returncode == 0


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("g++") or not knows_the_flags("g++"),
    reason="no g++ 10 or newer for x86 here",
)
def test_the_installation_has_compiled_the_kernels() -> None:
    folder = Path(library.__file__).parent
    assert library.unsuitable(SUITED, folder) is None
    assert library.load(folder)


def test_the_arguments_of_every_function_are_those_of_its_source() -> None:
    declared, with_status = {}, set()
    for source in sorted((ROOT / "mindgen/kernels/cpu").glob("*.cpp")):
        for result, name, arguments in EXPORTED.findall(source.read_text()):
            declared[name] = "".join(map(letter_of, filter(None, arguments.split(","))))
            with_status |= {name} if result == "std::int64_t" and arguments else set()
    assert {name: declared.pop(name) for name in library.FUNCTIONS} == library.FUNCTIONS
    assert declared == {"threads": "", "sources": ""} and with_status == library.TAKE_MEMORY


def letter_of(argument: str) -> str:
    """What library.FUNCTIONS calls an argument of C++."""
    if "*" in argument:
        return "p"
    *_, kind, _ = argument.split()
    return {"Int": "i", "std::int64_t": "i", "float": "f"}[kind]


@pytest.mark.parametrize("kind", [structures.Context, structures.SelfAttention, structures.FeedForward])
def test_the_fields_of_every_structure_are_those_of_its_source(kind: type[Structure]) -> None:
    sources = "".join(path.read_text() for path in sorted((ROOT / "mindgen/kernels/cpu").glob("*")))
    (body,) = re.findall(rf"^struct {kind.__name__} {{$(.*?)^}};", sources, re.MULTILINE | re.DOTALL)
    fields = re.findall(r"^  (const \w+\*|Int|float) (\w+);$", body, re.MULTILINE)
    declarations = [line for line in body.splitlines() if line.strip() and "(" not in line]
    assert len(fields) == len(declarations), f"not understood among {declarations}"
    letters = {c_void_p: "const", c_int64: "Int", c_float: "float"}
    assert [(name, letters[kind]) for name, kind in kind._fields_] == [(name, c.split()[0]) for c, name in fields]


@needs_kernels
def test_a_library_of_other_sources_is_not_used(tmp_path: Path) -> None:
    ours = Path(library.__file__).parent
    (compiled,) = ours.glob("_cpu*.so")
    for name in ("same", "changed", "wheel", "old"):
        shutil.copytree(ours / "cpu", tmp_path / name / "cpu")
        shutil.copy(compiled, tmp_path / name)
    shutil.rmtree(tmp_path / "wheel/cpu")
    with (tmp_path / "changed/cpu/linear.cpp").open("a") as source:
        source.write("// changed\n")
    any_other = file_of(cast(CDLL("libm.so.6").cos, c_void_p).value)
    assert any_other is not None
    shutil.copy(any_other, tmp_path / "old" / compiled.name)
    assert library.load(tmp_path / "same") and library.load(tmp_path / "wheel")
    for name in ("changed", "old"):
        with pytest.raises(OSError, match="other sources than those here: run `python setup.py build_ext --inplace`"):
            library.load(tmp_path / name)


@needs_kernels
def test_where_memory_ends_there_is_an_error_and_the_process_goes_on() -> None:
    product, right, attention, tokens = run(NO_MEMORY).splitlines()
    assert product == "not enough memory: mindgen_linear could not allocate the room that it works in"
    assert right == "True" and tokens == "1"
    assert attention == "not enough memory: mindgen_attend could not allocate the room that it works in"


@needs_kernels
def test_the_runtime_of_torch_is_found_among_several(tmp_path: Path) -> None:
    runtime = runtime_of(torch._C.__file__)
    assert runtime is not None and runtime in Path("/proc/self/maps").read_text()
    other = str(shutil.copy(runtime, tmp_path / "libgomp-6a29c32d.so.1.0.0"))
    assert runtime_of(other) == other and runtime_of(torch._C.__file__) == runtime
    assert runtime_of("libc.so.6") is None


@needs_kernels
def test_where_two_runtimes_compete_the_kernels_are_not_used(tmp_path: Path) -> None:
    runtime = Path(str(runtime_of(torch._C.__file__)))
    other = tmp_path / "libgomp-6a29c32d.so.1.0.0"
    other.write_bytes(runtime.read_bytes().replace(b"gomp.so.1\0", b"gomp.so.9\0").replace(b"gomp-", b"gomp_"))
    assert run(ANOTHER_RUNTIME, str(other)).endswith(f"{other} and {runtime}")


@needs_kernels
def test_there_is_one_pool_of_threads() -> None:
    (compiled,) = Path(library.__file__).parent.glob("_cpu*.so")
    assert b"libgomp" not in compiled.read_bytes()
    before, after = run(THREADS).split()
    assert before == after
