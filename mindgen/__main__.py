"""`python -m mindgen <command> ...`; under torchrun the same line runs on every rank."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from io import TextIOWrapper

from mindgen.commands import COMMANDS
from mindgen.parallel.interrupt import INTERRUPTED, interrupt_exits


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 1 for a failure, 2 for bad input, 130 after Ctrl-C."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: a lost peer is told once, by us
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains of it at the very end
        return 1


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"mindgen: unknown command {name!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    _mend_streams()
    try:
        with interrupt_exits():
            command = import_module(f"mindgen.commands.{name}")
        return command.main(rest)
    except KeyboardInterrupt:
        return INTERRUPTED


def _mend_streams() -> None:
    """A closed stream is as good as empty, and text that the terminal or its encoding cannot bear ends nothing."""
    for name, mode, errors in (
        ("stdin", "r", "surrogateescape"),
        ("stdout", "w", "replace"),
        ("stderr", "w", "replace"),
    ):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)


def _help() -> str:
    lines = [f"  {name:<14} {text}" for name, text in COMMANDS.items()]
    return "usage: mindgen <command> [options]; mindgen <command> --help lists them\n\n" + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
