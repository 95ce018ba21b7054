#!/bin/bash
# Two hosts without a scheduler, one rank for each accelerator. Run the same line on both, at about the same time:
#   launch/two_hosts.sh FIRST_HOST CONFIG.yaml|RUN [key=value ...]
# Both must see the run's directory and the stores under the same paths. RANKS=4 sets the ranks of this host; INTERFACE
# names the network interface where the host's own name does not lead to it.
set -euo pipefail
first=${1:?the name or address of the host that holds the rendezvous}
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ -n "${INTERFACE:-}" ]]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
exec torchrun --nnodes 2 --nproc-per-node "${RANKS:-gpu}" --max-restarts 0 \
    --rdzv-backend c10d --rdzv-endpoint "$first:${PORT:-29500}" --rdzv-id "${ID:-multifid}" \
    -m multifid train "$@"
