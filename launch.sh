#!/usr/bin/env bash
# Sets mindgen up in .venv and runs it.
#
#   bash launch.sh                              stream an answer of the demo model, at TP=2, from 2 CPU ranks
#   bash launch.sh test [--full] [pytest ...]   run what CI runs: ruff, mypy, pytest; --full adds the long matrix
#   bash launch.sh <command> ...                python -m mindgen <command> ...
#
# Environment:
#   TP, PP    tensor and pipeline parallel size, handed to the command
#   NNODES    run through torchrun; NODE_RANK, MASTER_ADDR and MASTER_PORT as there, NPROC_PER_NODE is TP * PP / NNODES
#   PYTHON    the Python (3.11 or newer) that .venv is built on; a torch that it can import is used as it is
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/tools/set_up.sh"

main() {
  local size
  for size in TP PP NNODES NPROC_PER_NODE; do
    [[ -z ${!size:-} || ${!size} =~ ^[1-9][0-9]*$ ]] || refuse "$size=${!size} is not a positive whole number"
  done
  if [[ -n ${PYTHON:-} ]]; then PYTHON=$(command -v "$PYTHON" || echo "$PYTHON"); fi
  if [[ ${PYTHON:-} == "$venv"/* ]]; then unset PYTHON; fi
  case ${1:-} in
    "") require runtime; demo ;;
    -h | --help) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "$root/launch.sh" ;;
    test) require dev; check "${@:2}" ;;
    *) require runtime; run_command "$@" ;;
  esac
}

demo() {
  local shards
  shards=$root/.demo/tp2-$(cksum <"$root/examples/demo/model/model.safetensors" | tr ' ' -)
  locked convert_demo "$shards"
  say "asking the demo model, on 2 CPU ranks: how are you?"
  exec "$python" -m mindgen generate --load "$shards" --tensor-model-parallel-size 2 --device cpu --stream \
    --prompt "how are you?" --hf-chat-template --max-new-tokens 64
}

convert_demo() {  # $1: the folder to write; its tracker file is written last
  if [[ -f $1/latest_checkpointed_iteration.txt ]]; then return; fi
  "$python" "$root/tools/checkpoint/convert_ckpt.py" --load-model-type hf --save-model-type mg \
    --load-dir "$root/examples/demo/model" --save-dir "$1" \
    --target-tensor-parallel-size 2 --target-pipeline-parallel-size 1 >&2
}

check() {
  local tests="not full"
  if [[ ${1:-} == --full ]]; then tests="full or not full"; shift; fi
  cd "$root"
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # tests start several ranks on few cores
  "$python" -m ruff check .
  "$python" -m ruff format --check .
  "$python" -m mypy
  exec "$python" -m pytest -m "$tests" "$@"
}

run_command() {  # a size that is also given as a flag comes later, and wins
  local command=$1
  shift
  if [[ -n ${PP:-} ]]; then set -- --pipeline-model-parallel-size "$PP" "$@"; fi
  if [[ -n ${TP:-} ]]; then set -- --tensor-model-parallel-size "$TP" "$@"; fi
  if [[ -n ${NNODES:-} ]]; then run_on_nodes "$command" "$@"; fi
  exec "$python" -m mindgen "$command" "$@"
}

run_on_nodes() {
  local ranks=$((${TP:-1} * ${PP:-1})) per_node cores
  per_node=${NPROC_PER_NODE:-$((ranks / NNODES))}
  [[ -n ${NPROC_PER_NODE:-} || $((per_node * NNODES)) == "$ranks" ]] ||
    refuse "TP * PP = $ranks ranks do not spread evenly over NNODES=$NNODES; change one, or give NPROC_PER_NODE"
  [[ $NNODES == 1 || ( -n ${NODE_RANK:-} && -n ${MASTER_ADDR:-} ) ]] ||
    refuse "NNODES=$NNODES needs NODE_RANK (0 to $((NNODES - 1))) and MASTER_ADDR (the host of node 0)"
  cores=$(getconf _NPROCESSORS_ONLN)
  # Unset, torchrun would give every rank a single thread.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > per_node ? cores / per_node : 1))}
  exec "$python" -m torch.distributed.run --nnodes "$NNODES" --node_rank "${NODE_RANK:-0}" \
    --master_addr "${MASTER_ADDR:-localhost}" --master_port "${MASTER_PORT:-6000}" \
    --nproc_per_node "$per_node" -m mindgen "$@"
}

main "$@"
