"""The model that ships: its size, its shape, its two tokenizers, and that its trainer runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mindgen.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo"
TEXTS = ["how are you?", "def f(a, b):\n    return a + b\n", "\tx = 'é☃😀'\n\n\n        y", "  two  spaces  "]


def test_it_is_small_enough_to_ship() -> None:
    files = subprocess.run(["git", "ls-files", "-z", str(DEMO)], cwd=ROOT, capture_output=True, text=True, check=True)
    sizes = [(ROOT / name).stat().st_size for name in files.stdout.split("\0") if name]
    assert sum(sizes) <= 12_000_000


def test_tp_4_and_pp_4_divide_it() -> None:
    config = json.loads((DEMO / "model" / "config.json").read_text())
    heads = (config["num_attention_heads"], config["num_key_value_heads"], config["max_position_embeddings"])
    assert heads == (8, 4, 2048)
    assert config["num_hidden_layers"] % 4 == 0 and config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("text", TEXTS)
def test_both_tokenizer_files_give_the_same_ids(text: str) -> None:
    folder = load_tokenizer(DEMO / "model")
    file = load_tokenizer(DEMO / "model", "SentencePiece", DEMO / "model" / "tokenizer.model")
    assert folder.encode(text) == file.encode(text)
    assert folder.decode(folder.encode(text)) == text == file.decode(file.encode(text))


@pytest.mark.full
def test_the_trainer_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(DEMO / "train.py"), "--minutes", "0.2", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=280)
    assert (tmp_path / "model" / "model.safetensors").exists()
