"""Steps replayed from graphs give what the model computes. Recorded operations stand for the graphs of a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mindgen.attention.backend import choose_backend
from mindgen.attention.decodes import DecodeRows
from mindgen.attention.sdpa import SdpaAttention
from mindgen.config import EngineConfig
from mindgen.engine.graphs import Run, Shape, StepGraphs, _agree, why_no_graphs
from mindgen.engine.kv_cache import KVCache
from mindgen.engine.request import Output, Request, SamplingParams
from mindgen.engine.runner import Runner
from mindgen.model.build import build_stage
from mindgen.model.decoder import Decoder
from mindgen.parallel.group import SingleGroup
from mindgen.parallel.topology import SINGLE, Topology
from mindgen.parallel.world import World
from mindgen.startup.opened import Opened
from mindgen.startup.ready import make_engine, make_runner
from mindgen.weights.load import load_weights
from mindgen.weights.open import open_source
from tests.attention.paged import make_batch
from tests.checkpoints import CASES, prompts
from tests.model.recorded import Recorder, tensors

CPU, META = torch.device("cpu"), torch.device("meta")
WITH_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
DENSE = [case for case in CASES if case not in WITH_EXPERTS]
ROUNDING = 1e-4  # a context filled up with columns that nobody sees is summed in another order
GREEDY = SamplingParams(max_new_tokens=24, temperature=0.0, logprobs=0)


def requests() -> list[Request]:
    """Of several lengths, so that the number of those that decode together goes up and down; samples that fork."""
    lengths = (24, 9, 17, 30, 5, 12)
    asked = [replace(GREEDY, max_new_tokens=length) for length in lengths]
    asked[1] = SamplingParams(max_new_tokens=9, seed=5, n=2, logprobs=0)
    return [
        Request(number, tuple(ids), params) for number, (ids, params) in enumerate(zip(prompts(6), asked, strict=True))
    ]


Said = dict[tuple[int, int], list[tuple[int, float]]]  # tokens and log-probabilities of each sample


def answers(opened: Opened, runner: Runner) -> Said:
    found: Said = {}
    for output in make_engine(opened, runner).run(requests()):
        found.setdefault((output.request_id, output.index), []).extend(_said(output))
    return found


def _said(output: Output) -> list[tuple[int, float]]:
    return [(one.token_id, one.logprob) for one in output.logprobs or ()]


def check(found: Said, expected: Said) -> None:
    for key, said in expected.items():
        tokens, logprobs = zip(*said, strict=True)
        assert tuple(token for token, _ in found[key]) == tokens
        assert [logprob for _, logprob in found[key]] == pytest.approx(logprobs, abs=ROUNDING)


def twins(folder: Path, recorder: Any) -> tuple[Opened, Runner, Runner]:
    """A runner of the model, and another over a cache of its own that replays."""
    config = EngineConfig(str(folder), dtype="fp32", attention="sdpa", block_size=8, max_batch_tokens=48)
    config = replace(config, kv_cache_memory=0.004)
    source = open_source(folder)
    plain = make_runner(config, source, World(), CPU, 1)
    model, cache = plain.model, plain.cache
    assert isinstance(model, Decoder) and cache is not None
    sizes = (cache.num_blocks, cache.block_size, model.num_kv_heads, model.head_dim)
    spare = KVCache(model.num_layers, *sizes, model.dtype, CPU, has_spare=True)
    graphs = StepGraphs(model, spare, plain.backend, recorder)
    return Opened(config, source), plain, Runner(model, spare, plain.backend, World(), CPU, graphs)


@pytest.mark.parametrize("case", DENSE)
def test_answers_are_those_of_the_model(case: str, checkpoint: Callable[[str], Path]) -> None:
    recorder = Recorder()
    opened, plain, replaying = twins(checkpoint(case), recorder)
    expected, found = answers(opened, plain), answers(opened, replaying)
    assert isinstance(replaying.graphs, StepGraphs) and recorder.num_captures >= 3
    assert 10 <= replaying.graphs.num_replayed < recorder.num_replays
    check(found, expected)
    assert plain.cache is not None and replaying.cache is not None
    blocks = slice(plain.cache.num_blocks)
    for memory in ("keys", "values"):
        ours, theirs = torch.stack(getattr(replaying.cache, memory)), torch.stack(getattr(plain.cache, memory))
        torch.testing.assert_close(ours[:, blocks], theirs, atol=ROUNDING, rtol=ROUNDING)


def test_every_stage_of_a_pipeline_replays(checkpoint: Callable[[str], Path]) -> None:
    """The later one takes hidden states, nothing that was passed on is overwritten by the next step, and where there
    are fewer sequences than before nothing is written for those that left: others have their blocks."""
    source = open_source(checkpoint("gemma2"))
    more, fewer = [(1, 9), (1, 3), (1, 5), (1, 20)], [(1, 9), (1, 3), (1, 28)]  # whose third has the fourth's slot
    mixes = [more, fewer] * 4
    results: list[tuple[Tensor, Tensor]] = [(torch.zeros(0), torch.zeros(0))] * len(mixes)
    for rank in range(2):
        topology, recorder = Topology(rank, 1, 2), Recorder()
        model = build_stage(source.spec, topology, SingleGroup(), torch.float32, CPU)
        load_weights(model, source, topology)
        sizes = (model.num_layers, 40, 4, model.num_kv_heads, model.head_dim, model.dtype, CPU)
        ours, theirs = KVCache(*sizes, has_spare=True), KVCache(*sizes)
        graphs = StepGraphs(model, ours, SdpaAttention(model.scores), recorder)
        for step, mix in enumerate(mixes):
            batch = make_batch(mix)
            batch.tokens, batch.num_tokens = torch.tensor([7, 40 + step, 99, 3])[: len(mix)], len(mix)
            hidden, expected = results[step] if rank else (None, batch.tokens)
            with torch.inference_mode():
                found = graphs.forward(batch, hidden)
                expected = model(expected, SdpaAttention(model.scores).prepare(batch, theirs))
            assert found is not None
            results[step] = found, expected
        assert recorder.num_captures == 1 and recorder.num_replays >= 6
        torch.testing.assert_close(torch.stack(ours.keys)[:, :40], torch.stack(theirs.keys))
    for found, expected in results:
        torch.testing.assert_close(found, expected)


def test_steps_with_longer_queries_are_not_for_graphs() -> None:
    batch = make_batch([(1, 9), (2, 3)])
    batch.num_tokens = 3
    assert Shape.of(batch) is None
    batch = make_batch([(1, 9), (1, 3), (1, 14)])
    batch.num_tokens = 3
    assert Shape.of(batch) == Shape(rows=4, blocks=4)


def replays_nothing(run: Run) -> tuple[Callable[[], None], Tensor]:
    """What a graph is that kept everything of its capture."""
    return lambda: None, run()


def spoils_the_cache(run: Run) -> tuple[Callable[[], None], Tensor]:
    """It writes keys and values of nothing."""
    result = run()
    stage = run.__self__._stage  # type: ignore[attr-defined]

    def replay() -> None:
        for memory in stage.cache.keys:
            memory.flatten(0, 1)[run.__self__._numbers[3]] = 7.0  # type: ignore[attr-defined]
        result.fill_(3.0)

    return replay, result


@pytest.mark.parametrize("capture", [replays_nothing, spoils_the_cache])
def test_graphs_that_do_not_work_are_not_used(
    capture: Any, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The answers stay right."""
    opened, plain, replaying = twins(checkpoint("llama31"), capture)
    check(answers(opened, replaying), answers(opened, plain))
    assert isinstance(replaying.graphs, StepGraphs) and replaying.graphs.num_replayed == 0
    said = "graphs: steps of 4 x 16 blocks go on without: a replayed one differs from the model's\n"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("good", range(4))
def test_where_memory_does_not_suffice_steps_go_on_without(
    good: int, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a step that is filled up, at its capture, or at a comparison."""
    opened, plain, replaying = twins(checkpoint("llama31"), Recorder())
    expected, calls = answers(opened, plain), count()
    prepare = SdpaAttention.prepare_decodes

    def prepare_some(*arguments: Any) -> Any:
        if next(calls) >= good:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prepare(*arguments)

    monkeypatch.setattr(SdpaAttention, "prepare_decodes", prepare_some)
    check(answers(opened, replaying), expected)
    assert "blocks go on without: there is not enough memory for them\n" in capsys.readouterr().err


def test_rows_are_compared_one_by_one() -> None:
    """A large number in one of them hides nothing of the others."""
    expected = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    expected[0, 0] = 1000
    assert _agree(expected * (1 + 2.0**-8), expected)
    for row in range(4):
        found = expected.clone()
        found[row] = expected[row - 1]
        assert not _agree(found, expected)
    found[row] = float("nan")
    assert not _agree(found, expected)
    expected[row, 3] = float("inf")
    assert _agree(found, expected)  # an answer that is lost in any case


def test_a_step_that_filled_up_would_take_more_than_the_cache_is_not_for_a_graph(
    checkpoint: Callable[[str], Path],
) -> None:
    source, recorder = open_source(checkpoint("llama31")), Recorder()
    model = build_stage(source.spec, SINGLE, SingleGroup(), torch.float32, CPU)
    load_weights(model, source, SINGLE)
    for num_blocks, is_for_graphs in ((63, False), (64, True)):
        cache = KVCache(model.num_layers, num_blocks, 4, model.num_kv_heads, model.head_dim, model.dtype, CPU, True)
        batch = make_batch([(1, 2)] * 5 + [(1, 20)])  # filled up: 8 x 8 blocks
        batch.tokens, batch.num_tokens = torch.arange(6), 6
        with torch.inference_mode():
            found = StepGraphs(model, cache, SdpaAttention(model.scores), recorder).forward(batch, None)
        assert (found is not None) == is_for_graphs


class OneDevice(TorchDispatchMode):
    """Fails where anything is not on `meta`, where no value can be asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        assert all(tensor.device == META for tensor in tensors((args, kwargs, results))), f"{func} is not for a graph"
        return results


def on_meta(folder: Path) -> tuple[Decoder, KVCache]:
    model = build_stage(open_source(folder).spec, SINGLE, SingleGroup(), torch.bfloat16, META)
    return model, KVCache(model.num_layers, 40, 4, model.num_kv_heads, model.head_dim, torch.bfloat16, META)


@pytest.mark.parametrize("case", DENSE)
def test_a_step_of_decodes_stays_on_its_device(case: str, checkpoint: Callable[[str], Path]) -> None:
    """What a device with graphs asks of a step: no copy from the host and no value that the host waits for."""
    model, cache = on_meta(checkpoint(case))
    number = torch.zeros(3, dtype=torch.int64, device=META)
    rows = DecodeRows(number, number, number, number, torch.zeros(3, 4, dtype=torch.int64, device=META))
    with torch.inference_mode(), OneDevice():
        context = SdpaAttention(model.scores).prepare_decodes(rows, cache)
        assert model.logits(model(number, context)).shape == (3, 331)


@pytest.mark.parametrize(
    ("device", "tp", "case", "attention", "has_cache", "reason"),
    [
        ("cuda", 1, "llama31", "sdpa", True, None),
        ("cpu", 1, "llama31", "sdpa", True, "a CPU has none"),
        ("npu", 1, "llama31", "sdpa", True, "those of an NPU are not captured yet"),
        ("cuda", 2, "llama31", "sdpa", True, "2 tensor parallel ranks meet in every layer"),
        ("cuda", 1, "llama31", "sdpa", False, "without a cache every step has other sizes"),
        ("cuda", 1, "llama31", "reference", True, "attention 'reference' goes from sequence to sequence"),
        ("cuda", 1, "mixtral", "sdpa", True, "which experts have tokens is looked up in every step"),
    ],
)
def test_why_nothing_is_captured_is_said(
    device: str, tp: int, case: str, attention: str, has_cache: bool, reason: str | None,
    checkpoint: Callable[[str], Path],
) -> None:  # fmt: skip
    model, _ = on_meta(checkpoint(case))
    backend = choose_backend(attention, model.scores, META)
    place = Topology(0, tp, 1)
    # torch of a CPU knows no torch.device("npu")
    said = why_no_graphs(_Named(device), place, model, backend, has_cache)  # type: ignore[arg-type]
    assert said == reason if reason is None else said is not None and said.startswith(reason)


class _Named:
    def __init__(self, name: str) -> None:
        self.type = name
