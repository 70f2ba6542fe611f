"""Which layers of a `config.json` have a window, and which have experts."""

from __future__ import annotations

from mindgen.weights.families.family import Config, Family, whole

_MOST_LAYERS = 1 << 16  # of which lists are made
_KINDS = ("full_attention", "sliding_attention")


def sliding_layers(config: Config, family: Family) -> tuple[int, ...] | None:
    """The layers with a window where not all have it: by `layer_types`, or by what stood for it before.

    Raises ValueError for malformed fields, and where `layer_types` says what the family's models do not do.
    """
    count, kinds = whole(config, "num_hidden_layers"), config.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and set(map(str, kinds)) <= set(_KINDS)):
        raise ValueError(f"layer_types is {str(kinds)[:80]}; it must be a list of {' and '.join(_KINDS)}")
    if config.get("sliding_window") is None:
        if kinds and "sliding_attention" in kinds:
            raise ValueError("layer_types has sliding_attention, but there is no sliding_window")
        return None
    if count > _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers is {count}; it must be at most {_MOST_LAYERS}")
    layers = _by_kinds(kinds, count, family) if kinds else _by_rule(config, count, family)
    return None if len(layers) == count else layers


def _by_kinds(kinds: list[str], count: int, family: Family) -> tuple[int, ...]:
    if len(kinds) != count:
        raise ValueError(f"layer_types has {len(kinds)} entries for {count} layers")
    if family.sliding == "all" and "full_attention" in kinds:
        raise ValueError(
            "layer_types has full_attention, but in this family all layers have the sliding_window; "
            "remove one of the two fields"
        )
    return tuple(number for number, kind in enumerate(kinds) if kind == "sliding_attention")


def _by_rule(config: Config, count: int, family: Family) -> tuple[int, ...]:
    first = whole(config, "max_window_layers")
    rules = {
        "all": range(count),
        "later": range(first, count),
        "even": range(0, count, 2),
        "early even": range(0, min(count, first), 2),
    }
    return tuple(rules[family.sliding])


def expert_layers(config: Config) -> tuple[int, ...] | None:
    """The layers with experts where not all have them: every so many, but none of those that are listed."""
    step, without = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers", ())
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"decoder_sparse_step is {step!r}; it must be a whole number from 1")
    if not isinstance(without, list | tuple) or not all(isinstance(layer, int) for layer in without):
        raise ValueError(f"mlp_only_layers is {str(without)[:80]}; it must be a list of numbers of layers")
    count = config.get("num_hidden_layers", 0)
    if (step, len(without)) == (1, 0) or not isinstance(count, int) or count > _MOST_LAYERS:
        return None  # what is wrong with a number of layers, others say
    layers = tuple(layer for layer in range(count) if (layer + 1) % step == 0 and layer not in without)
    return None if len(layers) == count else layers
