"""What a checkpoint holds, on the command line: tools/checkpoint/show_ckpt.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mindgen.commands.flags import Parser
from mindgen.commands.tools import run
from mindgen.weights.flags import add_architecture_flags, given_flags
from mindgen.weights.huggingface import TensorFile
from mindgen.weights.manifest import read_manifest
from mindgen.weights.megatron import MegatronSource
from mindgen.weights.open import open_source
from mindgen.weights.shards import open_shard
from mindgen.weights.source import Source
from mindgen.weights.verify import verify


def main(arguments: list[str]) -> int:
    """Shows a checkpoint; the exit code is 0, or 2 if it is damaged or is none."""
    return run("show_ckpt.py", lambda: _show(arguments))


def parser() -> Parser:
    """The flags of the command."""
    made = Parser(prog="show_ckpt.py", description="Shows what a checkpoint is and holds, and checks that it is whole.")
    made.add_argument("path", type=Path, help="a Hugging Face folder or a Megatron directory")
    made.add_argument(
        "--verify", action="store_true", help="read everything and compare it with the manifest; 2 if anything differs"
    )
    made.add_argument("--tokenizer-name-or-path", help="a folder with a config.json, where the checkpoint has none")
    add_architecture_flags(made)
    return made


def _show(arguments: list[str]) -> None:
    parsed = parser().parse_args(arguments)
    source = open_source(parsed.path, given_flags(parsed), parsed.tokenizer_name_or_path)
    source.check()
    for line in _lines(source):
        print(line)
    if parsed.verify:
        print(_verify(source.text_folders[0]))


def _lines(source: Source) -> Iterator[str]:
    yield str(source.text_folders[0])
    yield from _table("model", asdict(source.spec))
    if isinstance(source, MegatronSource):
        layout: dict[str, Any] = {"tensor_parallel_size": source.grid.tp, "pipeline_parallel_size": source.grid.pp}
        layout |= {"layers_by_stage": ",".join(map(str, source.layers)), "padded_vocab_size": source.padded_vocab}
        if source.spec.num_experts is not None:
            layout["expert_parallel_size"] = source.grid.ep
        yield from _table("layout", layout | {"format": source.grid.save_format})
    for path in source.files:
        yield f"{path.relative_to(source.text_folders[0])}  {path.stat().st_size} bytes"
        file = open_shard(path) if isinstance(source, MegatronSource) else TensorFile(path)
        for name in sorted(file.names):
            shape, dtype = file.describe(name)
            yield f"  {name}  {dtype}  {list(shape)}"


def _table(title: str, values: dict[str, Any]) -> Iterator[str]:
    yield title
    yield from (f"  {name:<24}{value}" for name, value in values.items())


def _verify(folder: Path) -> str:
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"{folder} has no manifest, so only its structure can be checked, and that is in order")
    size = sum(record.size for record in manifest.files.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc="verifying", disable=not sys.stderr.isatty()) as bar:
        verify(folder, manifest, bar.update)
    return f"verified: {len(manifest.files)} files, {size} bytes, are as conversion {manifest.conversion} wrote them"
