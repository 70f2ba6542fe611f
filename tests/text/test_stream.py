"""Pieces of text join to the whole text, and stop strings are never half printed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindgen.text.stream import MAX_HELD, Detokenizer, StopMatcher
from mindgen.text.tokenizer import LoadedTokenizer, load_tokenizer
from tests.text import families
from tests.text.folders import sentencepiece_bytes

EMOJI = "ok 😀👩‍👩‍👧 你好, wörld"

WAYS = ("llama2", "llama2_json", "llama2_older", "llama3", "qwen2", "pieces", "pieces_default", "chatglm", "ranks")

thorough = settings(max_examples=150)


@pytest.fixture(scope="module")
def tokenizers(
    tokenizer_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, LoadedTokenizer]:
    """Every way to decode; the `pieces` ones read SentencePiece, `pieces_default` strips spaces at the beginning."""
    loaded = {name: load_tokenizer(tokenizer_folders[name]) for name in WAYS[:5]}
    default = tmp_path_factory.mktemp("default") / "tokenizer.model"
    default.write_bytes(sentencepiece_bytes(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True))
    loaded["pieces"] = load_tokenizer(tokenizer_folders["llama2"], "SentencePiece")
    loaded["pieces_default"] = load_tokenizer(default.parent, "SentencePiece")
    root = tmp_path_factory.mktemp("families")
    loaded["chatglm"] = load_tokenizer(families.chatglm(root / "chatglm"))
    loaded["ranks"] = load_tokenizer(families.glm4(root / "glm4"))
    return loaded


@pytest.fixture(params=WAYS)
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, LoadedTokenizer]) -> LoadedTokenizer:
    return tokenizers[request.param]


def stream(tokenizer: LoadedTokenizer, ids: Sequence[int], size: int = 1) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    return [*pieces, detokenizer.finish()]


def odd_ids(tokenizer: LoadedTokenizer) -> list[int]:
    """Ids that decoders treat in some special way: bytes, spaces, special tokens, ids without text."""
    names = [*(f"<0x{byte:02X}>" for byte in (0x0A, 0x20, 0x41, 0x80, 0xBD, 0xA0, 0xE4, 0xF0, 0x9F, 0x98, 0xFF))]
    names += ["▁", "Ġ", "a", "▁a", "Ġa", "<s>", "</s>", "<unk>", "<tool>", "<tool_call>", "<|eot_id|>", "<|im_end|>"]
    names += ["Ċ", "Ġ", "ä", "½", "ł", "ð", "Ł", "ÿ", "Ģ"]  # single bytes in the letters of byte-level BPE
    found = [token for token in map(tokenizer.token_to_id, names) if token is not None]
    return [*found, tokenizer.vocab_size + 5]


@given(seed=st.integers(0, 2**32), length=st.integers(0, 60), size=st.integers(1, 5))
@thorough
def test_pieces_of_any_ids_join_to_the_whole_text(
    tokenizer: LoadedTokenizer, seed: int, length: int, size: int
) -> None:
    chance = random.Random(seed)
    alphabet = [*odd_ids(tokenizer) * chance.choice((1, 10, 100)), *range(tokenizer.vocab_size)]
    alphabet = chance.sample(alphabet, chance.choice((2, 5, len(alphabet))))
    ids = chance.choices(alphabet, k=length)
    assert "".join(stream(tokenizer, ids, size)) == tokenizer.decode(ids)


def test_pieces_of_all_odd_beginnings_join_to_the_whole_text(tokenizer: LoadedTokenizer) -> None:
    odd = odd_ids(tokenizer)
    few = odd[-6:]
    for ids in [*product(odd, repeat=2), *product(few, repeat=3)]:
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids), ids


@given(text=st.text(max_size=40))
@thorough
def test_any_text_comes_back_in_pieces_without_replacement_characters(tokenizer: LoadedTokenizer, text: str) -> None:
    text = text.replace("\ufffd", "")
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_several_tokens_comes_whole(tokenizer: LoadedTokenizer) -> None:
    ids = tokenizer.encode(EMOJI)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == EMOJI
    assert all(piece.encode("utf-8") for piece in pieces if piece)
    assert "" in pieces[:-1], "no token ended within a character: the text tests nothing"


def test_text_is_not_held_longer_than_needed(tokenizers: dict[str, LoadedTokenizer]) -> None:
    for name in ("llama3", "qwen2", "pieces"):
        assert stream(tokenizers[name], tokenizers[name].encode("x 😀"))[-2:] == ["😀", ""]


def test_a_run_of_byte_tokens_waits_for_the_token_after_it(tokenizers: dict[str, LoadedTokenizer]) -> None:
    tokenizer = tokenizers["llama2_json"]
    newline, bad, letter = (tokenizer.token_to_id(token) for token in ("<0x0A>", "<0xE4>", "a"))
    assert newline is not None and bad is not None and letter is not None
    assert stream(tokenizer, [letter, newline, letter]) == ["a", "", "\na", ""]
    assert stream(tokenizer, [letter, newline, bad, letter]) == ["a", "", "", "\ufffd\ufffda", ""]


def test_an_unfinished_character_comes_at_the_end_only(tokenizer: LoadedTokenizer) -> None:
    ids = tokenizer.encode("😀")[:-1]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces[:-1]).strip() == ""
    assert pieces[-1].endswith("\ufffd")


def test_the_space_between_words_survives_special_tokens_at_the_beginning(tokenizer: LoadedTokenizer) -> None:
    words = tokenizer.encode("x def", add_special_tokens=False)
    special = tokenizer.eos_id
    assert special is not None
    for ids in ([special, *words], [special, words[0], special, *words[1:]], [*words[-1:], special, *words[-1:]]):
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)
    assert stream(tokenizer, [special, special]) == ["", "", ""]


class CountingDecoder:
    """Counts the ids that are decoded."""

    def __init__(self, tokenizer: LoadedTokenizer) -> None:
        self.tokenizer = tokenizer
        self.num_decoded = 0

    def decode(self, ids: Sequence[int]) -> str:
        self.num_decoded += len(ids)
        return self.tokenizer.decode(ids)

    def token_to_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)


@pytest.mark.parametrize("odd", [True, False])
def test_the_work_for_a_token_does_not_grow_with_the_text(tokenizer: LoadedTokenizer, odd: bool) -> None:
    chance = random.Random(5)
    for alphabet in [[token] for token in odd_ids(tokenizer)] if odd else [range(tokenizer.vocab_size)]:
        decoder = CountingDecoder(tokenizer)
        detokenizer = Detokenizer(decoder)
        num_tokens = 500
        text = [detokenizer.push([chance.choice(alphabet)]) for _ in range(num_tokens)]
        assert len([*text, detokenizer.finish()]) == num_tokens + 1
        assert decoder.num_decoded < num_tokens * (2 * MAX_HELD + 4)


class WordDecoder:
    """No letters in its vocabulary, and a space before every word but the first."""

    words = ("alpha", "beta", "gamma")

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[token] for token in ids if token < len(self.words))

    def token_to_id(self, token: str) -> int | None:
        return None


def test_a_decoder_without_letters_keeps_its_spaces() -> None:
    detokenizer = Detokenizer(WordDecoder())
    assert [detokenizer.push([token]) for token in (0, 1, 9, 2, 0)] == ["alpha", " beta", "", " gamma", " alpha"]


# --- stop strings ---


def cut_at_first_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The plain twin: looks at the whole text at once."""
    found = [text.index(stop) for stop in stops if stop in text]
    return (text[: min(found)], True) if found else (text, False)


def run_matcher(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        safe, stopped = matcher.push(piece)
        shown += safe
        assert stopped == matcher.stopped
        if stopped:
            assert matcher.push("more") == ("", True)
            break
    shown += matcher.finish()
    return shown, matcher.stopped


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
)
@settings(max_examples=300)
def test_the_text_is_cut_before_the_first_stop_however_it_is_cut_into_pieces(
    pieces: list[str], stops: list[str]
) -> None:
    assert run_matcher(pieces, stops) == cut_at_first_stop("".join(pieces), stops)


@given(pieces=st.lists(st.text("ab", max_size=3), max_size=8), stops=st.lists(st.text("ab", min_size=1), min_size=1))
@settings(max_examples=300)
def test_nothing_that_could_become_a_stop_is_ever_shown(pieces: list[str], stops: list[str]) -> None:
    matcher, pushed, shown = StopMatcher(stops), "", ""
    for piece in pieces:
        safe, stopped = matcher.push(piece)
        pushed, shown = pushed + piece, shown + safe
        if stopped:
            break
        for begin in range(len(shown)):
            assert not any(stop.startswith(pushed[begin:]) for stop in stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["hello wor", "ld"], ["world"], "hello "),
        (list("one END two"), ["END"], "one "),
        (["a", "ab", "abc"], ["abc", "ab"], "a"),
        (["STOP at the start"], ["STOP"], ""),
        (["x", "STOP"], ["STOP", "xST"], ""),
        (["aaab"], ["aab"], "a"),
        (["ab", "abc"], ["ababc"], ""),
        (["abcd"], ["bc", "abcd"], ""),
        (["abc", "x"], ["bc", "abcd"], "a"),
        (["xxabc", "x"], ["bc", "abcd"], "xxa"),
        (["你", "好吗"], ["好"], "你"),
        (["no stop her", "e"], ["stop there"], "no stop here"),
        (["half a st"], ["stop"], "half a st"),
        (["anything"], [], "anything"),
    ],
)
def test_stops_in_words(pieces: list[str], stops: list[str], shown: str) -> None:
    assert run_matcher(pieces, stops) == (shown, cut_at_first_stop("".join(pieces), stops)[1])


def test_what_may_become_a_stop_is_held_until_it_cannot() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert [matcher.push(piece)[0] for piece in ("hi", "\n", "\nUs", "ual")] == ["hi", "", "", "\n\nUsual"]


@pytest.mark.parametrize("stops", [[""], ["a", ""], "a string"])
def test_an_empty_stop_is_refused(stops: Sequence[str]) -> None:
    with pytest.raises(ValueError, match="stop strings are"):
        StopMatcher(stops)


@pytest.mark.timeout(30)
def test_long_repetitive_stops_take_bounded_time() -> None:
    matcher = StopMatcher(["a" * 50_000 + "b", "a" * 49_999 + "c"])
    for _ in range(2000):
        assert not matcher.push("a" * 50)[1]
    assert len(matcher.finish()) <= 50_000


def test_a_stop_spans_tokens_of_a_real_tokenizer(tokenizer: LoadedTokenizer) -> None:
    text = "def one():\n    pass\n\nclass 你好 Two:\n"
    for stop in ("\n\nclass", "你好", "好 T", "):", "f one", "\n"):
        detokenizer, matcher = Detokenizer(tokenizer), StopMatcher([stop])
        shown = ""
        ids = tokenizer.encode(text)
        for token in ids:
            safe, stopped = matcher.push(detokenizer.push([token]))
            shown += safe
            if stopped:
                break
        assert (shown, matcher.stopped) == cut_at_first_stop(tokenizer.decode(ids), [stop])
