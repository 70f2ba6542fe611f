"""`LLM` in this process: what it takes and gives, alone and over two ranks."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch

from mindgen import LLM, EngineConfig, PeerLost, Result, SamplingParams
from mindgen.llm.call import Call
from mindgen.llm.desk import Deliver
from mindgen.llm.llm import _into
from mindgen.llm.questions import make_questions
from tests.checkpoints import prompts

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "model"
QUESTION = [{"role": "user", "content": "how are you?"}]
ANSWER = "I am fine, thank you! How can I help you today?"
GREEDY = SamplingParams(temperature=0, max_new_tokens=8)
CHAT = SamplingParams(temperature=0)
LONG = SamplingParams(temperature=0, max_new_tokens=1800, ignore_eos=True)
SMALL = {"device": "cpu", "kv_cache_memory": 0.05}
SEEDED = [SamplingParams(max_new_tokens=12, seed=seed, ignore_eos=True) for seed in range(4)]


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM(DEMO, **SMALL) as llm:
        yield llm


@pytest.fixture(scope="module")
def pair() -> Iterator[LLM]:
    """The demo model over two ranks, in fp32."""
    with LLM(DEMO, tensor_parallel_size=2, dtype="fp32", **SMALL) as llm:
        yield llm


def children() -> list[psutil.Process]:
    return psutil.Process().children()


def only_rank(llm: LLM) -> psutil.Process:
    """The process of its rank 1."""
    (child,) = llm._host._ranks.children.values()
    return psutil.Process(child.pid)


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

    def test_chat_uses_the_template(self, demo: LLM) -> None:
        result = demo.chat(QUESTION, CHAT)
        assert (result.text, result.finish_reason) == (ANSWER, "eos")
        assert [other.text for other in demo.chat([QUESTION, QUESTION], CHAT)] == [ANSWER] * 2

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

    def test_seeded_answers_are_the_same_alone_in_a_crowd_and_over_two_ranks(self, pair: LLM) -> None:
        with LLM(DEMO, dtype="fp32", **SMALL) as single:
            alone = [single.generate("def f", params).token_ids for params in SEEDED]
            crowd = [result.token_ids for result in single.generate(["def f"] * 4, SEEDED)]
        split = [result.token_ids for result in pair.generate(["def f"] * 4, SEEDED)]
        assert alone == crowd == split and alone[0] != alone[1]


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


def waiting(llm: LLM) -> bool:
    """Whether the engine has anything to do once it has done what it was told: asked where it decides."""
    found: list[bool] = []
    done = threading.Event()
    llm._host._commands.put(lambda engine: (found.append(engine.scheduler.has_work), done.set()))
    assert done.wait(60)
    return found[0]


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


class TestRefusals:
    def test_an_unknown_option_is_a_type_error_that_names_it(self) -> None:
        with pytest.raises(TypeError, match="tensor_paralel_size.*tensor_parallel_size"):
            LLM(DEMO, tensor_paralel_size=2)

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0; it must be at least 1"),
            ({"tensor_parallel_size": 3}, "Sizes that fit: 1, 2, 4, 8"),
        ],
    )
    def test_a_bad_value_says_what_is_allowed(self, option: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LLM(DEMO, **option)

    def test_every_option_is_a_field_and_a_configuration_is_taken_whole(self) -> None:
        values = {field.name: field.default for field in fields(EngineConfig) if field.name != "model"}
        config = EngineConfig(str(DEMO), **values | SMALL)
        with LLM(config, block_size=32) as llm:
            assert (llm.config.block_size, llm.config.device) == (32, "cpu")

    def test_a_folder_without_weights_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="holds no weights"):
            LLM(tmp_path)

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ([1, 99999], "prompt 99: it has token id 99999; the model's are 0 to"),
            ([], "prompt 99: it is empty"),
            ([1, "a"], "prompt 99: .*neither a text nor"),
            (None, "prompt 99: "),
            (b"ab", "prompt 99: .*neither a text nor"),
        ],
    )
    def test_one_bad_prompt_of_a_hundred_is_named_before_any_runs(self, demo: LLM, bad: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            demo.generate(["def f"] * 99 + [bad], LONG)
        assert not waiting(demo)

    def test_what_only_the_engine_can_refuse_leaves_nothing_behind(self, demo: LLM) -> None:
        params, received = [LONG, LONG, SamplingParams(logit_bias={99999: 1.0})], []
        with pytest.raises(ValueError, match="99999"):
            demo.generate(["def f"] * 3, params)
        with Call(demo._host, 3, received.append) as call:
            call.ask(make_questions(["def f"] * 3, params, demo._model))
            assert not waiting(demo)
            assert [str(error) for error in received if isinstance(error, ValueError)] and len(received) == 1

    def test_one_params_for_each_prompt(self, demo: LLM) -> None:
        with pytest.raises(ValueError, match="2 SamplingParams for 3 prompts"):
            demo.generate(["a"] * 3, [GREEDY] * 2)
        with pytest.raises(ValueError, match="is not SamplingParams"):
            demo.generate(["a"], [0.7])

    @pytest.mark.parametrize("bad", [None, 5, b"ab", {"role": "user", "content": "one message"}])
    def test_what_is_no_prompt_at_all_is_told_what_one_is(self, demo: LLM, bad: Any) -> None:
        with pytest.raises(ValueError, match="give a text, token ids"):
            demo.generate(bad)
        with pytest.raises(ValueError, match="give a list of messages"):
            demo.chat(bad)

    @pytest.mark.parametrize("bad", [[5], [QUESTION, 5], [*QUESTION, 5], ["hi"], [[5]]])
    def test_what_is_no_conversation_is_told_what_one_is(self, demo: LLM, bad: Any) -> None:
        with pytest.raises(ValueError, match="is of type (int|str).*; give a list of messages, each a dict"):
            demo.chat(bad)

    @pytest.mark.parametrize("bad", [[2**70], [99999]])
    def test_a_stop_token_outside_the_vocabulary_is_refused_and_harms_nobody(self, demo: LLM, bad: list[int]) -> None:
        with pytest.raises(ValueError, match=f"stop_token_ids of request .* has token id {bad[0]}; the model's voc"):
            demo.generate("def f", SamplingParams(stop_token_ids=bad, min_new_tokens=3))
        assert demo.chat(QUESTION, CHAT).text == ANSWER

    def test_whatever_fails_in_the_engine_ends_no_other_request(self, demo: LLM) -> None:
        params = SamplingParams(max_new_tokens=2)
        object.__setattr__(params, "stop_token_ids", ("a",))
        with pytest.raises(RuntimeError, match="the request failed: TypeError"):
            demo.generate("def f", params)
        with pytest.raises(ValueError, match=r"\[1\] is no request's id"):
            demo.abort([1])  # type: ignore[arg-type]
        demo._host.abort([[1]])  # type: ignore[list-item]
        assert demo.chat(QUESTION, CHAT).text == ANSWER and not waiting(demo)

    def test_text_without_a_tokenizer_is_refused(self, checkpoint: Callable[[str], Path]) -> None:
        with LLM(checkpoint("qwen3"), **SMALL) as llm:
            with pytest.raises(ValueError, match="no tokenizer"):
                llm.generate("hello")
            with pytest.raises(ValueError, match="no tokenizer|needs a tokenizer"):
                llm.chat(QUESTION)


def test_the_bar_is_shown_on_demand_and_silent_elsewhere(demo: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    demo.generate(["def f"] * 3, GREEDY)
    assert capsys.readouterr().err == ""
    demo.generate(["def f"] * 3, GREEDY, progress=True)
    assert "3/3" in (shown := capsys.readouterr().err) and "tokens/s" in shown


class TestTwoRanks:
    def test_ctrl_c_aborts_and_leaves_all_ranks_usable(self, pair: LLM) -> None:
        with interrupted_in("_answers"), pytest.raises(KeyboardInterrupt):
            pair.generate(["def f"] * 2, LONG)
        assert pair.chat(QUESTION, CHAT).text == ANSWER
        assert not waiting(pair)

    def test_a_second_one_of_several_ranks_is_refused_and_one_of_one_rank_is_not(self, pair: LLM) -> None:
        count = len(children())
        with pytest.raises(RuntimeError, match="torch.distributed is in use.*close the other"):
            LLM(DEMO, tensor_parallel_size=2, **SMALL)
        assert len(children()) == count
        with LLM(DEMO, **SMALL) as other:
            assert other.chat(QUESTION, CHAT).text == pair.chat(QUESTION, CHAT).text == ANSWER


@contextmanager
def interrupted_in(function: str) -> Iterator[None]:
    """Presses Ctrl-C, which a terminal sends to children too, when a thread is in the function."""
    left = threading.Event()

    def press() -> None:
        while function not in functions_running() and not left.is_set():
            time.sleep(0.001)
        if not left.is_set():
            for process in (*children(), psutil.Process()):
                process.send_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=press, daemon=True).start()
        yield
    finally:
        left.set()
        signal.signal(signal.SIGINT, before)


def functions_running() -> set[str]:
    names = set()
    for frame in sys._current_frames().values():
        at: FrameType | None = frame
        while at is not None:
            names.add(at.f_code.co_name)
            at = at.f_back
    return names


class TestEnds:
    """After `pair`, since torch.distributed exists once in a process."""

    def test_a_rank_that_dies_is_an_exception_in_every_call_and_another_llm_can_follow(self, pair: LLM) -> None:
        only_rank(pair).kill()
        with pytest.raises(PeerLost, match="rank 1 died"):
            pair.generate("def f", LONG)
        pair.close()
        threads, handlers = torch.get_num_threads(), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        llm = LLM(DEMO, tensor_parallel_size=2, **SMALL)
        assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        pieces = llm.stream("def f", LONG)
        next(pieces)
        only_rank(llm).kill()
        with pytest.raises(PeerLost, match=r"rank 1 died \(killed by signal 9\).*make a new one"):
            list(pieces)
        with pytest.raises(PeerLost, match="make a new one"):
            llm.generate("def f")
        llm.close()
        assert torch.get_num_threads() == threads

        after = LLM(DEMO, pipeline_parallel_size=2, **SMALL)
        rank = only_rank(after)
        assert after.chat(QUESTION, CHAT).text == ANSWER
        del after
        gc.collect()
        _, alive = psutil.wait_procs([rank], timeout=30)
        assert not alive

    @pytest.mark.parametrize("moment", ["model", "roll_call"])
    def test_ctrl_c_while_it_starts_leaves_no_rank_and_no_thread(self, moment: str) -> None:
        before, others = set(children()), set(threading.enumerate())
        with interrupted_in(moment), pytest.raises(KeyboardInterrupt):
            LLM(DEMO, tensor_parallel_size=2, **SMALL)
        _, alive = psutil.wait_procs(list(set(children()) - before), timeout=30)
        assert not alive
        for thread in set(threading.enumerate()) - others:
            thread.join(30)
            assert not thread.is_alive()

    def test_a_closed_one_says_so(self) -> None:
        llm = LLM(DEMO, **SMALL)
        pieces = llm.stream("def f", LONG)
        next(pieces)
        llm.close()
        llm.close()
        with pytest.raises(RuntimeError, match="closed"):
            list(pieces)
        with pytest.raises(RuntimeError, match="closed; make a new one"):
            llm.generate("def f")
