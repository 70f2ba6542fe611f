"""What processors must know of the tokens of a sequence, kept up as they grow: no step looks at the whole text again.

Everything that is simply added to scores (biases, penalties by count, tokens that must not come now) is one mapping
from token id to number.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from mindgen.engine.params import SamplingParams

NEVER = float("-inf")
TokenIds = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Rules:
    """What a request does to scores, whatever its sequences say.

    num_prompt: tokens of the prompt. remembers: is there a repetition penalty? presence, frequency: what is taken away
    from a token that was generated, once and for each time. added: of every step. end_ids: tokens that cannot come
    before min_new_tokens are generated. banned: last token of a beginning -> (beginning, the token that must not
    follow it).
    """

    num_prompt: int
    remembers: bool = False
    presence: float = 0.0
    frequency: float = 0.0
    added: Mapping[int, float] = field(default_factory=dict)
    end_ids: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    banned: Mapping[int, tuple[tuple[TokenIds, int], ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, params: SamplingParams, num_prompt: int, end_ids: Collection[int] = (), bad_words: Iterable[TokenIds] = ()
    ) -> Rules:
        """`bad_words` are the token ids of each way to write one; those of a single token never come."""
        ways = [tuple(way) for way in bad_words]
        return cls(
            num_prompt=num_prompt,
            remembers=params.repetition_penalty != 1.0,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            added=dict(params.logit_bias) | {way[0]: NEVER for way in ways if len(way) == 1},
            end_ids=frozenset(end_ids),
            min_new_tokens=params.min_new_tokens,
            banned=_by_beginning(way for way in ways if len(way) > 1),
        )

    @property
    def counts(self) -> bool:
        """Does it matter how often a token was generated?"""
        return bool(self.presence or self.frequency)


class Past:
    """The tokens of one sequence as its rules see them."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.seen: dict[int, None] = {}  # distinct tokens, of the prompt too; empty unless the rules remember
        self._added = dict(rules.added)
        self._counts: dict[int, int] = {}
        self._num_read = 0

    def fork(self) -> Past:
        """Another sequence with the same tokens so far."""
        other = Past(self.rules)
        other.seen, other._added, other._counts = self.seen.copy(), self._added.copy(), self._counts.copy()
        other._num_read = self._num_read
        return other

    def read(self, tokens: list[int]) -> None:
        """Take in what is new in `tokens`, all tokens of the sequence."""
        if self.rules.remembers:
            self.seen.update(dict.fromkeys(tokens[self._num_read :]))
        if self.rules.counts:
            for token in tokens[max(self._num_read, self.rules.num_prompt) :]:
                self._count(token)
        self._num_read = len(tokens)

    def added(self, tokens: list[int]) -> Mapping[int, float]:
        """What is added to the scores of the token that follows `tokens`, which were read."""
        never = self._never(tokens)
        return self._added | dict.fromkeys(never, NEVER) if never else self._added

    def _count(self, token: int) -> None:
        count = self._counts[token] = self._counts.get(token, 0) + 1
        rules = self.rules
        self._added[token] = rules.added.get(token, 0.0) - rules.presence - rules.frequency * count

    def _never(self, tokens: list[int]) -> list[int]:
        """Tokens that must not come next, beside those that never come."""
        rules = self.rules
        never = list(rules.end_ids) if len(tokens) - rules.num_prompt < rules.min_new_tokens else []
        for beginning, token in rules.banned.get(tokens[-1], ()):
            if tuple(tokens[-len(beginning) :]) == beginning:
                never.append(token)
        return never


def _by_beginning(ways: Iterable[TokenIds]) -> dict[int, tuple[tuple[TokenIds, int], ...]]:
    found: dict[int, tuple[tuple[TokenIds, int], ...]] = {}
    for *beginning, token in ways:
        found[beginning[-1]] = (*found.get(beginning[-1], ()), (tuple(beginning), token))
    return found
