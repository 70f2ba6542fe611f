"""Tokenizers as transformers reads them: any kind of Hugging Face folder, at the price of a slow import."""

from __future__ import annotations

from typing import Any

from mindgen.text.families import unread_class
from mindgen.text.folder import (
    MAX_CONFIG_BYTES,
    MAX_VOCABULARY_BYTES,
    TokenizerFolder,
    is_library_failure,
    read_json,
    read_tokenizer_json,
)
from mindgen.text.tokenizer import LoadedTokenizer


def load_with_transformers(folder: TokenizerFolder, use_fast: bool = True) -> LoadedTokenizer:
    """Reads the folder with AutoTokenizer; remote code stays off. ValueError names the folder or the damaged file."""
    _check_json_files(folder)
    tokenizer = _auto_tokenizer(folder, use_fast)
    return LoadedTokenizer(
        vocabulary=TransformersVocabulary(tokenizer),
        source=str(folder.path),
        special_tokens={name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        chat_templates=folder.chat_templates,
    )


def _check_json_files(folder: TokenizerFolder) -> None:
    """Damage is easier to explain here than from an exception of transformers."""
    limits = {
        "vocab.json": MAX_VOCABULARY_BYTES,
        "tokenizer_config.json": MAX_CONFIG_BYTES,
        "config.json": MAX_CONFIG_BYTES,
        "special_tokens_map.json": MAX_CONFIG_BYTES,
        "added_tokens.json": MAX_CONFIG_BYTES,
    }
    if folder.has("tokenizer.json"):
        read_tokenizer_json(folder.path / "tokenizer.json")
    for name, limit in limits.items():
        if folder.has(name):
            read_json(folder.path / name, limit)


def _auto_tokenizer(folder: TokenizerFolder, use_fast: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder.path), trust_remote_code=False, local_files_only=True, use_fast=use_fast
        )
    except BaseException as error:
        if not is_library_failure(error):
            raise
        reason = unread_class(folder) or f"{type(error).__name__}: {str(error)[:500]}"
        raise ValueError(f"transformers cannot read the tokenizer in {folder.path}: {reason}") from error


class TransformersVocabulary:
    """A `Vocabulary` over a transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.size = max(len(tokenizer), 1 + max(tokenizer.added_tokens_decoder, default=-1))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: list[int]) -> str:
        # What the model wrote, without the "clean-up" that removes spaces before punctuation.
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.convert_tokens_to_ids(token)  # the id of unk for what it does not know
        if found is None or self._tokenizer.convert_ids_to_tokens(found) != token:
            return None
        return found
