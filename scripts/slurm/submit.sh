#!/usr/bin/env bash
# Submit a recipe: check it here and now, make the log directory, call sbatch.
#
# scripts/slurm/submit.sh [--dry-run] [SBATCH OPTION...] recipes/NAME.sbatch [LAUNCH OPTION...] [A.B=C...]
#
# Options before the file go to sbatch and win over its #SBATCH lines (--nodes=2 --partition=gpu --time=4:00:00); what
# follows the file goes to its launcher. --dry-run prints the script, the sbatch command and what each node would run, and submits nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
fail() {
    echo "submit.sh: $1" >&2
    exit 2
}

dry_run="" options=()
while [[ "${1:-}" == -* ]]; do
    case "$1" in
        --dry-run) dry_run=1 ;;
        --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;;
        --*=* | -?*) options+=("$1") ;;
    esac
    shift
done
script="${1:-}"
[[ "$script" == *.sbatch ]] || fail "expected recipes/NAME.sbatch, came ${script:-nothing}; sbatch options are written --name=value; see --help"
[ -f "$script" ] || fail "there is no $script here ($PWD)"
shift
grep -q '^#SBATCH --signal=B:USR1@' "$script" || fail "$script has no line '#SBATCH --signal=B:USR1@SECONDS': nobody would stop the run before its time is over"

# A mistake is cheaper here than after a night in the queue.
recipe="${script%.sbatch}.yaml"
if [ -f "$recipe" ] && [ -x .venv/bin/ultraep-rl ]; then
    overrides=()
    for argument in "$@"; do if [[ "$argument" == *=* && "$argument" != -* ]]; then overrides+=("$argument"); fi; done
    .venv/bin/python -m rl.cli train "$recipe" "${overrides[@]}" --dry-run >/dev/null || fail "$recipe cannot run as it is, above"
fi
if [ -n "$dry_run" ]; then
    cat "$script"
    echo
    printf '# submitted by: '
    printf '%q ' sbatch "${options[@]}" "$script" "$@"
    printf '\n# on every node: '
    bash "$script" "$@" --dry-run
    exit 0
fi
mkdir -p logs/slurm # sbatch does not, and a job whose output has no place ends without a word
exec sbatch "${options[@]}" "$script" "$@"
