#!/usr/bin/env bash
# Measures where a model's knowledge lies: accuracy with weights rebuilt from a part of their directions.
#   bash scripts/analyze.sh                               the embedded base: CPU, one core, about 1.5 minutes
#   bash scripts/analyze.sh --run runs/vqa_small       a finished run; --help lists every setting
# The same command again continues an interrupted analysis and leaves a finished one alone.
set -euo pipefail
source "$(dirname "$0")/_setup.sh"
setup_environment
exec "$PYTHON" studies/analyze.py "$@"
