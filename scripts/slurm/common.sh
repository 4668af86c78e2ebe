# Sourced by launch.sh and megatron.sh: options that both take, and the command that runs something on every node.
# The launchers run on the job's first node, outside of any container, so they need no more than bash and Slurm.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
container="" mounts="" python="" interface="" tmp=/tmp logs="logs/slurm" dry_run=""

fail() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}

# The comment at the top of a script is its help.
help() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 0
}

# Takes one option and its value from the arguments; sets `taken` to how many they were, 0 for no option of these.
common_option() {
    taken=2
    case "$1" in
        --container | --mounts | --python | --interface | --tmp | --logs)
            [ $# -ge 2 ] || fail "expected a value after $1"
            printf -v "${1#--}" '%s' "$2"
            ;;
        --dry-run) dry_run=1 taken=1 ;;
        *) taken=0 ;;
    esac
}

# Inside a job, what Slurm says; outside (--dry-run), the names that it will have.
job_facts() {
    job="${SLURM_JOB_ID:-JOB}"
    attempt="${SLURM_RESTART_COUNT:-0}"
    if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
        nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)"
    elif [ -n "$dry_run" ]; then
        nodes="NODES"
    else
        fail "this is no Slurm job: run it by sbatch (scripts/slurm/submit.sh does), or add --dry-run to see what it would do"
    fi
    count="${SLURM_JOB_NUM_NODES:-N}"
    state="$logs/$job/attempt-$attempt"
}

# Sets the array `each`: srun and whatever makes its environment, up to the program.
srun_command() {
    # --wait: when the head is through, a node that died is not waited for until Slurm has noticed.
    each=(srun --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60
        --output="$state/%N.log" --error="$state/%N.log" --open-mode=append)
    # srun does not take it over from sbatch by itself since Slurm 22.05.
    if [ -n "${SLURM_CPUS_ON_NODE:-}" ]; then each+=(--cpus-per-task="$SLURM_CPUS_ON_NODE"); fi
    # The container sees the repository, the directory that the job was submitted from, and the logs, at their own paths.
    local bind="$root:$root" directory
    for directory in "$PWD" "$(realpath -m "$logs")"; do
        [[ "$directory/" == "$root"/* ]] || bind+=",$directory:$directory"
    done
    bind+="${mounts:+,$mounts}"
    case "$container" in
        "") python="${python:-$root/.venv/bin/python}" ;;
        *.sif)
            python="${python:-python3}"
            local gpus=()
            if [ -n "${SLURM_JOB_GPUS:-}${SLURM_GPUS_ON_NODE:-}" ]; then gpus=(--nv); fi
            each+=(apptainer exec "${gpus[@]}" --bind "$bind" --pwd "$PWD" "$container")
            ;;
        *)
            python="${python:-python3}"
            # The name is what attach.sh finds the running container by.
            each+=(--container-image="$container" --container-name="ultraep" --container-mounts="$bind"
                --container-workdir="$PWD")
            ;;
    esac
    each+=(env PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}")
}

# A port that nobody on this node listens on, in the block of ten that belongs to the job's id.
free_port() {
    local base=$((20000 + job % 1200 * 10)) port
    for ((port = base; port < base + 10; port++)); do
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "$port"
            return
        fi
    done
    fail "ports $base to $((base + 9)) are all in use on $(hostname)"
}

show() {
    printf '%q ' "$@"
    echo
}
