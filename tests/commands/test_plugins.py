"""What `plugin_params` may say."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from mindgen.commands.mindie.plugins import PLUGINS, check_plugins, read_plugin_params


def test_supported_plugins_are_named_together_with_what_they_do() -> None:
    asked = read_plugin_params('{"plugin_type": "prefix_cache, splitfuse"}')
    assert asked.names == ("prefix_cache", "splitfuse") and not asked.drafts
    assert len(asked.notes) == 2 and all(
        PLUGINS[name].does in note for name, note in zip(asked.names, asked.notes, strict=True)
    )


@pytest.mark.parametrize("name", ["memory_decoding", "la", "mtp", "prefix_cache,mtp", "lookahead"])
def test_an_unsupported_plugin_is_an_error_that_lists_the_supported_ones(name: str) -> None:
    with pytest.raises(ValueError, match="not supported") as caught:
        read_plugin_params(json.dumps({"plugin_type": name}))
    assert name.split(",")[-1] in str(caught.value)
    assert all(supported in str(caught.value) for supported in PLUGINS)


def test_no_plugin_leaves_fields_without_effect() -> None:
    assert read_plugin_params(None).names == ()
    asked = read_plugin_params('{"plugin_type": "", "decoding_length": 8, "level": 4}')
    assert asked.names == () and asked.notes == ("no effect without a plugin_type: decoding_length, level",)


BAD = {
    "nothing": ("", "has 0 characters"),
    "too much": (json.dumps({"plugin_type": "splitfuse", "x": "y" * 1000}), "it must have 1 to 1024"),
    "no JSON": ("{plugin_type}", "not JSON"),
    "endless nesting": ("[" * 1024, "not JSON"),
    "no object": ("[1]", "must be a JSON object"),
    "no type": ('{"decoding_length": 8}', "plugin_type is None"),
    "a type that is no text": ('{"plugin_type": 3}', "plugin_type is 3"),
    "an empty part": ('{"plugin_type": "splitfuse,"}', "plugin type '' is not supported"),
    "a foreign field": ('{"plugin_type": "prefix_cache", "level": 4}', "'level', but prefix_cache takes no other"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_plugin_params_are_refused(name: str) -> None:
    text, expected = BAD[name]
    with pytest.raises(ValueError) as caught:
        read_plugin_params(text)
    assert expected in str(caught.value)


def test_a_plugin_that_is_switched_off_is_refused() -> None:
    asked = read_plugin_params('{"plugin_type": "prefix_cache"}')
    check_plugins(asked, SimpleNamespace(prefix_reuse=True))
    with pytest.raises(ValueError, match="prefix_cache contradicts --no-prefix-reuse"):
        check_plugins(asked, SimpleNamespace(prefix_reuse=False))
