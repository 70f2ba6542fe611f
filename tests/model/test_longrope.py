"""Phi-3.5's two sets of rotary factors against transformers: prompts and answers below, at and beyond the boundary.

All prompts begin alike, so that blocks of short and of long sequences would be taken for each other if they could be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mindgen.config import EngineConfig
from mindgen.engine.blocks import BlockPool
from mindgen.engine.engine import Engine
from mindgen.engine.request import Output, Request, SamplingParams
from mindgen.engine.runner import Runner
from mindgen.engine.scheduler import Scheduler
from mindgen.layers.rope import scaled_frequencies
from mindgen.parallel.topology import SINGLE
from mindgen.parallel.world import connect
from mindgen.startup.opened import Opened
from mindgen.startup.ready import make_engine, make_runner
from mindgen.weights.config_json import spec_from_config
from mindgen.weights.huggingface import open_huggingface
from tests.checkpoints import prompts
from tests.model.test_decoder import difference, logits

CPU = torch.device("cpu")
BOUNDARY, BLOCK_SIZE, NUM_NEW = 64, 8, 20
FEW = 14  # blocks: one request takes 12 of them
LENGTHS = (3, 40, 44, 45, 46, 62, 63, 64, 65, 70)  # 44: the answer's last token is computed by nobody; 46 crosses
GREEDY = SamplingParams(max_new_tokens=NUM_NEW, temperature=0.0, logprobs=0)
BEAMS = SamplingParams(max_new_tokens=8, temperature=0.0, num_beams=3)


def prompt(length: int) -> tuple[int, ...]:
    return tuple(prompts(1)[0][:length])


@dataclass(frozen=True)
class Way:
    """blocks: of the cache, 0 for none."""

    max_batch_tokens: int = 512
    blocks: int = 128
    reuse: bool = True
    attention: str = "auto"


WAYS = {
    "at once": Way(),
    "without reuse": Way(reuse=False),
    "token by token": Way(1),
    "chunks of 3": Way(3),
    "chunks of 29, without reuse": Way(29, reuse=False),
    "too few blocks": Way(40, blocks=FEW),
    "too few blocks, without reuse": Way(17, blocks=FEW, reuse=False),
    "without a cache": Way(blocks=0),
    "reference": Way(50, attention="reference"),
    "sdpa": Way(50, attention="sdpa"),
}


@pytest.fixture(scope="module")
def engine_of(checkpoint: Callable[[str], Path]) -> Iterator[Callable[[Way], Engine]]:
    """A fresh engine for a way, over the one runner that its attention and cache need."""
    source, runners = open_huggingface(checkpoint("phi35")), {}
    config = EngineConfig("phi35", 1, block_size=BLOCK_SIZE, kv_cache_memory=0.008)
    with connect(SINGLE, CPU) as world:

        def make(way: Way) -> Engine:
            kind = (way.attention, bool(way.blocks))
            if kind not in runners:
                own = replace(config, attention=way.attention, use_kv_cache=bool(way.blocks))
                runners[kind] = make_runner(own, source, world, CPU, 1)
            return own_pool(make_engine(Opened(config, source), runners[kind]), runners[kind], way)

        yield make


def own_pool(engine: Engine, runner: Runner, way: Way) -> Engine:
    """The engine that `make_engine` makes, but for the blocks and the chunks of a way."""
    made = engine.scheduler
    pool = BlockPool(way.blocks, BLOCK_SIZE, way.reuse) if way.blocks else None
    limits = {"max_positions": made.max_positions, "short_context": made.short_context}
    return Engine(Scheduler(pool, way.max_batch_tokens, **limits), runner)


@pytest.fixture(scope="module")
def theirs(judge: Callable[[str], Any]) -> Callable[[int, SamplingParams], list[int]]:
    """What transformers answers to the prompt of a length, alone, and without its cache.

    With it, transformers 4 lets every token see all in the step that crosses the boundary.
    """
    known: dict[tuple[int, SamplingParams], list[int]] = {}

    def get(length: int, params: SamplingParams) -> list[int]:
        if (length, params) not in known:
            known[length, params] = generated(judge("phi35"), length, params)
        return known[length, params]

    return get


def generated(model: Any, length: int, params: SamplingParams) -> list[int]:
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=params.max_new_tokens,
        num_beams=params.num_beams,
        pad_token_id=0,
        use_cache=False,
    )
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt(length)])
    with torch.inference_mode():
        return model.generate(ids, attention_mask=torch.ones_like(ids))[0, length:].tolist()


def answers(outputs: list[Output]) -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for output in outputs:
        found.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    return found


def ask(params: SamplingParams, lengths: tuple[int, ...] = LENGTHS) -> list[Request]:
    return [Request(length, prompt(length), params) for length in lengths]


@pytest.mark.parametrize("name", list(WAYS))
def test_a_crowd_of_short_long_and_crossing_answers_is_what_each_gets_alone(
    name: str, engine_of: Callable[[Way], Engine], theirs: Callable[..., list[int]]
) -> None:
    way, engine = WAYS[name], engine_of(WAYS[name])
    expected = {(length, 0): theirs(length, GREEDY) for length in LENGTHS}
    for _ in range(1 + way.reuse):  # the second time over what the first one left
        assert answers(list(engine.run(ask(GREEDY)))) == expected
    stats = engine.scheduler.stats
    assert (stats.num_preemptions > 0) == (way.blocks == FEW)
    assert (stats.num_reused_tokens > 0) == (way.reuse and way.blocks > 0) or way.blocks == FEW


@pytest.mark.parametrize("length", [63, 64, 65])
def test_every_logit_across_the_boundary_is_that_of_transformers(
    length: int, engine_of: Callable[[Way], Engine], judge: Callable[[str], Any], theirs: Callable[..., list[int]]
) -> None:
    outputs = list(engine_of(WAYS["chunks of 3"]).run(ask(replace(GREEDY, logprobs=4, prompt_logprobs=0), (length,))))
    tokens = [*prompt(length), *theirs(length, GREEDY)]
    for end, entry in enumerate([entry for output in outputs for entry in output.logprobs or ()], start=length):
        values, ids = their_logprobs(judge, tokens[:end])[-1].topk(4)
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
    scored, whole = outputs[0].prompt_logprobs, their_logprobs(judge, tokens[:length])
    assert scored is not None and end == length + NUM_NEW - 1
    for place, entry in enumerate(scored[1:]):
        assert entry.logprob == pytest.approx(float(whole[place, tokens[place + 1]]), abs=1e-4)


@torch.inference_mode()
def their_logprobs(judge: Callable[[str], Any], tokens: list[int]) -> torch.Tensor:
    logprobs: torch.Tensor = judge("phi35")(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return logprobs


@pytest.mark.parametrize("name", ["at once", "chunks of 3", "too few blocks, without reuse"])
def test_beams_cross_the_boundary_together(
    name: str, engine_of: Callable[[Way], Engine], theirs: Callable[..., list[int]]
) -> None:
    way = replace(WAYS[name], blocks=WAYS[name].blocks + 8)
    lengths = (40, 58, 63, 64, 65)
    expected = {(length, 0): theirs(length, BEAMS) for length in lengths}
    assert answers(list(engine_of(way).run(ask(BEAMS, lengths)))) == expected


def test_samples_of_one_prompt_cross_the_boundary_one_by_one(engine_of: Callable[[Way], Engine]) -> None:
    params = SamplingParams(max_new_tokens=NUM_NEW, temperature=1.1, seed=3, n=3)
    get = partial(ask, params, (50, 64))
    expected = answers(list(engine_of(WAYS["without a cache"]).run(get())))
    assert len({tuple(tokens) for tokens in expected.values()}) == 6
    for name in ("at once", "chunks of 3", "too few blocks", "chunks of 29, without reuse"):
        assert answers(list(engine_of(WAYS[name]).run(get()))) == expected


def test_the_next_turn_of_a_conversation_may_be_long(
    engine_of: Callable[[Way], Engine], theirs: Callable[..., list[int]], judge: Callable[[str], Any]
) -> None:
    engine = engine_of(WAYS["at once"])
    first = answers(list(engine.run(ask(GREEDY, (40,)))))[40, 0]
    second = (*prompt(40), *first, 5, 6, 7, 8, 9)
    assert len(second) == BOUNDARY + 1
    found = answers(list(engine.run([Request(1, second, GREEDY)])))[1, 0]
    for end, token in enumerate(found, start=len(second)):
        assert their_logprobs(judge, [*second, *found][:end])[-1].argmax() == token
    assert engine.scheduler.stats.num_reused_tokens == 0  # all that the first turn left was short
    list(engine.run([Request(2, second[:BOUNDARY], GREEDY)]))
    assert engine.scheduler.stats.num_reused_tokens >= 56  # short again, and long where its answer goes beyond


def test_only_an_answer_that_crosses_is_computed_twice(engine_of: Callable[[Way], Engine]) -> None:
    computed = {}
    for length in (44, 45, 46, 65):
        engine = engine_of(WAYS["without reuse"])
        list(engine.run(ask(GREEDY, (length,))))
        computed[length] = engine.scheduler.stats.num_computed_tokens - (length + NUM_NEW - 1)
    assert computed == {44: 0, 45: 0, 46: BOUNDARY, 65: 0}


@pytest.mark.parametrize("options", [{"n": 3, "seed": 3}, {"num_beams": 3, "temperature": 0.0}])
def test_samples_and_beams_of_a_long_prompt_go_on_from_its_keys(
    options: dict[str, float], engine_of: Callable[[Way], Engine]
) -> None:
    engine = engine_of(WAYS["at once"])
    list(engine.run(ask(SamplingParams(max_new_tokens=NUM_NEW, **options), (65,))))
    assert engine.scheduler.stats.num_computed_tokens == 65 + 3 * (NUM_NEW - 1)


def test_the_context_ends_where_the_model_says(engine_of: Callable[[Way], Engine]) -> None:
    engine = engine_of(Way())
    with pytest.raises(ValueError, match="together 257, but the model's context is 256"):
        engine.submit(Request(0, prompt(57), replace(GREEDY, max_new_tokens=200)))
    engine.submit(Request(0, prompt(56), replace(GREEDY, max_new_tokens=200)))


def test_the_short_factors_matter_for_short_prompts_only(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("phi35")
    spec = open_huggingface(folder).spec
    assert spec.rope_scaling and spec.rope_scaling.short_factors
    scaling = replace(spec.rope_scaling, short_factors=tuple(2 * number for number in spec.rope_scaling.short_factors))
    changed = replace(spec, rope_scaling=scaling)
    for length, matters in ((BOUNDARY, True), (BOUNDARY + 1, False)):
        ids = list(prompt(length))
        assert (difference(logits(folder, ids, changed), logits(folder, ids)) > 1e-3) == matters


@pytest.mark.parametrize("stated", [{}, {"factor": 8.0}, {"attention_factor": 1.25}])
def test_frequencies_of_the_published_shape_are_bit_for_bit_those_of_transformers(stated: dict[str, float]) -> None:
    """At position 131,071 one bit of a frequency turns a head by a hundredth of a radian."""
    if "factor" in stated:
        pytest.importorskip("transformers", minversion="5", reason="transformers 4 takes no factor for such a rope")
    from transformers import Phi3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    short, long = ([1.0 + 0.037 * k for k in range(48)], [1.1 + 1.313 * k for k in range(48)])
    config = Phi3Config(
        max_position_embeddings=131072, original_max_position_embeddings=4096, pad_token_id=None, rope_theta=10000.0,
        rope_scaling={"type": "longrope", "short_factor": short, "long_factor": long},
    )  # fmt: skip
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or config.rope_scaling  # transformers 5, or 4
    rope |= stated
    ours, factor = scaled_frequencies(spec_from_config(config.to_dict(), None, "config.json"))
    for mine, length in zip(ours, (4096, 4097), strict=True):
        expected, their_factor = ROPE_INIT_FUNCTIONS["longrope"](config, CPU, seq_len=length)
        assert torch.equal(mine, expected) and factor == their_factor
