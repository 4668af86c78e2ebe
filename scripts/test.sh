#!/usr/bin/env bash
# Environment, then every check: ruff, mypy, pytest, and the multi-rank tests again on the newest megatron-core.
# All parts run even if one fails. With arguments, only pytest runs, with those: scripts/test.sh tests/rl -k grpo
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup_env.sh || exit 1

export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python=.venv/bin/python
pinned_megatron="$(sed -n 's/^megatron-core==//p' constraints/cpu.txt)"
second_megatron_path="$(ls -d "$PWD"/.venv/megatron-core-*)"
second_megatron="${second_megatron_path##*-}"

if (($#)); then
    exec "$python" -m pytest "$@"
fi

# mypy stops at a path that does not exist.
typed=()
for path in megatron_ultraep/{plan,pipeline,replay,runtime,kernels,telemetry,layout.py,config.py,processes.py} rl/{algorithms,planning}; do
    if [ -e "$path" ]; then typed+=("$path"); fi
done

passed=0
failed=()
part() {
    local name="$1"
    shift
    echo "=== $name"
    if "$@"; then passed=$((passed + 1)); else failed+=("$name"); fi
}

part "ruff check" "$python" -m ruff check .
part "ruff format" "$python" -m ruff format --check .
part "mypy" "$python" -m mypy "${typed[@]}"
part "pytest, megatron-core $pinned_megatron" \
    env ULTRAEP_EXPECT_MCORE="$pinned_megatron" "$python" -m pytest
# Kernels and the harness of ranks know no Megatron: once is enough.
part "pytest of several ranks, megatron-core $second_megatron" \
    env ULTRAEP_EXPECT_MCORE="$second_megatron" PYTHONPATH="$second_megatron_path" \
    "$python" -m pytest -m "multiproc and not slow" --ignore=tests/megatron_ultraep/kernels --ignore=tests/test_ranks.py

echo
for name in "${failed[@]}"; do echo "failed: $name"; done
echo "parts: $passed passed, ${#failed[@]} failed"
((${#failed[@]} == 0))
