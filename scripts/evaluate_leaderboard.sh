#!/usr/bin/env bash
# Evaluates a run in a fresh process through lmms-eval's own command line and adds it to ./leaderboard.
#   bash scripts/evaluate_leaderboard.sh runs/vqa_small
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
setup_environment
exec "$PYTHON" -m mllm_keeplora.commands.main leaderboard "$@"
