#!/usr/bin/env python3
"""How long a checkpoint takes to load from a cold page cache: mindgen, transformers, and reading its files plainly.

`python tools/cold_load.py FOLDER [--turns N]`, a Hugging Face folder of safetensors. Each load has a process of its own
and does not count its imports; before it the files are written back and dropped from the page cache. Prints seconds,
medians with their spread over the turns, ratios of neighbours, and RssAnon of the whole process, some 0.2 GB of imports
included, over the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere, installed or not

WAYS = ("mindgen", "transformers", "plain")
_PIECE = 4 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not list(options.folder.glob("*.safetensors")):
        parser.error(f"{options.folder} holds no .safetensors files; name a Hugging Face folder that does")
    if options.way:
        print(json.dumps(one(options.way, options.folder)))
    else:
        report([turn(options.folder) for _ in range(options.turns)])
    return 0


def turn(folder: Path) -> dict[str, dict[str, float]]:
    """Every way once."""
    command = [sys.executable, __file__, str(folder), "--way"]
    printed = {way: subprocess.check_output([*command, way], text=True).splitlines()[-1] for way in WAYS}
    return {way: json.loads(line) for way, line in printed.items()}


def report(turns: list[dict[str, dict[str, float]]]) -> None:
    for way in WAYS:
        seconds = [found[way]["seconds"] for found in turns]
        ratios = [found["mindgen"]["seconds"] / found[way]["seconds"] for found in turns]
        spread = f"{median(seconds):.2f} s ({min(seconds):.2f} .. {max(seconds):.2f})"
        memory = median(found[way]["memory"] for found in turns)
        print(f"{way:<13} {spread:<24} mindgen is {median(ratios):.2f} x, RssAnon {memory:.2f} x the weights")


def one(way: str, folder: Path) -> dict[str, float]:
    """Seconds of one load and the memory after it."""
    files = sorted(folder.glob("*.safetensors"))
    load = {"mindgen": _mindgen, "transformers": _transformers, "plain": _plain}[way](folder)
    for file in files:
        _drop(file)
    start = time.perf_counter()
    kept = load()
    seconds = time.perf_counter() - start
    anonymous = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    del kept
    return {"seconds": seconds, "memory": int(anonymous.split()[1]) * 1024 / sum(file.stat().st_size for file in files)}


def _drop(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def _mindgen(folder: Path) -> Callable[[], object]:
    import torch

    from mindgen.model.build import build_stage
    from mindgen.parallel.group import SingleGroup
    from mindgen.parallel.topology import SINGLE
    from mindgen.weights.load import load_weights
    from mindgen.weights.open import open_source

    def load() -> object:
        source = open_source(folder)
        model = build_stage(source.spec, SINGLE, SingleGroup(), getattr(torch, source.spec.dtype), torch.device("cpu"))
        load_weights(model, source, SINGLE)
        return model

    return load


def _transformers(folder: Path) -> Callable[[], object]:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # imports the class
    return lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=config.dtype)


def _plain(folder: Path) -> Callable[[], object]:
    def load() -> object:
        piece = bytearray(_PIECE)
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb", buffering=0) as data:
                while data.readinto(piece):
                    pass
        return piece

    return load


if __name__ == "__main__":
    sys.exit(main())
