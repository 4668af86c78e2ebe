#!/usr/bin/env bash
# The main job in small, from nothing: environment, then RL of a tiny mixture of experts on this machine's CPUs.
# Further arguments go to the run: scripts/smoke.sh --dry-run, scripts/smoke.sh run.seed=3
# Every call is a run of its own: runs/smoke, runs/smoke-2, ...; continue one with ultraep-rl train ... --resume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup_env.sh
name=smoke
for ((n = 2; ; n++)); do
    [ -e "runs/$name/run.json" ] || break
    name="smoke-$n"
done
exec .venv/bin/ultraep-rl train recipes/smoke.yaml "run.name=$name" "$@"
