"""The picture: how close the figures come to the roofline, and how latencies are spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindgen.commands.bench.bounds import Cost
from mindgen.commands.bench.machine import Probe
from mindgen.commands.bench.measure import Measured


def draw(path: Path, measured: list[Measured], results: list[dict[str, Any]], probe: Probe) -> None:
    """Writes a PNG: the roofline at the left, the distribution of latencies at the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _roofline(left, results, probe)
    _latencies(right, measured, results)
    figure.savefig(path, format="png", dpi=110)


def _roofline(axes: Any, results: list[dict[str, Any]], probe: Probe) -> None:
    points = [
        (rate["flop_per_byte"], rate["gflop_per_s"], f"{_label(entry)} {name.split('_')[0]}")
        for entry in results
        for name, rate in entry["rates"].items()
        if name != "requests_per_s"
    ]
    ridge = probe.matrix_rate / probe.read_rate
    low = min([ridge, *(x for x, _, _ in points)]) / 2
    high = max([ridge, *(x for x, _, _ in points)]) * 2
    roof = [x * probe.read_rate for x in (low, ridge)] + [probe.matrix_rate]
    axes.loglog([low, ridge, high], [rate / 1e9 for rate in roof], color="black", label=_roof_label(probe))
    for x, y, label in points:
        axes.loglog([x], [y], "o", label=label)
        axes.loglog([x, x], [y, _roof(x, probe)], ":", color="grey")
    axes.set(title="Roofline", xlabel="FLOP per byte read", ylabel="GFLOP/s")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize="small")


def _roof(intensity: float, probe: Probe) -> float:
    cost = Cost(1.0, intensity)
    return intensity / cost.seconds(probe.read_rate, probe.matrix_rate) / 1e9


def _roof_label(probe: Probe) -> str:
    return f"{probe.read_rate / 1e9:.1f} GB/s, {probe.matrix_rate / 1e9:.0f} GFLOP/s"


def _latencies(axes: Any, measured: list[Measured], results: list[dict[str, Any]]) -> None:
    """The share of tokens that came within a time."""
    for found, entry in zip(measured, results, strict=True):
        for who, runs, style in (("", found.ours, "-"), (" transformers", found.theirs, "--")):
            for what, values in (
                ("first token", sorted(value for run in runs for value in run.first_token)),
                ("between tokens", sorted(value for run in runs for value in run.gaps)),
            ):
                if values:
                    shares = [(number + 1) / len(values) for number in range(len(values))]
                    times = [value * 1e3 for value in values]
                    axes.step(times, shares, style, where="post", label=f"{_label(entry)}{who}: {what}")
    axes.set(title="Latency", xlabel="milliseconds", ylabel="share within", xscale="log", ylim=(0, 1.02))
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize="small")


def _label(entry: dict[str, Any]) -> str:
    if entry["kind"] == "serving":
        return f"{entry['num_requests']} requests"
    return f"{entry['batch_size']} x {entry['input_len']}+{entry['output_len']}"
