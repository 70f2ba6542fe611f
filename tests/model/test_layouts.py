"""Every family at every layout against transformers. One world of four ranks is started once and serves all cells.

CI runs some families in every way and of the others a few cells; the rest of the matrix is marked `full`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import CASES, prompts
from tests.model import pressure
from tests.model.test_decoder import difference
from tests.model.world import WAYS

Layout = tuple[int, int, int]  # tensor, pipeline, and expert parallel size
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (4, 1, 1)]  # at tp 4 two KV heads are held twice
EXPERT_LAYOUTS = [(2, 1, 2), (2, 2, 2), (4, 1, 2), (4, 1, 4)]
WITH_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
THOROUGH = ("llama2", "llama31", "llama32", "mistral", "qwen2", "gemma2", "qwen3")
PRESSED = [("llama31", layout) for layout in LAYOUTS[:4]] + [("mistral", LAYOUTS[0]), ("phi35", LAYOUTS[3])]
FEW = [(2, 2, 1), (4, 1, 1), (2, 2, 2), (4, 1, 2)]
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(1800)  # the first test pays for all, with the whole matrix some ten minutes


def cells_of(ways: tuple[str, ...]) -> Iterator[Any]:
    """Parameters (case, layout, way) for all cases; beams and sampling are the same code for all of them."""
    for case in CASES:
        for layout in LAYOUTS + (EXPERT_LAYOUTS if case in WITH_EXPERTS else []):
            for way in ways:
                in_ci = case in THOROUGH or (layout in FEW and way == "greedy")
                name = f"{case} {'x'.join(map(str, layout))} {way}"
                yield pytest.param(case, layout, way, id=name, marks=() if in_ci else pytest.mark.full)


def cell(folder: Path, case: str, layout: Layout, what: str) -> Any:
    return torch.load(folder / f"{case} {' '.join(map(str, layout))} {what}.pt")


@pytest.fixture(scope="module")
def computed(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder with what four ranks computed for the tests that were selected."""
    out = tmp_path_factory.mktemp("cells")
    plan: dict[str, dict[str, list[str]]] = {}
    for item in request.session.items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if item.path != request.path or "case" not in params:
            continue
        pressed = item.function is test_scheduling_does_not_show_in_the_answers
        wanted = ["pressure"] if pressed else ["greedy", params["way"]]
        alone = [(1, 1, 1)] if pressed or params["way"] == "sampled" else []
        for layout in [params["layout"], *alone]:
            ways = plan.setdefault(",".join(map(str, layout)), {}).setdefault(str(checkpoint(params["case"])), [])
            ways += [way for way in wanted if way not in ways]
    (out / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "tests.model.world", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1700)
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
        use_cache=model.config.model_type != "phi3",  # see tests/model/test_longrope.py
    )
    config.eos_token_id = None
    model.generation_config = config
    tensor = torch.tensor([ids])
    with torch.inference_mode():
        output = model.generate(tensor, attention_mask=torch.ones_like(tensor))
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize(("case", "layout", "way"), list(cells_of(("greedy",))))
def test_logits(
    case: str, layout: Layout, way: str, computed: Path, expected_logits: Callable[[str], list[torch.Tensor]]
) -> None:
    for ours, expected in zip(cell(computed, case, layout, "logits"), expected_logits(case), strict=True):
        assert difference(ours, expected) < 1e-4


@pytest.mark.parametrize(("case", "layout", "way"), list(cells_of(("greedy", "beams 2", "beams 4"))))
def test_tokens_of_a_mixed_batch_are_those_of_each_prompt_alone_in_transformers(
    case: str, layout: Layout, way: str, computed: Path, expected_tokens: Callable[[str, str], list[list[int]]]
) -> None:
    assert cell(computed, case, layout, "tokens")[way] == expected_tokens(case, way)


@pytest.mark.parametrize(("case", "layout", "way"), list(cells_of(("sampled",))))
def test_sampled_tokens_do_not_depend_on_the_layout(case: str, layout: Layout, way: str, computed: Path) -> None:
    ours, alone = (cell(computed, case, place, "tokens") for place in (layout, (1, 1, 1)))
    assert ours[way] == alone[way]
    assert ours[way] != ours["greedy"]


@pytest.mark.parametrize("way", list(pressure.WAYS))
@pytest.mark.parametrize(("case", "layout"), PRESSED)
def test_scheduling_does_not_show_in_the_answers(case: str, layout: Layout, way: str, computed: Path) -> None:
    shared = [request.id for request in pressure.mixed_requests() if pressure.can_share(request, pressure.WAYS[way])]
    known = cell(computed, case, (1, 1, 1), "pressure")["one by one"]
    alone = {key: answer for key, answer in known.items() if key[0] in shared}
    answers, num_preemptions, num_reused = cell(computed, case, layout, "pressure")[way]
    assert len(known) == 11 and answers.keys() == alone.keys()
    for key, (tokens, numbers) in answers.items():
        expected, expected_numbers = alone[key]
        assert tokens == expected
        assert numbers == pytest.approx(expected_numbers, rel=0, abs=1e-5)
    assert sum(len(numbers) for _, numbers in answers.values()) > 200
    is_tight = pressure.WAYS[way].spare is not None
    assert num_preemptions == 0 or is_tight
    assert num_preemptions > 0 or not is_tight or case == "mistral"  # what is behind its window makes room
    assert num_reused > 0 or not pressure.WAYS[way].reuse
