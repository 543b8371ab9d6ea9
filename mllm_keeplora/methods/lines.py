"""LiNeS (arXiv 2410.17146): sequential LoRA whose updates are scaled by depth once they are learnt."""

from dataclasses import dataclass

from mllm_keeplora.config import RunConfig
from mllm_keeplora.linalg.layer_scaling import layer_scales
from mllm_keeplora.methods.base import Method
from mllm_keeplora.modeling.targets import Target


@dataclass(frozen=True)
class Lines(Method):
    """Train at scale 1, fold lambda_l s B A with lambda_l = gamma + (1 - gamma) l / (L - 1) (its eq. 2).

    gamma is the tower's own setting. LiNeS scales the task vector of a whole fine-tuning; here every stage's
    update is one. KeepLoRA++ has the same lambda_l in training already, so that learning can make up for it.
    """

    def folded_layer_scale(self, config: RunConfig, target: Target) -> float:
        """lambda_l within the tower."""
        return layer_scales(target.num_layers, config.towers()[target.tower].gamma)[target.depth]
