"""Flags of existing Megatron scripts: of the model (checked against it) and of training (without effect)."""

from __future__ import annotations

import argparse

from mindgen.weights.flags import add_architecture_flags

_PRECISIONS = {"bf16": "bf16", "fp16": "fp16"}
# Flags of training, of fusions, of logging and of checks that always happen here, and whether a value follows.
_SWITCHES = """
    no-load-optim no-load-rng no-save-optim no-save-rng finetune use-mcore-models use-legacy-models
    no-masked-softmax-fusion no-gradient-accumulation-fusion no-bias-gelu-fusion no-bias-swiglu-fusion
    no-bias-dropout-fusion no-rope-fusion no-async-tensor-model-parallel-allreduce no-persist-layer-norm
    use-fused-swiglu use-fused-rmsnorm use-fused-rotary-pos-emb use-fused-ring-attention-update
    attention-softmax-in-fp32 no-attention-softmax-in-fp32 accumulate-allreduce-grads-in-fp32
    exit-on-missing-checkpoint use-checkpoint-args no-initialization use-cpu-initialization
    use-distributed-optimizer overlap-grad-reduce overlap-param-gather input-layernorm-in-fp32 norm-in-fp32
    fill-neg-inf no-shared-storage no-check-for-nan-in-loss-and-grad reuse-fp32-param jit-compile log-throughput
    moe-grouped-gemm moe-permutation-async-comm moe-permute-fusion moe-alltoall-overlap-comm moe-allgather-overlap-comm
    use-fused-moe-token-permute-and-unpermute moe-pad-expert-input-to-capacity moe-per-layer-logging
    gemm-gradient-accumulation-fusion
""".split()
_VALUES = """
    make-vocab-size-divisible-by
    seq-length encoder-seq-length micro-batch-size global-batch-size train-iters lr min-lr lr-decay-style
    lr-warmup-fraction lr-warmup-iters weight-decay clip-grad adam-beta1 adam-beta2 adam-eps init-method-std
    attention-dropout hidden-dropout initial-loss-scale log-interval save-interval eval-interval eval-iters save
    data-path split data-cache-path num-workers transformer-impl ckpt-format dist-ckpt-format distributed-backend
    distributed-timeout-minutes load-format sparse-mode pre-tockens next-tockens tokenizer-padding-side
    max-tokens-to-oom inference-batch-times-seqlen-threshold
    moe-router-load-balancing-type moe-aux-loss-coeff moe-z-loss-coeff moe-token-dispatcher-type
""".split()
_NO_EFFECT = {f"--{name}": False for name in _SWITCHES} | {f"--{name}": True for name in _VALUES}


def add_legacy_flags(parser: argparse.ArgumentParser) -> None:
    """Everything that a MindSpeed-LLM or Megatron inference script may pass besides our own flags."""
    add_architecture_flags(parser)
    group = parser.add_argument_group("flags of existing scripts")
    for name in _PRECISIONS:
        group.add_argument(f"--{name}", action="store_true", help=f"the same as --dtype {name}")
    group.add_argument("--use-flash-attn", action="store_true", help="the same as --attention sdpa; needs the cache")
    for name, takes_value in _NO_EFFECT.items():
        kind = {"nargs": 1} if takes_value else {"action": "store_true"}
        group.add_argument(name, dest=_effectless(name), help=argparse.SUPPRESS, default=None, **kind)


def apply_legacy_flags(parsed: argparse.Namespace) -> list[str]:
    """Turns them into our own options in place. Returns notes for the user; ValueError for contradictions."""
    for name in _PRECISIONS:
        if getattr(parsed, name):
            _set(parsed, "dtype", name, f"--{name}")
    if parsed.use_flash_attn:
        if parsed.use_kv_cache is False:
            raise ValueError("--use-flash-attn works over the cache; leave out --no-use-kv-cache or --use-flash-attn")
        _set(parsed, "attention", "sdpa", "--use-flash-attn")
    given = [name for name in _NO_EFFECT if getattr(parsed, _effectless(name))]
    return [f"no effect here: {', '.join(given)}"] if given else []


def _set(parsed: argparse.Namespace, name: str, value: str, flag: str) -> None:
    before = getattr(parsed, name)
    if before not in (None, "auto", value):
        raise ValueError(f"{flag} contradicts --{name} {before}; give one of them")
    setattr(parsed, name, value)


def _effectless(flag: str) -> str:
    return "no_effect" + flag.replace("-", "_")
