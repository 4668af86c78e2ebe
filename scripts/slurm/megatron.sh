#!/usr/bin/env bash
# Run a Megatron training script with balanced experts inside a Slurm job: torchrun over its nodes, each rank started by
# megatron_ultraep.launch. The last line of an sbatch file, see megatron.sbatch beside this one.
#
# scripts/slurm/megatron.sh [OPTION...] -- [--ultraep-... FLAGS] SCRIPT.py [ARGUMENT OF THE JOB...]
#   --per-node N        ranks on each node (default: its GPUs)
#   --container, --mounts, --python, --interface, --logs, --dry-run   as for launch.sh
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

per_node="${SLURM_GPUS_ON_NODE:-}"
while (($#)) && [ "$1" != "--" ]; do
    common_option "$@"
    if ((taken == 0)); then
        taken=1
        case "$1" in
            --per-node)
                [ $# -ge 2 ] || fail "expected a value after $1"
                per_node="$2" taken=2
                ;;
            --help) help ;;
            *) fail "unknown option $1; what belongs to the job comes after --, see --help" ;;
        esac
    fi
    shift "$taken"
done
[ "${1:-}" = "--" ] && shift || fail "expected -- before the job's own script and arguments; see --help"
(($#)) || fail "expected a script after --; see --help"
[ -n "$per_node" ] || fail "this job has no GPUs that Slurm knows of: say how many ranks a node has with --per-node"

job_facts
srun_command
head="${nodes%%,*}"
port=PORT
if [ -z "$dry_run" ]; then
    port="$(free_port)" || exit 2
    mkdir -p "$state" || fail "cannot write to $state: name another directory with --logs"
fi
# The rendezvous has the job's id: no other job's ranks join by mistake. torchrun takes `head` for its own store.
each+=("$python" -u -m torch.distributed.run --nnodes="$count" --nproc-per-node="$per_node" --rdzv-backend=c10d
    --rdzv-endpoint="$head:$port" --rdzv-id="$job-$attempt" --max-restarts=0 -m megatron_ultraep.launch "$@")
if [ -n "$interface" ]; then export GLOO_SOCKET_IFNAME="$interface" NCCL_SOCKET_IFNAME="$interface"; fi
if [ -n "$dry_run" ]; then
    show "${each[@]}"
    exit 0
fi
echo "$(date +%T) job $job, attempt $attempt, on $nodes; logs: $state/NODE.log"
exec "${each[@]}"
