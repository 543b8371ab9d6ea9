"""Which linear layers of a model are adapted, from the facts about its family."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from mllm_keeplora.config import RunConfig, Tower
from mllm_keeplora.modeling.families import Media, ModelFamily, TargetError, family_of
from mllm_keeplora.modeling.linear4bit import is_linear


@dataclass(frozen=True)
class Target:
    """One adapted linear layer.

    Attributes:
        name: full module name in the base model.
        tower: vision or language.
        depth: l, its layer's position in the tower, 0 = shallowest.
        num_layers: L, layers of that tower that take part in the forward result.
        in_features, out_features: the weight is [out_features, in_features].
        media: what passes through it; empty for a language layer, which every sample passes.
    """

    name: str
    tower: Tower
    depth: int
    num_layers: int
    in_features: int
    out_features: int
    media: tuple[Media, ...] = ()

    def is_reached_by(self, media: Collection[Media]) -> bool:
        """Whether samples with these media (none: text alone) give the layer a gradient."""
        return self.tower == "language" or not set(self.media).isdisjoint(media)


def find_targets(
    model: PreTrainedModel,
    patterns: Mapping[Tower, Sequence[str]],
    *,
    media: Collection[Media] = ("image", "video"),
    protect_projector: bool = False,
) -> list[Target]:
    """Lists the linear layers to adapt, shallow to deep, vision towers first.

    Args:
        model: the base model, before any adapter is attached.
        patterns: per adapted tower, names of linear layers inside a layer (`q_proj`, `self_attn.q_proj`), or
            `all-linear`. A tower that is absent is not adapted.
        media: what the samples show. A vision tower that sees none of it gets no gradient and is left out.
        protect_projector: adapt the projectors too, as the deepest layer of the vision tower.

    Returns:
        The targets. Layers that take no part in the forward result (the last ViT layer where features are
        read before it) are left out: they get no gradient.

    Raises:
        TargetError: an unknown model family, a pattern that matches nothing, nothing to adapt at all, or a projector
            where there is none.
    """
    config = model.config
    family = family_of(config)
    if protect_projector and not family.projectors:
        raise TargetError(f"projector: protected, but {family.model_type} has no projector; set projector: frozen")
    targets: list[Target] = []
    if "vision" in patterns:
        depth = family.used_vision_layers(config)
        seen = {layers: _media_of(family, layers, media) for layers in family.vision_layers.values()}
        for layers, kinds in seen.items():
            if kinds:
                targets += _tower_targets(model, "vision", layers, depth, patterns["vision"], kinds)
        if protect_projector and targets:
            kinds = tuple(kind for kind in family.vision_layers if kind in media)
            for projector in family.projectors:
                found = _linears_below(model, projector, "vision", depth - 1, depth, kinds)
                if not found:
                    raise TargetError(
                        f"{config.model_type} has no linear layer in its projector {projector}, which cannot be "
                        "adapted; set projector: frozen"
                    )
                targets += found
    if "language" in patterns:
        depth = int(config.get_text_config().num_hidden_layers)
        targets += _tower_targets(model, "language", family.language_layers, depth, patterns["language"], ())
    if not targets:
        raise TargetError(
            "nothing to adapt: both towers are switched off, or the samples reach none that is on (set "
            "language.adapt or vision.adapt)"
        )
    return targets


def targets_of(model: PreTrainedModel, config: RunConfig, media: Collection[Media]) -> list[Target]:
    """The layers that a run with these settings adapts, where its samples show `media`."""
    patterns = {name: tower.targets for name, tower in config.towers().items()}
    return find_targets(model, patterns, media=media, protect_projector=config.projector == "protected")


def left_out(model: PreTrainedModel, targets: Sequence[Target], config: RunConfig) -> dict[str, int]:
    """Why linear layers are not among `targets_of` -> their number."""
    adapted = {target.name for target in targets}
    linears = (name for name, module in model.named_modules() if is_linear(module))
    reasons = (_reason(name, model, adapted, config) for name in linears if name not in adapted)
    return dict(Counter(reasons))


def _reason(name: str, model: PreTrainedModel, adapted: Collection[str], config: RunConfig) -> str:
    family = family_of(model.config)
    if name.startswith(tuple(f"{projector}." for projector in family.projectors)):
        return "projector (projector: frozen)"
    layers = next((layers for layers in family.towers if name.startswith(f"{layers}.")), None)
    if layers is None:
        return "outside the towers' layers (lm_head, poolers, embeddings of patches)"
    tower, depth = family.towers[layers], int(name.removeprefix(f"{layers}.").split(".")[0])
    if tower not in config.towers():
        return f"{tower} tower ({tower}.adapt: false)"
    if tower == "vision" and depth >= family.used_vision_layers(model.config):
        return "vision layers behind the one that features are read from (no gradient)"
    if not any(other.startswith(f"{layers}.") for other in adapted):
        return f"{layers}: the samples show nothing that it sees"
    return f"{tower}: not among {tower}.targets"


def _media_of(family: ModelFamily, layers: str, media: Collection[Media]) -> tuple[Media, ...]:
    """Which of `media` a list of vision layers sees."""
    return tuple(kind for kind, seen_by in family.vision_layers.items() if seen_by == layers and kind in media)


def _tower_targets(
    model: nn.Module,
    tower: Tower,
    layers: str,
    num_layers: int,
    patterns: Sequence[str],
    media: tuple[Media, ...],
) -> list[Target]:
    found = [
        target
        for depth in range(num_layers)
        for target in _linears_below(model, f"{layers}.{depth}", tower, depth, num_layers, media)
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
        raise TargetError(f"no linear layer under {layers}.0 .. {layers}.{num_layers - 1} in the {tower} tower")
    return wanted


def _linears_below(
    model: nn.Module, prefix: str, tower: Tower, depth: int, num_layers: int, media: tuple[Media, ...]
) -> list[Target]:
    root = model.get_submodule(prefix)
    return [
        Target(f"{prefix}.{name}", tower, depth, num_layers, module.in_features, module.out_features, media)
        for name, module in root.named_modules()
        if is_linear(module)
    ]
