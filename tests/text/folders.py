"""Tokenizer folders of every kind we read, trained on the spot from a few kilobytes of text."""

from __future__ import annotations

import argparse
import inspect
import io
import json
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SOURCE = inspect.getsource(textwrap) + inspect.getsource(argparse)[:20000]
CORPUS = [*SOURCE.splitlines(), *["naïve café 你好 héllo"] * 4]

QWEN_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHATML = (
    "{% for message in messages %}\n"
    "    {% if message['role'] not in ['system', 'user', 'assistant'] %}\n"
    "        {{- raise_exception('unknown role ' + message['role']) }}\n"
    "    {% endif %}\n"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

LLAMA2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)

LLAMA3_CHAT = (
    "{{- bos_token }}{%- set ns = namespace(count=0) -%}"
    "{%- if strftime_now is defined %}{%- set date = strftime_now('%d') %}{%- endif %}"
    "{%- for message in messages %}{%- set ns.count = ns.count + 1 %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{% generation %}{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{%- if loop.last and ns.count > 2 %}{%- break %}{%- endif %}"
    "{%- endfor %}{%- if tools %}{{- tools | tojson(indent=2) }}{%- endif %}"
    "{{- {'b': ['é<', 1], 'a': none} | tojson }}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def sentencepiece_bytes(**options: Any) -> bytes:
    """A trained SentencePiece model, by default of the kind that Llama has: BPE, byte fallback, text as it is."""
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **{**settings, **options})
    return model.getvalue()


def llama2(folder: Path, **config: Any) -> Path:
    """`tokenizer.model` and settings, no `tokenizer.json`."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,  # which transformers 5 takes for granted
        "chat_template": LLAMA2_CHAT,
    }
    write_json(folder / "tokenizer_config.json", {**settings, **config})
    write_json(folder / "config.json", {"model_type": "llama"})
    return folder


def llama2_with_json(folder: Path, source: Path) -> Path:
    """What transformers itself saves for `source`: a `tokenizer.json` with the pipeline of LlamaTokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(str(folder))
    write_json(folder / "config.json", {"model_type": "llama"})
    return folder


def llama2_older(folder: Path, source: Path) -> Path:
    """The `tokenizer.json` of older releases: a normalizer puts the space, before every part between special tokens."""
    shutil.copytree(source, folder)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _byte_level(pre_tokenizer: Any, normalizer: Any, special: list[str], ignore_merges: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def llama3(folder: Path) -> Path:
    """Byte-level BPE with many special tokens, BOS by the post-processor."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    split = pre_tokenizers.Split(Regex(r"\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\p{N}{1,3}|\s+"), "isolated")
    steps = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer = _byte_level(steps, None, special, ignore_merges=True)
    bos = tokenizer.token_to_id(special[0])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], bos)]),
        ]
    )
    return _save(
        folder,
        tokenizer,
        "llama",
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        clean_up_tokenization_spaces=True,
        chat_template=LLAMA3_CHAT,
    )


def qwen2(folder: Path, model_type: str = "qwen2", **config: Any) -> Path:
    """Byte-level BPE with NFC and no BOS."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    split = pre_tokenizers.Split(Regex(QWEN_REGEX), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer = _byte_level(
        pre_tokenizers.Sequence([split, byte_level]), normalizers.NFC(), special, ignore_merges=False
    )
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "add_bos_token": False,
        "add_prefix_space": False,
        "split_special_tokens": False,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "chat_template": CHATML,
    }
    return _save(folder, tokenizer, model_type, **{**settings, **config})


def _save(folder: Path, tokenizer: Tokenizer, model_type: str, **config: Any) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    added = json.loads(tokenizer.to_str())["added_tokens"]
    config["added_tokens_decoder"] = {str(token.pop("id")): token for token in added}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "config.json", {"model_type": model_type})
    return folder


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes one JSON file in place."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    write_json(path, value)
