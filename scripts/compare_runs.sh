#!/usr/bin/env bash
# Puts finished runs over one stream side by side: a page, a picture, a table. Seeds of one method are averaged.
#   bash scripts/compare_runs.sh runs/vqa_small runs/lora --out runs/comparison
set -euo pipefail
source "$(dirname "$0")/_setup.sh"
setup_environment
exec "$PYTHON" -m mllm_keeplora.reports.comparison "$@"
