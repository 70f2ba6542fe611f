"""What belongs to a checkpoint besides its weights: `config.json`, generation settings, the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mindgen.spec import ModelSpec
from mindgen.weights.config_json import config_from_spec, spec_from_config
from mindgen.weights.huggingface import inside, read_json
from mindgen.weights.manifest import FileRecord
from mindgen.weights.source import Source
from mindgen.weights.writers import write_bytes

_TOKENIZER = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that make up its tokenizer; never code."""
    names = list(_TOKENIZER) + sorted(path.name for path in folder.glob("*.tiktoken"))
    return [inside(folder, name) for name in names if (folder / name).exists()]


def text_source(tokenizer_name_or_path: str | None, tokenizer_model: str | None) -> Path | None:
    """The folder that flags name for text files, None if they name none. ValueError for one that does not exist."""
    if tokenizer_name_or_path is not None:
        if not Path(tokenizer_name_or_path).is_dir():
            raise ValueError(f"--tokenizer-name-or-path: {tokenizer_name_or_path} is not a folder")
        return Path(tokenizer_name_or_path)
    if tokenizer_model is None or tokenizer_model == "None":
        return None
    if not Path(tokenizer_model).is_file():
        raise ValueError(f"--tokenizer-model: there is no file {tokenizer_model}; leave it out, or say None")
    return Path(tokenizer_model).absolute().parent


def write_texts(
    target: Path, source: Source, spec: ModelSpec, named: Path | None, beside: Path | None
) -> dict[str, FileRecord]:
    """Writes `config.json` for `spec`, and copies of generation settings and tokenizer where there are any.

    The tokenizer is that of the folder `named` by flags, else the source's own, else that of the folder `beside` the
    target; settings are first of all the source's own.
    """
    folders = [folder for folder in (*source.text_folders, named, beside) if folder is not None]
    files = {"config.json": write_bytes(target / "config.json", _config(source.spec, spec, folders))}
    chosen = [tokenizer_files(folder) for folder in ([named] if named else []) + folders]
    copies = next((paths for paths in chosen if paths), []) + _first(folders, "generation_config.json")
    return files | {path.name: write_bytes(target / path.name, path.read_bytes()) for path in copies}


def _first(folders: list[Path], name: str) -> list[Path]:
    return [inside(folder, name) for folder in folders if (folder / name).exists()][:1]


def _config(before: ModelSpec, spec: ModelSpec, folders: list[Path]) -> bytes:
    """The `config.json` there is, as it is but for a dtype that was changed; a new one if none states this model."""
    for path in _first(folders, "config.json"):
        config = read_json(path)
        if spec_from_config(config, spec.dtype, str(path)) == spec:
            changed = {"dtype" if "dtype" in config else "torch_dtype": spec.dtype}
            return path.read_bytes() if spec.dtype == before.dtype else _dump(config | changed)
    return _dump(config_from_spec(spec))


def _dump(config: dict[str, Any]) -> bytes:
    return (json.dumps(config, indent=2) + "\n").encode()
