#!/usr/bin/env bash
# Qwen2 MoE: the Hugging Face folder TOKENIZER_PATH to Megatron shards of TP x PP in CHECKPOINT.
TOKENIZER_PATH=${TOKENIZER_PATH:-"your Hugging Face folder"}
CHECKPOINT=${CHECKPOINT:-"your model ckpt path"}
TOKENIZER_MODEL=${TOKENIZER_MODEL:-}
TP=${TP:-4}
PP=${PP:-1}
EP=${EP:-4}   # so many groups of the TP ranks have different experts; divides TP

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
hf2mcore "$@"
