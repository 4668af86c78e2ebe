#!/usr/bin/env bash
# Run a recipe inside a Slurm job: a private Ray cluster over its nodes, `ultraep-rl train`, and requeue when time is over or a
# node fails. The last line of an sbatch file, by exec, so that the signal of --signal=B:USR1@SECONDS arrives here:
#
#     exec scripts/slurm/launch.sh recipes/smoke.yaml "$@"
#
# scripts/slurm/launch.sh RECIPE.yaml [A.B=C...] [OPTION...]
#   --container IMAGE   *.sif: apptainer; anything else: enroot with pyxis (srun --container-image)
#   --mounts A:B[,C:D]  more directories for the container; this repository is always there
#   --python PATH       default: .venv/bin/python of this repository; in containers python3
#   --interface NAME    network interface for everything; default: that which the nodes' names resolve to
#   --tmp DIR           for Ray's files, on each node's own disk (default /tmp)
#   --logs DIR          for logs, on a file system that all nodes share (default logs/slurm)
#   --max-requeues N    give up after so many (default 50)
#   --dry-run           print what would run on the nodes, and run nothing; needs no job
#
# SIGUSR1: stop after the iteration, then requeue. SIGUSR2: stop, and stay stopped (scancel --batch --signal=USR2 JOB).
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

max_requeues=50
run=() # the recipe and its overrides
while (($#)); do
    common_option "$@"
    if ((taken == 0)); then
        taken=1
        case "$1" in
            --max-requeues)
                [ $# -ge 2 ] || fail "expected a value after $1"
                max_requeues="$2" taken=2
                ;;
            --help) help ;;
            -*) fail "unknown option $1; see --help. Flags of ultraep-rl train are written as fields: allow_untested=true" ;;
            *) run+=("$1") ;;
        esac
    fi
    shift "$taken"
done
recipe="${run[0]:-}"
[[ "$recipe" == *.yaml || "$recipe" == *.yml ]] || fail "expected a recipe, RECIPE.yaml, came ${recipe:-nothing}; see --help"
[ -f "$recipe" ] || fail "expected the recipe $recipe in $PWD: submit jobs from the directory that holds it"

job_facts
srun_command
program=("$python" -u -m rl.slurm.node --state "$state" --nodes "$nodes" --tmp "$tmp")
if [ -n "$interface" ]; then program+=(--interface "$interface"); fi
program+=(-- "${run[@]}")
if [ -n "$dry_run" ]; then
    show "${each[@]}" "${program[@]}"
    exit 0
fi

mkdir -p "$state" && chmod 700 "$logs/$job" || fail "cannot write to $logs/$job: name another directory with --logs"
rm -f "$state"/{stop,code,head.json}
echo "$container" >"$state/container"
if [ ! -e "$logs/$job/.gitignore" ]; then echo '*' >"$logs/$job/.gitignore"; fi
requeue_after_stop=1
ask_to_stop() {
    # When the job's time is over, in seconds since 1970; nothing where there is no limit.
    local end
    end="$(scontrol show job "$job" | grep -oP '(?<=EndTime=)\S+')"
    date -d "$end" +%s 2>/dev/null >"$state/stop.partial"
    mv "$state/stop.partial" "$state/stop"
    echo "$(date +%T) asked to stop, time is over at ${end:-?}"
}
trap ask_to_stop USR1
trap 'requeue_after_stop=""; ask_to_stop' USR2

echo "$(date +%T) job $job, attempt $attempt, on $nodes; logs: $state/NODE.log; look inside: scripts/slurm/attach.sh $job"
"${each[@]}" "${program[@]}" &
step=$!
# A trapped signal ends `wait`, not the step.
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
    code=$?
done
if [ -s "$state/code" ]; then code="$(<"$state/code")"; fi

again=""
case "$code" in
    75) reason="stopped to go on later" again="$requeue_after_stop" ;;
    76) reason="a node was lost" again=1 ;;
    124) reason="no checkpoint was made in the time there was: raise --time, or checkpoint more often" ;;
    *) reason="the run ended" ;;
esac
echo "$(date +%T) $reason (code $code)"
if [ -n "$again" ]; then
    if ((attempt >= max_requeues)); then
        echo "requeued $attempt times already (--max-requeues); submit it again to go on"
    elif scontrol requeue "$job"; then
        sleep 60 # Slurm ends this script; until then it must not look like the end of the job
    else
        echo "Slurm does not requeue job $job; submit it again to go on"
    fi
fi
exit "$code"
