"""MindIE's `plugin_params`: a JSON text that switches on what this table knows, and is refused for anything else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LONGEST = 1024  # characters, MindIE's limit


@dataclass(frozen=True)
class Plugin:
    """One plugin type. does: what it means here. drafts: whether it guesses tokens ahead, so that a speculation gamma
    has a meaning. needs: engine settings without which it would be off. params: the fields that it takes."""

    does: str
    drafts: bool = False
    needs: Mapping[str, Any] = field(default_factory=dict)
    params: tuple[str, ...] = ()


PLUGINS = {
    "prefix_cache": Plugin("requests share the full cache blocks of a common beginning", needs={"prefix_reuse": True}),
    "splitfuse": Plugin("a long prompt runs in chunks, beside the tokens of others"),
}


@dataclass(frozen=True)
class PluginParams:
    """What a `plugin_params` asks: plugins by name, and the other fields. notes: lines for the user."""

    names: tuple[str, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def drafts(self) -> bool:
        return any(PLUGINS[name].drafts for name in self.names)


def read_plugin_params(text: str | None) -> PluginParams:
    """What the text asks; nothing for None and an empty plugin_type. Raises ValueError for what is not supported."""
    if text is None:
        return PluginParams()
    fields = _parse(text)
    names = _names(fields.pop("plugin_type", None))
    if not names:
        idle = (f"no effect without a plugin_type: {', '.join(fields)}",) if fields else ()
        return PluginParams(notes=idle)
    known = [name for plugin in names for name in PLUGINS[plugin].params]
    unknown = [name for name in fields if name not in known]
    if unknown:
        takes = f"only {', '.join(known)}" if known else "no other field"
        raise ValueError(f"plugin_params has {unknown[0]!r}, but {', '.join(names)} takes {takes}; leave it out")
    return PluginParams(names, fields, tuple(f"plugin {name}: {PLUGINS[name].does}" for name in names))


def check_plugins(asked: PluginParams, config: object) -> None:
    """Raises ValueError where the engine's configuration switches off what a plugin stands for."""
    for name in asked.names:
        for setting, value in PLUGINS[name].needs.items():
            if getattr(config, setting) != value:
                flag = f"--no-{setting.replace('_', '-')}"
                raise ValueError(f"plugin_type {name} contradicts {flag}; give one of them")


def _parse(text: str) -> dict[str, Any]:
    if not 0 < len(text) <= _LONGEST:
        raise ValueError(f"plugin_params has {len(text)} characters; it must have 1 to {_LONGEST}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"plugin_params is not JSON ({error}); write for example {_example()}") from None
    if not isinstance(value, dict):
        raise ValueError(f"plugin_params is {text}; it must be a JSON object such as {_example()}")
    return value


def _names(value: object) -> tuple[str, ...]:
    """The plugins of a `plugin_type`, which may hold several between commas."""
    if not isinstance(value, str):
        raise ValueError(f"plugin_type is {value!r} in plugin_params; it must be a text, as in {_example()}")
    names = tuple(dict.fromkeys(name.strip() for name in value.split(","))) if value.strip() else ()
    unsupported = [name for name in names if name not in PLUGINS]
    if unsupported:
        raise ValueError(
            f"plugin type {unsupported[0]!r} is not supported; the supported ones are {', '.join(PLUGINS)}"
        )
    return names


def _example() -> str:
    return json.dumps({"plugin_type": next(iter(PLUGINS))})
