#!/usr/bin/env bash
# The main job in small, from nothing: environment, then RL of a tiny mixture of experts on this machine's CPUs.
# Further arguments go to the run: scripts/smoke.sh --dry-run, scripts/smoke.sh training.seed=3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup_env.sh
exec .venv/bin/ultraep-rl train recipes/smoke.yaml "$@"
