"""What all tests share: tiny checkpoints and what transformers computes from them, made once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: ranks of a test share two cores

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

from tests.checkpoints import CASES, make_model, prompts, save_model

torch.set_num_threads(1)

# Property tests try the same examples in every run, on a machine of any speed, and leave nothing behind.
settings.register_profile(
    "same every time", derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("same every time")


def pytest_configure(config: pytest.Config) -> None:
    """What hypothesis computes for itself goes where it is deleted."""
    folder = TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    set_hypothesis_home_dir(folder.name)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The Hugging Face folder of a case, written once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        return folder / name if (folder / name).exists() else save_model(name, folder / name)

    return get


@pytest.fixture(scope="session")
def judge() -> Callable[[str], Any]:
    """The transformers model of a case."""
    models: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in models:
            models[name] = make_model(name)
        return models[name]

    return get


@pytest.fixture(scope="session")
def expected_logits(judge: Callable[[str], Any]) -> Callable[[str], list[torch.Tensor]]:
    """What transformers says of every prompt of `prompts`, [length, vocab] each."""
    known: dict[str, list[torch.Tensor]] = {}

    def get(name: str) -> list[torch.Tensor]:
        if name not in known:
            with torch.inference_mode():
                known[name] = [judge(name)(torch.tensor([ids])).logits[0] for ids in prompts(3)]
        return known[name]

    return get


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> str:
    """Every family, with the features of a published model."""
    return str(request.param)
