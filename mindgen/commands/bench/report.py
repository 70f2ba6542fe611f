"""What was measured as plain values for JSON, and those as text. Every name says its unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite, isinf
from statistics import median
from typing import Any

from mindgen.commands.bench.bounds import Cost
from mindgen.commands.bench.machine import UNSTEADY, Probe
from mindgen.commands.bench.measure import DECODE, OUTPUT, PREFILL, REQUESTS, Limit, Measured, Run
from mindgen.commands.latency import Percentiles

_TITLES = {
    PREFILL: ("prefill", "tokens/s"),
    DECODE: ("decode", "tokens/s"),
    REQUESTS: ("requests", "requests/s"),
    OUTPUT: ("output", "tokens/s"),
}


def probes(before: Probe, after: Probe) -> dict[str, Any]:
    """Both probes and how far they differ."""
    change = before.change(after)
    return {"before": _probe(before), "after": _probe(after), "change": change, "steady": change <= UNSTEADY}


def _probe(probe: Probe) -> dict[str, float]:
    return {"read_gb_per_s": probe.read_rate / 1e9, "matrix_gflop_per_s": probe.matrix_rate / 1e9}


def result(measured: Measured, probe: Probe) -> dict[str, Any]:
    """One task: every rate with its bound by `probe` and the share reached, latencies, and transformers beside them."""
    task, runs = measured.task, measured.ours
    values: dict[str, Any] = {
        name: round(value, 6) if isinstance(value, float) and isfinite(value) else _plain(value)
        for name, value in task.about.items()
    }
    values["rates"] = {name: _rate(runs, name, limit, probe) for name, limit in task.limits.items()}
    values |= _latencies(runs)
    last = "p50" if task.is_serving else "p99"  # the bound of a batch is that of its last first token
    values["time_to_first_token_s"] |= _bounded(values["time_to_first_token_s"][last], task.first_token, probe)
    if task.gap is not None:
        values["inter_token_latency_s"] |= _bounded(values["inter_token_latency_s"]["p50"], task.gap, probe)
    values["read_gb_per_s"] = [rate / 1e9 for rate in measured.read_rates]
    values["scheduler"] = measured.scheduled
    if measured.theirs:
        values["hf"] = _comparison(measured)
    return values


def _plain(value: object) -> object:
    return "inf" if isinstance(value, float) and isinf(value) else value


def _rate(runs: Sequence[Run], name: str, limit: Limit, probe: Probe) -> dict[str, Any]:
    found = _spread([run.rates[name] for run in runs])
    bound = limit.amount / max(limit.seconds, _seconds(limit.cost, probe))
    by = "arrivals" if limit.seconds > _seconds(limit.cost, probe) else _bounded_by(limit.cost, probe)
    flops = limit.cost.flops / limit.amount
    return found | {
        "bound": bound,
        "bound_by": by,
        "share": found["median"] / bound,
        "flop_per_byte": limit.cost.intensity,
        "gflop_per_s": found["median"] * flops / 1e9,
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": median(values), "min": min(values), "max": max(values), "runs": list(values)}


def _seconds(cost: Cost, probe: Probe) -> float:
    return cost.seconds(probe.read_rate, probe.matrix_rate)


def _bounded(seconds: float, cost: Cost, probe: Probe) -> dict[str, float]:
    bound = _seconds(cost, probe)
    return {"bound": bound, "share": bound / seconds}


def _bounded_by(cost: Cost, probe: Probe) -> str:
    return "reading" if cost.num_bytes / probe.read_rate > cost.flops / probe.matrix_rate else "computing"


def _latencies(runs: Sequence[Run]) -> dict[str, dict[str, float | None]]:
    return {
        "time_to_first_token_s": _percentiles([value for run in runs for value in run.first_token]),
        "inter_token_latency_s": _percentiles([value for run in runs for value in run.gaps]),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return dict.fromkeys(("p50", "p90", "p99"))
    found = Percentiles.of(values)
    return {"p50": found.p50, "p90": found.p90, "p99": found.p99}


def _comparison(measured: Measured) -> dict[str, Any]:
    """Rates of transformers, ratios of neighbouring runs, and in how many answers all tokens are the same."""
    pairs = list(zip(measured.ours, measured.theirs, strict=True))
    answers = [pair for ours, theirs in pairs for pair in zip(ours.tokens, theirs.tokens, strict=True)]
    names = list(measured.task.limits)
    return {
        "rates": {name: _spread([run.rates[name] for run in measured.theirs]) for name in names},
        **_latencies(measured.theirs),
        "ratios": {name: _spread([ours.rates[name] / theirs.rates[name] for ours, theirs in pairs]) for name in names},
        "answers": len(answers),
        "answers_with_the_same_tokens": sum(ours == theirs for ours, theirs in answers),
        "tokens_before_a_difference": sum(_common(ours, theirs) for ours, theirs in answers),
        "tokens": sum(len(ours) for ours, _ in answers),
    }


def _common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens are the same before the first that is not."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((at for at, (our, their) in pairs if our != their), len(ours))


def text_of(report: dict[str, Any]) -> str:
    """The whole report for people."""
    lines = [*_machine_lines(report), *_memory_lines(report["memory"])]
    for entry in report["results"]:
        lines += ["", *_result_lines(entry)]
    return "\n".join(lines)


def _machine_lines(report: dict[str, Any]) -> Iterator[str]:
    model, run, found = report["model"], report["run"], report["probes"]
    yield f"model    {model['name']}: {model['parameters'] / 1e9:.3f} billion parameters, {run['dtype']}"
    yield (
        f"machine  {report['host']['device']}, {report['host']['processor']}; "
        f"tp {run['tensor_parallel_size']} x pp {run['pipeline_parallel_size']}, {run['num_threads']} threads in all"
    )
    if "transformers" in report["host"]:
        yield (
            f"beside   transformers {report['host']['transformers']}: one process on {report['host']['device']}, "
            f"{run['num_threads']} threads, prompts padded on the left"
        )
    for when in ("before", "after"):
        yield (
            f"{when:<8} reads {found[when]['read_gb_per_s']:.1f} GB/s, "
            f"multiplies {found[when]['matrix_gflop_per_s']:.0f} GFLOP/s; bounds take the better of the two probes"
        )
    if not found["steady"]:
        yield (
            f"unsteady: the probes differ by {found['change']:.0%}. The machine changed under the measurement: "
            "shares mislead, and only ratios of neighbouring runs count"
        )


def _memory_lines(memory: dict[str, Any]) -> Iterator[str]:
    for rank, held in enumerate(memory["ranks"]):
        gib = {name: "?" if size is None else f"{size / 2**30:.2f}" for name, size in held.items()}
        yield (
            f"rank {rank:<4}loaded {gib['loaded_rss_bytes']} GiB, {gib['loaded_anonymous_bytes']} anonymous, "
            f"peak {gib['loaded_peak_rss_bytes']}; at the end {gib['rss_bytes']}, {gib['anonymous_bytes']} anonymous"
        )
    if memory["num_ranks_not_seen"]:
        yield f"memory of {memory['num_ranks_not_seen']} ranks is not seen from here"
    if "device_peak_bytes" in memory:
        yield f"device   peak of rank 0 {memory['device_peak_bytes'] / 2**30:.2f} GiB"


def _result_lines(entry: dict[str, Any]) -> Iterator[str]:
    yield _title(entry)
    for name, rate in entry["rates"].items():
        yield (
            f"  {_TITLES[name][0]:<16}{_shown(rate, name)}, "
            f"bound {rate['bound']:.1f} by {rate['bound_by']}, share {rate['share']:.0%}"
        )
    yield from _latency_lines(entry)
    counts = entry["scheduler"]
    yield (
        f"  {'scheduler':<16}{counts['num_computed_tokens']} tokens computed, {counts['num_reused_tokens']} reused, "
        f"{counts['num_preemptions']} preemptions"
    )
    if "hf" in entry:
        yield "  transformers"
        yield from _comparison_lines(entry["hf"])


def _title(entry: dict[str, Any]) -> str:
    lengths = f"{entry['input_len']} tokens in, {entry['output_len']} out"
    if entry["kind"] == "serving":
        return f"{entry['num_requests']} requests, {entry['request_rate']} a second, {lengths}"
    return f"batch {entry['batch_size']}, {lengths}"


def _shown(rate: dict[str, Any], name: str) -> str:
    digits = 3 if name == REQUESTS else 1
    low, middle, high = (f"{rate[key]:.{digits}f}" for key in ("min", "median", "max"))
    return f"{middle} {_TITLES[name][1]} ({low} .. {high} in {len(rate['runs'])} runs)"


def _latency_lines(entry: dict[str, Any]) -> Iterator[str]:
    for title, key in (("first token", "time_to_first_token_s"), ("between tokens", "inter_token_latency_s")):
        found = entry[key]
        if found["p50"] is None:
            continue
        shown = ", ".join(f"{name} {found[name] * 1e3:.1f}" for name in ("p50", "p90", "p99"))
        if "bound" in found:
            shown += f", bound {found['bound'] * 1e3:.1f}, share {found['share']:.0%}"
        yield f"  {title:<16}{shown} (ms)"


def _comparison_lines(found: dict[str, Any]) -> Iterator[str]:
    for name, rate in found["rates"].items():
        ratio = found["ratios"][name]
        yield (
            f"  {_TITLES[name][0]:<16}{_shown(rate, name)}; "
            f"mindgen is {ratio['median']:.2f} x ({ratio['min']:.2f} .. {ratio['max']:.2f})"
        )
    yield from _latency_lines(found)
    yield (
        f"  all tokens are the same in {found['answers_with_the_same_tokens']} of {found['answers']} answers; "
        f"{found['tokens_before_a_difference']} of {found['tokens']} tokens come before the first difference"
    )
