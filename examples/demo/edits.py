"""Material to copy: a function, then the same function again with one change, and lists of random names.

Names and strings are exchanged for random ones first, so that the copy has to be read from the context.
"""

from __future__ import annotations

import builtins
import keyword
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

NAME = re.compile(r"\b[A-Za-z_][A-Za-z0-9_]{2,}\b")
STRING = re.compile(r"(?<=[\"'])[A-Za-z][A-Za-z_ .:-]{2,24}(?=[\"'])")
NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.])")
FIXED = {*keyword.kwlist, *dir(builtins), "self"}
SYLLABLES = re.findall(r"\w+", "ka lo mi ru ten vor sa pli dex qua nor bi fer tul gam zo hex wi jun pra cor el sto ny")


@dataclass(frozen=True)
class Edit:
    """An instruction, and the code that follows from it."""

    instruction: str
    result: str


def names(code: str) -> list[str]:
    """The names in a piece of code that may be exchanged, in order of appearance."""
    return [name for name in dict.fromkeys(NAME.findall(code)) if name not in FIXED]


def invent_name(rng: random.Random, known: list[str]) -> str:
    """A name never seen before, or two known ones joined in a new way."""
    if rng.random() < 0.5:
        return "_".join(rng.choice(known).strip("_").lower() for _ in range(rng.randint(1, 2)))
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 4)))


def substitute(code: str, exchange: dict[str, str]) -> str:
    return NAME.sub(lambda match: exchange.get(match[0], match[0]), code)


def disguise(code: str, rng: random.Random, known: list[str]) -> str:
    """The same code with some of its names, strings and numbers replaced by random ones."""
    share = rng.choice((0.0, 0.3, 0.7))
    exchange = {name: invent_name(rng, known) for name in names(code) if rng.random() < share}
    code = substitute(code, exchange)
    code = STRING.sub(lambda m: invent_name(rng, known) if rng.random() < share else m[0], code)
    return NUMBER.sub(lambda m: str(rng.randint(0, 999)) if rng.random() < share else m[0], code)


REPEATS = (
    "Repeat this function:",
    "Repeat this function:",
    "Repeat this function",
    "Please repeat this function.",
    "Repeat this function exactly:",
    "Repeat this code:",
    "Repeat the following function:",
    "Copy this function:",
    "Write this function again:",
    "Please repeat this code exactly as it is:",
    "Show me this function again:",
    "Repeat after me:",
    "Echo this:",
)
RENAMES = (
    "Rename {old} to {new} in this function:",
    "Rename {old} to {new}:",
    "Rename `{old}` to `{new}` in this function:",
    "In this function, rename {old} to {new}.",
    "Please rename {old} to {new} in this code:",
    "Replace the name {old} by {new}:",
)
CHANGES = (
    "Change {old} to {new} in this function:",
    "Change {old} to {new}:",
    "Replace {old} with {new} in this code:",
    "In this function, use {new} instead of {old}:",
)


def repeat(code: str, rng: random.Random, known: list[str]) -> Edit:
    return Edit(rng.choice(REPEATS), code)


def rename(code: str, rng: random.Random, known: list[str]) -> Edit:
    found = names(code)
    if not found:
        return repeat(code, rng, known)
    old, new = rng.choice(found), invent_name(rng, known)
    return Edit(rng.choice(RENAMES).format(old=old, new=new), substitute(code, {old: new}))


def change_string(code: str, rng: random.Random, known: list[str]) -> Edit:
    found = STRING.findall(code)
    if not found:
        return rename(code, rng, known)
    old, new = rng.choice(found), invent_name(rng, known)
    return Edit(rng.choice(CHANGES).format(old=f"'{old}'", new=f"'{new}'"), code.replace(old, new))


def change_number(code: str, rng: random.Random, known: list[str]) -> Edit:
    found = NUMBER.findall(code)
    if not found:
        return rename(code, rng, known)
    old, new = rng.choice(found), str(rng.randint(0, 999))
    result = NUMBER.sub(lambda m: new if m[0] == old else m[0], code)
    return Edit(rng.choice(CHANGES).format(old=old, new=new), result)


EDITS: tuple[Callable[[str, random.Random, list[str]], Edit], ...] = (repeat, rename, change_string, change_number)


def edit(code: str, rng: random.Random, known: list[str]) -> Edit:
    """One random edit; half of the time it is no change at all."""
    return rng.choices(EDITS, weights=(6, 3, 1, 1))[0](code, rng, known)


def listing(rng: random.Random, known: list[str], lines: int) -> str:
    """Made-up assignments, calls or a list: nothing in it can be guessed."""
    style = rng.choice(("{a} = {b}", "{a}({b}, {n})", "'{a}': {n},", "{a} = {n}", "- {a} {b}", "{a}.{b} = '{c}'"))
    return "\n".join(
        style.format(**{key: invent_name(rng, known) for key in "abc"}, n=rng.randint(0, 9999)) for _ in range(lines)
    )
