#!/usr/bin/env bash
# Runs a KeepLoRA++ stream of image classification and ends in its retention report. Sets itself up on first use.
#   bash scripts/run_classification_stream.sh                                the small default: CPU, 2 cores, minutes
#   bash scripts/run_classification_stream.sh --config recipes/configs/classification/FILE.yaml    any other; --help
#                                                                                           lists every setting
# The same command again continues an interrupted run and leaves a complete one alone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
setup_environment
exec "$PYTHON" "$REPOSITORY/recipes/classification.py" "$@"
