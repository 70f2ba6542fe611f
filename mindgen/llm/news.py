"""What rank 0 tells the other ranks that a launcher started: what it was asked, and every output.

It travels as JSON in a vector of int64, because that is what goes between ranks, and because nothing is executed to
read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mindgen.engine.request import Output, Request, TokenLogprob

if TYPE_CHECKING:
    from torch import Tensor

_WORD = 8  # bytes of an int64


@dataclass(frozen=True)
class News:
    """What is new: outputs; requests by id with a digest of what they ask; those of them that were refused, and why."""

    outputs: tuple[Output, ...] = ()
    asked: tuple[tuple[int, str], ...] = ()
    refused: tuple[int, ...] = ()
    reason: str = ""

    def pack(self) -> Tensor:
        """[words] int64."""
        import torch

        data = json.dumps(asdict(self)).encode()
        padded = bytearray(data.ljust(-(-len(data) // _WORD) * _WORD))  # JSON may end in spaces
        return torch.frombuffer(padded, dtype=torch.int64)

    @classmethod
    def unpack(cls, words: Tensor) -> News:
        values = json.loads(words.numpy().tobytes())
        outputs = tuple(_output(output) for output in values["outputs"])
        asked = tuple((number, digest) for number, digest in values["asked"])
        return cls(outputs, asked, tuple(values["refused"]), values["reason"])


def digest(request: Request) -> str:
    """What a request asks, short: the same on all ranks that run the same script."""
    from hashlib import sha256

    return sha256(repr((request.prompt, request.params)).encode()).hexdigest()[:16]


def _output(values: dict[str, Any]) -> Output:
    logprobs = {name: _logprobs(values[name]) for name in ("logprobs", "prompt_logprobs")}
    return Output(**values | logprobs | {"token_ids": tuple(values["token_ids"])})


def _logprobs(entries: Iterable[dict[str, Any]] | None) -> tuple[TokenLogprob, ...] | None:
    if entries is None:
        return None
    return tuple(
        TokenLogprob(entry["token_id"], entry["logprob"], tuple((token, value) for token, value in entry["top"]))
        for entry in entries
    )
