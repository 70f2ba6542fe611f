"""Tokens and text as transformers has them, from every kind of folder, and clear words about bad ones."""

from __future__ import annotations

import json
import os
import random
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
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models

from mindgen.text.folder import TokenizerFolder
from mindgen.text.huggingface import load_with_transformers
from mindgen.text.tokenizer import LoadedTokenizer, end_of_text_ids, load_tokenizer
from mindgen.text.tokenizer_json import JsonVocabulary, load_plain_tokenizer_json
from tests.text import folders
from tests.text.conftest import KINDS
from tests.text.folders import edit_json, write_json

TEXTS = [
    "",
    " ",
    "Hello world",
    " leading and  double  spaces ",
    "def f(x):\n\treturn x  # 1234567\r\n\n",
    "naïve café 你好 😀👩‍👩‍👧 ﬁ",
    "\ufeffafter a byte order mark",
    "שלום עולם and مرحبا",
    "e\u0301 a\u0308\u0304 combining",
    "nul \0 and \x7f and \u2028",
    "a▁b ▁ ▁▁",
    "<s>hello</s> a <s> b<unk>",
    "<|im_start|>user\nhi<|im_end|> <|eot_id|>x<|begin_of_text|>",
    "<tool>x <tool_call>y</tool_call>",
    "<0x0A> and <|not_a_token|>",
]

TAKES_THE_SHORT_WAY = {
    "llama2": False,
    "llama2_json": True,
    "llama2_older": False,
    "llama3": True,
    "qwen2": True,
    "qwen3": True,
}

fast = settings(max_examples=60)


@pytest.fixture
def loaded(kind: str, tokenizer_folders: dict[str, Path]) -> LoadedTokenizer:
    return load_tokenizer(tokenizer_folders[kind])


@pytest.fixture
def copy_of(tokenizer_folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A folder of the given kind that may be changed."""
    return lambda kind: Path(shutil.copytree(tokenizer_folders[kind], tmp_path / kind))


def test_folders_are_read_without_transformers_where_that_changes_nothing(kind: str, loaded: LoadedTokenizer) -> None:
    assert isinstance(loaded.vocabulary, JsonVocabulary) == TAKES_THE_SHORT_WAY[kind]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_transformers(
    kind: str, loaded: LoadedTokenizer, hugging_face: Callable[[str], Any], text: str
) -> None:
    judge = hugging_face(kind)
    assert loaded.encode(text) == judge(text)["input_ids"]
    assert loaded.encode(text, add_special_tokens=False) == judge(text, add_special_tokens=False)["input_ids"]


@given(text=st.text(max_size=60))
@fast
def test_tokens_of_any_text_are_those_of_transformers(
    kind: str, tokenizer_folders: dict[str, Path], hugging_face: Callable[[str], Any], text: str
) -> None:
    assert load_once(tokenizer_folders[kind]).encode(text) == hugging_face(kind)(text)["input_ids"]


@given(seed=st.integers(0, 2**32), length=st.integers(0, 40))
@fast
def test_text_of_any_ids_is_that_of_transformers(
    kind: str, tokenizer_folders: dict[str, Path], hugging_face: Callable[[str], Any], seed: int, length: int
) -> None:
    tokenizer = load_once(tokenizer_folders[kind])
    ids = random.Random(seed).choices(range(tokenizer.vocab_size), k=length)
    expected = hugging_face(kind).decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert tokenizer.decode(ids) == expected


@cache
def load_once(folder: Path) -> LoadedTokenizer:
    return load_tokenizer(folder)


def test_named_tokens_and_the_size_are_those_of_transformers(
    kind: str, loaded: LoadedTokenizer, hugging_face: Callable[[str], Any]
) -> None:
    judge = hugging_face(kind)
    assert (loaded.bos_id, loaded.eos_id) == (judge.bos_token_id, judge.eos_token_id)
    assert loaded.vocab_size == len(judge)
    named = judge.special_tokens_map.items()  # in transformers 4 also a list of those that have no name
    assert loaded.special_tokens == {name: token for name, token in named if isinstance(token, str)}
    for token, token_id in judge.get_vocab().items():
        assert loaded.token_to_id(token) == token_id
    assert loaded.token_to_id("<|no such token|>") is None


def test_padding_ids_of_the_model_have_no_text(loaded: LoadedTokenizer) -> None:
    ids = loaded.encode("Hello", add_special_tokens=False)
    assert loaded.decode([*ids, loaded.vocab_size, 10**9, -1]) == loaded.decode(ids) == "Hello"


def test_spaces_before_punctuation_stay_as_the_model_wrote_them(loaded: LoadedTokenizer) -> None:
    assert loaded.decode(loaded.encode("well , it 's n't .")) == "well , it 's n't ."


def test_transformers_is_not_asked_to_clean_up_either(tmp_path: Path) -> None:
    words = RustTokenizer(models.WordLevel({"well": 0, ".": 1, "<unk>": 2}, unk_token="<unk>"))
    words.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}
    write_json(tmp_path / "tokenizer_config.json", settings)
    assert load_with_transformers(TokenizerFolder(tmp_path)).decode([0, 1]) == "well ."


@pytest.mark.parametrize(
    "change",
    [
        {"some_setting_of_tomorrow": True},
        {"split_special_tokens": True},
        {"auto_map": None},
        {"errors": "strict"},
        {"additional_special_tokens": ["<|brand_new|>"]},
        {"eos_token": "a"},
        {"add_bos_token": True},
        {"tokenizer_class": "GPT2Tokenizer"},
        {"add_prefix_space": True},
    ],
)
def test_what_is_not_surely_the_same_is_left_to_transformers(
    copy_of: Callable[[str], Path], change: dict[str, Any]
) -> None:
    folder = copy_of("qwen2")
    assert load_plain_tokenizer_json(TokenizerFolder(folder)) is not None
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(change))
    assert load_plain_tokenizer_json(TokenizerFolder(folder)) is None


@pytest.mark.parametrize(
    ("kind", "name"), [("qwen2", "unk_token"), ("qwen2", "pad_token"), ("llama2_json", "bos_token")]
)
def test_tokens_that_the_class_makes_up_are_left_to_transformers(
    copy_of: Callable[[str], Path], kind: str, name: str
) -> None:
    folder = copy_of(kind)
    edit_json(folder / "tokenizer_config.json", lambda config: config.pop(name))
    assert load_plain_tokenizer_json(TokenizerFolder(folder)) is None


@pytest.mark.parametrize("kind", ["llama2_json", "qwen2"])
@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "decoder"])
def test_another_pipeline_than_that_of_the_class_is_left_to_transformers(
    copy_of: Callable[[str], Path], kind: str, part: str
) -> None:
    folder = copy_of(kind)
    other = {"normalizer": {"type": "NFKC"}, "pre_tokenizer": {"type": "Whitespace"}, "decoder": {"type": "Fuse"}}
    edit_json(folder / "tokenizer.json", lambda value: value.update({part: other[part]}))
    assert load_plain_tokenizer_json(TokenizerFolder(folder)) is None


@pytest.mark.parametrize("change", [{"special": True}, {"normalized": True}, {"content": "<other>"}])
def test_added_tokens_that_the_config_states_otherwise_are_left_to_transformers(
    copy_of: Callable[[str], Path], change: dict[str, Any]
) -> None:
    folder = copy_of("qwen2")
    tool_call = str(load_tokenizer(folder).token_to_id("<tool_call>"))
    edit_json(folder / "tokenizer_config.json", lambda config: config["added_tokens_decoder"][tool_call].update(change))
    assert load_plain_tokenizer_json(TokenizerFolder(folder)) is None


def test_the_slow_classes_can_be_asked_for(tokenizer_folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    folder = tokenizer_folders["llama2_json"]
    tokenizer = load_tokenizer(folder, use_fast=False)
    assert not isinstance(tokenizer.vocabulary, JsonVocabulary)
    judge = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, use_fast=False)
    assert tokenizer.encode("Hello") == judge("Hello")["input_ids"]


def test_a_file_of_the_folder_names_the_folder(tokenizer_folders: dict[str, Path], tmp_path: Path) -> None:
    file = tokenizer_folders["llama3"] / "tokenizer.json"
    assert load_tokenizer(tmp_path / "nothing", model_file=file).encode("Hello")


def test_starting_up_does_not_import_transformers(tokenizer_folders: dict[str, Path]) -> None:
    program = (
        "import sys; from mindgen.text.tokenizer import load_tokenizer\n"
        "assert not {'transformers', 'tokenizers', 'sentencepiece', 'jinja2'} & set(sys.modules), 'on import'\n"
        "load_tokenizer(sys.argv[1]).encode('x')\n"
        "assert not {'transformers', 'torch', 'jinja2'} & set(sys.modules), 'while loading'"
    )
    command = [sys.executable, "-c", program, str(tokenizer_folders["llama3"])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60)
    assert done.returncode == 0, done.stderr


# --- bad input ---


def test_a_lone_surrogate_is_refused_by_name(loaded: LoadedTokenizer) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate.*character 3"):
        loaded.encode("abc\ud800")


@pytest.mark.parametrize("kind", ["llama2_json", "llama3"])
@pytest.mark.timeout(60)
def test_a_megabyte_of_one_character_takes_bounded_time(tokenizer_folders: dict[str, Path], kind: str) -> None:
    assert load_once(tokenizer_folders[kind]).encode("a" * 1_000_000)


def test_a_missing_tokenizer_names_the_folder_the_files_and_the_flags(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path)
    for words in (str(tmp_path), "tokenizer.json", "tokenizer.model", "--tokenizer-name-or-path", "--tokenizer-model"):
        assert words in str(caught.value)
    assert "--prompt-ids" in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "nowhere", "owner/never-downloaded", "../..x/y/z"])
def test_a_folder_that_does_not_exist_is_named(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--tokenizer-name-or-path") as caught:
        load_tokenizer(name)
    assert name in str(caught.value)


def test_an_unknown_kind_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--tokenizer-type 'Nonsense'.*PretrainedFromHF.*Llama2Tokenizer"):
        load_tokenizer(tmp_path, kind="Nonsense")


def test_another_file_name_needs_the_sentencepiece_kind(tmp_path: Path) -> None:
    (tmp_path / "my.model").write_bytes(b"x")
    with pytest.raises(ValueError, match="--tokenizer-type SentencePiece"):
        load_tokenizer(tmp_path, model_file=tmp_path / "my.model")
    with pytest.raises(ValueError, match=r"tokenizer\.model does not exist"):
        load_tokenizer(tmp_path, model_file=tmp_path / "tokenizer.model")


HALF = object()
DAMAGE: dict[str, Any] = {
    "empty": b"",
    "half": HALF,
    "not text": b"\xff\xfe\x00\x01" * 100,
    "a list": b"[]",
    "endless nesting": b"[" * 1_000_000,
    "no model": b'{"version": "1.0"}',
    "no vocabulary": b'{"model": {"type": "BPE"}}',
    "a merge of nothing": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}',
    "a negative id": b'{"added_tokens": [{"id": -1, "content": "x"}], "model": {"type": "BPE", "vocab": {"a": 0}}}',
    "an id that is text": b'{"added_tokens": [{"id": "x"}], "model": {"type": "BPE", "vocab": {"a": 0}}}',
    "a token that is text": b'{"added_tokens": ["x"], "model": {"type": "BPE", "vocab": {"a": 0}}}',
    "an enormous number": b'{"model": {"type": "BPE", "vocab": {"a": ' + b"9" * 10_000 + b"}}}",
}


@pytest.mark.parametrize("kind", ["llama3", "qwen2", "llama2_json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tokenizer_json_is_named(copy_of: Callable[[str], Path], kind: str, damage: str) -> None:
    file = copy_of(kind) / "tokenizer.json"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if DAMAGE[damage] is HALF else DAMAGE[damage])
    with pytest.raises(ValueError, match=str(file.parent)):
        load_tokenizer(file.parent)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_config_is_named(copy_of: Callable[[str], Path], name: str, content: bytes) -> None:
    folder = copy_of("llama3")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"bos_token": 5},
        {"bos_token": {"text": "<s>"}},
        {"added_tokens_decoder": {"x": {}}},
        {"added_tokens_decoder": {"1": "<s>"}},
        {"tokenizer_class": 7},
        {"chat_template": 7},
    ],
)
def test_settings_of_the_wrong_type_are_an_error_in_words(
    copy_of: Callable[[str], Path], change: dict[str, Any]
) -> None:
    folder = copy_of("llama3")
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(change))
    with pytest.raises(ValueError, match=str(folder)):
        load_tokenizer(folder)


def test_a_huge_file_is_refused_without_reading_it(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama3")
    with (folder / "tokenizer.json").open("wb") as file:
        os.truncate(file.fileno(), 300 << 20)  # sparse: takes no space
    with pytest.raises(ValueError, match=r"tokenizer\.json is larger than 256 MB"):
        load_tokenizer(folder)


def test_code_beside_the_tokenizer_is_never_run(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of("llama3")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\n")
    change = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(change))
    with pytest.raises(ValueError, match=str(folder)):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


# --- end of text ---


def test_every_source_of_end_of_text_ids_counts_once(tokenizer_folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(tokenizer_folders["llama3"])
    eot, end = tokenizer.token_to_id("<|eot_id|>"), tokenizer.token_to_id("<|end_of_text|>")
    assert end_of_text_ids(tokenizer, None, []) == (eot,)
    assert end_of_text_ids(tokenizer, {"eos_token_id": 7}, []) == (eot, 7)
    assert end_of_text_ids(tokenizer, {"eos_token_id": [7, eot]}, ["<|end_of_text|>", 9, "7"]) == (eot, 7, end, 9)
    assert end_of_text_ids(None, {"eos_token_id": None}, ["3"]) == (3,)


@pytest.mark.parametrize("value", ["<|nonsense|>", "two words", "", -1])
def test_an_unknown_eos_token_is_named(tokenizer_folders: dict[str, Path], value: str | int) -> None:
    with pytest.raises(ValueError, match="--add-eos-token") as caught:
        end_of_text_ids(load_tokenizer(tokenizer_folders["llama3"]), None, [value])
    assert str(value) in str(caught.value)


def test_an_eos_token_without_a_tokenizer_must_be_an_id() -> None:
    with pytest.raises(ValueError, match="its id instead"):
        end_of_text_ids(None, None, ["</s>"])


@pytest.mark.parametrize("value", ["2", True, [1, None], -1, {"a": 1}, 1.5])
def test_a_damaged_generation_config_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id"):
        end_of_text_ids(None, {"eos_token_id": value}, [])


def test_all_kinds_are_tested() -> None:
    assert set(TAKES_THE_SHORT_WAY) == set(KINDS)


# --- the two readers agree on chat settings as well ---


def test_both_readers_know_the_same_names_and_templates(tokenizer_folders: dict[str, Path]) -> None:
    for kind, short in TAKES_THE_SHORT_WAY.items():
        if short:
            folder = TokenizerFolder(tokenizer_folders[kind])
            plain, full = load_plain_tokenizer_json(folder), load_with_transformers(folder)
            assert plain is not None
            assert plain.special_tokens == full.special_tokens
            assert plain.chat_templates == full.chat_templates


def test_a_folder_with_nothing_but_tokenizer_json_is_read(tokenizer_folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip(
        "transformers", minversion="5", reason="transformers 4 does not know the model of such a folder"
    )
    shutil.copy(tokenizer_folders["llama3"] / "tokenizer.json", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("Hello") == load_tokenizer(tokenizer_folders["llama3"]).encode("Hello")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.has_chat_template) == (None, None, False)


def test_older_files_beside_the_config_are_left_to_transformers(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama3")
    edit_json(folder / "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder"))
    assert load_plain_tokenizer_json(TokenizerFolder(folder)) is not None
    write_json(folder / "special_tokens_map.json", {"eos_token": "<|end_of_text|>"})
    assert load_plain_tokenizer_json(TokenizerFolder(folder)) is None
    assert json.loads((folder / "special_tokens_map.json").read_text())
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == tokenizer.token_to_id("<|end_of_text|>")


def test_folders_module_trains_what_it_says(tokenizer_folders: dict[str, Path]) -> None:
    assert not (tokenizer_folders["llama2"] / "tokenizer.json").exists()
    assert folders.CORPUS
