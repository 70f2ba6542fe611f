"""From a line of `predict`'s input to the token ids of its prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindgen.commands.predict.chat_template import TurnTemplate, has_turn_template, read_turn_template
from mindgen.commands.predict.data import BadLine, Line, read_lines
from mindgen.commands.predict.options import PredictConfig
from mindgen.engine.request import Request
from mindgen.startup.opened import Opened
from mindgen.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A line that can be answered. num_cut: tokens that its beginning lost. num_new: the most that may follow."""

    line: Line
    ids: tuple[int, ...]
    num_cut: int
    num_new: int

    def request(self, options: PredictConfig) -> Request:
        return Request(self.line.number, self.ids, options.params(self.num_new, self.line.number))


@dataclass(frozen=True)
class Prompter:
    """How prompts are made. template: one of PaddleNLP's, or None; own: the tokenizer's is used. total: the most tokens
    of prompt and answer together."""

    options: PredictConfig
    tokenizer: Tokenizer
    template: TurnTemplate | None
    own: bool
    total: int

    def prompts(self) -> Iterator[Prompt | BadLine]:
        """Every line of the input, in order, made anew each time."""
        for line in read_lines(self.options.data_file, self.options.batch_size):
            yield line if isinstance(line, BadLine) else self._prompt(line)

    def _prompt(self, line: Line) -> Prompt | BadLine:
        try:
            ids, kept = self._encode(line)
        except ValueError as error:
            return BadLine(line.number, str(error))
        most = min(self.options.src_length, self.total)
        cut = _without_beginning(ids, kept, most)
        room = self.total - len(cut)
        if not cut:
            return BadLine(line.number, "has an empty prompt, and this model has no BOS token to start from")
        if room < 1 or room < self.options.min_length:
            return BadLine(line.number, self._no_room(len(ids), len(cut)))
        return Prompt(line, tuple(cut), len(ids) - len(cut), min(self.options.max_length, room))

    def _no_room(self, length: int, kept: int) -> str:
        """Why there is none for an answer to so many tokens, by the flags whose limits are reached."""
        options = self.options
        cut = f", of which --src_length keeps {kept}" if kept < length and kept < self.total else ""
        total = (
            f"--total_max_length is {self.total}"
            if self.total == options.total_max_length
            else (f"the model's context is {self.total}")
        )
        least = f" of --min_length {options.min_length}" if options.min_length else ""
        return f"has {length} tokens{cut}, and {total}, for prompt and answer together: no room for an answer{least}"

    def _encode(self, line: Line) -> tuple[list[int], int]:
        """The whole prompt, and how many of its first tokens are to stay when it is cut."""
        if self.template is not None:
            text = self.template.render(line.turns, line.question, line.context)
            return self.tokenizer.encode(text, add_special_tokens=False), 0
        if self.own:
            return self.tokenizer.apply_chat_template(_messages(line)), 0
        if line.is_chat:
            raise ValueError("holds chat turns or a system text, but no chat template is in use; see --chat_template")
        bos = self.tokenizer.bos_id
        ids = self.tokenizer.encode(line.question) or ([] if bos is None else [bos])
        return ids, int(ids[:1] == [bos])


def make_prompter(options: PredictConfig, model: Opened) -> Prompter:
    """The one that --chat_template and the tokenizer ask for; ValueError for a template that cannot be read."""
    assert model.tokenizer is not None
    template, own = None, options.chat_template is None and model.tokenizer.has_chat_template
    folders = model.source.text_folders
    stated = options.chat_template
    if stated is None and not own:
        found = [folder for folder in folders if has_turn_template(folder)]
        template = read_turn_template(found[0]) if found else None
    elif stated is not None and stated.lower() != "none":
        path = Path(stated)
        own = model.tokenizer.has_chat_template and _is_one_of(path, folders)
        template = None if own else read_turn_template(path)
    return Prompter(options, model.tokenizer, template, own, options.total(model.max_positions))


def _is_one_of(path: Path, folders: Any) -> bool:
    return path.is_dir() and any(path.resolve() == Path(folder).resolve() for folder in folders)


def _messages(line: Line) -> list[dict[str, str]]:
    unknown = [name for name in line.context if name != "system"]
    if unknown:
        raise ValueError(f'has {unknown[0]!r} in its "context"; the tokenizer\'s own chat template knows "system" only')
    system = line.context.get("system")
    said = [] if system is None else [{"role": "system", "content": system}]
    for user, bot in line.turns:
        said += [{"role": "user", "content": user}, {"role": "assistant", "content": bot}]
    return [*said, {"role": "user", "content": line.question}]


def _without_beginning(ids: list[int], kept: int, most: int) -> list[int]:
    """At most `most` of the ids: the first `kept`, and the last ones."""
    if len(ids) <= most:
        return ids
    kept = min(kept, most)
    return ids[:kept] + ids[len(ids) - (most - kept) :]
