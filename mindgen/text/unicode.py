"""Which strings can be tokenized."""

from __future__ import annotations


def require_utf8(text: str) -> None:
    """ValueError for a string that is not Unicode text, that is one with a lone surrogate in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate ({text[error.start]!r}) at character {error.start}, which is not valid "
            "Unicode; was it read with the wrong encoding?"
        ) from error
