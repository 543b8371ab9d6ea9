"""Scores by lmms-eval: the registered model id, the evaluation of a live model, and the report.

Importing this package is cheap: lmms-eval loads it through the entry point below before it knows any model.
"""

from typing import Any

from mllm_keeplora.errors import KeepLoRAError

MODEL_ID = "keeplora"


class EvaluationError(KeepLoRAError, RuntimeError):
    """An evaluation that could not be completed; never turned into a score."""


def model_manifest() -> Any:
    """Tells lmms-eval where the model behind `--model keeplora` lives (entry-point group `lmms_eval.models`).

    A function and not a module-level object: lmms-eval reads its entry points while its own model registry is
    still being imported, so a module that imports the registry at its top and is imported first would be
    loaded half-way, fail, and lmms-eval would only warn.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL_ID, chat_class_path="mllm_keeplora.evaluation.lmms_model.KeepLoRAModel")
