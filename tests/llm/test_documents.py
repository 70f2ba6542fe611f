"""The Python of the documents, run as it stands there, with the demo model in the place of DIR."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.llm.test_programs import ROOT, environment

DEMO = str(ROOT / "examples" / "demo" / "model")


@pytest.mark.parametrize("name", ["README.md", "docs/python.md"])
def test_the_python_of_a_document_runs(name: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    script = "\n".join(blocks).replace('"DIR"', repr(DEMO))
    environ = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-"], input=script, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "I am fine, thank you!" in done.stdout and len(blocks) >= 1
