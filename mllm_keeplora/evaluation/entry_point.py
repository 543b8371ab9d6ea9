"""How lmms-eval finds the model behind `--model keeplora` (entry-point group `lmms_eval.models`).

Importing this file is cheap: lmms-eval loads it before it knows any model.
"""

import os
from typing import Any

from huggingface_hub.constants import HF_HOME

MODEL_ID = "keeplora"


def name_hub_home() -> None:
    """Names the hub's cache in the environment: lmms-eval's video tasks look for HF_HOME there, and fail without."""
    os.environ.setdefault("HF_HOME", HF_HOME)


def model_manifest() -> Any:
    """Where the model lies, as lmms-eval's `ModelManifest`.

    A function, because lmms-eval reads its entry points while its own registry is still being imported. A module
    that imported the registry at its top would be loaded half-way and fail, and lmms-eval would only warn.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    name_hub_home()
    return ModelManifest(MODEL_ID, chat_class_path="mllm_keeplora.evaluation.lmms_model.KeepLoRAModel")
