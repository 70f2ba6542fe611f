"""A first look at all of `predict`'s input, before anything is computed or written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mindgen.commands.predict.data import BadLine
from mindgen.commands.predict.journal import journal_path, read_journal
from mindgen.commands.predict.options import PredictConfig
from mindgen.commands.predict.output import NOTHING, Version, version_of
from mindgen.commands.predict.prompts import Prompt, Prompter
from mindgen.commands.predict.records import Record
from mindgen.engine.blocks import BlockPool
from mindgen.engine.fits import most_blocks

_MOST_SHOWN = 10


@dataclass
class Survey:
    """What the input holds.

    checked: the version of the output file, which is empty without --resume. num_done: lines that it holds already,
    num_failed of them with an error. largest: the prompt that takes the most blocks of the cache, its answer included.
    bad: the first of the lines that cannot be used. waiting: the answers to later lines in the journal, by line number.
    """

    checked: Version = NOTHING
    num_lines: int = 0
    num_done: int = 0
    num_failed: int = 0
    num_cut: int = 0
    num_bad: int = 0
    largest: Prompt | None = None
    most_blocks: int = 0
    bad: list[BadLine] = field(default_factory=list)
    unused: dict[str, None] = field(default_factory=dict)
    waiting: dict[int, Record] = field(default_factory=dict)

    def add(self, prompt: Prompt, num_blocks: int) -> None:
        """Counts a line that takes so many blocks."""
        self.num_lines += 1
        self.num_cut += bool(prompt.num_cut)
        self.unused |= dict.fromkeys(prompt.line.unused)
        if num_blocks > self.most_blocks:
            self.largest, self.most_blocks = prompt, num_blocks

    def add_bad(self, line: BadLine) -> None:
        self.num_bad += 1
        if len(self.bad) < _MOST_SHOWN:
            self.bad.append(line)

    def notes(self, options: PredictConfig) -> list[str]:
        """Lines for the user on what is unusual."""
        notes = []
        if self.num_bad:
            notes.append(f"--skip_bad_lines: left out: {self.num_bad}\n{_listing(self)}")
        if self.num_cut:
            notes.append(f"prompts longer than --src_length, which lose their beginning: {self.num_cut}")
        if self.unused:
            notes.append(f"not used, in some lines: {', '.join(list(self.unused)[:_MOST_SHOWN])}")
        if self.num_done:
            notes.append(f"--resume: {self.num_done} of {self.num_lines} lines are in {options.output_file} already")
        if self.waiting:
            notes.append(
                f"--resume: answers to later lines are in {journal_path(options.output_file)}: {len(self.waiting)}"
            )
        return notes


def survey(prompter: Prompter, done: Iterator[Record]) -> Survey:
    """Reads the whole input, beside what an interrupted run has written.

    Raises ValueError for bad lines that are not to be skipped, and for output of another input.
    """
    options = prompter.options
    found, pool, waiting = Survey(), BlockPool(1, options.block_size), {}
    if options.resume:
        found.checked = version_of(options)  # before its lines are read: what comes later is a change
        waiting = read_journal(options.output_file)
    for prompt in prompter.prompts():
        if isinstance(prompt, BadLine):
            found.add_bad(prompt)
            continue
        found.add(prompt, most_blocks(prompt.request(options), pool))
        _compare(prompt, next(done, None), waiting.pop(prompt.line.number, None), found, options)
    if found.num_bad and not options.skip_bad_lines:
        raise ValueError(
            f"lines of {options.data_file} that cannot be used: {found.num_bad}; mend them, or leave them out with "
            f"--skip_bad_lines\n{_listing(found)}"
        )
    if next(done, None) is not None:
        raise ValueError(
            f"--output_file {options.output_file} holds more lines than {_input(options)} has; {_OTHER_RUN}"
        )
    if waiting:
        raise ValueError(
            f"{journal_path(options.output_file)} answers line {min(waiting)}, which {_input(options)} has not; "
            f"{_OTHER_RUN}"
        )
    if not found.num_lines:
        raise ValueError(f"--data_file {options.data_file} holds nothing to answer")
    return found


_OTHER_RUN = "it is of another input; name another output file, or begin it anew with --overwrite"


def _compare(
    prompt: Prompt, written: Record | None, waiting: Record | None, found: Survey, options: PredictConfig
) -> None:
    """Counts what an interrupted run wrote of this prompt's answer: to the output, or to the journal before."""
    if written is not None:
        _check_same(prompt, written, f"line {found.num_lines} of --output_file {options.output_file}", options)
        found.num_done += 1
        found.num_failed += "error" in written
    if waiting is not None:
        _check_same(prompt, waiting, f"an answer in {journal_path(options.output_file)}", options)
        if written is None:
            found.waiting[prompt.line.number] = waiting


def _check_same(prompt: Prompt, record: Record, title: str, options: PredictConfig) -> None:
    if (record["src"], record["tgt"]) != (prompt.line.src, prompt.line.tgt):
        raise ValueError(f"{title} does not belong to line {prompt.line.number} of {_input(options)}; {_OTHER_RUN}")


def _input(options: PredictConfig) -> str:
    return options.data_file or "the built-in prompt"


def _listing(found: Survey) -> str:
    lines = [f"line {bad.number} {bad.reason}" for bad in found.bad]
    more = found.num_bad - len(found.bad)
    return "\n".join([*lines, f"and {more} more"] if more else lines)
