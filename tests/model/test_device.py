"""The whole way of a request on a device that is not the CPU gives what the CPU gives: see accelerator.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mindgen.__main__ import main
from mindgen.config import EngineConfig
from mindgen.engine.request import Request, SamplingParams
from mindgen.engine.runner import Runner
from mindgen.parallel.world import World
from mindgen.startup.opened import Opened
from mindgen.startup.ready import describe, make_engine, make_runner
from mindgen.weights.open import open_source
from tests.checkpoints import prompts
from tests.model.accelerator import CPU, DEVICE, DeviceModule, OnDevice
from tests.model.test_graphs import DENSE, ROUNDING, Said

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "model"
EVERY_WAY = [
    SamplingParams(max_new_tokens=6, temperature=0.0, logprobs=2, prompt_logprobs=1),
    SamplingParams(max_new_tokens=9, seed=5, n=2, logprobs=0, top_k=5, repetition_penalty=1.2),
    SamplingParams(max_new_tokens=7, seed=6, top_p=0.8, min_p=0.01, temperature=0.8, logprobs=3),
    SamplingParams(max_new_tokens=5, temperature=0.0, num_beams=3, n=2),
    SamplingParams(max_new_tokens=8, seed=7, frequency_penalty=0.5, logit_bias={3: 1.0}, min_new_tokens=4, logprobs=0),
    SamplingParams(max_new_tokens=6, seed=8, best_of=3, top_k=50, top_p=0.9, prompt_logprobs=0),
]


def config_of(folder: Path, **options: object) -> EngineConfig:
    return EngineConfig(str(folder), dtype="fp32", block_size=8, max_batch_tokens=48, kv_cache_memory=0.004, **options)  # type: ignore[arg-type]


def answers(config: EngineConfig, device: torch.device) -> tuple[Said, Runner]:
    source = open_source(Path(config.model))
    runner = make_runner(config, source, World(), device, 1)
    found: Said = {}
    requests = [
        Request(number, tuple(ids), way) for number, (ids, way) in enumerate(zip(prompts(6), EVERY_WAY, strict=True))
    ]
    for output in make_engine(Opened(config, source), runner).run(requests):
        said = found.setdefault((output.request_id, output.index), [])
        said += [
            (one.token_id, one.logprob or 0.0) for one in (*(output.prompt_logprobs or ()), *(output.logprobs or ()))
        ]
        said += [(token, 0.0) for token in output.token_ids]
    return found, runner


def check(found: Said, expected: Said) -> None:
    assert found.keys() == expected.keys()
    for key, said in expected.items():
        assert [token for token, _ in found[key]] == [token for token, _ in said]
        assert [logprob for _, logprob in found[key]] == pytest.approx([logprob for _, logprob in said], abs=ROUNDING)


@pytest.mark.usefixtures("accelerator")
def test_devices_do_not_meet() -> None:
    """Else the tests below would show nothing."""
    there, here = torch.arange(3, device=DEVICE), torch.arange(3)
    assert (there + 1).tolist() == [1, 2, 3] and there[here].device == DEVICE and there.cpu().tolist() == [0, 1, 2]
    mixes = (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: here.index_add_(0, there, here),
        lambda: here[there],
        lambda: here.index_put_((here,), there),
        lambda: there.index_put_((here,), here),
    )
    for mix in mixes:
        with pytest.raises(AssertionError, match="has tensors on the CPU and on the device"):
            mix()


def test_every_family_computes_there(case: str, checkpoint: Callable[[str], Path], accelerator: DeviceModule) -> None:
    """Weights, prompts, chunks, decodes and samplers, eagerly."""
    config = config_of(checkpoint(case))
    found, runner = answers(config, DEVICE)
    assert runner.cache is not None and isinstance(runner.cache.keys[0], OnDevice)
    assert runner.backend.name == "sdpa" and not accelerator.num_captured
    check(found, answers(replace(config, attention="sdpa"), CPU)[0])


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("gemma2", {"use_kv_cache": False}),
        ("bloom", {"use_kv_cache": False}),
        ("llama31", {"attention": "reference"}),
        ("bloom", {"attention": "reference"}),
        ("llama31", {"capture_graphs": True}),
        ("phi35", {"capture_graphs": True}),
        ("gpt2", {"capture_graphs": True}),
        ("mixtral", {"capture_graphs": True}),
    ],
)
def test_other_ways_compute_there(
    case: str, options: dict[str, object], checkpoint: Callable[[str], Path], accelerator: DeviceModule
) -> None:
    config = config_of(checkpoint(case), **options)
    found, runner = answers(config, DEVICE)
    check(found, answers(replace(config, attention="reference", capture_graphs=False), CPU)[0])
    captures = config.capture_graphs and case in DENSE
    assert (accelerator.num_captured > 0) == captures
    if config.capture_graphs:
        said = (
            "graphs: steps of decoding are captured, and replayed" if captures else "graphs: none are captured: which"
        )
        assert describe(Opened(config, open_source(Path(config.model))), runner)[-1].startswith(said)


def test_commands_run_there(tmp_path: Path, capfd: pytest.CaptureFixture[str], accelerator: DeviceModule) -> None:
    """generate, predict with graphs, and the benchmark with its bounds, which are the device's."""
    asked = ["--load", str(DEMO), "--dtype", "fp32", "--prompt", "def add(a, b):", "--max-new-tokens", "12"]
    assert main(["generate", *asked, "--device", "cpu"]) == 0
    expected = capfd.readouterr().out
    assert main(["generate", *asked, "--device", "cuda"]) == 0
    assert capfd.readouterr().out == expected
    (tmp_path / "in").write_text('{"src": "def add(a, b):"}\n')
    files = ["--data_file", str(tmp_path / "in"), "--output_file", str(tmp_path / "out"), "--quiet"]
    asked = ["--model_name_or_path", str(DEMO), "--dtype", "fp32", "--chat_template", "none", "--max_length", "12"]
    assert main(["predict", *asked, *files, "--device", "gpu", "--mode", "static"]) == 0
    said = capfd.readouterr().err
    assert "graphs: steps of decoding are captured, and replayed" in said and "graphs: 8 steps were replayed\n" in said
    assert json.loads((tmp_path / "out").read_text())["output"] + "\n" == expected and accelerator.num_captured == 1
    sizes = ["--batch-size", "2", "--input-len", "9", "--output-len", "4", "--repeats", "1"]
    report = tmp_path / "report.json"
    assert main(["bench", "--load", str(DEMO), "--device", "cuda", *sizes, "--json", str(report)]) == 0
    assert json.loads(report.read_text())["host"]["device"] == "a device that is not here"
