"""Rows of tokens from the corpus: code, edit pairs, dialogues and random text, each with a fixed share."""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import sentencepiece
import torch
from corpus import Corpus, chunks
from dialogues import dialogue
from edits import disguise, edit, listing, names, repeat
from torch import Tensor

IGNORED = -100  # the label of a token that is shown but not learned
SMALLEST = 48  # a shorter rest of a row is filled with plain code
NEIGHBOURS = 40  # functions of nearly the same length to choose from
FIRST_PIECE = 300  # below are control tokens, bytes and the commonest pieces


@dataclass(frozen=True)
class Document:
    """Tokens from begin to end of text; those before `learned_from` are shown but carry no loss."""

    tokens: list[int]
    learned_from: int = 1


@dataclass
class Mixer:
    """Draws documents, always of the kind that is furthest behind its share of the tokens."""

    corpus: Corpus
    pieces: sentencepiece.SentencePieceProcessor
    rng: random.Random
    drawn: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        coded = [(self.pieces.encode(code), code) for code in self.corpus.train_functions]
        coded.sort(key=lambda pair: (len(pair[0]), pair[1]))
        self.codes = [code for _, code in coded]
        self.lengths = [len(tokens) for tokens, _ in coded]
        self.blocks = [block for source in self.corpus.train for block in chunks(source.text)]
        self.known = sorted({name for code in self.codes[::5] for name in names(code)})
        self.kinds = {"code": self.code, "copies": self.copies, "chat": self.chat, "noise": self.noise}
        self.deck: list[str] = []

    def next(self, shares: dict[str, float], space: int) -> Document:
        """The next document; where it does not fit in what is left of the row, plain code, which may be cut."""
        kind = min(shares, key=lambda name: self.drawn.get(name, 0) / shares[name])
        document = self.kinds[kind](space) if space > SMALLEST else self.code(space)
        if len(document.tokens) > space and kind != "code":
            kind, document = "code", self.code(space)
        self.drawn[kind] = self.drawn.get(kind, 0) + min(space, len(document.tokens))
        return document

    def wrap(self, text: str) -> list[int]:
        return [self.pieces.bos_id(), *self.pieces.encode(text), self.pieces.eos_id()]

    def code(self, limit: int) -> Document:
        """A function, or a stretch of a module; everything is drawn once before anything is drawn twice."""
        if not self.deck:
            self.deck = self.codes + self.blocks[::2]
            self.rng.shuffle(self.deck)
        return Document(self.wrap(self.deck.pop()))

    def short_function(self, longest: int) -> str:
        """A random function of at most `longest` tokens; all lengths are equally likely, for long ones are rare."""
        first = bisect.bisect_left(self.lengths, self.rng.uniform(0, longest))
        last = bisect.bisect_right(self.lengths, max(longest, self.lengths[0]))
        return self.codes[min(first + self.rng.randrange(NEIGHBOURS), last - 1)]

    def copies(self, limit: int) -> Document:
        """A function and its edited copy, as a chat or as plain text one after the other."""
        code = disguise(self.short_function((limit - 24) * 2 // 5), self.rng, self.known)
        if self.rng.random() < 0.08:
            code = listing(self.rng, self.known, self.rng.randint(1, max(2, limit // 40)))
        change = edit(code, self.rng, self.known)
        if self.rng.random() < 0.4:
            return self.second_half(code + "\n\n\n", change.result)
        return self.turn(f"{change.instruction}\n\n{code}", change.result)

    def second_half(self, shown: str, learned: str) -> Document:
        start = len(self.pieces.encode(shown)) + 1
        return Document(self.wrap(shown + learned), start)

    def turn(self, question: str, answer: str) -> Document:
        return self.second_half(f"<|user|>{question}<|assistant|>", answer)

    def chat(self, limit: int) -> Document:
        tokens = [self.pieces.bos_id()]
        for question, answer in dialogue(self.rng, self.known):
            tokens += [*self.pieces.encode(f"<|user|>{question}<|assistant|>{answer}"), self.pieces.eos_id()]
        return Document(tokens)

    def noise(self, limit: int) -> Document:
        """Random tokens, or a made-up listing, two to four times over."""
        times = self.rng.randint(2, 4)
        length = self.rng.randint(4, max(5, (limit - 2) // times - 1))
        once = [self.rng.randrange(FIRST_PIECE, self.pieces.get_piece_size()) for _ in range(length)]
        if self.rng.random() < 0.4:
            once = self.pieces.encode(listing(self.rng, self.known, 1 + length // 12) + "\n")[:length]
        return Document([self.pieces.bos_id(), *once * times, self.pieces.eos_id()], 1 + len(once))

    def row(self, shares: dict[str, float], length: int) -> tuple[list[int], list[int]]:
        """Documents one after the other; only plain code is ever cut at the end of a row."""
        tokens: list[int] = []
        labels: list[int] = []
        while len(tokens) <= length:
            space = length + 1 - len(tokens)
            document = self.next(shares, space)
            head = min(document.learned_from, len(document.tokens))
            tokens += document.tokens[:space]
            labels += ([IGNORED] * head + document.tokens[head:])[:space]
        return tokens[:-1], labels[1:]

    def batch(self, shares: dict[str, float], rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels, each [rows, length]."""
        made = [self.row(shares, length) for _ in range(rows)]
        return torch.tensor([tokens for tokens, _ in made]), torch.tensor([labels for _, labels in made])


def copying_probes(mixer: Mixer, functions: list[str], longest: int, count: int) -> Iterator[Document]:
    """Held-out functions to be repeated, the longest that fit, for the training log."""
    fitting = sorted((len(mixer.pieces.encode(code)), code) for code in functions)
    for code in [code for length, code in fitting if length <= longest][-count:]:
        yield mixer.turn(f"{repeat(code, random.Random(0), []).instruction}\n\n{code}", code)
