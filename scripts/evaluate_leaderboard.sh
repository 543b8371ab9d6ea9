#!/usr/bin/env bash
# Evaluates a finished run in a fresh process through lmms-eval's own command line and adds it to leaderboard/.
#   bash scripts/evaluate_leaderboard.sh runs/vqa_small
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_setup.sh
setup_environment
exec "$PYTHON" eval/leaderboard.py "$@"
