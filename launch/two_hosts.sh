#!/bin/bash
# Two hosts without a scheduler, one rank for each accelerator. At about the same time, on the first and on the second:
#   launch/two_hosts.sh 0 FIRST_HOST CONFIG.yaml|RUN [key=value ...]
#   launch/two_hosts.sh 1 FIRST_HOST CONFIG.yaml|RUN [key=value ...]
# Both must see the run's directory and the stores under the same paths. RANKS=4 sets the ranks of this host; INTERFACE
# names the network interface where the host's own name does not lead to it.
set -euo pipefail
node=${1:?0 on the first host, 1 on the second}
first=${2:?the name or address of the first host}
shift 2
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ -n "${INTERFACE:-}" ]]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
exec torchrun --nnodes 2 --node-rank "$node" --nproc-per-node "${RANKS:-gpu}" --max-restarts 0 \
    --master-addr "$first" --master-port "${PORT:-29500}" -m multifid train "$@"
