"""Damaged copies of checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def without_tensor(folder: Path, target: Path, name: str) -> Path:
    """A copy of a Hugging Face folder of one file that lacks a tensor."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    del tensors[name]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def with_nan(folder: Path, target: Path, name: str) -> Path:
    """A copy of a Hugging Face folder in which one tensor holds no numbers."""
    shutil.copytree(folder, target)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name].fill_(float("nan"))
            save_file(tensors, path, metadata={"format": "pt"})
    return target
