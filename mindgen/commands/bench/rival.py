"""transformers on the same weights: what `--vs hf` compares with."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mindgen.commands.bench.machine import Machine
from mindgen.device import synchronize
from mindgen.engine.request import Request
from mindgen.parallel.topology import SINGLE
from mindgen.weights.families import find_family, rows_of
from mindgen.weights.families.family import Config
from mindgen.weights.rows import axis_sizes, parameters
from mindgen.weights.source import Source


@dataclass(frozen=True)
class Rivalry:
    """One run of transformers: seconds from its start to each new token of the batch, and the tokens of each prompt."""

    times: tuple[float, ...]
    tokens: tuple[tuple[int, ...], ...]

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.times)]


class Rival:
    """A transformers model in this process, on rank 0's device, with the CPU threads of all ranks together."""

    def __init__(self, source: Source, config: Config, machine: Machine, dtype: torch.dtype):
        print("bench: loading transformers", file=sys.stderr)
        self._machine = machine
        model = _load(source, config, dtype).to(machine.device)
        self._model = model.eval()
        self._model.generation_config = _settings(1)  # its own ends of text would count beside ours

    def run(self, requests: list[Request]) -> Rivalry:
        """All requests as one batch, shorter prompts padded on the left, greedily, until the longest answer is there.

        Tokens beyond what a request asked for are dropped.
        """
        ids, mask = _padded(requests, self._machine.device)
        most = max(request.params.max_new_tokens for request in requests)
        clock = _Clock(self._machine.device)
        with self._machine.all_threads(), torch.inference_mode():
            clock.start()
            made = self._model.generate(
                ids,
                attention_mask=mask,
                generation_config=_settings(most),
                stopping_criteria=[clock],
            )
        assert made.shape[1] == ids.shape[1] + most, (
            f"transformers gave {made.shape[1] - ids.shape[1]} of {most} tokens"
        )
        rows = made[:, ids.shape[1] :].tolist()
        pairs = zip(rows, requests, strict=True)
        return Rivalry(tuple(clock.times), tuple(tuple(row[: r.params.max_new_tokens]) for row, r in pairs))


class _Clock:
    """transformers asks after every token whether to stop: never, but the time is noted."""

    def __init__(self, device: torch.device):
        self._device, self._started, self.times = device, 0.0, list[float]()

    def start(self) -> None:
        synchronize(self._device)
        self._started = time.perf_counter()

    def __call__(self, ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        synchronize(self._device)
        self.times.append(time.perf_counter() - self._started)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def _settings(num_new: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(do_sample=False, max_new_tokens=num_new, eos_token_id=None, pad_token_id=0)


def _padded(requests: list[Request], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [requests, longest prompt]."""
    longest = max(len(request.prompt) for request in requests)
    rows = [[0] * (longest - len(request.prompt)) + list(request.prompt) for request in requests]
    masks = [[0] * (longest - len(request.prompt)) + [1] * len(request.prompt) for request in requests]
    return torch.tensor(rows, device=device), torch.tensor(masks, device=device)


def _load(source: Source, fields: Config, dtype: torch.dtype) -> Any:
    """The model of any source: its configuration and tensors as transformers names them."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Masks alone say what is padding, and a format's own default for it may lie beyond a small vocabulary.
    config = transformers.AutoConfig.for_model(**fields | {"pad_token_id": None})
    model_class = getattr(transformers, find_family(source.spec.family).architecture)
    return model_class.from_pretrained(None, config=config, state_dict=_tensors(source, dtype), dtype=dtype)


def _tensors(source: Source, dtype: torch.dtype) -> dict[str, Tensor]:
    sizes, tensors = axis_sizes(source.spec), dict[str, Tensor]()
    for parameter in parameters(rows_of(source.spec.family), source.spec, SINGLE):
        row = parameter.row
        whole = source.read(row, parameter.layer, 0, sizes[row.split] if row.split else 1)
        for name, tensor in row.unpack(whole, sizes).items():
            tensors[name.format(layer=parameter.layer)] = tensor.to(dtype).contiguous()
    return tensors
