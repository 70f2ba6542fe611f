# What the scripts beside it share: how to convert, and how to start the ranks. It holds no fact about any model,
# because a checkpoint says itself what it is.
#
# Read from the script or the environment:
#   CHECKPOINT       the Megatron shards (iter_*/mp_rank_*) of any TP x PP; to generate, or a Hugging Face folder
#   TOKENIZER_PATH   the Hugging Face folder: its weights to convert, its tokenizer to generate (default: CHECKPOINT)
#   TOKENIZER_MODEL  a tokenizer.model that is not in TOKENIZER_PATH
#   TP, PP           tensor and pipeline parallel size, of the shards to write or of the ranks to start
#   EP               how many groups of the TP ranks have different experts; empty without experts
#   PROMPT_TYPE      the layout of conversations, for models without a chat template; empty: the tokenizer's template
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, NPUS_PER_NODE   as torchrun has them
#   PYTHON           default: the .venv that launch.sh makes, else python3
#   DRY_RUN=1        print the command instead of running it
# Further arguments of a script go to the command, after its own.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -x $root/.venv/bin/python ]]; then PYTHON=$root/.venv/bin/python; fi
fi

refuse() { printf '%s: %s\n' "$0" "$*" >&2; exit 2; }

require_path() {  # $1: the name of a variable that must be more than its placeholder
  [[ -n ${!1:-} && ${!1} != your\ * ]] || refuse "$1 is not set: edit it in this file, or run $1=/path/to/it bash $0"
}

require_sizes() {  # the names of variables that must be whole numbers of at least 1
  local name
  for name; do
    [[ ${!name:-} =~ ^[1-9][0-9]*$ ]] || refuse "$name=${!name:-} is not a positive whole number"
  done
}

run() {
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

convert() {
  if [[ -n ${TOKENIZER_MODEL:-} ]]; then set -- --tokenizer-model "$TOKENIZER_MODEL" "$@"; fi
  run "$PYTHON" "$root/tools/checkpoint/convert_ckpt.py" "$@"
}

hf2mcore() {  # TOKENIZER_PATH -> CHECKPOINT
  require_path TOKENIZER_PATH
  require_path CHECKPOINT
  require_sizes TP PP
  if [[ -n ${EP:-} ]]; then require_sizes EP && set -- --target-expert-parallel-size "$EP" "$@"; fi
  convert --load-model-type hf --save-model-type mg --load-dir "$TOKENIZER_PATH" --save-dir "$CHECKPOINT" \
    --target-tensor-parallel-size "$TP" --target-pipeline-parallel-size "$PP" "$@"
}

mcore2hf() {  # CHECKPOINT -> TOKENIZER_PATH/mg2hf
  require_path CHECKPOINT
  require_path TOKENIZER_PATH
  convert --load-model-type mg --save-model-type hf --load-dir "$CHECKPOINT" --save-dir "$TOKENIZER_PATH" \
    --target-tensor-parallel-size 1 --target-pipeline-parallel-size 1 "$@"
}

generate_arguments() {  # sets arguments, from the variables
  require_path CHECKPOINT
  require_sizes TP PP
  arguments=(generate --load "$CHECKPOINT" --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP")
  if [[ -n ${EP:-} ]]; then require_sizes EP && arguments+=(--expert-model-parallel-size "$EP"); fi
  if [[ -n ${TOKENIZER_PATH:-} && $TOKENIZER_PATH != your\ * ]]; then
    arguments+=(--tokenizer-name-or-path "$TOKENIZER_PATH")
  fi
  if [[ -n ${TOKENIZER_MODEL:-} ]]; then arguments+=(--tokenizer-model "$TOKENIZER_MODEL"); fi
}

choose_launcher() {  # sets launcher: torchrun over the nodes
  local ranks=$((TP * PP))
  NNODES=${NNODES:-1}
  require_sizes NNODES
  NPUS_PER_NODE=${NPUS_PER_NODE:-$((ranks / NNODES))}
  ((NPUS_PER_NODE * NNODES == ranks)) ||
    refuse "TP * PP = $ranks ranks, but NNODES * NPUS_PER_NODE = $NNODES * $NPUS_PER_NODE: the two must be equal"
  launcher=("$PYTHON" -m torch.distributed.run --nproc_per_node "$NPUS_PER_NODE" --nnodes "$NNODES"
    --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-localhost}" --master_port "${MASTER_PORT:-6001}")
}

generate() {  # $1: a name for the log of the text, logs/generate_mcore_$1.log
  local log=logs/generate_mcore_$1.log arguments launcher
  shift
  generate_arguments
  choose_launcher
  set -- "${launcher[@]}" -m mindgen "${arguments[@]}" --stream "$@"
  if [[ ${DRY_RUN:-0} == 1 ]]; then run "$@"; return; fi
  mkdir -p logs
  run "$@" | tee -i "$log"
}

chat() {  # on one node without torchrun, which would take Ctrl-C for itself
  local arguments launcher=("$PYTHON") layout=(--hf-chat-template)
  generate_arguments
  if [[ -n ${PROMPT_TYPE:-} ]]; then layout=(--prompt-type "$PROMPT_TYPE"); fi
  if [[ ${NNODES:-1} != 1 ]]; then choose_launcher; fi
  run "${launcher[@]}" -m mindgen "${arguments[@]}" --task chat "${layout[@]}" "$@"
}
