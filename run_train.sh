#!/usr/bin/env bash
# Trains a model; installs torchladder first if it is not installed:
#
#   ./run_train.sh --job.config_file train_configs/quickstart.toml [--section.key value ...]
#
# NGPU           ranks on this node (default: its number of GPUs, or 1)
# NNODES         number of nodes (default: 1); with more than one, run this script on every node and set
# RDZV_ENDPOINT  host:port of one node, the same on all of them
# LOG_RANK       local ranks whose output is shown (default: 0; for example 0,1)
# MAX_RESTARTS   how often torchrun restarts all ranks after one has failed (default: 0)
#
# Exit code: 0 when training is complete, 75 when it was interrupted (run it again to resume), 2 when settings are
# invalid, else that of the error.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt

NGPU="${NGPU:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)')}"
NNODES="${NNODES:-1}"
LOG_RANK="${LOG_RANK:-0}"
MAX_RESTARTS="${MAX_RESTARTS:-0}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}" # else waiting threads keep the CPUs of a busy machine from the others
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

for name in NGPU NNODES MAX_RESTARTS; do
    if ! [[ "${!name}" =~ ^[0-9]+$ ]] || { [ "$name" != MAX_RESTARTS ] && [ "${!name}" -eq 0 ]; }; then
        echo "torchladder: $name=${!name}: must be a whole number of 1 or more (MAX_RESTARTS: 0 or more)." >&2
        exit 2
    fi
done
if [ "$NNODES" -gt 1 ] && [ -z "${RDZV_ENDPOINT:-}" ]; then
    echo "torchladder: NNODES=$NNODES needs RDZV_ENDPOINT=host:port, the same on every node." >&2
    exit 2
fi
if [ "$NGPU" -eq 1 ] && [ "$NNODES" -eq 1 ]; then
    exec "$PYTHON" -m torchladder.train "$@"
fi

# torchrun takes every exit code but 0 for a failure and restarts the run, so local rank 0 leaves the exit code in a file.
TORCHLADDER_EXIT_FILE="$(mktemp)"
export TORCHLADDER_EXIT_FILE
trap '' USR1 USR2 # torchrun does not handle these signals, and would be killed together with the ranks
"$PYTHON" -m torchladder.distributed.launch \
    --nnodes "$NNODES" --nproc_per_node "$NGPU" --max-restarts "$MAX_RESTARTS" \
    --rdzv_backend c10d --rdzv_endpoint "${RDZV_ENDPOINT:-localhost:0}" \
    --local-ranks-filter "$LOG_RANK" --role rank --tee 3 \
    -m torchladder.train "$@" &
torchrun=$!
trap 'kill -TERM $torchrun' TERM INT
trap 'pkill -USR1 -P $torchrun || true' USR1 USR2 # to the ranks, which save and end without torchrun's time limit
code=0
wait "$torchrun" || code=$?
while kill -0 "$torchrun" 2>/dev/null; do # a signal interrupts wait, not the run
    code=0
    wait "$torchrun" || code=$?
done
exit_code="$(cat "$TORCHLADDER_EXIT_FILE")"
rm -f "$TORCHLADDER_EXIT_FILE"
if [ "$exit_code" = 75 ]; then code=75; fi
exit "$code"
