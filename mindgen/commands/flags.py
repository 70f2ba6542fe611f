"""Command-line flags from the fields of dataclasses, and back."""

from __future__ import annotations

import argparse
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from mindgen.config import flags_of

Config = TypeVar("Config")
_OPTION = re.compile(r"(?<![-\w])[a-z]+(_[a-z]+)+\b")


class Parser(argparse.ArgumentParser):
    """Takes flags by their whole names only, and raises ValueError where argparse would exit."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> Any:
        raise ValueError(f"{message}; {self.prog} --help lists what there is")


def add_flags(parser: argparse.ArgumentParser, config: type, leave_out: Collection[str] = ()) -> None:
    """One flag for every field of a configuration but those left out, with the help and names that the field states."""
    paragraph = (config.__doc__ or config.__name__).partition("\n\n")[0]
    group = parser.add_argument_group(" ".join(paragraph.split()).split(". ")[0].rstrip("."))
    hints = get_type_hints(config)
    for item in (item for item in fields(config) if item.name not in leave_out):
        group.add_argument(*flags_of(item), dest=item.name, default=None, **_kind(item, hints[item.name]))


def from_flags(config: type[Config], parsed: argparse.Namespace, **replaced: Any) -> Config:
    """The configuration that a parsed command line states; `replaced` overrides single fields, flags or none."""
    names = [item.name for item in fields(config) if item.name not in replaced]  # type: ignore[arg-type]
    values = {name: getattr(parsed, name) for name in names}
    given = {name: value for name, value in values.items() if value is not None}
    return config(**given | replaced)


@contextmanager
def by_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """Within it, a ValueError on an option (`top_k is -1; ...`) calls that by its flag: --top_k, or as `flags` says.

    Options further on in the message are called as `flags` says; they are told from prose by an underscore.
    """
    try:
        yield
    except ValueError as error:
        name, verb, rest = str(error).partition(" is ")
        if not (verb and name.isidentifier()):
            name, verb, rest = "", "", str(error)
        flag = flags.get(name, f"--{name}") if name else ""
        raise ValueError(flag + verb + _OPTION.sub(lambda found: flags.get(found[0], found[0]), rest)) from None


def truth(text: str) -> bool:
    """A switch that is given with a value, as scripts of PaddleNLP do: `--block_attn 1`, `--block_attn True`."""
    known = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return known[text.lower()]


def _default(item: Field[Any]) -> Any:
    return None if item.default is MISSING else item.default


def _kind(item: Field[Any], hint: Any) -> dict[str, Any]:
    """What argparse needs to know of a field: its type, how often it may come, what to say of it."""
    options: dict[str, Any] = {"help": _help(item)}
    options |= {name: item.metadata[name] for name in ("choices", "metavar") if name in item.metadata}
    hint = _without_none(hint)
    if hint is bool and item.metadata.get("style") == "truth":
        return options | {"nargs": "?", "const": True, "type": truth, "metavar": "True"}
    if hint is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    if "choices" not in options:
        options.setdefault("metavar", {int: "N", float: "X"}.get(hint, "TEXT"))
    if get_origin(hint) is tuple:
        element = get_args(hint)[0]
        style = item.metadata.get("style", "commas")
        if style == "repeat":
            return options | {"action": _Append, "type": _number(element)}
        if style == "several":
            return options | {"nargs": "+", "action": _Append, "type": _number(element)}
        return options | {"type": _commas(element)}
    return options | {"type": _number(hint)}


def _help(item: Field[Any]) -> str:
    text = str(item.metadata.get("help", "")).replace("%", "%%")
    default = _default(item)
    said = "default" in text or default in (None, "", ()) or isinstance(default, bool)
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return text if said else f"{text} (default: {shown})"


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _number(kind: type) -> Callable[[str], Any]:
    """argparse names the type in its message by this function's name."""
    words = {int: "whole number", float: "number", str: "text"}

    def parse(text: str) -> Any:
        return kind(text)

    parse.__name__ = words[kind]
    return parse


def _commas(kind: type) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = "comma-separated list"
    return parse


class _Append(argparse.Action):
    """Collects into a tuple, also over repeated flags."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        added = tuple(values) if isinstance(values, list) else (values,)
        setattr(namespace, self.dest, (getattr(namespace, self.dest) or ()) + added)
