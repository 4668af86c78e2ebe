#!/usr/bin/env bash
# A shell, or one command, on a node of a running job, in the environment of its Ray cluster.
#
# scripts/slurm/attach.sh [--node NAME] [--logs DIR] JOB [COMMAND...]
#     scripts/slurm/attach.sh 1234                     # a shell on the first node
#     scripts/slurm/attach.sh 1234 ray status          # RAY_ADDRESS and the token are set
#     scripts/slurm/attach.sh --node n2 1234 nvidia-smi
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

node=""
while [[ "${1:-}" == --* ]]; do
    case "$1" in
        --node | --logs)
            [ $# -ge 2 ] || fail "expected a value after $1"
            printf -v "${1#--}" '%s' "$2"
            shift
            ;;
        --help) help ;;
        *) fail "unknown option $1; see --help" ;;
    esac
    shift
done
job="${1:-}"
[[ "$job" =~ ^[0-9]+$ ]] || fail "expected the id of a running job, came ${job:-nothing}; squeue --me lists them"
shift
state="$(ls -d "$logs/$job"/attempt-* 2>/dev/null | sort -V | tail -1)" || true
[ -n "$state" ] || fail "no logs of job $job in $PWD/$logs: call it where the job was submitted, or name its --logs"
[ -f "$state/attach.env" ] || fail "job $job has no Ray cluster yet, or none any more; see $state"
if [ -z "$node" ]; then node="$(scontrol show hostnames "$(squeue -h -j "$job" -o %N)" | head -1)"; fi
[ -n "$node" ] || fail "job $job does not run"

each=(srun --jobid="$job" --overlap --nodes=1 --ntasks=1 --nodelist="$node")
container="$(cat "$state/container" 2>/dev/null || true)"
case "$container" in
    "") ;;
    *.sif) each+=(apptainer exec --bind "$root:$root" --pwd "$PWD" "$container") ;;
    *) each+=(--container-name=ultraep --container-workdir="$PWD") ;;
esac
if (($#)); then
    exec "${each[@]}" bash -c 'source "$0" && exec "$@"' "$state/attach.env" "$@"
fi
exec "${each[@]:0:1}" --pty "${each[@]:1}" bash -c 'source "$0" && exec bash -i' "$state/attach.env"
