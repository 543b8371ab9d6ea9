"""Facts about model families that no config holds: a new family is one entry of `FAMILIES`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from mllm_keeplora.config import RunConfig, Tower
from mllm_keeplora.errors import ConfigError, KeepLoRAError

Media = Literal["image", "video"]


class TargetError(KeepLoRAError, ValueError):
    """A model, or a target pattern, that does not give the layers to adapt."""


def _layers_before_feature(config: Any) -> int:
    """Layers whose output reaches the projector, which reads hidden state `vision_feature_layer`."""
    total = int(config.vision_config.num_hidden_layers)
    read = config.vision_feature_layer
    # There are total + 1 hidden states, the embeddings first: index -1 uses every layer, -2 all but the last.
    return max(index if index >= 0 else total + 1 + index for index in (read if isinstance(read, list) else [read]))


def _all_layers(config: Any) -> int:
    return int(config.vision_config.num_hidden_layers)


def _patches(pixels: Tensor, vision_config: Any) -> int:
    """Of pictures [.., channels, height, width]."""
    size = vision_config.patch_size  # of InternVL a height and a width
    sides = (size, size) if isinstance(size, int) else size
    height, width = (side // patch for side, patch in zip(pixels.shape[-2:], sides, strict=True))
    return pixels.shape[:-3].numel() * height * width


def _patches_and_class_tokens(pixels: Tensor, vision_config: Any) -> int:
    return _patches(pixels, vision_config) + pixels.shape[:-3].numel()


def _patches_cut_by_the_processor(pixels: Tensor, vision_config: Any) -> int:
    """Of [patches, values of one]."""
    return len(pixels)


@dataclass(frozen=True)
class ModelFamily:
    """One architecture. What an entry leaves out is as in LLaVA-1.5.

    Names of linear layers and norms are those inside one layer of a tower.

    Attributes:
        model_type: `config.model_type` of the family.
        vision_layers: what a sample shows -> name of the list of layers that sees it. A kind that is absent
            cannot be given to the model. Most families see images and videos with one tower, Video-LLaVA with
            one each.
        language_layers: name of the language tower's list of layers.
        projectors: names of the modules between the towers.
        used_vision_layers: how many vision layers take part in the forward result, from the model's config.
        vision_rows: rows that go through the vision tower, from the processor's pixel values and the vision
            config.
        writers: linear layers of both towers that write to the residual stream, by the last part of their
            name.
        fused: linear layers that give queries, keys and values in one, likewise.
        keys: the linear layer that gives the keys in the language tower, by its whole name in a layer.
        clips_of_any_length: whether clips of different numbers of frames may share a batch.
        head_norms: norm of queries or keys -> the linear layer that it follows, whose heads it norms one by
            one.
        heads: modules between a tower's features and its output; they are neither quantised nor adapted.
        classifies: the model compares pictures with the prompts of classes, and writes no text.
        sees_ahead: tokens of a picture see each other in both directions, by a mask that flash-attention does not take.
        recurrence: what some language layers have in place of attention: a gated delta rule, by its name in a layer.
    """

    model_type: str
    vision_layers: Mapping[Media, str]
    language_layers: str = "model.language_model.layers"
    projectors: tuple[str, ...] = ("model.multi_modal_projector",)
    used_vision_layers: Callable[[Any], int] = _layers_before_feature
    vision_rows: Callable[[Tensor, Any], int] = _patches_and_class_tokens
    writers: tuple[str, ...] = ("out_proj", "fc2", "o_proj", "down_proj")
    fused: tuple[str, ...] = ()
    keys: str = "self_attn.k_proj"
    clips_of_any_length: bool = False
    head_norms: Mapping[str, str] = field(default_factory=dict)
    heads: tuple[str, ...] = ("lm_head",)
    classifies: bool = False
    sees_ahead: bool = False
    recurrence: str | None = None

    @property
    def towers(self) -> dict[str, Tower]:
        """Name of a list of layers -> the tower that it belongs to."""
        vision: dict[str, Tower] = dict.fromkeys(self.vision_layers.values(), "vision")
        return {**vision, self.language_layers: "language"}

    @property
    def not_quantised(self) -> tuple[str, ...]:
        """Modules that stay in the compute dtype on a 4-bit base."""
        return (*self.projectors, *self.heads)


_CLIP = "model.vision_tower.encoder.layers"
_QWEN = "model.visual.blocks"

FAMILIES: dict[str, ModelFamily] = {
    family.model_type: family
    for family in (
        # LLaVA-1.5 and LLaVA-NeXT (1.6)
        ModelFamily("llava", {"image": _CLIP}),
        ModelFamily("llava_next", {"image": _CLIP}),
        # Its vision tower is a SigLIP, which has no class token.
        ModelFamily("llava_onevision", {"image": _CLIP, "video": _CLIP}, vision_rows=_patches),
        ModelFamily("llava_next_video", {"image": _CLIP, "video": _CLIP}),
        ModelFamily(
            "video_llava",
            {"image": "model.image_tower.encoder.layers", "video": "model.video_tower.encoder.layers"},
        ),
        ModelFamily(
            "qwen2_5_vl",
            {"image": _QWEN, "video": _QWEN},
            projectors=("model.visual.merger",),
            used_vision_layers=_all_layers,
            vision_rows=_patches_cut_by_the_processor,
            writers=("proj", "down_proj", "o_proj"),
            fused=("qkv",),
            clips_of_any_length=True,
        ),
        # Its vision tower also feeds the first language layers, through projectors of their own.
        ModelFamily(
            "qwen3_vl",
            {"image": _QWEN, "video": _QWEN},
            projectors=("model.visual.merger", "model.visual.deepstack_merger_list"),
            used_vision_layers=_all_layers,
            vision_rows=_patches_cut_by_the_processor,
            writers=("proj", "linear_fc2", "o_proj", "down_proj"),
            fused=("qkv",),
            clips_of_any_length=True,
            head_norms={"self_attn.q_norm": "self_attn.q_proj", "self_attn.k_norm": "self_attn.k_proj"},
        ),
        # Three in four of its language layers keep a state in place of keys and values (gated delta rule).
        ModelFamily(
            "qwen3_5",
            {"image": _QWEN, "video": _QWEN},
            projectors=("model.visual.merger",),
            used_vision_layers=_all_layers,
            vision_rows=_patches_cut_by_the_processor,
            writers=("proj", "linear_fc2", "o_proj", "out_proj", "down_proj"),
            fused=("qkv",),
            clips_of_any_length=True,
            head_norms={"self_attn.q_norm": "self_attn.q_proj", "self_attn.k_norm": "self_attn.k_proj"},
            recurrence="linear_attn",
        ),
        # InternVL3 in transformers' form: it shows the frames of a clip as images of one tile.
        ModelFamily(
            "internvl",
            dict.fromkeys(("image", "video"), "model.vision_tower.encoder.layer"),
            writers=("projection_layer", "fc2", "o_proj", "down_proj"),
        ),
        # Its vision tower is a SigLIP, all of which is read. Its projector's weight is no linear layer.
        ModelFamily(
            "gemma3",
            {"image": _CLIP},
            used_vision_layers=_all_layers,
            vision_rows=_patches,
            head_norms={"self_attn.q_norm": "self_attn.q_proj", "self_attn.k_norm": "self_attn.k_proj"},
            sees_ahead=True,
        ),
        # Two towers side by side: it has no projector, and its text tower is the language tower.
        ModelFamily(
            "clip",
            {"image": "vision_model.encoder.layers"},
            language_layers="text_model.encoder.layers",
            projectors=(),
            used_vision_layers=_all_layers,
            writers=("out_proj", "fc2"),
            heads=("visual_projection", "text_projection"),
            classifies=True,
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
            f"{', '.join(FAMILIES)}); add one ModelFamily entry to mllm_keeplora/modeling/families.py"
        )
    return family


# What to do where a family takes clips of one length.
EQUAL_LENGTHS = "set video.fps to null, which takes video.frames of every clip, or all batch sizes to 1"


def check_clip_lengths(config: RunConfig, model_config: Any) -> None:
    """Refuses `video.fps` for a family that takes clips of one length in a batch.

    Raises:
        ConfigError: it is set, and a batch may hold several clips.
        TargetError: an unknown model family.
    """
    trained = [config.train, *map(config.train_for, config.train_overrides)]
    together = max(
        *(train.per_device_train_batch_size for train in trained),
        config.probe.batch_size,
        config.evaluation.batch_size,
    )
    if config.video.fps is not None and together > 1 and not family_of(model_config).clips_of_any_length:
        raise ConfigError(
            f"video.fps is {config.video.fps:g}, by which clips have different numbers of frames, but "
            f"{model_config.model_type} takes one number in a batch; {EQUAL_LENGTHS}"
        )
