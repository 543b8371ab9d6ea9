#!/usr/bin/env bash
# Merges the adapter into a 16-bit base:  bash scripts/export.sh runs/vqa_small --out exported/
set -euo pipefail
source "$(dirname "$0")/_setup.sh"
setup_environment
exec "$PYTHON" -m mllm_keeplora.continual.export "$@"
