"""Folders of tokenizers whose class is code beside the model; the code itself is not there, as nobody runs it."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.text.folders import CORPUS, sentencepiece_bytes, write_json

ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
CHATGLM_TOKENS = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *ROLES]
GLM4_TOKENS = [
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
]
QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))]

# As the classes state them.
QWEN_PATTERN = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
GLM4_PATTERN = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def trained_ranks() -> dict[bytes, int]:
    """Tokens of bytes in the order in which training found them, as tiktoken files hold them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [*CORPUS, "ababa banana " * 9, "     " * 9, "123\n" * 999],
        trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False),
    )
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {bytes(letters[letter] for letter in token): rank for token, rank in vocabulary}


def write_ranks(file: Path, ranks: dict[bytes, int]) -> None:
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))


def _config(folder: Path, name: str, module: str, model_type: str, **config: Any) -> Path:
    settings = {"tokenizer_class": name, "auto_map": {"AutoTokenizer": [f"{module}.{name}", None]}}
    write_json(folder / "tokenizer_config.json", {**settings, **config})
    write_json(folder / "config.json", {"model_type": model_type})
    return folder


def qwen1(folder: Path) -> Path:
    folder.mkdir()
    write_ranks(folder / "qwen.tiktoken", trained_ranks())
    return _config(folder, "QWenTokenizer", "tokenization_qwen", "qwen", model_max_length=8192)


def glm4(folder: Path) -> Path:
    folder.mkdir()
    ranks = trained_ranks()
    write_ranks(folder / "tokenizer.model", ranks)
    added = {str(len(ranks) + number): {"content": token, "special": True} for number, token in enumerate(GLM4_TOKENS)}
    settings = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "added_tokens_decoder": added}
    return _config(folder, "ChatGLM4Tokenizer", "tokenization_chatglm", "chatglm", **settings)


def chatglm(folder: Path) -> Path:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes())
    return _config(folder, "ChatGLMTokenizer", "tokenization_chatglm", "chatglm")


def baichuan(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    roles = [f"<reserved_{number}>" for number in (102, 103, 106, 107)]
    model = sentencepiece_bytes(user_defined_symbols=roles, add_dummy_prefix=False)
    (folder / "tokenizer.model").write_bytes(model)
    return _config(folder, "BaichuanTokenizer", "tokenization_baichuan", "baichuan", **config)


def internlm2(folder: Path) -> Path:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes(add_dummy_prefix=False))
    tokens = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
    added = {str(600 + number): {"content": token, "special": True} for number, token in enumerate(tokens)}
    settings = {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": added}
    return _config(folder, "InternLM2Tokenizer", "tokenization_internlm2", "internlm2", **settings)


def _plain(folder: Path, model: bytes, model_type: str, **config: Any) -> Path:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model)
    write_json(folder / "tokenizer_config.json", {"unk_token": "<unk>", **config})
    write_json(folder / "config.json", {"model_type": model_type})
    return folder


def yi(folder: Path, **config: Any) -> Path:
    """A class that transformers has, around a model that puts no space before a text."""
    bos, eos = "<|startoftext|>", "<|endoftext|>"
    roles = ["<|im_start|>", "<|im_end|>"]
    model = sentencepiece_bytes(
        user_defined_symbols=roles, bos_piece=bos, eos_piece=eos, add_dummy_prefix=False, vocab_size=620
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": bos, "eos_token": eos}
    return _plain(folder, model, "llama", **{**settings, **config})


def gemma(folder: Path) -> Path:
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    pieces = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"}
    turns = ["<start_of_turn>", "<end_of_turn>"]
    model = sentencepiece_bytes(user_defined_symbols=turns, add_dummy_prefix=False, **ids, **pieces)
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "add_bos_token": True}
    return _plain(folder, model, "gemma", tokenizer_class="GemmaTokenizer", **settings)


def codellama(folder: Path) -> Path:
    parts = {"prefix_token": "▁<PRE>", "suffix_token": "▁<SUF>", "middle_token": "▁<MID>", "eot_token": "▁<EOT>"}
    model = sentencepiece_bytes(user_defined_symbols=list(parts.values()))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "CodeLlamaTokenizer", **parts}
    return _plain(folder, model, "llama", **settings)


WRITERS = {"qwen1": qwen1, "glm4": glm4, "chatglm": chatglm, "baichuan": baichuan, "internlm2": internlm2}
