"""Reads `tokenizer.json` without transformers, whose import takes seconds, where the result is surely the same.

transformers does more than open the file: it adds tokens from `tokenizer_config.json`, and some of its classes keep
only the vocabulary and merges of the file and put a pipeline of their own around them. So a folder is read here only
if nothing would be added, and if the pipeline in the file is the one that the class builds. Everything else,
every setting that is not known here included, is left to transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from mindgen.text.folder import TokenizerFolder, is_library_failure, read_tokenizer_json
from mindgen.text.tokenizer import LoadedTokenizer

# Model types whose tokenizer class transformers takes from tokenizer_config.json; None: no config.json.
MODEL_TYPES = (None, "llama", "mistral", "qwen2", "qwen3")

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Settings with no effect on tokens or text (as we ask for them), and those that have none at the values given.
HARMLESS_SETTINGS = frozenset(
    (
        *("tokenizer_class", "chat_template", "added_tokens_decoder", "add_bos_token", "add_eos_token", "legacy"),
        *("clean_up_tokenization_spaces", "model_max_length", "model_input_names", "padding_side", "truncation_side"),
        *("use_default_system_prompt", "spaces_between_special_tokens", "backend", "is_local", "local_files_only"),
        *("name_or_path", "transformers_version", "additional_special_tokens", "extra_special_tokens", *NAMED_TOKENS),
    )
)
HARMLESS_VALUES: Mapping[str, tuple[Any, ...]] = {
    "errors": ("replace",),
    "split_special_tokens": (False, None),
    "sp_model_kwargs": ({}, None),
    "add_prefix_space": (None,),
}


def load_plain_tokenizer_json(folder: TokenizerFolder) -> LoadedTokenizer | None:
    """The tokenizer, or None where transformers has to decide. ValueError names a damaged file."""
    if not folder.has("tokenizer.json") or unplain_setting(folder) is not None:
        return None
    path = folder.path / "tokenizer.json"
    text, parsed = read_tokenizer_json(path)
    file = TokenizerFile(parsed, folder.tokenizer_config, folder.model_type)
    if _difference(file) is not None:
        return None
    tokenizer = _rust_tokenizer(text, path)
    if not _writes_stated_ends(tokenizer, file):
        return None
    return LoadedTokenizer(
        vocabulary=JsonVocabulary(tokenizer),
        source=str(folder.path),
        special_tokens=file.named_tokens,
        chat_templates=folder.chat_templates,
    )


def _difference(file: TokenizerFile) -> str | None:
    try:
        return file.difference()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"malformed: {error}"  # transformers will say what is wrong with it


def unplain_setting(folder: TokenizerFolder) -> str | None:
    """The first reason, in words, that the files beside `tokenizer.json` ask for more than that file says."""
    config = folder.tokenizer_config
    if folder.model_type not in MODEL_TYPES:
        return f"model type {folder.model_type!r}"
    if "added_tokens_decoder" not in config:
        for name in ("special_tokens_map.json", "added_tokens.json"):
            if folder.has(name):
                return f"{name} adds to tokenizer_config.json"
    if folder.has("tekken.json"):
        return "tekken.json"
    for name, value in config.items():
        if name in HARMLESS_VALUES and value in HARMLESS_VALUES[name]:
            continue
        if name not in HARMLESS_SETTINGS and not _is_ignored_prefix_space(config, name):
            return f"tokenizer_config.json sets {name!r}"
    return None


def _is_ignored_prefix_space(config: Mapping[str, Any], name: str) -> bool:
    """Each class knows one value of `add_prefix_space` as its own: what its pipeline does anyway."""
    usual = {"LlamaTokenizer": True, "Qwen2Tokenizer": False}
    return name == "add_prefix_space" and config[name] is usual.get(tokenizer_class(config))


def tokenizer_class(config: Mapping[str, Any]) -> str:
    """The class that the config names, in the spelling without `Fast`."""
    return str(config.get("tokenizer_class", "")).removesuffix("Fast")


LLAMA_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}

QWEN_SPLIT = {
    "type": "Split",
    "pattern": {
        "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    },
    "behavior": "Isolated",
    "invert": False,
}


@dataclass(frozen=True)
class TokenizerFile:
    """The parsed `tokenizer.json` beside the `tokenizer_config.json` it is used with."""

    json: Mapping[str, Any]
    config: Mapping[str, Any]
    model_type: str | None

    @cached_property
    def named_tokens(self) -> dict[str, str]:
        """`bos_token` and the like, as templates see them."""
        stated = {name: self.config[name] for name in NAMED_TOKENS if self.config.get(name) is not None}
        return {name: token["content"] if isinstance(token, dict) else token for name, token in stated.items()}

    @cached_property
    def built_as(self) -> str:
        """`file` where the file's own pipeline is used, else the class that builds one around the vocabulary."""
        name = tokenizer_class(self.config)
        if name == "Qwen2Tokenizer" or self.model_type == "qwen2":
            return "Qwen2Tokenizer"
        byte_level = '"ByteLevel"' in json.dumps([self.json.get("pre_tokenizer"), self.json.get("decoder")])
        return "LlamaTokenizer" if name == "LlamaTokenizer" and not byte_level else "file"

    def difference(self) -> str | None:
        """What transformers would do differently from the file, in words; None where nothing."""
        name = tokenizer_class(self.config)
        if name not in ("PreTrainedTokenizer", "TokenizersBackend", "LlamaTokenizer", "Qwen2Tokenizer"):
            return f"tokenizer class {name!r}"
        if name == "LlamaTokenizer" and self.model_type not in (None, "llama", "mistral"):
            return f"LlamaTokenizer for model type {self.model_type!r}"
        if self.built_as == "LlamaTokenizer" and not self._is_llama_pipeline():
            return "not the pipeline of LlamaTokenizer"
        if self.built_as == "Qwen2Tokenizer" and not self._is_qwen_pipeline():
            return "not the pipeline of Qwen2Tokenizer"
        return self._token_difference()

    def _token_difference(self) -> str | None:
        for name in CLASS_DEFAULTS.get(self.built_as, ()):
            if name not in self.config:
                return f"the class's default {name}"
        added = {token["id"]: token for token in self.json.get("added_tokens", ())}
        for token_id, token in self.config.get("added_tokens_decoder", {}).items():
            if {**token, "id": int(token_id)} != added.get(int(token_id)):
                return f"added token {token_id}"
        plain = {token["content"] for token in added.values() if _is_plain_special(token)}
        for token in [*self.named_tokens.values(), *self._extra_tokens()]:
            if not isinstance(token, str) or token not in plain:
                return f"special token {token!r}"
        return None

    def _extra_tokens(self) -> list[Any]:
        stated = [self.config.get(name) or [] for name in ("additional_special_tokens", "extra_special_tokens")]
        return [token for tokens in stated for token in (tokens if isinstance(tokens, list) else [tokens])]

    def _is_llama_pipeline(self) -> bool:
        model = self.json["model"]
        scheme = "always" if self.config.get("legacy") else "first"
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        # With all 256 bytes in the vocabulary nothing is unknown, so it does not matter how unknowns are written.
        return (
            _is_plain_bpe(model)
            and model.get("byte_fallback") is True
            and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
            and self.json.get("normalizer") is None
            and self.json.get("pre_tokenizer") == metaspace
            and self.json.get("decoder") == LLAMA_DECODER
        )

    def _is_qwen_pipeline(self) -> bool:
        model = self.json["model"]
        splits = self.json.get("pre_tokenizer") or {}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        return (
            _is_plain_bpe(model)
            and not model.get("byte_fallback")
            and not model.get("fuse_unk")
            and model.get("unk_token") is None
            and self.json.get("normalizer") == {"type": "NFC"}
            and splits.get("type") == "Sequence"
            and [_without_offsets(step) for step in splits.get("pretokenizers", ())] == [QWEN_SPLIT, byte_level]
            and (self.json.get("decoder") or {}).get("type") == "ByteLevel"
        )


# Tokens that a class makes up where tokenizer_config.json does not state them, be it as null.
CLASS_DEFAULTS: Mapping[str, tuple[str, ...]] = {
    "LlamaTokenizer": ("bos_token", "eos_token", "unk_token"),
    "Qwen2Tokenizer": ("eos_token", "unk_token", "pad_token"),
}


def _is_plain_bpe(model: Mapping[str, Any]) -> bool:
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    return model.get("type") == "BPE" and not any(model.get(name) for name in odd)


def _is_plain_special(token: Mapping[str, Any]) -> bool:
    odd = ("single_word", "lstrip", "rstrip", "normalized")
    return bool(token["special"]) and not any(token[flag] for flag in odd)


def _without_offsets(step: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in step.items() if name != "trim_offsets"}


def _writes_stated_ends(tokenizer: RustTokenizer, file: TokenizerFile) -> bool:
    """Whether BOS and EOS are added as `tokenizer_config.json` says; some releases ask the file, some the config."""
    named = {name: tokenizer.token_to_id(token) for name, token in file.named_tokens.items()}
    ids = tokenizer.encode("").ids
    for name in ("bos", "eos"):
        stated = file.config.get(f"add_{name}_token", True if (name, file.built_as) == LLAMA_BOS else None)
        if stated is not None and stated != (named.get(f"{name}_token") in ids):
            return False
    return True


LLAMA_BOS = ("bos", "LlamaTokenizer")  # that class adds BOS unless it is told otherwise


def _rust_tokenizer(text: str, path: Path) -> RustTokenizer:
    try:
        tokenizer = RustTokenizer.from_str(text)
    except BaseException as error:
        if not is_library_failure(error):
            raise
        raise ValueError(f"{path} is damaged: {str(error)[:500]}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class JsonVocabulary:
    """A `Vocabulary` over the `tokenizers` library."""

    def __init__(self, tokenizer: RustTokenizer) -> None:
        self._tokenizer = tokenizer
        self.size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)
