"""The tasks of `generate`, by the names of MindSpeed-LLM's documentation and of its code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from mindgen.commands.flags import by_flags
from mindgen.config import flags_of
from mindgen.engine.request import SamplingParams

if TYPE_CHECKING:
    from mindgen.commands.options import GenerateConfig


@dataclass(frozen=True)
class Task:
    """name: as documented; title: what is printed above its output."""

    name: str
    title: str
    sampling: bool = False
    beams: bool = False
    chat: bool = False

    def params(self, options: GenerateConfig, max_new_tokens: int) -> SamplingParams:
        """What the command line asks of this task; ValueError for values out of range, by their flags."""
        with by_flags(sampling_flags(options)):
            return self._params(options, max_new_tokens)

    def _params(self, options: GenerateConfig, max_new_tokens: int) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=options.temperature if self.sampling else 0.0,
            top_k=options.top_k if self.sampling else 0,
            top_p=options.top_p if self.sampling else 1.0,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
            stop=options.stop,
            ignore_eos=options.ignore_eos,
            n=options.num_return_sequences,
            num_beams=options.num_beams if self.beams else 1,
            length_penalty=options.length_penalty if self.beams else 1.0,
            logprobs=options.logprobs,
        )


def sampling_flags(options: GenerateConfig) -> dict[str, str]:
    """What the options of SamplingParams are called on the command line."""
    return {item.name: flags_of(item)[0] for item in fields(options)} | {"n": "--num-return-sequences"}


_GREEDY = Task("greedy_search", "Greedy Search")
_SAMPLE = Task("greedy_search_with_sampling", "Do Sample", sampling=True)

TASKS = {
    "greedy_search": _GREEDY,
    "greedy": _GREEDY,
    "greedy_search_with_sampling": _SAMPLE,
    "do_sample": _SAMPLE,
    "beam_search": Task("beam_search", "Beam Search", beams=True),
    "beam_search_with_sampling": Task(
        "beam_search_with_sampling", "Beam Search with sampling", sampling=True, beams=True
    ),
    "chat": Task("chat", "Chat", sampling=True, chat=True),
}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names in order, each once; ValueError names the known ones."""
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}; choose from {', '.join(TASKS)}")
    return list(dict.fromkeys(TASKS[name] for name in names))
