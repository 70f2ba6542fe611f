"""The converter's command line: tools/checkpoint/convert_ckpt.py."""

from __future__ import annotations

import sys

from mindgen.commands.flags import Parser, add_flags, from_flags
from mindgen.commands.tools import run
from mindgen.weights.convert import ConvertConfig, convert
from mindgen.weights.flags import add_architecture_flags, given_flags


def main(arguments: list[str]) -> int:
    """Runs the converter; the exit code is 0, 2 for bad input or a disk that fails, 128 + n after a signal."""
    return run("convert_ckpt.py", lambda: _convert(arguments))


def parser() -> Parser:
    """The flags of the converter."""
    made = Parser(
        prog="convert_ckpt.py",
        description="Converts Hugging Face folders to Megatron shards of any TP x PP, and shards to others or back.",
    )
    add_flags(made, ConvertConfig)
    add_architecture_flags(made)
    return made


def _convert(arguments: list[str]) -> None:
    parsed = parser().parse_args(arguments)
    print(convert(from_flags(ConvertConfig, parsed), given_flags(parsed)), file=sys.stdout)
