#!/usr/bin/env bash
# Scores a finished run's saved replies with a judge model (CL-VISTA's published score); --help lists the settings.
#   bash scripts/judge_replies.sh runs/video_cl_vista --judge Qwen/Qwen3-30B-A3B-Instruct-2507
# That judge's 30.5 billion weights of 2 bytes need 57 GiB of GPU memory. The same command again continues an interrupted judging.
set -euo pipefail
source "$(dirname "$0")/_setup.sh"
setup_environment
exec "$PYTHON" -m mllm_keeplora.evaluation.judge "$@"
