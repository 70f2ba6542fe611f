"""Reads a SentencePiece `tokenizer.model` with the sentencepiece library itself, as Megatron does.

A `tokenizer_config.json` beside it is honoured: added tokens, BOS and EOS, the chat template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from mindgen.text.families import Family, stated_family
from mindgen.text.folder import MAX_CONFIG_BYTES, MAX_VOCABULARY_BYTES, TokenizerFolder, read_bytes, read_json
from mindgen.text.tokenizer import LoadedTokenizer

# Appended to a serialized model this sets normalizer_spec.add_dummy_prefix to false: in the protobuf
# encoding a later field is merged over an earlier one.
WITHOUT_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


def load_sentencepiece(path: Path, add_bos: bool) -> LoadedTokenizer:
    """The tokenizer of a SentencePiece model file.

    `add_bos` is whether text starts with BOS where no tokenizer_config.json beside the file says so.
    Raises ValueError, naming the file, for one that is damaged or not a SentencePiece model.
    """
    folder = TokenizerFolder(path.parent)
    config = folder.tokenizer_config
    model = PieceModel(read_bytes(path, MAX_VOCABULARY_BYTES), str(path))
    special_tokens = _special_tokens(model.processor, config)
    family = stated_family(folder)
    tokens = _added_tokens(folder, model.processor, set(special_tokens.values()))
    tokens += _family_tokens(family, model.processor.get_piece_size())
    # The classes that are code beside a model hand every part of a text between special tokens to SentencePiece anew.
    everywhere = bool(config.get("legacy")) if family is None else True
    added = {token.content: token for token in tokens}
    vocabulary = PieceVocabulary(model, added, everywhere)
    vocabulary.prefix = _stated_id(vocabulary, special_tokens, "bos_token", config.get("add_bos_token", add_bos))
    vocabulary.suffix = _stated_id(vocabulary, special_tokens, "eos_token", config.get("add_eos_token", False))
    if family is None:
        return LoadedTokenizer(vocabulary, str(path), special_tokens, folder.chat_templates)
    if family.prefix:
        vocabulary.prefix = [added[token].id for token in family.prefix]
    return LoadedTokenizer(
        vocabulary, str(path), special_tokens, folder.chat_templates, family.ends, family.prompt_types
    )


def _family_tokens(family: Family | None, first_id: int) -> list[AddedToken]:
    if family is None:
        return []
    return [
        AddedToken(token, first_id + number, special=True, after="[gMASK]" if token in family.words else "")
        for number, token in enumerate(family.special)
    ]


def puts_space_first(path: Path) -> bool:
    """Whether the model reads `a` as ` a` at the beginning of a text. ValueError for a file that is no model."""
    processor = PieceModel(read_bytes(path, MAX_VOCABULARY_BYTES), str(path)).processor
    pieces: list[str] = processor.encode("a", out_type=str)
    return "".join(pieces).startswith("▁")


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before SentencePiece sees it; `strip_*` eats the spaces beside it.

    after: what must stand directly before it in the text, for tokens that look like a word.
    """

    content: str
    id: int
    special: bool
    strip_left: bool = False
    strip_right: bool = False
    after: str = ""


class PieceModel:
    """The two readings of one model file: with the space that SentencePiece puts before a text, and without it."""

    def __init__(self, content: bytes, path: str) -> None:
        self._content = content
        self.processor = self._load(content, path)

    @cached_property
    def without_prefix(self) -> SentencePieceProcessor:
        return self._load(self._content + WITHOUT_DUMMY_PREFIX, "the model without its prefix")

    @staticmethod
    def _load(content: bytes, path: str) -> SentencePieceProcessor:
        processor = SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(content)
            num_pieces = processor.get_piece_size()
        except Exception as error:  # the library raises RuntimeError, the types differ between its releases
            raise ValueError(
                f"{path} is not a SentencePiece model, or damaged (a tiktoken file, as Llama 3 has, is read from its "
                f"Hugging Face folder with --tokenizer-type PretrainedFromHF): {str(error)[:200]}"
            ) from error
        if not num_pieces:
            raise ValueError(f"{path} is not a SentencePiece model, or damaged: it has no pieces")
        return processor


class PieceVocabulary:
    """A `Vocabulary` over a SentencePiece model and the tokens added to it.

    Special tokens written out in a text are those tokens, and only the beginning of a text gets SentencePiece's
    leading space; with `prefix_everywhere` the text after every special token does (transformers calls that legacy).
    """

    def __init__(self, model: PieceModel, added: Mapping[str, AddedToken], prefix_everywhere: bool) -> None:
        self._model = model
        self._processor = model.processor
        self._added = added
        self._prefix_everywhere = prefix_everywhere
        self._num_pieces: int = model.processor.get_piece_size()
        self._by_id = {token.id: token for token in added.values()}
        self._split = re.compile("|".join(_pattern(added[text]) for text in sorted(added, key=len, reverse=True)))
        self.size = max(self._num_pieces, 1 + max(self._by_id, default=-1))
        self.prefix: list[int] = []
        self.suffix: list[int] = []

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = self._encode_with_added(text)
        return [*self.prefix, *ids, *self.suffix] if add_special_tokens else ids

    def _encode_with_added(self, text: str) -> list[int]:
        ids: list[int] = []
        position = 0
        for match in self._split.finditer(text) if self._added else ():
            ids += self._encode_pieces(text[position : match.start()], at_start=position == 0)
            ids.append(self._added[match[match.lastindex or 0]].id)
            position = match.end()
        return ids + self._encode_pieces(text[position:], at_start=position == 0)

    def _encode_pieces(self, text: str, at_start: bool) -> list[int]:
        if not text:
            return []
        with_prefix = at_start or self._prefix_everywhere
        processor = self._processor if with_prefix else self._model.without_prefix
        ids: list[int] = processor.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        pieces = [self._piece(token) for token in ids]
        text: str = self._processor.decode_pieces([piece for piece in pieces if piece is not None])
        return text

    def _piece(self, token: int) -> str | None:
        """What the decoder is given for an id; None for what is not shown: special tokens and gaps."""
        added = self._by_id.get(token)
        if added is not None:
            return None if added.special else added.content
        if token >= self._num_pieces:
            return None
        piece: str = self._processor.id_to_piece(token)
        return piece

    def token_to_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token].id
        found: int = self._processor.piece_to_id(token)  # the id of unk for what it does not know
        return found if self._processor.id_to_piece(found) == token else None


def _pattern(token: AddedToken) -> str:
    """Matches the token with the spaces that it eats; its one group is the token alone."""
    before, after = (r"\s*" if strips else "" for strips in (token.strip_left, token.strip_right))
    condition = f"(?<={re.escape(token.after)})" if token.after else ""
    return f"{before}{condition}({re.escape(token.content)}){after}"


def _is_special(processor: SentencePieceProcessor, token: int) -> bool:
    return bool(processor.is_control(token) or processor.is_unknown(token))


def _special_tokens(processor: SentencePieceProcessor, config: Mapping[str, Any]) -> dict[str, str]:
    """Names as chat templates use them: the config's where it states them, else the model's own."""
    own = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    tokens = {name: processor.id_to_piece(token) for name, token in own.items() if token >= 0}
    for name in (*own, "pad_token"):
        stated = config.get(name)
        if stated is not None:
            tokens[name] = str(stated["content"] if isinstance(stated, dict) else stated)
    return tokens


def _added_tokens(folder: TokenizerFolder, processor: SentencePieceProcessor, named: set[str]) -> list[AddedToken]:
    own = [
        AddedToken(processor.id_to_piece(token), token, special=True)
        for token in range(processor.get_piece_size())
        if _is_special(processor, token)
    ]
    return own + (_decoder_tokens(folder) or _legacy_added_tokens(folder, named))


def _decoder_tokens(folder: TokenizerFolder) -> list[AddedToken]:
    stated = folder.tokenizer_config.get("added_tokens_decoder") or {}
    try:
        return [
            AddedToken(
                token["content"],
                int(token_id),
                bool(token.get("special")),
                bool(token.get("lstrip")),
                bool(token.get("rstrip")),
            )
            for token_id, token in stated.items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        where = folder.path / "tokenizer_config.json"
        raise ValueError(f"{where} is damaged: 'added_tokens_decoder' cannot be read: {error!r}") from error


def _legacy_added_tokens(folder: TokenizerFolder, named: set[str]) -> list[AddedToken]:
    """`added_tokens.json`, which older folders have: token to id."""
    if not folder.has("added_tokens.json"):
        return []
    stated = read_json(folder.path / "added_tokens.json", MAX_CONFIG_BYTES)
    if not all(type(token_id) is int for token_id in stated.values()):
        raise ValueError(f"{folder.path / 'added_tokens.json'} is damaged: it must map tokens to ids")
    return [AddedToken(content, token_id, special=content in named) for content, token_id in stated.items()]


def _stated_id(vocabulary: PieceVocabulary, special_tokens: Mapping[str, str], name: str, wanted: object) -> list[int]:
    """The id to put at an end of every text; nothing where none is wanted or the model has none."""
    token = vocabulary.token_to_id(special_tokens[name]) if wanted and name in special_tokens else None
    return [] if token is None else [token]
