"""What `LLM` refuses, before anything of it runs, and that what fails harms nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import fields
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from mindgen import LLM, EngineConfig, SamplingParams
from mindgen.llm.call import Call
from mindgen.llm.questions import make_questions
from tests.llm.demo import ANSWER, CHAT, DEMO, GREEDY, LONG, QUESTION, SMALL, waiting


@pytest.fixture(scope="module")
def cramped(checkpoint: Callable[[str], Path]) -> Iterator[LLM]:
    """Without a tokenizer, and with room for few tokens."""
    with LLM(checkpoint("qwen3"), device="cpu", block_size=16, kv_cache_memory=0.0001) as llm:
        yield llm


def test_an_unknown_option_is_a_type_error_that_names_it() -> None:
    with pytest.raises(TypeError, match="tensor_paralel_size.*tensor_parallel_size"):
        LLM(DEMO, tensor_paralel_size=2)


def test_all_keywords_there_are_are_named() -> None:
    keywords = [name for name, each in signature(LLM).parameters.items() if each.kind is Parameter.KEYWORD_ONLY]
    fields_of_config = [field.name for field in fields(EngineConfig) if field.name != "model"]
    with pytest.raises(TypeError, match=f"'foo'; it has {', '.join(fields_of_config + keywords)}$"):
        LLM(DEMO, foo=1)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"tensor_parallel_size": 0}, r"tensor_parallel_size \(--tensor-.*\) is 0; it must be at least 1"),
        ({"tensor_parallel_size": 3}, "Sizes that fit: 1, 2, 4, 8"),
    ],
)
def test_a_bad_value_says_what_is_allowed(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(DEMO, **option)


def test_every_option_is_a_field_and_a_configuration_is_taken_whole() -> None:
    values = {field.name: field.default for field in fields(EngineConfig) if field.name != "model"}
    config = EngineConfig(str(DEMO), **values | SMALL)
    with LLM(config, block_size=32) as llm:
        assert (llm.config.block_size, llm.config.device) == (32, "cpu")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
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
        (numpy.array([[1, 2]]), "prompt 99: .*neither a text nor"),
        (torch.tensor([[5]]), "prompt 99: .*neither a text nor"),
        (torch.tensor([1.0, 2.0]), "prompt 99: .*neither a text nor"),
    ],
)
def test_one_bad_prompt_of_a_hundred_is_named_before_any_runs(demo: LLM, bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.generate(["def f"] * 99 + [bad], LONG)
    assert not waiting(demo)


async def _drain(pieces: AsyncIterator[Any]) -> None:
    async for _ in pieces:
        pass


@pytest.mark.parametrize("bad", [["a", "b"], ("a",), [[1, 2], [3]], numpy.array([[1, 2]])])
def test_a_stream_of_several_prompts_says_who_takes_them(demo: LLM, bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^stream takes one prompt, .*; generate takes lists of them"):
        demo.stream(bad)
    with pytest.raises(ValueError, match=r"^astream takes one prompt, .*; agenerate takes lists of them"):
        asyncio.run(_drain(demo.astream(bad)))
    assert not waiting(demo)


@pytest.mark.parametrize("bad", [[1, "a"], [1.0, 2.0], 5, {"role": "user"}])
def test_a_stream_of_no_prompt_at_all_is_told_so(demo: LLM, bad: Any) -> None:
    with pytest.raises(ValueError, match="the prompt: .* is neither a text nor a sequence of token ids"):
        demo.stream(bad)


def test_what_only_the_engine_can_refuse_leaves_nothing_behind(demo: LLM) -> None:
    params, received = [LONG, LONG, SamplingParams(logit_bias={99999: 1.0})], []
    with pytest.raises(ValueError, match="99999"):
        demo.generate(["def f"] * 3, params)
    with Call(demo._host, 3, received.append) as call:
        call.ask(make_questions(["def f"] * 3, params, demo._model))
        assert not waiting(demo)
        assert [str(error) for error in received if isinstance(error, ValueError)] and len(received) == 1


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([1] * 200, {}, " has 200 prompt tokens and may generate .* but the cache has "),
        ([1], {"stop_token_ids": [331]}, "stop_token_ids of .* has token id 331"),
        ([1], {"logit_bias": {331: 1.0}}, "the logit_bias of .* has token id 331"),
        ([1], {"bad_words": ["no"]}, " has bad_words, which need a tokenizer"),
    ],
)
def test_what_only_the_engine_refuses_is_named_as_the_caller_counts(
    cramped: LLM, prompt: list[int], options: dict[str, Any], message: str
) -> None:
    cramped.generate([[1]] * 7, GREEDY)
    params = SamplingParams(max_new_tokens=8, **options)
    with pytest.raises(ValueError, match=message) as caught:
        cramped.generate([[1], [2], prompt], [GREEDY, GREEDY, params])
    assert "prompt 2 has" in str(caught.value) or "of prompt 2 has" in str(caught.value)
    with pytest.raises(ValueError, match=message) as caught:
        cramped.generate(prompt, params)
    assert "the request has" in str(caught.value)
    assert not waiting(cramped)


def test_one_params_for_each_prompt(demo: LLM) -> None:
    with pytest.raises(ValueError, match="2 SamplingParams for 3 prompts"):
        demo.generate(["a"] * 3, [GREEDY] * 2)
    with pytest.raises(
        ValueError, match=r"0.7 is not SamplingParams; give one, such as SamplingParams\(temperature=0\)"
    ):
        demo.generate(["a"], [0.7])


@pytest.mark.parametrize("bad", [5, "greedy", {"n": 2}, (params for params in [GREEDY])])
def test_params_of_a_wrong_type_are_told_what_to_be(demo: LLM, bad: Any) -> None:
    with pytest.raises(ValueError, match="is of type .*; give SamplingParams, or one for each prompt, such as S"):
        demo.generate("a", bad)


def test_what_leaves_no_room_for_the_least_answer_is_said_with_what_the_caller_gave(demo: LLM) -> None:
    message = (
        r"2040 tokens, and the model has 2048 positions: room for 8, and min_new_tokens is 20; shorten the prompt or"
    )
    with pytest.raises(ValueError, match=message):
        demo.generate([1] * 2040, SamplingParams(min_new_tokens=20))
    assert len(demo.generate([1] * 2040, SamplingParams(min_new_tokens=8)).token_ids) == 8


@pytest.mark.parametrize("bad", [None, 5, numpy.array(5), b"ab", {"role": "user", "content": "one message"}])
def test_what_is_no_prompt_at_all_is_told_what_one_is(demo: LLM, bad: Any) -> None:
    with pytest.raises(ValueError, match="give a text, token ids"):
        demo.generate(bad)
    with pytest.raises(ValueError, match="give a list of messages"):
        demo.chat(bad)


@pytest.mark.parametrize("bad", [[5], [QUESTION, 5], [*QUESTION, 5], ["hi"], [[5]]])
def test_what_is_no_conversation_is_told_what_one_is(demo: LLM, bad: Any) -> None:
    with pytest.raises(ValueError, match="is of type (int|str).*; give a list of messages, each a dict"):
        demo.chat(bad)


@pytest.mark.parametrize("bad", [[2**70], [99999]])
def test_a_stop_token_outside_the_vocabulary_is_refused_and_harms_nobody(demo: LLM, bad: list[int]) -> None:
    with pytest.raises(ValueError, match=f"^stop_token_ids of the request has token id {bad[0]}; the model's voc"):
        demo.generate("def f", SamplingParams(stop_token_ids=bad, min_new_tokens=3))
    assert demo.chat(QUESTION, CHAT).text == ANSWER


def test_whatever_fails_in_the_engine_ends_no_other_request(demo: LLM) -> None:
    params = SamplingParams(max_new_tokens=2)
    object.__setattr__(params, "stop_token_ids", ("a",))
    with pytest.raises(RuntimeError, match="the request failed: TypeError"):
        demo.generate("def f", params)
    with pytest.raises(ValueError, match=r"\[1\] is no request's id"):
        demo.abort([1])  # type: ignore[arg-type]
    demo._host.abort([[1]])  # type: ignore[list-item]
    assert demo.chat(QUESTION, CHAT).text == ANSWER and not waiting(demo)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", r"unknown prompt_type \(--prompt-type\) 'nonsense'; choose one of alpaca, baichuan, "),
        (["llama2"], r"unknown prompt_type \(--prompt-type\) \['llama2'\]; choose one of alpaca"),
        ("qwen", r"prompt_type \(--prompt-type\) qwen writes the token <\|im_start\|>"),
    ],
)
def test_a_prompt_type_that_is_unknown_or_of_another_family_is_named(name: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(DEMO, prompt_type=name, **SMALL)


def test_a_prompt_type_needs_a_tokenizer(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"tokenizer \(--tokenizer-name-or-path\)"):
        LLM(checkpoint("qwen3"), prompt_type="llama2", **SMALL)


def test_text_without_a_tokenizer_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with LLM(checkpoint("qwen3"), **SMALL) as llm:
        with pytest.raises(ValueError, match="no tokenizer"):
            llm.generate("hello")
        with pytest.raises(ValueError, match="no tokenizer|needs a tokenizer"):
            llm.chat(QUESTION)
