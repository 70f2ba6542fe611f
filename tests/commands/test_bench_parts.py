"""What `mindgen bench` counts, draws and computes, against counts by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest
import torch

from mindgen.commands.bench.bounds import Cost, count_parameters, count_work
from mindgen.commands.bench.machine import Machine, Probe
from mindgen.commands.bench.measure import DECODE, OUTPUT, PREFILL, Measured, Run, batch_rates, batch_task, serving_task
from mindgen.commands.bench.options import BenchConfig, Shape
from mindgen.commands.bench.random_weights import RandomSource
from mindgen.commands.bench.report import probes, result
from mindgen.commands.bench.shapes import find_shape
from mindgen.commands.bench.workload import Words, batch_of, mix_of
from mindgen.commands.latency import Timeline
from mindgen.weights.families import rows_of
from mindgen.weights.rows import EMBEDDING, HEAD, axis_sizes

TINY_LLAMA = find_shape("tinyllama-1.1b", "bfloat16")
# By hand: q and o are 2048 x 2048, k and v 256 x 2048, three MLP matrices of 5632 x 2048, 22 layers.
LAYER = 2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 5632 * 2048
MATRICES, HEAD_SIZE, NORMS = 22 * LAYER, 32000 * 2048, (2 * 22 + 1) * 2048


def test_bytes_and_flops_of_tinyllama_are_those_counted_by_hand() -> None:
    work = count_work(TINY_LLAMA, itemsize=2)
    assert (LAYER, MATRICES) == (44_040_192, 968_884_224)
    assert count_parameters(TINY_LLAMA) == MATRICES + 2 * HEAD_SIZE + NORMS == 1_100_048_384
    assert work.weight_bytes == 2 * (MATRICES + HEAD_SIZE + NORMS)
    assert work.cache_bytes == 2 * 22 * 4 * 64 * 2  # keys and values, 4 heads of 64
    assert work.linear_flops == 2 * MATRICES
    prompt = work.prefill(1, 512)
    pairs = 512 * 513 // 2
    assert prompt.flops == 512 * 2 * MATRICES + 2 * HEAD_SIZE + pairs * 22 * 4 * 2048
    assert prompt.flops == pytest.approx(1016e9, rel=1e-3)
    step = work.decode_step(8, 256)
    assert step.num_bytes == work.weight_bytes + 8 * 256 * work.cache_bytes
    assert step.flops == 8 * (2 * MATRICES + 2 * HEAD_SIZE + 256 * 22 * 4 * 2048)


def test_decode_reads_a_context_that_grows() -> None:
    work = count_work(TINY_LLAMA, itemsize=2)
    steps = [work.decode_step(3, context) for context in range(101, 105)]  # of 5 tokens the first is the prompt's
    whole = work.decode(3, 100, 5)
    assert whole.num_bytes == pytest.approx(sum(step.num_bytes for step in steps))
    assert whole.flops == pytest.approx(sum(step.flops for step in steps))


def test_ranks_pay_for_padding_and_replicas() -> None:
    alone, eight = count_work(TINY_LLAMA, 2), count_work(TINY_LLAMA, 2, tp=8)
    replicas = 22 * 2 * 4 * 64 * 2048  # four more K and V heads in each layer
    assert eight.linear_flops - alone.linear_flops == 2 * replicas
    assert eight.cache_bytes == 2 * alone.cache_bytes
    assert eight.weight_bytes - alone.weight_bytes == 2 * (replicas + 7 * NORMS)
    three = count_work(replace(TINY_LLAMA, vocab_size=31999), 2, tp=2)
    assert three.head_flops == 2 * HEAD_SIZE


def test_a_window_limits_what_a_query_sees() -> None:
    work = count_work(replace(TINY_LLAMA, sliding_window=10), 2)
    assert work.decode_step(1, 500) == work.decode_step(1, 10)
    pairs = sum(min(10, query) for query in range(1, 31))
    assert work.prefill(1, 30).flops == 30 * work.linear_flops + work.head_flops + pairs * work.pair_flops


def test_a_tied_head_is_read_but_is_no_parameter_of_its_own() -> None:
    tied = replace(TINY_LLAMA, tie_embeddings=True)
    assert count_work(tied, 2) == count_work(TINY_LLAMA, 2)
    assert count_parameters(TINY_LLAMA) - count_parameters(tied) == HEAD_SIZE


def test_time_is_that_of_the_slower_of_reading_and_computing() -> None:
    assert Cost(100.0, 10.0).seconds(read_rate=50.0, matrix_rate=1.0) == 10.0
    assert Cost(100.0, 10.0).seconds(read_rate=5.0, matrix_rate=1.0) == 20.0
    assert Cost(100.0, 10.0).intensity == 0.1


def test_limits_of_a_batch_count_its_tokens() -> None:
    work, words = count_work(TINY_LLAMA, 2), Words(100, 0)
    task = batch_task(Shape(4, 30, 7), work, words)
    assert {name: limit.amount for name, limit in task.limits.items()} == {PREFILL: 120, DECODE: 24}
    assert task.limits[DECODE].cost == work.decode(4, 30, 7)
    assert list(batch_task(Shape(4, 30, 1), work, words).limits) == [PREFILL]


def test_serving_cannot_end_before_the_last_arrival_nor_read_weights_less_often_than_its_longest_answer() -> None:
    work, words = count_work(TINY_LLAMA, 2), Words(100, 0)
    options = BenchConfig(request_rate=2.0, num_requests=5, input_len=("4-9",), output_len=("2-6",))
    arrivals, limit = mix_of(options, words, 3), serving_task(options, work, words).limits[OUTPUT]
    lengths = [(len(request.prompt), request.params.max_new_tokens) for _, request in arrivals]
    assert limit.amount == sum(new for _, new in lengths)
    assert limit.seconds == arrivals[-1][0]
    caches = sum(
        work.decode_step(1, n + at).num_bytes - work.weight_bytes for n, new in lengths for at in range(1, new)
    )
    assert limit.cost.num_bytes == pytest.approx(max(new for _, new in lengths) * work.weight_bytes + caches)
    assert limit.cost.flops == pytest.approx(
        sum(work.prefill(1, n).flops + work.decode(1, n, new).flops for n, new in lengths)
    )


def test_rates_of_a_batch_part_at_the_last_first_token() -> None:
    early = Timeline(10, tokens={0: [(1.0, 1), (2.0, 1), (4.0, 2)]})
    late = Timeline(30, tokens={0: [(2.0, 1), (4.0, 1)]})
    assert batch_rates([early, late]) == {PREFILL: 40 / 2.0, DECODE: 3 / 2.0}
    assert batch_rates([Timeline(10, tokens={0: [(0.5, 1)]})]) == {PREFILL: 20.0}


def test_prompts_have_exact_lengths_and_are_never_asked_twice() -> None:
    words = Words(1000, seed=1)
    runs = [batch_of(Shape(3, 40, 5), words, turn) for turn in range(2)]
    requests = [request for arrivals in runs for _, request in arrivals]
    assert all(len(request.prompt) == 40 and max(request.prompt) < 1000 for request in requests)
    assert all(request.params.max_new_tokens == 5 and request.params.ignore_eos for request in requests)
    assert all(request.params.temperature == 0 for request in requests)
    assert len({request.prompt for request in requests}) == 6
    assert runs[0] == batch_of(Shape(3, 40, 5), words, 0) != batch_of(Shape(3, 40, 5), Words(1000, seed=2), 0)


def test_a_text_is_cut_to_length_and_begins_again() -> None:
    prompt = Words(1000, 0, text=(5, 6, 7)).prompt(8, "x")
    assert len(prompt) == 8 and set(prompt) == {5, 6, 7}
    assert all((after - before) % 3 == 1 for before, after in pairwise(prompt))


def test_arrivals_are_a_seeded_poisson_process() -> None:
    options = BenchConfig(request_rate=10.0, num_requests=2000, input_len=("1-3",), output_len=("2",))
    arrivals = mix_of(options, Words(50, 0), 0)
    times = [at for at, _ in arrivals]
    assert times[0] == 0 and times == sorted(times)
    gaps = torch.tensor(times).diff()
    assert float(gaps.mean()) == pytest.approx(0.1, rel=0.1) and float(gaps.std()) == pytest.approx(0.1, rel=0.15)
    assert {len(request.prompt) for _, request in arrivals} == {1, 2, 3}
    assert [at for at, _ in mix_of(options, Words(50, 0), 1)] == times
    assert {at for at, _ in mix_of(replace(options, request_rate=inf), Words(50, 0), 0)} == {0.0}


SMALL = replace(TINY_LLAMA, num_layers=3, hidden_size=64, num_heads=8, head_dim=16, ffn_size=96, vocab_size=331)


def test_random_weights_are_the_same_in_whatever_slices_they_are_read() -> None:
    spec = replace(SMALL, hidden_size=4096, vocab_size=200)  # so that a row is drawn in several runs
    source = RandomSource(spec, "x", 5)
    for row in rows_of("llama"):
        if row.split is None:
            continue
        length, axis = axis_sizes(spec)[row.split], row.names.index(row.split)
        whole = source.read(row, 1, 0, length)
        for start, stop in ((0, 1), (length - 1, length), (1, length - 1), (length // 3, length // 2 + 1)):
            part = RandomSource(spec, "x", 5).read(row, 1, start, stop)
            assert torch.equal(part, whole.narrow(axis, start, stop - start)), row.name


def test_random_weights_differ_by_row_layer_and_seed_and_keep_their_scale() -> None:
    source = RandomSource(SMALL, "x", 0)
    rows = {row.name: row for row in rows_of("llama")}
    fc2 = rows["decoder.layers.{layer}.mlp.linear_fc2.weight"]
    first = source.read(fc2, 0, 0, 96)
    assert first.shape == (64, 96) and first.dtype == torch.bfloat16
    assert not torch.equal(first, source.read(fc2, 1, 0, 96))
    assert not torch.equal(first, RandomSource(SMALL, "x", 1).read(fc2, 0, 0, 96))
    assert float(first.float().std()) == pytest.approx(96**-0.5, rel=0.05)
    head = source.read(rows[HEAD], None, 0, 331).float()
    normed = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert float((head @ normed).std()) == pytest.approx(2 * float(normed.square().mean().sqrt()), rel=0.2)
    tied = RandomSource(replace(SMALL, tie_embeddings=True), "x", 0)
    assert torch.equal(tied.read(rows[HEAD], None, 0, 331), tied.read(rows[EMBEDDING], None, 0, 331))
    assert not torch.equal(source.read(rows[HEAD], None, 0, 331), source.read(rows[EMBEDDING], None, 0, 331))


def test_a_machine_that_changed_is_called_unsteady() -> None:
    calm = probes(Probe(10e9, 1e12), Probe(11e9, 1e12))
    assert calm["steady"] and calm["change"] == pytest.approx(0.1)
    assert calm["before"] == {"read_gb_per_s": 10.0, "matrix_gflop_per_s": 1000.0}
    assert not probes(Probe(10e9, 1e12), Probe(10e9, 0.8e12))["steady"]


def test_a_difference_is_found_where_it_is() -> None:
    task = batch_task(Shape(2, 3, 3), count_work(SMALL, 2), Words(9, 0))
    rates = {PREFILL: 6.0, DECODE: 4.0}
    ours = Run(rates, [1.0, 1.0], [0.5] * 4, [(1, 2, 3), (4, 5, 6)])
    theirs = replace(ours, rates={PREFILL: 3.0, DECODE: 1.0}, tokens=[(1, 2, 3), (4, 7, 6)])
    found = result(Measured(task, [ours], [theirs], [1e9], {}), Probe(1e9, 1e12))["hf"]
    assert (found["answers_with_the_same_tokens"], found["answers"]) == (1, 2)
    assert (found["tokens_before_a_difference"], found["tokens"]) == (4, 6)
    assert {name: ratio["median"] for name, ratio in found["ratios"].items()} == {PREFILL: 2.0, DECODE: 4.0}


def test_a_probe_reads_with_the_threads_of_all_ranks_and_gives_them_back() -> None:
    threads = torch.get_num_threads()
    machine = Machine(torch.device("cpu"), torch.float32, num_ranks=1)
    assert machine.read_rate() > 0 and torch.get_num_threads() == threads == machine.num_threads


def test_published_shapes_have_published_sizes() -> None:
    sizes = {"tinyllama-1.1b": 1.100e9, "qwen2.5-0.5b": 0.494e9, "qwen3-8b": 8.19e9, "mistral-7b-v0.3": 7.25e9}
    for name, size in sizes.items():
        assert count_parameters(find_shape(name, "bfloat16")) == pytest.approx(size, rel=2e-3), name


def test_experts_are_read_as_far_as_tokens_choose_them() -> None:
    spec = replace(TINY_LLAMA, family="mixtral", num_experts=8, experts_per_token=2, expert_ffn_size=5632)
    dense, work = count_work(TINY_LLAMA, 2), count_work(spec, 2)
    one = 22 * 3 * 2048 * 5632
    router = 22 * 8 * 2048
    assert work.experts is not None and work.experts.bytes_of_one == 2 * one
    assert work.weight_bytes == dense.weight_bytes - 2 * one + 2 * router
    assert work.linear_flops == dense.linear_flops + 2 * (one + router)
    assert work.decode_step(1, 0).num_bytes == pytest.approx(work.weight_bytes + 2 * 2 * one)
    assert work.decode_step(100, 0).num_bytes == pytest.approx(work.weight_bytes + 8 * 2 * one)
    stored = work.stored(0.75)
    assert (stored.weight_bytes, stored.linear_flops) == (round(0.75 * work.weight_bytes), work.linear_flops)
    assert stored.experts is not None and stored.experts.bytes_of_one == 1.5 * one
