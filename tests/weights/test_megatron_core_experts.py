"""Our shards of models with experts in NVIDIA's own model, which loads all of each and finds all that it asks for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mindgen.weights.convert import convert
from tests.model.test_layouts import WITH_EXPERTS
from tests.weights.expert_folders import config_for

pytest.importorskip("megatron", reason="megatron-core, which would judge our shards, is not installed")

LAYOUTS = [(1, 1, 1), (2, 2, 1), (2, 2, 2), (4, 1, 2), (4, 1, 4)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def loaded(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which every rank says how many tensors it loaded."""
    folder, out = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("loaded")
    for name in WITH_EXPERTS:
        for layout in LAYOUTS:
            convert(config_for(checkpoint(name), folder / name / " ".join(map(str, layout)), *layout))
    texts = [",".join(map(str, layout)) for layout in LAYOUTS]
    folders = [str(folder / name) for name in WITH_EXPERTS]
    command = [sys.executable, "-W", "ignore", "-m", "tests.weights.megatron_core_experts"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, str(out), *texts, "--", *folders], cwd=ROOT, env=environ, check=True, timeout=150)
    return out


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_megatron_core_loads_every_shard_strictly(name: str, layout: tuple[int, int, int], loaded: Path) -> None:
    counts = [int((loaded / f"{name} {' '.join(map(str, layout))} {rank}").read_text()) for rank in range(4)]
    assert all(count > 10 for count in counts)
