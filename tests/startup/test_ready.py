"""What cannot run is found before minutes are spent on reading weights, and on all ranks alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mindgen.config import EngineConfig
from mindgen.parallel.group import SingleGroup
from mindgen.parallel.world import RankError, World
from mindgen.startup import ready
from mindgen.startup.ready import make_runner
from mindgen.weights.huggingface import open_huggingface
from tests.weights.folders import config_of, random_tensors, write_folder

CPU = torch.device("cpu")


class WithAnother(SingleGroup):
    """A group whose other rank says the same, but for the texts."""

    def __init__(self, text: str) -> None:
        self.text = text

    def all_gather(self, tensor: Tensor, dim: int = 0, *_: object) -> Tensor:
        if tensor.dtype != torch.uint8:
            return torch.cat([tensor, tensor], dim)
        text = list(self.text.encode().ljust(tensor.shape[1], b"\0"))
        return torch.cat([tensor, torch.tensor([text], dtype=torch.uint8)])


def start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, attention: str, world: World, cache_memory: float = 0.01
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(ready, "load_weights", never)
    config = config_of("llama", rope_scaling=None)
    source = open_huggingface(write_folder(folder, config, random_tensors(config)))
    options = EngineConfig(str(folder), device="cpu", dtype="fp32", attention=attention, kv_cache_memory=cache_memory)
    make_runner(options, source, world, CPU, 1)


def test_a_backend_that_cannot_run_ends_all_ranks_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RankError, match="'native' cannot run: it computes in bfloat16"):
        start(tmp_path, monkeypatch, "native", World())


def test_a_cache_larger_than_the_host_ends_all_ranks_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RankError, match=r"kv_cache_memory \(--kv-cache-memory\) is 1e\+08 GiB, and this host has "):
        start(tmp_path, monkeypatch, "cpu", World(), cache_memory=1e8)


def test_ranks_whose_backends_differ_end_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(everyone=WithAnother("native"))
    with pytest.raises(RankError, match=r"attention \(--attention\).* differs .* cpu on rank 0, native on rank 1"):
        start(tmp_path, monkeypatch, "auto", world)


def test_ranks_whose_backends_are_the_same_go_on_to_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError, match="weights were read"):
        start(tmp_path, monkeypatch, "auto", World(everyone=WithAnother("cpu")))
