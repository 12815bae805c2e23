#!/usr/bin/env bash
# Trains, and sets up first where nothing is installed yet:
#
#   ./run_train.sh --job.config_file train_configs/quickstart.toml [--section.key value ...]
#
# NGPU           processes on this machine (default: its GPUs, or 1)
# NNODES         machines (default 1); with more than one, run this on each of them and set
# RDZV_ENDPOINT  host:port of one machine, the same everywhere
# LOG_RANK       ranks of this machine whose output is shown (default 0; for example 0,1)
# MAX_RESTARTS   times that torchrun starts all ranks again after one has died (default 0)
#
# Ends with 0 when all steps are taken, 75 when it was asked to end before (start it again), else with the error's code.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt

NGPU="${NGPU:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)')}"
NNODES="${NNODES:-1}"
LOG_RANK="${LOG_RANK:-0}"
MAX_RESTARTS="${MAX_RESTARTS:-0}"
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

if [ "$NNODES" -gt 1 ] && [ -z "${RDZV_ENDPOINT:-}" ]; then
    echo "NNODES=$NNODES needs RDZV_ENDPOINT=host:port, the same on every machine." >&2
    exit 2
fi
if [ "$NGPU" -eq 1 ] && [ "$NNODES" -eq 1 ]; then
    exec "$PYTHON" -m torchladder.train "$@"
fi

# torchrun knows two ends, 0 and failed, and starts a failed run again; what it was really is left in a file.
TORCHLADDER_EXIT_FILE="$(mktemp)"
export TORCHLADDER_EXIT_FILE
trap '' USR1 USR2 # meant for the ranks, which hear them; torchrun would die of them, and with it the ranks
"$PYTHON" -m torch.distributed.run \
    --nnodes "$NNODES" --nproc_per_node "$NGPU" --max-restarts "$MAX_RESTARTS" \
    --rdzv_backend c10d --rdzv_endpoint "${RDZV_ENDPOINT:-localhost:0}" \
    --local-ranks-filter "$LOG_RANK" --role rank --tee 3 \
    -m torchladder.train "$@" &
torchrun=$!
trap 'kill -TERM $torchrun' TERM INT
code=0
wait "$torchrun" || code=$?
while kill -0 "$torchrun" 2>/dev/null; do # a signal ends a wait, not the run
    code=0
    wait "$torchrun" || code=$?
done
said="$(cat "$TORCHLADDER_EXIT_FILE")"
rm -f "$TORCHLADDER_EXIT_FILE"
if [ "$said" = 75 ]; then code=75; fi
exit "$code"
