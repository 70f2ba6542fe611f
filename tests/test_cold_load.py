"""tools/cold_load.py, whose figures docs/benchmarks.md has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/cold_load.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_every_way_is_timed() -> None:
    done = run("examples/demo/model", "--turns", "1")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["mindgen", "transformers", "plain"]
    assert all(float(line[1]) > 0 and line[2] == "s" for line in lines) and "1.00 x, RssAnon" in done.stdout


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    done = run(str(tmp_path))
    assert done.returncode == 2 and f"{tmp_path} holds no .safetensors files" in done.stderr
