"""The README's commands, run as they stand there, with the demo model in the place of DIR."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = "examples/demo/model"
ELSEWHERE = ("launch.sh test", "NNODES=2")  # this test itself, and several machines: tests/test_launch.py


def commands() -> list[str]:
    """Every command of a `sh` block, continued lines joined, comments cut."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [line.split(" # ")[0].strip() for line in lines]
    return [line for line in found if line and not any(word in line for word in ELSEWHERE)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the converters of the README write, one after the other."""
    return tmp_path_factory.mktemp("readme")


def run(command: str, work: Path) -> subprocess.CompletedProcess[str]:
    for name in ("SHARDS", "OTHER", "BACK"):
        command = re.sub(rf"\b{name}\b", str(work / name.lower()), command)
    command = re.sub(r"\bDIR\b", DEMO, command)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environ = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    bash = ["bash", "-euo", "pipefail", "-c", command]
    return subprocess.run(bash, cwd=ROOT, env=environ, input="quit\n", capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_runs(command: str, work: Path) -> None:
    done = run(command, work)
    assert done.returncode == 0, done.stderr
    if "how are you?" in command and "chat" not in command.split():
        assert done.stdout.strip()
    if "--hf-chat-template" in command or command == "bash launch.sh":
        assert done.stdout.strip() in README, "the README shows another answer"
