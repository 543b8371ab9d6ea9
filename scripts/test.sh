#!/usr/bin/env bash
# Lint, types and tests; sets itself up on first use.
#   bash scripts/test.sh            what CI runs: minutes on 2 cores, offline
#   bash scripts/test.sh --slow     the long tests too (kills and reruns); other arguments go to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
setup_environment
cd "$REPOSITORY"
selection=(-m "not slow") arguments=()
for argument in "$@"; do
    if [ "$argument" = --slow ]; then selection=(); else arguments+=("$argument"); fi
done
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy --num-workers auto
# One worker a core; a file stays on one worker, so that its models are built once.
exec "$PYTHON" -m pytest -n logical --dist loadfile --no-loadscope-reorder "${selection[@]}" "${arguments[@]}"
