"""Text as it grows: token ids to pieces of text, and stop strings in those pieces."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """The part of a tokenizer that a Detokenizer needs."""

    def decode(self, ids: Sequence[int]) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...


REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character

# An unfinished character is at most 3 bytes, and decoders write one U+FFFD for all of them or one for each.
MAX_UNFINISHED = 3
# Tokens kept in front of a possible character: 3 U+FFFD stand for at most 9 bytes, and what those are is settled
# by the 3 bytes before them. A token has at least one byte.
MAX_HELD = 12


class Detokenizer:
    """Decodes a growing list of ids, a few at a time.

    The pieces of `push` and `finish`, joined, are exactly `decode(all ids)`. A piece is valid text: bytes that are
    not a character yet are held back, and U+FFFD comes only where the whole text has it. The work for a token does
    not grow with the text: what is settled is never decoded again, and stands in front of what is not as one
    ordinary letter, because decoders treat the beginning of a text differently (they drop a space).

    Byte tokens (`<0x0A>`) of the `tokenizers` library are held until another token follows: whether a run of them is
    text or is all written as U+FFFD depends on its last byte.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._run_ids = _ids_decoded_as_runs(tokenizer)
        self._letter = _ordinary_letter(tokenizer)
        self._context: list[int] = []  # stands for the settled text; empty at its beginning
        self._context_length = 0  # of its text
        self._held: list[int] = []
        self._num_emitted = 0  # characters of the text of `_held` that are out already
        self._shown: dict[int, bool] = {}  # does the token show in a text, or is it skipped?

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete; empty while they end within a character."""
        return "".join([self._push_one(token) for token in ids])

    def finish(self) -> str:
        """The rest, U+FFFD for an unfinished character included. Nothing may be pushed after it."""
        text = self._text()[self._num_emitted :]
        self._held, self._num_emitted = [], 0
        return text

    def _push_one(self, token: int) -> str:
        if not self._shows(token):
            return ""
        self._held.append(token)
        if token in self._run_ids:
            return ""
        text = self._text()
        finished = len(text) - _num_unfinished(text)
        piece = text[self._num_emitted : finished]
        self._num_emitted = finished
        self._forget(text)
        return piece

    def _forget(self, text: str) -> None:
        """Drops the held tokens that no later token can change the text of."""
        if not text:
            del self._held[1:]  # a beginning that shows nothing yet: more of the same changes nothing
        elif self._num_emitted == len(text):
            self._settle(len(self._held))
        elif len(self._held) > MAX_HELD:
            num_unfinished = len(text) - self._num_emitted
            self._settle(len(self._held) - MAX_HELD)
            self._num_emitted = len(self._text()) - num_unfinished

    def _settle(self, num_tokens: int) -> None:
        self._context = self._held[:num_tokens] if self._letter is None else [self._letter]
        self._context_length = len(self._tokenizer.decode(self._context))
        del self._held[:num_tokens]
        self._num_emitted = 0

    def _text(self) -> str:
        """What the held tokens add to the settled text."""
        return self._tokenizer.decode(self._context + self._held)[self._context_length :]

    def _shows(self, token: int) -> bool:
        """False for special tokens and the like, which must not separate what is on both sides of them."""
        if token not in self._shown:
            self._shown[token] = self._letter is None or len(self._tokenizer.decode([self._letter, token])) > 1
        return self._shown[token]


def _num_unfinished(text: str) -> int:
    """How many characters at the end of `text` may turn into another one with the next byte."""
    return min(MAX_UNFINISHED, len(text) - len(text.rstrip(REPLACEMENT)))


def _ids_decoded_as_runs(tokenizer: Decoder) -> frozenset[int]:
    """The byte tokens, unless the decoder makes the best of every single one, as SentencePiece does."""
    found = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    ids = [token for token in found if token is not None]
    one_by_one = len(ids) == 256 and tokenizer.decode([ids[ord("A")], ids[0xFF]]) == "A" + REPLACEMENT
    return frozenset() if one_by_one else frozenset(ids)


def _ordinary_letter(tokenizer: Decoder) -> int | None:
    """A token that is one letter, decoded the same at the beginning of a text and within it."""
    for letter in string.ascii_letters:
        token = tokenizer.token_to_id(letter)
        if token is not None and tokenizer.decode([token]) == letter and tokenizer.decode([token, token]) == 2 * letter:
            return token
    return None


class StopMatcher:
    """Cuts a growing text before the first place where one of the stop strings begins.

    The result depends on the text only, not on how it is cut into pieces: joined, the safe texts are everything
    before the stop string that begins first (of all that the text contains). Work per character is constant for
    each stop string (Knuth, Morris and Pratt: `_matched` is how much of a stop string the text ends with).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(stops):
            raise ValueError(f"stop strings are {stops!r}; each must be a string of at least one character")
        self._stops = tuple(dict.fromkeys(stops))
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""  # the text from the first place on where a stop string may begin
        self._found: int | None = None  # where in `_held` the first complete stop string begins
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether the text has ended with a stop string; then nothing more is emitted."""
        return self._stopped

    def push(self, text: str) -> tuple[str, bool]:
        """What of the text so far can be shown now, and whether a stop string ends it there."""
        if self._stopped:
            return "", True
        if not self._stops:
            return text, False
        start = len(self._held)
        self._held += text
        for position in range(start, len(self._held)):
            self._step(position)
            if self._found is not None and self._first_open(position + 1) >= self._found:
                return self._stop(self._found), True
        return self._release(self._first_open(len(self._held))), False

    def finish(self) -> str:
        """What was held back, at the end of the text; `stopped` tells whether a stop string was in it."""
        if self._found is not None:
            return self._stop(self._found)
        return self._release(len(self._held))

    def _step(self, position: int) -> None:
        character = self._held[position]
        for index, stop in enumerate(self._stops):
            matched = self._matched[index]
            while matched and stop[matched] != character:
                matched = self._fallbacks[index][matched - 1]
            matched += stop[matched] == character
            if matched == len(stop):
                begins = position + 1 - matched
                self._found = begins if self._found is None else min(self._found, begins)
                matched = 0  # the same string again would begin later
            self._matched[index] = matched

    def _first_open(self, end: int) -> int:
        """Where the longest unfinished stop string begins in the text up to `end`."""
        return end - max(self._matched)

    def _release(self, length: int) -> str:
        safe, self._held = self._held[:length], self._held[length:]
        if self._found is not None:
            self._found -= length
        return safe

    def _stop(self, length: int) -> str:
        self._stopped = True
        safe, self._held = self._held[:length], ""
        self._found = None
        return safe


def _fallbacks(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper suffix that `stop` begins with."""
    lengths = [0] * len(stop)
    matched = 0
    for index in range(1, len(stop)):
        while matched and stop[matched] != stop[index]:
            matched = lengths[matched - 1]
        matched += stop[matched] == stop[index]
        lengths[index] = matched
    return lengths
