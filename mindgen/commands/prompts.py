"""Prompts from the command line, a file or standard input, as token ids."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindgen.llm.questions import encode_prompt

if TYPE_CHECKING:
    from mindgen.commands.options import GenerateConfig
    from mindgen.text.tokenizer import Tokenizer

DEFAULT_PROMPT = "how are you?"


@dataclass(frozen=True)
class Prompt:
    """text is None where only ids were given; ids are empty until the text has been tokenized."""

    text: str | None
    ids: tuple[int, ...] = ()

    @property
    def shown(self) -> str:
        """Enough of the prompt to recognise it."""
        text = self.text if self.text is not None else ",".join(map(str, self.ids))
        return text if len(text) <= 60 else text[:57] + "..."


def gather_prompts(options: GenerateConfig) -> list[Prompt]:
    """All prompts in the order: --prompt, --prompt-ids, --prompt-file; the default one if there are none."""
    prompts = [Prompt(text) for text in options.prompt]
    prompts += [Prompt(None, _parse_ids(text, "--prompt-ids")) for text in options.prompt_ids]
    if options.prompt_file is not None:
        prompts += _from_file(options.prompt_file)
    return prompts or [Prompt(DEFAULT_PROMPT)]


def tokenize(
    prompts: list[Prompt], tokenizer: Tokenizer | None, vocab_size: int, options: GenerateConfig
) -> list[Prompt]:
    """The prompts with their ids. ValueError for an empty prompt without BOS and for ids outside the vocabulary."""
    return [_checked(_tokenized(prompt, tokenizer, options), vocab_size) for prompt in prompts]


def _tokenized(prompt: Prompt, tokenizer: Tokenizer | None, options: GenerateConfig) -> Prompt:
    if prompt.text is None:
        return prompt
    assert tokenizer is not None, "a text prompt without tokenizer is refused earlier"
    if options.hf_chat_template or options.prompt_type is not None:
        return Prompt(prompt.text, tuple(tokenizer.apply_chat_template([{"role": "user", "content": prompt.text}])))
    return Prompt(prompt.text, encode_prompt(tokenizer, prompt.text))


def _checked(prompt: Prompt, vocab_size: int) -> Prompt:
    outside = [token for token in prompt.ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(
            f"the prompt {prompt.shown!r} has token id {outside[0]}; the model's are 0 to {vocab_size - 1}"
        )
    return prompt


def _parse_ids(text: str, where: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{where} {text!r} is not a list of token ids such as 1,5,7") from None


def _from_file(name: str) -> list[Prompt]:
    """One prompt a line. If the first line is a JSON object, all are: with `prompt` (text) or `prompt_ids` (a list)."""
    if name != "-" and Path(name).exists() and not Path(name).is_file():
        raise ValueError(f"--prompt-file {name} is not a regular file; - reads standard input")
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt-file {name} cannot be read: {error}") from None
    lines = [(number, line) for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"--prompt-file {name} holds no prompt; write one on each line")
    if _as_object(lines[0][1]) is None:
        return [Prompt(line) for _, line in lines]
    return [_from_json(line, f"{name}, line {number}") for number, line in lines]


def _as_object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _from_json(line: str, where: str) -> Prompt:
    value = _as_object(line)
    if value is None:
        raise ValueError(f"{where} is not a JSON object, as the lines before it are")
    unknown = sorted(set(value) - {"prompt", "prompt_ids"})
    if unknown:
        raise ValueError(f"{where} has {unknown[0]!r}; a line has `prompt` or `prompt_ids`, the rest is said by flags")
    ids = value.get("prompt_ids")
    if isinstance(value.get("prompt"), str) and ids is None:
        return Prompt(value["prompt"])
    if isinstance(ids, list) and "prompt" not in value and all(type(token) is int for token in ids) and ids:
        return Prompt(None, tuple(ids))
    raise ValueError(f"{where} needs either `prompt` (a text) or `prompt_ids` (a list of token ids)")
