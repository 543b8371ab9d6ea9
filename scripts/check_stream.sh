#!/usr/bin/env bash
# Reads all records, images and clips of a stream and reports everything that is wrong, before a GPU is paid for.
#   bash scripts/check_stream.sh recipes/streams/mllm_dcl.yaml data_root=/where/the/data/are
set -euo pipefail
source "$(dirname "$0")/_setup.sh"
setup_environment
exec "$PYTHON" -m mllm_keeplora.planning.check_stream "$@"
