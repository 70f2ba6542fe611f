"""The SentencePiece model of the demo, and the same vocabulary as a `tokenizer.json` that gives the same ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import sentencepiece

BOS, EOS = "<s>", "</s>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
# A line break with the indentation after it is one token, so that depth is something to copy, not to count.
SPACE = "\u2581"  # how SentencePiece writes a space
INDENTS = tuple("\n" + SPACE * (4 * depth) for depth in range(9))
FIXED_PIECES = {"<unk>", *ROLES, *INDENTS}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_sentencepiece(texts: Iterator[str], file: Path, size: int) -> None:
    """Writes the model `file`: BPE, no normalisation at all, bytes for whatever is not in the vocabulary."""
    model = BytesIO()  # given a path, SentencePiece would write that into the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=[*ROLES, *INDENTS],
        character_coverage=0.9999,
        max_sentence_length=1 << 16,
        num_threads=2,
        minloglevel=2,
    )
    file.write_bytes(model.getvalue())


def fast_tokenizer(pieces: sentencepiece.SentencePieceProcessor) -> dict:
    """The content of `tokenizer.json`: a byte-fallback BPE that does what SentencePiece does, step by step."""
    ids = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(ids, token) for token in ("<unk>", BOS, EOS, *ROLES, *INDENTS)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": begin_of_text(ids[BOS]),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": merges(pieces, ids),
        },
    }


def merges(pieces: sentencepiece.SentencePieceProcessor, ids: dict[str, int]) -> list[list[str]]:
    """Every way to put a piece together from two others, in the order in which SentencePiece prefers them."""
    learned = [p for p, i in ids.items() if not (pieces.is_control(i) or pieces.is_byte(i) or p in FIXED_PIECES)]
    pairs = [(piece[:cut], piece[cut:]) for piece in learned for cut in range(1, len(piece))]
    pairs = [(left, right) for left, right in pairs if left in ids and right in ids]
    return [list(pair) for pair in sorted(pairs, key=lambda p: (ids[p[0] + p[1]], ids[p[0]], ids[p[1]]))]


def added_token(ids: dict[str, int], token: str) -> dict:
    special = token not in INDENTS
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}
    return {"id": ids[token], "content": token, **flags}


def begin_of_text(bos: int) -> dict:
    """The post-processor that puts the begin-of-text token first."""
    single = [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    special = {BOS: {"id": BOS, "ids": [bos], "tokens": [BOS]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def tokenizer_config(max_positions: int) -> dict:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": "<unk>",
        "pad_token": EOS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        "chat_template": CHAT_TEMPLATE,
    }


def write_tokenizer(pieces: sentencepiece.SentencePieceProcessor, folder: Path, max_positions: int) -> None:
    """`tokenizer.model`, and beside it the two JSON files that Hugging Face reads."""
    (folder / "tokenizer.model").write_bytes(pieces.serialized_model_proto())
    compact = json.dumps(fast_tokenizer(pieces), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(compact, "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(max_positions), indent=2) + "\n", "utf-8")
