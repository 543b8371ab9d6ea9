#!/usr/bin/env bash
# The first hour on a GPU: the gpu tests, the small default, a 7B-shaped stage, a Qwen step, and one table of it all.
#   bash scripts/first_gpu_hour.sh            everything lands in ./first_gpu_hour
#   bash scripts/first_gpu_hour.sh --quick    tiny sizes, on a CPU too: only shows that it works
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
setup_environment
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
exec "$PYTHON" "$REPOSITORY/benchmarks/first_gpu_hour.py" "$@"
