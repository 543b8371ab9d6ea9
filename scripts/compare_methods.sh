#!/usr/bin/env bash
# Rival methods beside KeepLoRA++ on the embedded streams, several seeds: tables and figures in docs/results.
#   bash scripts/compare_methods.sh          sequential LoRA, KeepLoRA, KeepLoRA++: CPU, 2 cores, at most 90 minutes
#   bash scripts/compare_methods.sh --all    every method, the ablations, the video stream: many hours, any number of calls
# The same command again continues an interrupted study.
set -euo pipefail
source "$(dirname "$0")/_setup.sh"
setup_environment
exec "$PYTHON" studies/compare_methods.py "$@"
