#!/usr/bin/env bash
# Mixtral 8x22B: streams text from CHECKPOINT (shards of any TP x PP, or a Hugging Face folder) on TP x PP ranks.
CHECKPOINT=${CHECKPOINT:-"your model ckpt path"}
TOKENIZER_PATH=${TOKENIZER_PATH:-}   # empty: the tokenizer in CHECKPOINT
TOKENIZER_MODEL=${TOKENIZER_MODEL:-}
TP=${TP:-8}
PP=${PP:-1}
EP=${EP:-8}   # so many groups of the TP ranks have different experts; divides TP

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
generate mixtral_8x22b "$@"
