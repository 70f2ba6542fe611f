"""One set of tokenizer folders for all tests of `mindgen.text`; copy a folder before changing it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.text import folders

KINDS = ("llama2", "llama2_json", "llama2_older", "llama3", "qwen2", "qwen3")


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind of folder, by name."""
    root = tmp_path_factory.mktemp("tokenizers")
    llama2 = folders.llama2(root / "llama2")
    llama2_json = folders.llama2_with_json(root / "llama2_json", llama2)
    return {
        "llama2": llama2,
        "llama2_json": llama2_json,
        "llama2_older": folders.llama2_older(root / "llama2_older", llama2_json),
        "llama3": folders.llama3(root / "llama3"),
        "qwen2": folders.qwen2(root / "qwen2"),
        "qwen3": folders.qwen2(root / "qwen3", model_type="qwen3"),
    }


@pytest.fixture(scope="session")
def hugging_face(tokenizer_folders: dict[str, Path]) -> Callable[[str], Any]:
    """The outside judge: what AutoTokenizer makes of a folder."""
    from transformers import AutoTokenizer

    known: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in known:
            known[name] = AutoTokenizer.from_pretrained(str(tokenizer_folders[name]), local_files_only=True)
        return known[name]

    return get


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)
