"""Loading: what it takes of memory, and that reading ahead ends with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mindgen.model.build import build_stage
from mindgen.parallel.group import SingleGroup
from mindgen.parallel.topology import SINGLE
from mindgen.weights.huggingface import open_huggingface
from mindgen.weights.load import load_weights
from tests.weights.test_memory import write_origin

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys, torch
from pathlib import Path
from mindgen.layers.packed import can_pack
from mindgen.model.build import build_stage
from mindgen.parallel.group import SingleGroup
from mindgen.parallel.topology import SINGLE
from mindgen.weights.huggingface import open_huggingface
from mindgen.weights.load import load_weights
from tests.weights.measured import Peak, anonymous_memory

can_pack(torch.bfloat16)
source = open_huggingface(Path(sys.argv[1]))
before = anonymous_memory()
with Peak() as peak:
    model = build_stage(source.spec, SINGLE, SingleGroup(), torch.bfloat16, torch.device("cpu"))
    load_weights(model, source, SINGLE)
weights = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps({"weights": weights, "peak": peak.value - before, "after": anonymous_memory() - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_a_rank_takes_little_more_memory_than_its_weights(tmp_path: Path) -> None:
    write_origin(tmp_path, 1024, 16, 32000)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["weights"] > 400 << 20
    assert measured["peak"] <= 1.3 * measured["weights"], measured
    assert measured["after"] <= 1.3 * measured["weights"], measured


def test_nothing_reads_on_after_a_load_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_origin(tmp_path, 256, 1, 512)
    source = open_huggingface(tmp_path)
    model = build_stage(source.spec, SINGLE, SingleGroup(), torch.bfloat16, torch.device("cpu"))

    def fail(*_: object) -> torch.Tensor:
        raise ValueError("a damaged file")

    monkeypatch.setattr(source, "read", fail)
    with pytest.raises(ValueError, match="a damaged file"):
        load_weights(model, source, SINGLE)
    assert "read-ahead" not in [thread.name for thread in threading.enumerate()]
