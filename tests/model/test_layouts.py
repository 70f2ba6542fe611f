"""Every family at every layout against transformers. One world of four ranks is started once and serves all cells."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import CASES, prompts
from tests.model import pressure
from tests.model.test_decoder import difference
from tests.model.world import PRESSED, WAYS

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]  # at tp 4 two KV heads are held twice
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cells(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what four ranks computed."""
    out = tmp_path_factory.mktemp("cells")
    layouts = [f"{tp},{pp}" for tp, pp in LAYOUTS]
    folders = [str(checkpoint(name)) for name in CASES]
    command = [sys.executable, "-m", "tests.model.world", str(out), *layouts, "--", *folders]
    subprocess.run(command, cwd=ROOT, check=True, timeout=280)
    return out


@pytest.fixture(scope="module")
def expected_tokens(judge: Callable[[str], Any]) -> Callable[[str, str], list[list[int]]]:
    """What transformers' `generate` says, each prompt alone."""
    known: dict[tuple[str, str], list[list[int]]] = {}

    def get(name: str, way: str) -> list[list[int]]:
        if (name, way) not in known:
            known[name, way] = [generated(judge(name), ids, way) for ids in prompts(6)]
        return known[name, way]

    return get


def generated(model: Any, ids: list[int], way: str) -> list[int]:
    from transformers import GenerationConfig

    params = WAYS[way]
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=params.max_new_tokens,
        num_beams=params.num_beams,
        length_penalty=params.length_penalty,
        pad_token_id=0,
    )
    config.eos_token_id = None
    model.generation_config = config
    tensor = torch.tensor([ids])
    with torch.inference_mode():
        output = model.generate(tensor, attention_mask=torch.ones_like(tensor))
    return output[0, len(ids) :].tolist()


layouts = pytest.mark.parametrize(("tp", "pp"), LAYOUTS)


@layouts
def test_logits(case: str, tp: int, pp: int, cells: Path, expected_logits: Callable[[str], list[torch.Tensor]]) -> None:
    ours = torch.load(cells / f"{case} {tp} {pp} logits.pt")
    for ids_logits, expected in zip(ours, expected_logits(case), strict=True):
        assert difference(ids_logits, expected) < 1e-4


@layouts
@pytest.mark.parametrize("way", ["greedy", "beams 2", "beams 4"])
def test_tokens_of_a_mixed_batch_are_those_of_each_prompt_alone_in_transformers(
    case: str, tp: int, pp: int, way: str, cells: Path, expected_tokens: Callable[[str, str], list[list[int]]]
) -> None:
    assert torch.load(cells / f"{case} {tp} {pp} tokens.pt")[way] == expected_tokens(case, way)


@layouts
def test_sampled_tokens_do_not_depend_on_the_layout(case: str, tp: int, pp: int, cells: Path) -> None:
    ours, alone = (torch.load(cells / f"{case} {layout} tokens.pt")["sampled"] for layout in (f"{tp} {pp}", "1 1"))
    assert ours == alone
    assert ours != torch.load(cells / f"{case} 1 1 tokens.pt")["greedy"]


@pytest.mark.parametrize("way", list(pressure.WAYS))
@pytest.mark.parametrize(("name", "tp", "pp"), PRESSED)
def test_scheduling_does_not_show_in_the_answers(name: str, tp: int, pp: int, way: str, cells: Path) -> None:
    shared = [request.id for request in pressure.mixed_requests() if pressure.can_share(request, pressure.WAYS[way])]
    known = torch.load(cells / f"{name} 1 1 pressure.pt")["one by one"]
    alone = {key: answer for key, answer in known.items() if key[0] in shared}
    answers, num_preemptions, num_reused = torch.load(cells / f"{name} {tp} {pp} pressure.pt")[way]
    assert len(known) == 11 and answers.keys() == alone.keys()
    for key, (tokens, numbers) in answers.items():
        expected, expected_numbers = alone[key]
        assert tokens == expected
        scale = max(map(abs, expected_numbers), default=0)  # a float32 logit is not known any better
        assert numbers == pytest.approx(expected_numbers, rel=0, abs=1e-5 * scale)
    assert sum(len(numbers) for _, numbers in answers.values()) > 200
    assert (num_preemptions > 0) == (pressure.WAYS[way].spare is not None)
    assert num_reused > 0 or not pressure.WAYS[way].reuse
