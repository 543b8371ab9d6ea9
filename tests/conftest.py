"""The package comes first: its guards must run before transformers and lmms-eval are imported."""

import mllm_keeplora  # noqa: F401
