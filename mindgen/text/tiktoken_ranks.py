"""Vocabularies in tiktoken's format (a line is `base64-of-the-token rank`), as the `tokenizers` library runs them.

The library's byte-level BPE gives the same tokens as tiktoken once every pair of tokens that joins to a token is one of
its merges, in the order of the joined token's rank. So no other package is needed to run these files.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import TYPE_CHECKING

from mindgen.text.families import Family
from mindgen.text.folder import MAX_VOCABULARY_BYTES, TokenizerFolder, read_bytes
from mindgen.text.tokenizer import LoadedTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer


def load_tiktoken(folder: TokenizerFolder, family: Family) -> LoadedTokenizer:
    """The tokenizer of the family's rank file. ValueError names a damaged file."""
    from mindgen.text.tokenizer_json import JsonVocabulary

    ranks = read_ranks(folder.path / family.file)
    assert family.eos is not None, "rank files name no special tokens themselves"
    return LoadedTokenizer(
        vocabulary=JsonVocabulary(_rust_tokenizer(ranks, family)),
        source=str(folder.path),
        special_tokens={"eos_token": family.eos, "pad_token": family.eos},
        chat_templates=folder.chat_templates,
        end_tokens=family.ends,
        fitting_types=family.prompt_types,
    )


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token to rank. ValueError unless the ranks are 0, 1, 2, ... of different tokens and every byte is a token."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path, MAX_VOCABULARY_BYTES).splitlines(), 1):
        if line.strip():
            token, rank = _parse_line(line, path, number)
            ranks[token] = rank
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise ValueError(f"{path} is damaged: byte {missing} is not a token")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path} is damaged: the ranks of its {len(ranks)} tokens are not 0 to {len(ranks) - 1}")
    return ranks


def _parse_line(line: bytes, path: Path, number: int) -> tuple[bytes, int]:
    try:
        token, rank = line.split()
        return base64.b64decode(token, validate=True), int(rank)
    except (ValueError, binascii.Error):
        shown = line[:40].decode("utf-8", errors="replace")
        raise ValueError(
            f"{path} is not a tiktoken file, or damaged: line {number} must be a base64 token and its rank, "
            f"not {shown!r}"
        ) from None


def _rust_tokenizer(ranks: dict[bytes, int], family: Family) -> RustTokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = _letters()
    written = {token: token.decode("latin-1").translate(letters) for token in ranks}
    vocabulary = {written[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(ranks, written), ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = [pre_tokenizers.Split(Regex(str(family.split)), "isolated"), byte_level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if family.nfc:
        tokenizer.normalizer = normalizers.NFC()
    # Qwen looks for special tokens in the normalised text, which `normalized` asks for.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=family.nfc) for token in family.special])
    if family.prefix:
        ids = [(token, len(ranks) + family.special.index(token)) for token in family.prefix]
        tokenizer.post_processor = processors.TemplateProcessing([*family.prefix, "$A"], special_tokens=ids)
    return tokenizer


def _letters() -> dict[int, str]:
    """How byte-level BPE writes a byte: visible Latin-1 characters as they are, the rest from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(0x100 + number) for number, byte in enumerate(hidden)}


def _merges(ranks: dict[bytes, int], written: dict[bytes, str]) -> list[tuple[str, str]]:
    """Every pair of tokens that joins to a token, by the rank of what it joins to."""
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [cut for cut in range(1, len(token)) if token[:cut] in ranks and token[cut:] in ranks]
        text = written[token]
        merges += [(text[:cut], text[cut:]) for cut in cuts]
    return merges
