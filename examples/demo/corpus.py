"""The text: the standard library of the Python that runs this, split by file into train and held out."""

from __future__ import annotations

import ast
import sysconfig
import textwrap
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 20
SKIPPED = {"site-packages", "dist-packages", "encodings", "pydoc_data", "test", "tests", "idle_test", "__pycache__"}
LONGEST_FILE = 400_000


@dataclass(frozen=True)
class Source:
    """One module: its path under the library root and its text."""

    path: str
    text: str


def library_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED.intersection(path.relative_to(root).parts) and path.stat().st_size < LONGEST_FILE:
            yield path


def is_held_out(path: str) -> bool:
    """A fixed one in twenty files, by the checksum of the name: the same on every machine."""
    return zlib.crc32(path.encode()) % HELD_OUT_ONE_IN == 0


def read_sources() -> list[Source]:
    """Every module of the library that parses, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    return [source for path in library_files(root) if (source := parseable(path, root))]


def parseable(path: Path, root: Path) -> Source | None:
    try:
        text = path.read_text("utf-8")
        ast.parse(text)
    except (SyntaxError, ValueError):
        return None
    return Source(path.relative_to(root).as_posix(), text)


def functions(text: str) -> list[str]:
    """The source of every function and method in a module, decorators included, moved to the left margin."""
    lines = text.split("\n")
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found.append(textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])).rstrip())
    return [code for code in found if parses(code)]


def chunks(text: str, size: int = 1500) -> list[str]:
    """A module cut between top-level statements into pieces of about `size` characters."""
    lines = text.split("\n")
    starts = [node.lineno - 1 for node in ast.parse(text).body]
    cuts, last = [0], 0
    for start in starts:
        if sum(map(len, lines[last:start])) > size:
            cuts.append(start)
            last = start
    return ["\n".join(lines[a:b]).rstrip() for a, b in zip(cuts, [*cuts[1:], len(lines)], strict=True)]


def parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return True


@dataclass(frozen=True)
class Corpus:
    """What is trained on, and what is kept for measuring; no function text is in both."""

    train: list[Source]
    held_out: list[Source]
    train_functions: list[str]
    held_out_functions: list[str]


def read_corpus() -> Corpus:
    sources = read_sources()
    held_out = [s for s in sources if is_held_out(s.path)]
    train = [s for s in sources if not is_held_out(s.path)]
    measured = unique(code for s in held_out for code in functions(s.text))
    learned = set(unique(code for s in train for code in functions(s.text)))
    return Corpus(
        train=train,
        held_out=held_out,
        train_functions=sorted(learned.difference(measured)),
        held_out_functions=sorted(set(measured).difference(learned)),
    )


def unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))
