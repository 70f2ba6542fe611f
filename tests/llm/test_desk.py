"""Who gets which output, without an engine: also on ranks that ask before or after rank 0."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from mindgen.engine.request import Output, Request, SamplingParams, TokenLogprob
from mindgen.llm.desk import Desk
from mindgen.llm.host import _as_told
from mindgen.llm.news import News, digest
from mindgen.parallel.group import PeerLost
from mindgen.parallel.rendezvous import RendezvousError
from mindgen.parallel.world import RankError


def mailbox() -> tuple[list[list[Output] | Exception], Callable[[list[Output] | Exception], None]]:
    received: list[list[Output] | Exception] = []
    return received, received.append


def test_everybody_gets_their_own_in_one_piece() -> None:
    desk, (mine, deliver), (others, deliver_others) = Desk(), mailbox(), mailbox()
    assert list(desk.open(2, deliver)) == [0, 1] and list(desk.open(1, deliver_others)) == [2]
    outputs = [Output(number, 0, (number,)) for number in (2, 0, 1)]
    desk.post(outputs)
    assert (mine, others) == ([[outputs[1], outputs[2]]], [[outputs[0]]])


def test_what_comes_before_the_question_is_kept_and_what_comes_after_leaving_is_not() -> None:
    desk, (received, deliver) = Desk(), mailbox()
    early, refusal = Output(0, 0, (5,)), ValueError("no")
    desk.post([early])
    desk.refuse([1], refusal)
    desk.open(2, deliver)
    assert received == [[early], refusal]
    desk.leave([0])
    desk.post([Output(0, 0, (6,))])
    assert len(received) == 2 and not desk._early


def test_the_end_reaches_all_who_wait_and_all_who_come_later() -> None:
    desk, (received, deliver) = Desk(), mailbox()
    desk.open(2, deliver)
    desk.fail(RuntimeError("first"))
    desk.fail(RuntimeError("second"))
    assert [str(error) for error in received] == ["first"]
    with pytest.raises(RuntimeError, match="first"):
        desk.open(1, deliver)


def test_who_asks_after_the_end_still_gets_what_came_before_it() -> None:
    desk, (received, deliver) = Desk(), mailbox()
    answer, end = [Output(1, 0, (5,))], RuntimeError("closed")
    desk.post(answer)
    desk.fail(end)
    assert list(desk.open(2, deliver)) == [0, 1]
    assert received == [answer, end]
    with pytest.raises(RuntimeError, match="closed"):
        desk.open(1, deliver)
    assert len(received) == 2


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (json.JSONDecodeError("no JSON", "{", 0), ValueError("no JSON: line 1 column 1 (char 0)")),
        (UnicodeDecodeError("utf-8", b"a", 0, 1, "no text"), ValueError),
        (FileNotFoundError(2, "no such file", "weights"), OSError("[Errno 2] no such file: 'weights'")),
        (RankError(1, "no weights"), ValueError("rank 1: no weights")),
        (PeerLost("rank 1 died"), PeerLost("rank 1 died")),
        (RendezvousError("nobody came"), RuntimeError("nobody came")),
        (KeyError("a"), RuntimeError("the engine failed: KeyError: 'a'")),
    ],
)
def test_the_end_is_told_as_often_as_somebody_asks(error: Exception, told: Any) -> None:
    desk = Desk()
    desk.fail(_as_told(error))
    for _ in range(2):
        with pytest.raises(Exception) as caught:
            desk.check()
        assert caught.type is (told if isinstance(told, type) else type(told))
        assert isinstance(told, type) or str(caught.value) == str(told)


def test_news_arrive_as_they_were() -> None:
    logprobs = (TokenLogprob(3, -math.inf, ((4, -0.1), (5, 1 / 3))), TokenLogprob(4, None))
    outputs = (
        Output(7, 1, (3, 4), 'é "quoted"\n\ud800', "length", logprobs, score=0.1, prompt_logprobs=logprobs[1:]),
        Output(8, 0, message="why", finish_reason="error"),
    )
    news = News(outputs, asked=((9, "abc"),), refused=(10, 11), reason="too long")
    assert News.unpack(news.pack()) == news


def test_a_digest_tells_requests_apart_whatever_their_number() -> None:
    params = SamplingParams(logit_bias={3: 1.0})
    assert digest(Request(1, (2, 3), params)) == digest(Request(5, (2, 3), params))
    assert digest(Request(1, (2, 3), params)) != digest(Request(1, (2, 3), SamplingParams()))
