"""`LLM` in this process: what it answers, whole, in pieces and without blocking."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch

from mindgen import LLM, Result, SamplingParams
from mindgen.llm.call import Progress
from mindgen.llm.desk import Deliver
from mindgen.llm.llm import _into
from tests.checkpoints import prompts
from tests.llm.demo import ANSWER, CHAT, DEMO, GREEDY, LONG, QUESTION, SEEDED, SMALL, waiting


class TestAnswers:
    @pytest.mark.parametrize("name", ["qwen3", "llama31"])
    def test_greedy_tokens_are_those_of_transformers(
        self, name: str, checkpoint: Callable[[str], Path], judge: Callable[[str], Any]
    ) -> None:
        asked = prompts(4)
        with LLM(checkpoint(name), **SMALL) as llm:
            results = llm.generate(asked, GREEDY)
        for ids, result in zip(asked, results, strict=True):
            wanted = judge(name).generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)
            assert result.token_ids == wanted[0, len(ids) :].tolist()
            assert result.prompt_token_ids == ids and result.prompt is None

    def test_a_single_prompt_gives_one_result_and_a_list_a_list(self, demo: LLM) -> None:
        text = demo.generate("def f", GREEDY)
        ids = demo.generate(text.prompt_token_ids, GREEDY)
        both = demo.generate(["def f", text.prompt_token_ids], GREEDY)
        assert isinstance(text, Result) and text.prompt == "def f" and text.text
        assert [ids.token_ids, both[0].token_ids, both[1].token_ids] == [text.token_ids] * 3
        assert demo.generate([]) == []

    def test_an_array_is_one_prompt_and_a_wider_one_a_list_of_them(self, demo: LLM) -> None:
        rows = [[1, 5, 6], [1, 2, 3]]
        wanted = [result.token_ids for result in demo.generate(rows, GREEDY)]
        for make in (numpy.array, torch.tensor):
            together, single = demo.generate(make(rows), GREEDY), demo.generate(make(rows[1]), GREEDY)
            assert [result.token_ids for result in together] == wanted
            assert single.token_ids == wanted[1]
            assert [result.token_ids for result in demo.generate([make(rows[0])], GREEDY)] == wanted[:1]

    def test_chat_uses_the_template(self, demo: LLM) -> None:
        result = demo.chat(QUESTION, CHAT)
        assert (result.text, result.finish_reason) == (ANSWER, "eos")
        assert [other.text for other in demo.chat([QUESTION, QUESTION], CHAT)] == [ANSWER] * 2

    def test_a_prompt_type_lays_out_conversations_in_place_of_the_template(self, demo: LLM) -> None:
        text = demo.tokenizer.encode("[INST] how are you? [/INST]", add_special_tokens=False)
        laid_out = [demo.tokenizer.bos_id, *text]
        with LLM(DEMO, prompt_type="llama2", **SMALL) as llm:
            assert llm.chat_prompt(QUESTION) == laid_out != demo.chat_prompt(QUESTION)
            assert llm.chat(QUESTION, GREEDY).token_ids == demo.generate(laid_out, GREEDY).token_ids

    def test_a_prompt_type_is_of_the_tokenizer_that_was_named(
        self, demo: LLM, checkpoint: Callable[[str], Path]
    ) -> None:
        """The model has none."""
        text = demo.tokenizer.encode("[INST] how are you? [/INST]", add_special_tokens=False)
        with LLM(checkpoint("qwen3"), tokenizer=DEMO, prompt_type="llama2", **SMALL) as llm:
            assert llm.chat_prompt(QUESTION) == [demo.tokenizer.bos_id, *text]

    def test_every_prompt_has_its_own_params_and_all_samples(self, demo: LLM) -> None:
        first = SamplingParams(max_new_tokens=3, n=3, logprobs=2, prompt_logprobs=1, seed=7, ignore_eos=True)
        one, other = demo.generate(["def f", "class A"], [first, GREEDY])
        assert [len(sample.token_ids) for sample in one.samples] == [3, 3, 3]
        assert (one.text, one.token_ids, one.logprobs) == (
            one.samples[0].text,
            one.samples[0].token_ids,
            one.samples[0].logprobs,
        )
        assert [entry.token_id for entry in one.logprobs] == one.token_ids
        assert [entry.token_id for entry in one.prompt_logprobs] == one.prompt_token_ids
        assert len(other.samples) == 1 and other.logprobs is None and other.prompt_logprobs is None

    def test_an_answer_ends_where_the_positions_of_the_model_do(self, checkpoint: Callable[[str], Path]) -> None:
        with LLM(checkpoint("qwen25"), **SMALL) as llm:
            result = llm.generate([5] * 250, SamplingParams(max_new_tokens=50, temperature=0, ignore_eos=True))
            assert (len(result.token_ids), result.finish_reason) == (6, "length")
            with pytest.raises(ValueError, match="256 tokens.*256 positions.*shorten"):
                llm.generate([5] * 256)


class TestStreams:
    def test_the_pieces_are_the_whole_answer(self, demo: LLM) -> None:
        pieces = list(demo.stream(demo.chat_prompt(QUESTION), CHAT))
        assert "".join(piece.text for piece in pieces) == ANSWER and len(pieces) > 5
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["eos"]

    def test_leaving_the_loop_aborts(self, demo: LLM) -> None:
        for _ in demo.stream("def f", LONG):
            break
        assert not waiting(demo)
        asyncio.run(self.leave_early(demo))
        assert not waiting(demo)

    async def leave_early(self, llm: LLM) -> None:
        pieces = llm.astream("def f", LONG)
        assert (await anext(pieces)).token_ids
        await pieces.aclose()

    def test_abort_from_outside_keeps_what_there_is(self, demo: LLM) -> None:
        pieces = demo.stream("def f", LONG)
        first = next(pieces)
        demo.abort(first.request_id)
        rest = list(pieces)
        assert rest[-1].finish_reason == "abort" and len(rest) < 1000


class TestAsync:
    def test_many_at_once_give_what_each_gives_alone(self, demo: LLM) -> None:
        async def ask() -> list[Any]:
            tasks = [demo.agenerate("def f", params) for params in SEEDED]
            return await asyncio.gather(*tasks, demo.achat(QUESTION, CHAT), self.text(demo))

        *seeded, chat, streamed = asyncio.run(ask())
        assert [r.token_ids for r in seeded] == [demo.generate("def f", params).token_ids for params in SEEDED]
        assert chat.text == streamed == ANSWER

    def test_a_loop_that_is_closed_meanwhile_harms_nobody(self) -> None:
        """It closes after it has said that it has not."""

        async def made() -> Deliver:
            return _into(asyncio.Queue())

        with closing(asyncio.new_event_loop()) as loop:
            deliver = loop.run_until_complete(made())
        with patch.object(loop, "is_closed", return_value=False):
            deliver([])

    async def text(self, llm: LLM) -> str:
        return "".join([piece.text async for piece in llm.astream(llm.chat_prompt(QUESTION), CHAT)])

    def test_the_loop_goes_on_and_a_cancelled_task_aborts(self, demo: LLM) -> None:
        async def cancel() -> None:
            task = asyncio.create_task(demo.agenerate(["def f"] * 3, LONG))
            async for _ in demo.astream("def f", GREEDY):  # which runs beside it
                pass
            assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(cancel())
        assert not waiting(demo)


def test_the_bar_is_shown_on_demand_and_silent_elsewhere(demo: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    demo.generate(["def f"] * 3, GREEDY)
    assert capsys.readouterr().err == ""
    demo.generate(["def f"] * 3, GREEDY, progress=True)
    assert "3/3" in (shown := capsys.readouterr().err) and "tokens/s" in shown


@pytest.mark.parametrize("options", [{"n": 2}, {"n": 2, "num_beams": 2}, {"n": 1, "best_of": 2}])
def test_the_bar_counts_what_is_generated_and_not_the_prompt_that_is_echoed(demo: LLM, options: dict[str, Any]) -> None:
    params = SamplingParams(max_new_tokens=3, min_new_tokens=3, ignore_eos=True, echo=True, **options)
    with patch.object(Progress, "advance") as advance:
        results = demo.generate(["def f", "class A"], params)
    assert advance.call_args.args == (2 * 3 * params.n, 2)
    assert results[0].token_ids[:-3] == results[0].prompt_token_ids
