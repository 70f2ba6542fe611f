"""What a caller gives, checked as a whole before anything of it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mindgen.config import EngineConfig
from mindgen.engine.request import Request, SamplingParams

if TYPE_CHECKING:
    from mindgen.startup.opened import Opened
    from mindgen.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]  # or what counts as one: a one-dimensional array or tensor, as a list of them a wider one
Prompts = Prompt | Sequence[Prompt]
Params = SamplingParams | Sequence[SamplingParams] | None
Conversation = Sequence[Mapping[str, Any]]  # messages with `role` and `content`
_OWN_OPTIONS = ("tokenizer", "prompt_type")  # keywords of LLM that are no fields of EngineConfig
_WANTED_PARAMS = "SamplingParams, or one for each prompt, such as SamplingParams(temperature=0)"


@dataclass(frozen=True)
class Question:
    """A prompt as it was given (None for token ids), its token ids, and what is asked of it."""

    prompt: str | None
    ids: tuple[int, ...]
    params: SamplingParams

    def request(self, number: int) -> Request:
        return Request(number, self.ids, self.params)


def make_config(model: str | Path | EngineConfig, options: Mapping[str, Any]) -> EngineConfig:
    """The configuration with the options. TypeError for an option that does not exist, ValueError for a bad value."""
    known = [field.name for field in fields(EngineConfig) if field.name != "model"]
    for name in options:
        if name not in known:
            raise TypeError(f"LLM has no option {name!r}; it has {', '.join((*known, *_OWN_OPTIONS))}")
    if isinstance(model, EngineConfig):
        return replace(model, **options)
    if not isinstance(model, str | Path):
        raise ValueError(f"model is {model!r}; it must be the path of a folder, or an EngineConfig")
    return EngineConfig(str(model), **options)


def is_single(prompts: Prompts) -> bool:
    """Whether it is one prompt: a text or token ids. An empty sequence is no prompt at all. ValueError for neither."""
    _check_sequence(prompts, "a text, token ids, or a list of such prompts")
    return isinstance(prompts, str) or (len(prompts) > 0 and _is_number(prompts[0]))


def check_single(prompt: object, taker: str, of_lists: str) -> None:
    """ValueError for several prompts, which the method `taker` does not take and `of_lists` does."""
    if isinstance(prompt, str) or not _is_sequence(prompt) or not len(cast(Sequence[Any], prompt)):
        return
    first = cast(Sequence[Any], prompt)[0]
    if isinstance(first, str) or _is_sequence(first):
        raise ValueError(
            f"{taker} takes one prompt, a text or token ids, not {prompt!r}; {of_lists} takes lists of them"
        )


def _is_number(value: object) -> bool:
    """Whether it may be a token id, and not a row of them: arrays and tensors have `__index__` at any width."""
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0


def is_conversation(messages: Conversation | Sequence[Conversation]) -> bool:
    """Whether it is one conversation, and not several. ValueError for neither."""
    _check_sequence(messages, "a list of messages, or a list of such conversations")
    return len(messages) > 0 and isinstance(messages[0], Mapping)


def check_conversation(messages: object) -> None:
    """ValueError for what is not a sequence of messages."""
    wanted = "a list of messages, each a dict with role and content"
    _check_sequence(messages, wanted)
    for message in cast(Conversation, messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"{message!r} is of type {type(message).__name__} and no message; give {wanted}")


def _check_sequence(value: object, wanted: str) -> None:
    if not _is_sequence(value):
        raise ValueError(f"{value!r} is of type {type(value).__name__}; give {wanted}")


def _is_sequence(value: object) -> bool:
    is_sequence = hasattr(value, "__len__") and hasattr(value, "__getitem__") and getattr(value, "ndim", 1) > 0
    return is_sequence and not isinstance(value, bytes | Mapping)


def make_questions(prompts: Sequence[Prompt], params: Params, model: Opened) -> list[Question]:
    """One question for each prompt. ValueError names the prompt that is no good, by its number from 0."""
    found = []
    for number, (prompt, wanted) in enumerate(zip(prompts, _one_each(params, len(prompts)), strict=True)):
        try:
            found.append(_question(prompt, wanted, model))
        except ValueError as error:
            name = f"prompt {number}" if len(prompts) > 1 else "the prompt"
            raise ValueError(f"{name}: {error}") from None
    return found


def _one_each(params: Params | str, count: int) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if isinstance(params, str):
        raise ValueError(f"{params!r} is of type str; give {_WANTED_PARAMS}")
    _check_sequence(params, _WANTED_PARAMS)
    if len(params) != count:
        raise ValueError(f"{len(params)} SamplingParams for {count} prompts; give one for each, or one for all")
    return params


def _question(prompt: Prompt, params: SamplingParams, model: Opened) -> Question:
    if not isinstance(params, SamplingParams):
        raise ValueError(f"{params!r} is not SamplingParams; give one, such as SamplingParams(temperature=0)")
    text: str | None = None
    if isinstance(prompt, str):
        text, ids = prompt, encode_prompt(model.tokenizer, prompt)
    else:
        ids = _token_ids(prompt, model.vocab_size)
    return Question(text, ids, _within(model.max_positions, len(ids), params))


def _within(positions: int, num_prompt: int, params: SamplingParams) -> SamplingParams:
    """The same with no more new tokens than there are positions for. ValueError where there are too few of these."""
    room = positions - num_prompt
    size = f"it has {num_prompt} tokens, and the model has {positions} positions"
    if room < 1:
        raise ValueError(f"{size}: no room for an answer; shorten the prompt")
    if params.min_new_tokens > room:
        raise ValueError(
            f"{size}: room for {room}, and min_new_tokens is {params.min_new_tokens}; "
            "shorten the prompt or lower min_new_tokens"
        )
    return replace(params, max_new_tokens=room) if params.max_new_tokens > room else params


def encode_prompt(tokenizer: Tokenizer | None, text: str) -> tuple[int, ...]:
    """Token ids of a text; of an empty one the BOS token. ValueError without a tokenizer or a BOS token."""
    if tokenizer is None:
        raise ValueError("it is a text, and the model has no tokenizer; give token ids, or name a tokenizer")
    ids = tuple(tokenizer.encode(text))
    if ids:
        return ids
    if tokenizer.bos_id is None:
        raise ValueError("the prompt is empty, and this model has no BOS token to start from; give a prompt with text")
    return (tokenizer.bos_id,)


def _token_ids(prompt: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    is_sequence = hasattr(prompt, "__iter__") and not isinstance(prompt, bytes | Mapping)
    try:
        ids = tuple(index(token) for token in prompt) if is_sequence and all(map(_is_number, prompt)) else None
    except TypeError:  # a tensor's numbers that are no whole ones
        ids = None
    if ids is None:
        raise ValueError(f"{prompt!r} is neither a text nor a sequence of token ids")
    if not ids:
        raise ValueError("it is empty; a prompt needs a token, for example the BOS")
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"it has token id {outside[0]}; the model's are 0 to {vocab_size - 1}")
    return ids
