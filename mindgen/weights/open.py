"""Opens a checkpoint of any kind by what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindgen.weights.flags import check_flags
from mindgen.weights.huggingface import is_huggingface, open_huggingface
from mindgen.weights.megatron import open_megatron
from mindgen.weights.megatron_directory import is_megatron
from mindgen.weights.source import Source


def open_source(path: Path, flags: dict[str, Any] | None = None, tokenizer_path: Path | str | None = None) -> Source:
    """A Hugging Face folder or a Megatron directory of any TP x PP.

    flags: given architecture flags (`given_flags` of flags.py). They are checked, and fill in what a Megatron
    checkpoint does not state. tokenizer_path: a folder whose `config.json` counts where such a checkpoint has none.
    Raises ValueError for a path that holds neither, for damage, and for flags that contradict the checkpoint.
    """
    if not path.is_dir():
        problem = "is not a folder" if path.exists() else "does not exist"
        raise ValueError(f"{path} {problem}; name a folder that holds weights")
    kinds = (is_huggingface(path), is_megatron(path))
    if kinds == (True, True):
        raise ValueError(
            f"{path} holds both Hugging Face weights and a Megatron checkpoint; name the folder of the iteration "
            "(iter_0000001) or move one of them"
        )
    if kinds == (False, False):
        raise ValueError(
            f"{path} holds no weights: neither model.safetensors (Hugging Face) nor latest_checkpointed_iteration.txt "
            "(Megatron)"
        )
    config_folder = Path(tokenizer_path) if tokenizer_path else None
    source: Source = open_huggingface(path) if kinds[0] else open_megatron(path, flags, config_folder)
    check_flags(source.spec, flags or {}, str(path))
    return source
