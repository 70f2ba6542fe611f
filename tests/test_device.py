from __future__ import annotations

import inspect
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from mindgen import device as devices
from mindgen.device import (
    Recorder,
    backend_name,
    choose,
    free_memory,
    library_name,
    pick_device,
    set_current,
    synchronize,
)

CPU = torch.device("cpu")
GIBIBYTE = 1 << 30


class FakeNpu:
    """What torch_npu adds to torch, for a host with two devices."""

    def __init__(self) -> None:
        self.current: torch.device | None = None
        self.waited_for: torch.device | None = None

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 2

    def set_device(self, device) -> None:
        self.current = device

    def synchronize(self, device) -> None:
        self.waited_for = device

    def mem_get_info(self, device) -> tuple[int, int]:
        return 3 * GIBIBYTE, 64 * GIBIBYTE


@pytest.fixture
def torch_npu(tmp_path, monkeypatch):
    """Installs a torch_npu whose source is the given text."""

    def install(source: str) -> None:
        (tmp_path / "torch_npu.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torch_npu", raising=False)

    yield install
    sys.modules.pop("torch_npu", None)


@pytest.fixture
def npu(torch_npu, monkeypatch):
    torch_npu("")
    fake = FakeNpu()
    monkeypatch.setattr(torch, "npu", fake, raising=False)
    return fake


def test_the_cpu_is_always_there():
    assert pick_device("cpu", 7) == CPU


def test_an_unknown_device_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="unknown device 'gpu'; choose one of auto, cpu, cuda, npu"):
        pick_device("gpu", 0)


@pytest.mark.parametrize(
    ("name", "counts", "expected"),
    [
        ("auto", {"npu": 8, "cuda": 8}, "npu:1"),
        ("auto", {"cuda": 2}, "cuda:1"),
        ("auto", {}, "cpu"),
        ("cuda", {"npu": 8, "cuda": 8}, "cuda:1"),
    ],
)
def test_auto_prefers_npu_then_cuda_then_cpu(name, counts, expected):
    assert choose(name, 1, counts, {}) == expected


def test_an_absent_device_is_refused_with_the_reason_and_what_is_there():
    with pytest.raises(ValueError, match="no npu device: it is on strike; available here: cuda, cpu"):
        choose("npu", 0, {"cuda": 1}, {"npu": "it is on strike"})


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_more_ranks_than_devices_are_refused_with_both_numbers(name):
    with pytest.raises(ValueError, match="local rank 2 wants cuda device 2, but this host shows 2"):
        choose(name, 2, {"cuda": 2}, {})


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_is_refused_where_torch_is_built_without_it():
    with pytest.raises(ValueError, match=r"no cuda device: this torch .* is built without CUDA"):
        pick_device("cuda", 0)


def test_npu_is_refused_where_torch_npu_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(ValueError, match=r"torch_npu is not installed; .* pip install 'mindgen\[npu\]'"):
        pick_device("npu", 0)


def test_npu_without_cann_says_what_to_source(torch_npu):
    torch_npu("raise ImportError('libhccl.so: cannot open shared object file')")
    with pytest.raises(ValueError, match=r"torch_npu does not load \(libhccl.so.*source the set_env.sh of your CANN"):
        pick_device("npu", 0)
    assert pick_device("auto", 0).type != "npu"


def test_an_npu_is_asked_through_torch_npu(npu):
    device = SimpleNamespace(type="npu", index=1)  # torch.device knows the word only with the real torch_npu
    set_current(device)
    synchronize(device)
    assert npu.current == npu.waited_for == device
    assert free_memory(device) == 3 * GIBIBYTE
    assert (library_name(device), backend_name(device)) == ("hccl", "cpu:gloo,npu:hccl")
    with pytest.raises(ValueError, match="local rank 2 wants npu device 2, but this host shows 2"):
        pick_device("npu", 2)


def test_every_device_also_carries_cpu_tensors():
    assert backend_name(CPU) == "gloo"
    assert backend_name(torch.device("cuda", 1)) == "cpu:gloo,cuda:nccl"
    assert library_name(torch.device("cuda", 1)) == "nccl"


def test_the_cpu_needs_no_current_device_and_no_waiting():
    set_current(CPU)
    synchronize(CPU)


def test_free_memory_is_a_plausible_number_of_bytes():
    assert 1 << 20 < free_memory(CPU) < 1 << 50


def test_a_memory_limit_around_the_process_counts_but_file_cache_does_not(tmp_path):
    inner = tmp_path / "fs" / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder, limit, usage in ((inner, "max", 0), (inner.parent, str(8 * GIBIBYTE), 5 * GIBIBYTE)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {GIBIBYTE}\nactive_file {GIBIBYTE}\n")
    (tmp_path / "cgroup").write_text("0::/outer/inner\n")
    assert devices._cgroup_rooms(tmp_path / "cgroup", tmp_path / "fs") == [5 * GIBIBYTE]


def test_a_memory_limit_of_the_first_cgroup_version_counts(tmp_path):
    folder = tmp_path / "fs" / "memory" / "job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(4 * GIBIBYTE))
    (folder / "memory.usage_in_bytes").write_text(str(3 * GIBIBYTE))
    (folder / "memory.stat").write_text(f"inactive_file 7\ntotal_inactive_file {GIBIBYTE}\ntotal_active_file 0\n")
    (tmp_path / "cgroup").write_text("5:cpu:/job\n4:memory:/job\n")
    assert devices._cgroup_rooms(tmp_path / "cgroup", tmp_path / "fs") == [2 * GIBIBYTE]


def test_no_cgroup_is_no_limit(tmp_path):
    assert devices._cgroup_rooms(tmp_path / "nothing", tmp_path) == []


def test_a_graph_is_captured_as_torch_has_it(monkeypatch):
    """All of a device but the device: what is captured is between the calls that begin and end it."""
    calls = []

    @contextmanager
    def graph(*arguments, **options):
        inspect.signature(torch.cuda.graph).bind(*arguments, **options)
        calls.append((arguments, options["pool"]))
        yield
        calls.append("end")

    made = SimpleNamespace(replay=lambda: calls.append("replay"))
    module = SimpleNamespace(CUDAGraph=lambda: made, graph=graph, graph_pool_handle=lambda: "pool")
    assert all(hasattr(torch.cuda, name) for name in vars(module))
    monkeypatch.setattr(devices, "_module", lambda kind: module)
    record = Recorder(torch.device("cuda"))
    replay, result = record(lambda: calls.append("run") or torch.ones(2))
    assert calls == [((made,), "pool"), "run", "end"] and result.tolist() == [1, 1]
    replay()
    assert calls[3:] == ["replay"]
