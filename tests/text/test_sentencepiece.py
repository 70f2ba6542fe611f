"""A SentencePiece file read by its own library, with what tokenizer_config.json adds to it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from mindgen.text.tokenizer import LoadedTokenizer, load_tokenizer
from tests.text.folders import edit_json, sentencepiece_bytes, write_json

TEXTS = [
    "",
    " \0",
    "Hello world",
    "  two  spaces ",
    "def f():\n\treturn 1",
    "naïve 你好 😀 ﬁ",
    "\ufeff",
    "שלום e\u0301",
]

fast = settings(max_examples=100)


@pytest.fixture
def model_file(tokenizer_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A model file alone in its folder."""
    return Path(shutil.copy(tokenizer_folders["llama2"] / "tokenizer.model", tmp_path / "my.model"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SentencePiece models of several making."""
    root = tmp_path_factory.mktemp("sentencepiece")
    options: dict[str, dict[str, Any]] = {
        "llama": {},
        "default": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        "unigram": {"model_type": "unigram"},
        "no_bytes": {"byte_fallback": False, "bos_id": -1, "user_defined_symbols": ["\n", "<mask>"]},
        "no_prefix": {"add_dummy_prefix": False},
    }
    for name, option in options.items():
        (root / f"{name}.model").write_bytes(sentencepiece_bytes(**option))
    return {name: root / f"{name}.model" for name in options}


MODELS = ("llama", "default", "unigram", "no_bytes", "no_prefix")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_and_text_are_those_of_the_library(models: dict[str, Path], name: str, text: str) -> None:
    judge = SentencePieceProcessor(model_file=str(models[name]))
    tokenizer = load_tokenizer("", "GPTSentencePieceTokenizer", model_file=models[name])
    ids = tokenizer.encode(text)
    assert ids == judge.encode(text)
    assert tokenizer.decode(ids) == judge.decode([token for token in ids if token != judge.unk_id()])


@given(text=st.text(max_size=60))
@fast
def test_tokens_are_those_of_transformers_where_the_text_begins_with_no_space(
    tokenizer_folders: dict[str, Path], hugging_face: Callable[[str], Any], text: str
) -> None:
    text = text.lstrip(" ▁")
    tokenizer = load_once(tokenizer_folders["llama2"])
    ids = tokenizer.encode(text)
    assert ids == hugging_face("llama2")(text)["input_ids"]
    assert tokenizer.decode(ids) == hugging_face("llama2").decode(ids, skip_special_tokens=True)


@cache
def load_once(folder: Path) -> LoadedTokenizer:
    return load_tokenizer(folder, "SentencePiece")


@pytest.mark.parametrize("text", ["a<s>b</s> c", "<s>", "</s></s>x", "x<unk>y <s> z"])
def test_special_tokens_in_a_text_are_those_of_transformers(
    tokenizer_folders: dict[str, Path], hugging_face: Callable[[str], Any], text: str
) -> None:
    assert load_once(tokenizer_folders["llama2"]).encode(text) == hugging_face("llama2")(text)["input_ids"]


@pytest.mark.parametrize(
    ("kind", "starts_with_bos"),
    [
        ("SentencePiece", True),
        ("Llama2Tokenizer", True),
        ("SentencePieceTokenizer", False),
        ("GPTSentencePieceTokenizer", False),
    ],
)
def test_the_kind_decides_about_bos_where_no_config_does(model_file: Path, kind: str, starts_with_bos: bool) -> None:
    tokenizer = load_tokenizer("", kind, model_file=model_file)
    assert (tokenizer.encode("Hello")[0] == tokenizer.bos_id) == starts_with_bos
    assert tokenizer.bos_id not in tokenizer.encode("Hello", add_special_tokens=False)
    write_json(model_file.parent / "tokenizer_config.json", {"add_bos_token": not starts_with_bos})
    tokenizer = load_tokenizer("", kind, model_file=model_file)
    assert (tokenizer.encode("Hello")[0] == tokenizer.bos_id) != starts_with_bos


def test_a_model_without_bos_starts_with_none(models: dict[str, Path]) -> None:
    tokenizer = load_tokenizer("", "SentencePiece", model_file=models["no_bytes"])
    assert tokenizer.bos_id is None
    assert tokenizer.encode("") == []


def test_added_tokens_of_the_config_are_honoured(tokenizer_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tokenizer_folders["llama2"], tmp_path / "added"))
    added = {
        "600": {"content": "<|im_start|>", "special": True, "lstrip": False, "rstrip": False},
        "601": {"content": "<|im_end|>", "special": True, "lstrip": False, "rstrip": True},
        "605": {"content": "<tool>", "special": False, "lstrip": False, "rstrip": False},
    }
    change = {"added_tokens_decoder": added, "eos_token": "<|im_end|>", "add_eos_token": True}
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(change))
    tokenizer = load_tokenizer(folder, "SentencePiece")
    ids = tokenizer.encode("<|im_start|>user x<|im_end|>  \n y <tool> z")
    assert ids[:2] == [1, 600] and ids[-1] == 601 == tokenizer.eos_id and 605 in ids
    assert tokenizer.decode(ids) == "user xy <tool> z"  # the space after a token that strips its right is gone
    assert tokenizer.vocab_size == 606
    assert tokenizer.token_to_id("<tool>") == 605
    assert tokenizer.token_to_id("<none>") is None
    assert [tokenizer.token_to_id("▁def")] == tokenizer.encode("def", add_special_tokens=False)[:1]


def test_of_added_tokens_that_begin_alike_the_longest_counts(model_file: Path) -> None:
    write_json(model_file.parent / "added_tokens.json", {"<a>": 600, "<a>b": 601, "<a>bc": 602})
    tokenizer = load_tokenizer("", "GPTSentencePieceTokenizer", model_file=model_file)
    assert tokenizer.encode("<a>b<a><a>bc") == [601, 600, 602]


def test_older_added_tokens_are_honoured(model_file: Path) -> None:
    write_json(model_file.parent / "added_tokens.json", {"<pad>": 600, "<tool>": 601})
    write_json(model_file.parent / "tokenizer_config.json", {"pad_token": "<pad>"})
    tokenizer = load_tokenizer("", "SentencePiece", model_file=model_file)
    assert tokenizer.decode(tokenizer.encode("a<pad>b<tool>")) == "ab<tool>"


def test_legacy_puts_the_space_after_every_special_token(tokenizer_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tokenizer_folders["llama2"], tmp_path / "legacy"))
    plain = load_tokenizer(folder, "SentencePiece").encode("<s>def")
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(legacy=True))
    legacy = load_tokenizer(folder, "SentencePiece")
    assert legacy.encode("<s>def") == [1, 1, legacy.token_to_id("▁def")] != plain


@pytest.mark.parametrize(
    "content",
    [b"", b"junk", b"\x00" * 1000, b"\xff" * 1000, b"aGVsbG8= 0\nIQ== 1\n", b"\x0a\x05\x0a\x03\xff\xfe\xfd"],
)
def test_a_file_that_is_no_sentencepiece_model_is_named(model_file: Path, content: bytes) -> None:
    model_file.write_bytes(content)
    with pytest.raises(ValueError, match=r"my\.model is not a SentencePiece model"):
        load_tokenizer("", "SentencePiece", model_file=model_file)


def test_damaged_models_never_end_the_process(model_file: Path) -> None:
    """In a process of its own, because the library is C++: every damage is a ValueError or leaves a usable model."""
    program = (
        "import pathlib, random, sys\n"
        "from mindgen.text.tokenizer import load_tokenizer\n"
        "file = pathlib.Path(sys.argv[1]); content = file.read_bytes(); chance = random.Random(1)\n"
        "for _ in range(300):\n"
        "    damaged = bytearray(content[: chance.choice([len(content), chance.randrange(len(content))])])\n"
        "    for _ in range(chance.randrange(8)):\n"
        "        damaged[chance.randrange(len(damaged) or 1):][:1] = bytes([chance.randrange(256)])\n"
        "        if damaged: damaged[chance.randrange(len(damaged))] = chance.randrange(256)\n"
        "    file.write_bytes(damaged)\n"
        "    try: tokenizer = load_tokenizer('', 'SentencePiece', model_file=file)\n"
        "    except ValueError: continue\n"
        "    tokenizer.decode(tokenizer.encode('some text\\n 你好'))\n"
    )
    command = [sys.executable, "-c", program, str(model_file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("kind", ["SentencePiece", "Llama2Tokenizer"])
def test_a_missing_model_names_the_file_and_the_flag(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.model.*--tokenizer-model"):
        load_tokenizer(tmp_path, kind)


def test_damaged_added_tokens_are_named(model_file: Path) -> None:
    write_json(model_file.parent / "added_tokens.json", {"<pad>": "x"})
    with pytest.raises(ValueError, match=r"added_tokens\.json is damaged"):
        load_tokenizer("", "SentencePiece", model_file=model_file)
    write_json(model_file.parent / "tokenizer_config.json", {"added_tokens_decoder": {"x": 1}})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is damaged"):
        load_tokenizer("", "SentencePiece", model_file=model_file)


@pytest.mark.timeout(60)
def test_a_megabyte_of_one_character_takes_bounded_time(models: dict[str, Path]) -> None:
    for name in ("llama", "unigram"):
        assert load_tokenizer("", "SentencePiece", model_file=models[name]).encode("a" * 1_000_000)


def test_a_lone_surrogate_is_refused_by_name(model_file: Path) -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        load_tokenizer("", "SentencePiece", model_file=model_file).encode("\udfff")
