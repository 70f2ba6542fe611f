"""Large language models over many devices, from the weights people have."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mindgen.config import EngineConfig
    from mindgen.engine.request import SamplingParams
    from mindgen.llm.llm import LLM
    from mindgen.llm.result import Result
    from mindgen.parallel.group import PeerLost

__all__ = ["LLM", "EngineConfig", "PeerLost", "Result", "SamplingParams"]

# Imported when asked for, because commands are to start quickly.
_HOMES = {
    "LLM": "mindgen.llm.llm",
    "EngineConfig": "mindgen.config",
    "PeerLost": "mindgen.parallel.group",
    "Result": "mindgen.llm.result",
    "SamplingParams": "mindgen.engine.request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
