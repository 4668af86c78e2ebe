#!/usr/bin/env bash
# Makes or updates .venv in the repository root: the CPU stack, this project, and a second megatron-core beside it.
# Needs Python 3.11 (set PYTHON to name one) and a C compiler. Takes minutes the first time, a moment when nothing changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_python_311() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null
}

find_python() {
    local candidates=(python3.11 python3 python) candidate
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if is_python_311 "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "setup_env: Python 3.11 expected; none of these is one: ${candidates[*]}." >&2
    echo "setup_env: install Python 3.11 with its venv module, or point to one: PYTHON=/path/to/python3.11 $0" >&2
    return 1
}

python="$(find_python)"
exec "$python" scripts/setup_env.py "$@"
