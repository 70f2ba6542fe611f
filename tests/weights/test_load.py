"""Loading: what it takes of memory, and that nothing goes on after it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import deque
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindgen.model.build import build_stage
from mindgen.parallel.group import SingleGroup
from mindgen.parallel.topology import SINGLE, Topology
from mindgen.weights import ahead, load
from mindgen.weights.copier import NUM_THREADS, Copier
from mindgen.weights.families import rows_of
from mindgen.weights.huggingface import TensorFile, open_huggingface
from mindgen.weights.load import least_rate, load_weights
from mindgen.weights.mapped import Mappings
from mindgen.weights.open import open_source
from mindgen.weights.pace import Pace
from mindgen.weights.rows import EMBEDDING, parameters, shard
from mindgen.weights.source import Source, reader
from tests.weights.folders import config_of, random_tensors, write_folder
from tests.weights.foreign import Style, write_megatron
from tests.weights.test_copier import drop_from_cache, reads_past_the_cache
from tests.weights.test_memory import write_origin

ROOT = Path(__file__).parents[2]
KINDS = ["safetensors", "bin", "torch, protocol 2", "torch, protocol 4"]
PROGRAM = """
import json, sys, torch
from pathlib import Path
from mindgen.layers.packed import can_pack
from mindgen.model.build import build_stage
from mindgen.parallel.group import SingleGroup
from mindgen.parallel.topology import SINGLE
from mindgen.weights.huggingface import open_huggingface
from mindgen.weights.load import load_weights
from tests.weights.measured import Peak, anonymous_memory

can_pack(torch.bfloat16)
source = open_huggingface(Path(sys.argv[1]))
before = anonymous_memory()
with Peak() as peak:
    model = build_stage(source.spec, SINGLE, SingleGroup(), torch.bfloat16, torch.device("cpu"))
    load_weights(model, source, SINGLE)
weights = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps({"weights": weights, "peak": peak.value - before, "after": anonymous_memory() - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
@pytest.mark.parametrize("state", ["cold", "cached", "cold, converted", "cached, converted"])
def test_a_rank_takes_little_more_memory_than_its_weights(tmp_path: Path, state: str) -> None:
    write_origin(tmp_path, 1024, 16, 32000)
    files = list(tmp_path.glob("*.safetensors"))
    if "converted" in state:
        for file in files:
            save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file)
    if "cold" in state:
        drop_from_cache(*files)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["weights"] > 400 << 20
    assert measured["peak"] <= 1.3 * measured["weights"], measured
    assert measured["after"] <= 1.3 * measured["weights"], measured


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_from_the_disk_and_from_memory_are_what_the_files_hold(tmp_path: Path, kind: str, tp: int) -> None:
    source = write_checkpoint(tmp_path, kind)
    for rank in range(tp):
        topology = Topology(rank, tp)
        drop_from_cache(*source.files)
        cold, cached = loaded(source, topology), loaded(source, topology)
        for parameter in parameters(rows_of(source.spec.family), source.spec, topology):
            row, layer = parameter.row, parameter.layer
            expected = shard(row, reader(source, row, layer), source.spec, topology).double()
            assert torch.equal(cold[parameter.name], expected), parameter.name
            assert torch.equal(cached[parameter.name], expected), parameter.name


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says where files are mapped")
@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_weight_are_known_in_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    source = write_checkpoint(tmp_path, kind)
    row = next(row for row in rows_of(source.spec.family) if row.name == EMBEDDING)
    weight = source.read(row, None, 3, 9)
    stretch = Mappings(source.files).find(weight)
    assert stretch is not None and stretch.length == weight.nbytes
    stored = stretch.path.read_bytes()[stretch.offset : stretch.offset + stretch.length]
    assert stored == weight.contiguous().view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("padding", [0, 1], ids=["aligned", "not aligned"])
def test_a_slice_takes_no_more_than_its_own_bytes_wherever_its_tensor_begins(
    tmp_path: Path, padding: int, dim: int
) -> None:
    path, tensor = tmp_path / "model.safetensors", torch.randn(6, 5).bfloat16()
    entry = {"dtype": "BF16", "shape": [6, 5], "data_offsets": [0, tensor.nbytes]}
    header = json.dumps({"weight": entry}).encode()
    header += b" " * (-len(header) % 8 + padding)
    path.write_bytes(len(header).to_bytes(8, "little") + header + tensor.view(torch.int16).numpy().tobytes())
    part = TensorFile(path).slice("weight", dim, 2, 4)
    assert torch.equal(part, tensor.narrow(dim, 2, 2))
    if padding:
        assert part.untyped_storage().nbytes() == part.nbytes


def write_checkpoint(path: Path, kind: str) -> Source:
    config = config_of("llama", rope_scaling=None)
    tensors = random_tensors(config)
    write_folder(path / "hf", config, tensors)
    if kind == "bin":
        for file in path.glob("hf/*.safetensors*"):
            file.unlink()
        torch.save(tensors, path / "hf" / "pytorch_model.bin")
    if not kind.startswith("torch"):
        return open_source(path / "hf")
    folder = write_megatron(path, config, tensors, Style(tp=2, protocol=int(kind[-1])))
    shutil.copy(path / "hf" / "config.json", folder)
    return open_source(path)


def loaded(source: Source, topology: Topology) -> dict[str, torch.Tensor]:
    """The parameters of a model of one rank, in a precision in which they stay as they are."""
    model = build_stage(source.spec, topology, SingleGroup(), torch.float64, torch.device("cpu"))
    load_weights(model, source, topology)
    return dict(model.named_parameters())


def test_the_next_load_finds_in_the_systems_cache_what_fits_there(tmp_path: Path) -> None:
    source = open_huggingface(write_origin(tmp_path / "model", 256, 1, 32000))
    row = next(row for row in rows_of(source.spec.family) if row.name == EMBEDDING)
    embedding = source.read(row, None, 0, 32000)
    drop_from_cache(*source.files)
    with Copier(source.files, Pace(inf)) as copier:
        weights = loaded(source, SINGLE)
        assert not copier.is_cold(embedding)
    assert torch.equal(weights[EMBEDDING], embedding.double())


def test_a_load_that_the_cache_could_not_keep_leaves_it_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not reads_past_the_cache(tmp_path):
        pytest.skip("this file system reads through its cache only")
    source = open_huggingface(write_origin(tmp_path / "model", 256, 1, 32000))
    row = next(row for row in rows_of(source.spec.family) if row.name == EMBEDDING)
    embedding = source.read(row, None, 0, 32000)
    drop_from_cache(*source.files)
    monkeypatch.setattr(load, "free_memory", lambda _: 0)
    with Copier(source.files, Pace(inf)) as copier:
        if not copier.is_cold(embedding):
            pytest.skip("the system did not forget the file")
        weights = loaded(source, SINGLE)
        assert copier.is_cold(embedding)
    assert torch.equal(weights[EMBEDDING], embedding.double())


def test_how_quick_a_disk_must_be_depends_on_the_size_of_files_and_on_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large, huge = (tmp_path / name for name in ("small", "large", "huge"))
    for path, size in ((small, 1000), (large, 1 << 30), (huge, 5 << 30)):
        with path.open("wb") as file:
            file.truncate(size)  # a hole, which takes no room
    monkeypatch.setattr(load, "free_memory", lambda _: 8 << 30)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert least_rate((small,)) == inf and least_rate((small, huge)) == 0
    assert NUM_THREADS * least_rate((small, large)) == 1.5e9


def test_nothing_reads_on_after_a_load_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_origin(tmp_path, 256, 1, 512)
    source = open_huggingface(tmp_path)
    model = build_stage(source.spec, SINGLE, SingleGroup(), torch.bfloat16, torch.device("cpu"))

    def fail(*_: object) -> torch.Tensor:
        raise ValueError("a damaged file")

    monkeypatch.setattr(source, "read", fail)
    with pytest.raises(ValueError, match="a damaged file"):
        load_weights(model, source, SINGLE)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_whoever_interrupts_a_load_does_not_wait_for_the_rest_of_a_large_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_huggingface(write_origin(tmp_path, 256, 1, 100_000))  # embedding: more pieces than there are readers
    model = build_stage(source.spec, SINGLE, SingleGroup(), torch.float32, torch.device("cpu"))
    begun, stopped, told, leave = threading.Event(), threading.Event(), deque[bool](), Copier.__exit__

    def copy(*_: object) -> None:
        begun.set()
        told.append(stopped.wait(60))

    def exit_(copier: Copier, *error: Any) -> None:
        copier._threads.shutdown(wait=False, cancel_futures=True)
        stopped.set()
        leave(copier, *error)

    def interrupt(*_: object) -> int:
        assert begun.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(Copier, "_copy", copy)
    monkeypatch.setattr(Copier, "__exit__", exit_)
    monkeypatch.setattr(ahead, "_first", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_weights(model, source, SINGLE)
    assert all(told) and len(told) <= NUM_THREADS
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("weights")]
