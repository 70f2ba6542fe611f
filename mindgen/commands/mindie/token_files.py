"""Prompts as token ids in text: `1,5,7`, and files with one such line for each request."""

from __future__ import annotations

from pathlib import Path


def parse_token_ids(text: str, where: str) -> tuple[int, ...]:
    """The ids of a comma-separated list; ValueError names `where` it stands."""
    parts = [part.strip() for part in text.split(",")]
    wrong = next((part for part in parts if not (part.isascii() and part.isdigit() and len(part) < 20)), None)
    if wrong is not None:
        raise ValueError(f"{where}: {wrong!r} is not a token id; write ids with commas between them, such as 1,5,7")
    return tuple(int(part) for part in parts)


def check_token_ids(ids: tuple[int, ...], vocab_size: int, where: str) -> None:
    """ValueError for an id that the model does not have."""
    outside = next((token for token in ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise ValueError(
            f"{where}: token id {outside} is outside the vocabulary; the model's are 0 to {vocab_size - 1}"
        )


def read_token_file(name: str) -> list[tuple[int, ...]]:
    """The requests of a CSV file without heading, one a line; lines may end in CRLF, and the file in empty lines.

    Raises ValueError for a file that cannot be read or is empty, and for a line that is no list of ids, by its number.
    """
    lines = read_lines(name)
    return [parse_token_ids(line, f"{name}, line {number}") for number, line in enumerate(lines, 1)]


def read_lines(name: str) -> list[str]:
    """The lines of a text file, empty ones at its end left out. ValueError if it cannot be read or holds none."""
    path = Path(name)
    if path.exists() and not path.is_file():
        raise ValueError(f"{name} is not a regular file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not a text in UTF-8: {error}") from None
    if not text.strip():
        raise ValueError(f"{name} holds no request; write one on each line")
    return text.rstrip().split("\n")
