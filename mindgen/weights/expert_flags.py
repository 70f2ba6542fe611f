"""Megatron's and MindSpeed-LLM's words for experts that do not state one field each; flags.py has the others."""

from __future__ import annotations

import ast
from typing import Any

Statement = dict[str, Any]

FLAGS: dict[str, type | None] = {
    "--n-shared-experts": int,
    "--moe-layer-freq": str,
    "--first-k-dense-replace": int,
    "--moe-tp-extend-ep": None,
}
# Ways of balancing the load in training that choose experts as in Megatron, or as MindSpeed-LLM's softmax_topk does.
_BALANCED = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none", "pai_megatron_aux_loss")
_NOT_RENORMALISED = "softmax_topk"
_FIELDS = (
    "num_experts", "experts_per_token", "expert_ffn_size", "shared_ffn_size", "renormalise_experts", "expert_layers",
)  # fmt: skip


def experts_by_args(args: dict[str, Any], stated: Statement) -> Statement:
    """What `args` state with what they mean for experts: nothing, whatever their defaults, of a model without any.

    Which layers have experts is left to the weights. Raises ValueError for a router that mindgen does not compute.
    """
    if not stated.get("num_experts"):
        return {name: value for name, value in stated.items() if name not in _FIELDS}
    kinds = args.get("moe_router_load_balancing_type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    strange = [kind for kind in kinds if kind not in (None, *_BALANCED, _NOT_RENORMALISED)]
    if strange:
        word = f"moe_router_load_balancing_type = {strange[0]!r}"
        raise ValueError(f"its args have {word}, which mindgen does not implement")
    rest = {"expert_ffn_size": stated.get("ffn_size")}  # Megatron's, unless it says more
    rest |= {name: value for name, value in stated.items() if name != "renormalise_experts"}
    return _shared(args.get("n_shared_experts"), rest) | _routing(args, kinds)


def _routing(args: dict[str, Any], kinds: list[Any]) -> Statement:
    """Megatron takes the softmax of the chosen experts only, which renormalises, unless it is told otherwise."""
    if args.get("norm_topk_prob"):
        return {"renormalise_experts": True}
    if args.get("moe_router_pre_softmax") or _NOT_RENORMALISED in kinds:
        return {"renormalise_experts": False}
    return {"renormalise_experts": True} if args.get("moe_router_pre_softmax") is False else {}


def experts_by_flags(flags: dict[str, Any], stated: Statement) -> Statement:
    """What flags state with what they mean for experts. Raises ValueError for a list of layers that is none."""
    count = stated.get("num_layers")
    places = [flags[name] for name in ("--moe-layer-freq", "--first-k-dense-replace") if name in flags]
    if count is not None and places:
        pattern = _pattern(str(flags.get("--moe-layer-freq", "1")), count)
        first = flags.get("--first-k-dense-replace", 0)
        layers = tuple(layer for layer in range(count) if pattern[layer] and layer >= first)
        stated = stated | {"expert_layers": None if len(layers) == count else layers}
    return _shared(flags.get("--n-shared-experts"), stated)


def _shared(count: int | None, stated: Statement) -> Statement:
    """MindSpeed-LLM counts how many experts the shared one is as large as."""
    if not count or stated.get("expert_ffn_size") is None:
        return stated
    return {"shared_ffn_size": count * stated["expert_ffn_size"]} | stated


def _pattern(text: str, count: int) -> list[int]:
    """Megatron's --moe-layer-freq, every N-th layer from the first or a list of 0 and 1 such as ([0]+[1]*3)*2."""
    try:
        found = _computed(ast.parse(text, mode="eval").body, count)
    except (SyntaxError, ValueError, RecursionError):
        found = None
    if isinstance(found, int) and found > 0:
        return [int(layer % found == 0) for layer in range(count)]
    if not isinstance(found, list) or len(found) != count:
        raise ValueError(f"--moe-layer-freq is {text!r}; it must be a number, or a list of 0 and 1 of {count} layers")
    return found


def _computed(node: ast.AST, longest: int) -> Any:
    """A number, or a list of numbers, added to lists and multiplied, up to the length that makes sense."""
    match node:
        case ast.Constant(value=int()):
            return node.value
        case ast.List(elts=items):
            return [_computed(item, longest) for item in items]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            found = _computed(left, longest) + _computed(right, longest)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            several, times = _computed(left, longest), _computed(right, longest)
            if not isinstance(several, list) or not isinstance(times, int) or len(several) * times > longest:
                raise ValueError("neither a list nor a number")
            found = several * times
        case _:
            raise ValueError("neither a list nor a number")
    if not isinstance(found, list):
        raise ValueError("neither a list nor a number")
    return found
