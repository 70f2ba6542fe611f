"""The converter streams: its memory is bounded by a shard or by a few tensors, not by the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.weights.folders import config_of, shapes, write_folder

ROOT = Path(__file__).parents[2]
SLACK = 64 << 20


def measured(*flags: Any) -> dict[str, Any]:
    """Runs tests/weights/measured.py; what it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.weights.measured", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = dict(json.loads(done.stdout.splitlines()[-1]))
    assert result["code"] == 0, done.stderr
    return result


def write_origin(path: Path, hidden: int, layers: int, vocab: int) -> Path:
    """A Llama of 128-wide heads in bf16, of numbers that repeat after a million, in four files."""
    config = config_of(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 128, head_dim=128,
        num_key_value_heads=2, intermediate_size=hidden * 11 // 4, vocab_size=vocab,
    )  # fmt: skip
    numbers = torch.randn(1 << 20).bfloat16()
    tensors = {
        name: numbers.repeat(-(-prod(shape) // len(numbers)))[: prod(shape)].view(shape).contiguous()
        for name, shape in shapes(config)
    }
    return write_folder(path, config, tensors, num_files=4)


def largest_shard(path: Path) -> int:
    return max(file.stat().st_size for file in path.glob("iter_*/mp_rank_*/*"))


def largest_tensor(path: Path) -> int:
    sizes = []
    for file in path.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            sizes += [handle.get_tensor(name).nbytes for name in handle.keys()]  # noqa: SIM118
    return max(sizes)


def measure(folder: Path, name: str) -> str:
    """Runs one of RUNS in `folder`; how much memory it took, of how much it may. Fails if it took more."""
    load, kinds, *flags = RUNS[name]
    loaded, saved = kinds.split()
    usual = ("--load-model-type", loaded, "--save-model-type", saved, "--load-dir", folder / load)
    run = measured(*usual, "--save-dir", folder / name, *flags)
    torch_format = name.startswith("torch")
    bound = int(1.5 * largest_shard(folder / name)) if torch_format else 3 * largest_tensor(folder / name) + SLACK
    assert run["peak"] <= bound, (name, run["peak"] >> 20, bound >> 20)
    return f"{name}: {run['peak'] >> 20} MB of {bound >> 20} MB allowed, {run['seconds']:.1f} s"


_FOUR = ("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2)
_TWO = ("--target-tensor-parallel-size", 1, "--target-pipeline-parallel-size", 2)
_SAFE = ("--save-format", "safetensors")
RUNS: dict[str, tuple[Any, ...]] = {
    "torch": ("origin", "hf mg", *_FOUR),
    "safetensors": ("origin", "hf mg", *_FOUR, *_SAFE),
    "hf from torch": ("torch", "mg hf"),
    "hf from safetensors": ("safetensors", "mg hf"),
    "torch from safetensors": ("safetensors", "mg mg", *_TWO),
    "safetensors from torch": ("torch", "mg mg", *_TWO, *_SAFE),
}


def test_memory_is_bounded(tmp_path: Path) -> None:
    write_origin(tmp_path / "origin", 1024, 8, 32000)
    for name in list(RUNS)[:3]:
        print(measure(tmp_path, name))


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_memory_is_bounded_for_more_than_two_gigabytes(tmp_path: Path) -> None:
    write_origin(tmp_path / "origin", 2048, 20, 64000)
    assert sum(file.stat().st_size for file in (tmp_path / "origin").iterdir()) > 2 << 30
    for name in RUNS:
        print(measure(tmp_path, name))
