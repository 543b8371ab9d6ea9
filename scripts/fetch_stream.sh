#!/usr/bin/env bash
# Downloads the data that a stream's YAML names from the Hugging Face hub and unpacks them; the same command continues an interrupted one.
#   bash scripts/fetch_stream.sh recipes/streams/mllm_dcl.yaml data_root=/where/the/data/shall/be
set -euo pipefail
source "$(dirname "$0")/_setup.sh"
setup_environment
exec "$PYTHON" -m mllm_keeplora.data.fetch_stream "$@"
