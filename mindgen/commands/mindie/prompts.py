"""The prompts of `run_generator`: texts, token ids, or a file of them, as token ids."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindgen.commands.mindie.options import DEFAULT_TEXTS, GeneratorConfig
from mindgen.commands.mindie.token_files import parse_token_ids, read_lines, read_token_file

if TYPE_CHECKING:
    from mindgen.text.tokenizer import Tokenizer

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class GeneratorPrompt:
    """A text, a conversation, or ids alone; once it is tokenized, all have ids. where: file and line, if any."""

    text: str | None = None
    messages: tuple[dict[str, Any], ...] = ()
    ids: tuple[int, ...] = ()
    where: str | None = None

    @property
    def question(self) -> str:
        """What is printed as the question: of a conversation its last message."""
        if self.messages:
            return str(self.messages[-1].get("content"))
        return self.text if self.text is not None else ",".join(map(str, self.ids))

    @property
    def shown(self) -> str:
        """Enough of it to recognise it."""
        question = self.question
        return question if len(question) <= 60 else question[:57] + "..."


def gather_prompts(options: GeneratorConfig) -> list[GeneratorPrompt]:
    """What the command line asks. ValueError for ids, files and lines that cannot be read."""
    if options.input_file is not None:
        return _from_file(options.input_file, options.is_chat_model)
    if options.input_ids:
        return [GeneratorPrompt(ids=parse_token_ids(text, "--input_ids")) for text in options.input_ids]
    return [GeneratorPrompt(text) for text in options.input_texts or DEFAULT_TEXTS]


def tokenize(
    prompts: list[GeneratorPrompt], tokenizer: Tokenizer | None, options: GeneratorConfig
) -> list[GeneratorPrompt]:
    """The prompts with their ids. ValueError, which says where a prompt stands in a file, for an empty text without
    BOS, and for a chat template that refuses."""
    if options.chat_template is not None:
        tokenizer = _with_template(tokenizer, options.chat_template)
    return [prompt if prompt.ids else _tokenized(prompt, tokenizer, options) for prompt in prompts]


def _tokenized(prompt: GeneratorPrompt, tokenizer: Tokenizer | None, options: GeneratorConfig) -> GeneratorPrompt:
    try:
        return replace(prompt, ids=_ids(prompt, tokenizer, options))
    except ValueError as error:
        raise error if prompt.where is None else ValueError(f"{prompt.where}: {error}") from None


def _ids(prompt: GeneratorPrompt, tokenizer: Tokenizer | None, options: GeneratorConfig) -> tuple[int, ...]:
    assert tokenizer is not None, "without a tokenizer there are ids"
    if options.is_chat_model:
        return tuple(tokenizer.apply_chat_template(prompt.messages or [{"role": "user", "content": prompt.text}]))
    assert prompt.text is not None
    ids = tokenizer.encode(prompt.text) or ([] if tokenizer.bos_id is None else [tokenizer.bos_id])
    if not ids:
        raise ValueError("a prompt is empty, and this model has no BOS token to start from; give a prompt with text")
    return tuple(ids)


def _with_template(tokenizer: Tokenizer | None, template: str) -> Tokenizer:
    """The tokenizer with another chat template: a file where there is one of this name, else the template itself."""
    from mindgen.text.tokenizer import LoadedTokenizer

    if not isinstance(tokenizer, LoadedTokenizer):
        raise ValueError("--chat_template needs the tokenizer; leave out --load_tokenizer false")
    if "{" in template:
        return replace(tokenizer, chat_templates={"default": template}, source="--chat_template")
    try:
        text = Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat_template {template} cannot be read: {error}") from None
    return replace(tokenizer, chat_templates={"default": text}, source=f"--chat_template {template}")


def _from_file(name: str, chat: bool) -> list[GeneratorPrompt]:
    """Token ids from a .csv; else one prompt a line, all of them JSON if the first line is a JSON value of a prompt."""
    if name.endswith(".csv"):
        return [GeneratorPrompt(ids=ids) for ids in read_token_file(name)]
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(read_lines(name), 1) if line.strip()]
    if not isinstance(_json(lines[0][1]), str | list | dict):
        return [GeneratorPrompt(line, where=f"{name}, line {number}") for number, line in lines]
    return [_from_json(_json(line), chat, f"{name}, line {number}") for number, line in lines]


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _from_json(value: Any, chat: bool, where: str) -> GeneratorPrompt:
    """A text, `{"prompt": text}`, or for a chat model a list of messages, also as `{"messages": list}`."""
    if isinstance(value, dict) and len(value) == 1:
        value = value.get("prompt", value.get("messages"))
    if isinstance(value, str):
        return GeneratorPrompt(value, where=where)
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        if not chat:
            raise ValueError(f"{where} is a conversation, which needs --is_chat_model; add it")
        return GeneratorPrompt(messages=tuple(value), where=where)
    raise ValueError(f'{where} must be a text, {{"prompt": text}}, or with --is_chat_model a list of messages')
