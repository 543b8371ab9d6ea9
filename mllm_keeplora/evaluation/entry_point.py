"""How lmms-eval finds the model behind `--model keeplora` (entry-point group `lmms_eval.models`).

Importing this file is cheap: lmms-eval loads it before it knows any model.
"""

from typing import Any

MODEL_ID = "keeplora"


def model_manifest() -> Any:
    """Where the model lies, as lmms-eval's `ModelManifest`.

    A function, because lmms-eval reads its entry points while its own registry is still being imported. A module
    that imported the registry at its top would be loaded half-way and fail, and lmms-eval would only warn.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL_ID, chat_class_path="mllm_keeplora.evaluation.lmms_model.KeepLoRAModel")
