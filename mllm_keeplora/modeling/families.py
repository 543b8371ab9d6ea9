"""Facts about model families: one entry each, which no config holds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mllm_keeplora.errors import KeepLoRAError

Media = Literal["image", "video"]


class TargetError(KeepLoRAError, ValueError):
    """A model, or a target pattern, that does not give the layers to adapt."""


@dataclass(frozen=True)
class ModelFamily:
    """Facts about one architecture that no config holds.

    Attributes:
        model_type: `config.model_type` of the family.
        vision_layers: what a sample shows -> name of the list of layers that sees it. A kind that is absent
            cannot be given to the model. Most families see images and videos with one tower, Video-LLaVA with
            one each.
        projectors: names of the modules between the towers.
        used_vision_layers: how many vision layers take part in the forward result, from the model's config.
    """

    model_type: str
    vision_layers: Mapping[Media, str]
    projectors: tuple[str, ...]
    used_vision_layers: Callable[[Any], int]

    @property
    def not_quantised(self) -> tuple[str, ...]:
        """Modules that stay in the compute dtype on a 4-bit base."""
        return (*self.projectors, "lm_head")


def _layers_before_feature(config: Any) -> int:
    """Layers whose output reaches the projector, which reads hidden state `vision_feature_layer`."""
    total = int(config.vision_config.num_hidden_layers)
    read = config.vision_feature_layer
    # hidden_states holds total + 1 entries, the embeddings first: index -1 uses every layer, -2 all but the
    # last.
    return max(
        index if index >= 0 else total + 1 + index for index in (read if isinstance(read, list) else [read])
    )


def _all_blocks(config: Any) -> int:
    return int(config.vision_config.depth)


LANGUAGE_LAYERS = "model.language_model.layers"


_CLIP = "model.vision_tower.encoder.layers"


_QWEN = "model.visual.blocks"


_LLAVA_PROJECTOR = ("model.multi_modal_projector",)


FAMILIES: dict[str, ModelFamily] = {
    family.model_type: family
    for family in (
        # LLaVA-1.5 and LLaVA-NeXT (1.6)
        ModelFamily("llava", {"image": _CLIP}, _LLAVA_PROJECTOR, _layers_before_feature),
        ModelFamily("llava_next", {"image": _CLIP}, _LLAVA_PROJECTOR, _layers_before_feature),
        ModelFamily(
            "llava_onevision", {"image": _CLIP, "video": _CLIP}, _LLAVA_PROJECTOR, _layers_before_feature
        ),
        ModelFamily(
            "llava_next_video", {"image": _CLIP, "video": _CLIP}, _LLAVA_PROJECTOR, _layers_before_feature
        ),
        ModelFamily(
            "video_llava",
            {"image": "model.image_tower.encoder.layers", "video": "model.video_tower.encoder.layers"},
            _LLAVA_PROJECTOR,
            _layers_before_feature,
        ),
        ModelFamily("qwen2_5_vl", {"image": _QWEN, "video": _QWEN}, ("model.visual.merger",), _all_blocks),
        # Its vision tower also feeds the first language layers, through projectors of their own.
        ModelFamily(
            "qwen3_vl",
            {"image": _QWEN, "video": _QWEN},
            ("model.visual.merger", "model.visual.deepstack_merger_list"),
            _all_blocks,
        ),
    )
}


def family_of(config: Any) -> ModelFamily:
    """The family of a model config.

    Raises:
        TargetError: a `model_type` that the table does not hold.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise TargetError(
            f"model type {config.model_type!r} is not in the table of model families (known: "
            f"{', '.join(FAMILIES)}); add one "
            "ModelFamily entry to mllm_keeplora/modeling/targets.py"
        )
    return family
