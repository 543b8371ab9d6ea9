#!/usr/bin/env bash
# Answers questions about an image:  bash scripts/chat.sh runs/vqa_small --image photo.png "What is shown?"
# or about a clip:                   bash scripts/chat.sh runs/video_small --video clip.mp4 "What happens?"
set -euo pipefail
source "$(dirname "$0")/_setup.sh"
setup_environment
exec "$PYTHON" -m mllm_keeplora.commands.chat "$@"
