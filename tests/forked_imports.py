"""What the commands import, for the fork server of `tests.forked`: code alone, nothing is computed or started."""

import gc

import av  # noqa: F401
import lmms_eval.evaluator  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from transformers import (  # noqa: F401
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaProcessor,
    Trainer,
)

import mllm_keeplora.commands.run
import mllm_keeplora.continual.run_stream
import mllm_keeplora.continual.saved_run
import mllm_keeplora.evaluation.lmms_model
import mllm_keeplora.recipes.small.streams
import mllm_keeplora.reports.page  # noqa: F401

gc.freeze()  # no collection of a command looks through the libraries, which takes half a second each time
