"""Which linear layers of a model are adapted: a table of facts per model family, and what follows from it."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.linears import is_linear

Tower = Literal["vision", "language"]


class TargetError(KeepLoRAError, ValueError):
    """A model, or a target pattern, that does not give the layers to adapt."""


@dataclass(frozen=True)
class Target:
    """One adapted linear layer.

    Attributes:
        name: full module name in the base model.
        tower: vision or language.
        depth: l, its layer's position in the tower, 0 = shallowest.
        num_layers: L, layers of that tower that take part in the forward result.
        in_features, out_features: the weight is [out_features, in_features].
    """

    name: str
    tower: Tower
    depth: int
    num_layers: int
    in_features: int
    out_features: int


@dataclass(frozen=True)
class ModelFamily:
    """Facts about one architecture that no config holds.

    Attributes:
        model_type: `config.model_type` of the family.
        layers: name of each tower's list of layers.
        projector: name of the module between the towers.
        used_vision_layers: how many vision layers take part in the forward result, from the model's config.
        not_quantised: modules that stay in the compute dtype on a 4-bit base.
    """

    model_type: str
    layers: Mapping[Tower, str]
    projector: str
    used_vision_layers: Callable[[Any], int]
    not_quantised: tuple[str, ...]


def _layers_before_feature(config: Any) -> int:
    """Layers whose output reaches the projector, which reads hidden state `vision_feature_layer`."""
    total = int(config.vision_config.num_hidden_layers)
    read = config.vision_feature_layer
    # hidden_states holds total + 1 entries, the embeddings first: index -1 uses every layer, -2 all but the
    # last.
    return max(
        index if index >= 0 else total + 1 + index for index in (read if isinstance(read, list) else [read])
    )


FAMILIES: dict[str, ModelFamily] = {
    family.model_type: family
    for family in (
        ModelFamily(
            model_type="llava",
            layers={"vision": "model.vision_tower.encoder.layers", "language": "model.language_model.layers"},
            projector="model.multi_modal_projector",
            used_vision_layers=_layers_before_feature,
            not_quantised=("model.multi_modal_projector", "lm_head"),
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
            "ModelFamily entry to mllm_keeplora/targets.py"
        )
    return family


def find_targets(
    model: PreTrainedModel, patterns: Mapping[Tower, Sequence[str]], *, protect_projector: bool = False
) -> list[Target]:
    """Lists the linear layers to adapt, shallow to deep, vision tower first.

    Args:
        model: the base model, before any adapter is attached.
        patterns: per adapted tower, names of linear layers inside a layer (`q_proj`, `self_attn.q_proj`), or
            `all-linear`. A tower that is absent is not adapted.
        protect_projector: adapt the projector too, as the deepest layer of the vision tower.

    Returns:
        The targets. Layers that take no part in the forward result (the last ViT layer where features are
        read before it) are left out: they get no gradient.

    Raises:
        TargetError: an unknown model family, a pattern that matches nothing, or nothing to adapt at all.
    """
    config = model.config
    family = family_of(config)
    targets: list[Target] = []
    for tower in ("vision", "language"):
        if tower not in patterns:
            continue
        num_layers = (
            family.used_vision_layers(config)
            if tower == "vision"
            else int(config.get_text_config().num_hidden_layers)
        )
        targets += _tower_targets(model, tower, family.layers[tower], num_layers, patterns[tower])
        if tower == "vision" and protect_projector:
            targets += _linears_below(model, family.projector, tower, num_layers - 1, num_layers)
    if not targets:
        raise TargetError(
            "nothing to adapt: both towers are switched off (set language.adapt or vision.adapt)"
        )
    return targets


def _tower_targets(
    model: nn.Module, tower: Tower, layers: str, num_layers: int, patterns: Sequence[str]
) -> list[Target]:
    found = [
        target
        for depth in range(num_layers)
        for target in _linears_below(model, f"{layers}.{depth}", tower, depth, num_layers)
    ]
    if list(patterns) == ["all-linear"]:
        wanted = found
    else:
        regex = {pattern: re.compile(rf"\.{re.escape(pattern)}$") for pattern in patterns}
        unmatched = [p for p, r in regex.items() if not any(r.search(target.name) for target in found)]
        if unmatched:
            known = sorted({target.name.split(f"{layers}.{target.depth}.", 1)[1] for target in found})
            raise TargetError(
                f"{tower}.targets {unmatched} match no linear layer under {layers}.*; available "
                f"there: {', '.join(known)}"
            )
        wanted = [target for target in found if any(r.search(target.name) for r in regex.values())]
    if not wanted:
        raise TargetError(
            f"no linear layer under {layers}.0 .. {layers}.{num_layers - 1} in the {tower} tower"
        )
    return wanted


def _linears_below(model: nn.Module, prefix: str, tower: Tower, depth: int, num_layers: int) -> list[Target]:
    root = model.get_submodule(prefix)
    return [
        Target(f"{prefix}.{name}", tower, depth, num_layers, module.in_features, module.out_features)
        for name, module in root.named_modules()
        if is_linear(module)
    ]
