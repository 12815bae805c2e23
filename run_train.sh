#!/usr/bin/env bash
# Trains, and sets up first where nothing is installed yet:
#
#   ./run_train.sh --job.config_file train_configs/quickstart.toml [--section.key value ...]
#
# NGPU           processes on this machine (default: its GPUs, or 1)
# NNODES         machines (default 1); with more than one, run this on each of them and set
# RDZV_ENDPOINT  host:port of one machine, the same everywhere
# LOG_RANK       ranks of this machine whose output is shown (default 0; for example 0,1)
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt

NGPU="${NGPU:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)')}"
NNODES="${NNODES:-1}"
LOG_RANK="${LOG_RANK:-0}"
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

if [ "$NNODES" -gt 1 ] && [ -z "${RDZV_ENDPOINT:-}" ]; then
    echo "NNODES=$NNODES needs RDZV_ENDPOINT=host:port, the same on every machine." >&2
    exit 2
fi
if [ "$NGPU" -eq 1 ] && [ "$NNODES" -eq 1 ]; then
    exec "$PYTHON" -m torchladder.train "$@"
fi
exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$NNODES" --nproc_per_node "$NGPU" \
    --rdzv_backend c10d --rdzv_endpoint "${RDZV_ENDPOINT:-localhost:0}" \
    --local-ranks-filter "$LOG_RANK" --role rank --tee 3 \
    -m torchladder.train "$@"
