from pathlib import Path
from typing import Any

import pytest

from mllm_keeplora.config import ConfigError, RunConfig, TowerConfig
from mllm_keeplora.continual.run import check_seen
from mllm_keeplora.data.conversation import Sample
from mllm_keeplora.modeling.families import TargetError, family_of
from mllm_keeplora.modeling.targets import find_targets
from tests.conversations import Turn, sample
from tests.modules.conftest import BOTH_TOWERS, all_targets


def test_every_linear_of_both_towers_that_takes_part(nf4_model: Any) -> None:
    targets = all_targets(nf4_model)
    vision = [
        f"model.vision_tower.encoder.layers.{d}.{n}"
        for d in range(2)
        for n in (
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.q_proj",
            "self_attn.out_proj",
            "mlp.fc1",
            "mlp.fc2",
        )
    ]
    language = [
        f"model.language_model.layers.{d}.{n}"
        for d in range(2)
        for n in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ]
    assert sorted(t.name for t in targets) == sorted(vision + language)


def test_the_last_vision_layer_is_left_out_and_does_not_count(nf4_model: Any) -> None:
    """Features are read after the 2nd of 3 layers: the 3rd gets no gradient, and L is 2."""
    vision = [t for t in all_targets(nf4_model) if t.tower == "vision"]
    assert {t.depth for t in vision} == {0, 1}
    assert {t.num_layers for t in vision} == {2}


@pytest.mark.parametrize("read, used", [(-1, 3), (-2, 2), (2, 2), ([-3, -2], 2)])
def test_layers_in_use_follow_the_feature_layer(nf4_model: Any, read: Any, used: int) -> None:
    nf4_model.config.vision_feature_layer = read
    assert family_of(nf4_model.config).used_vision_layers(nf4_model.config) == used


def test_patterns_select_by_name_within_their_tower(nf4_model: Any) -> None:
    targets = find_targets(nf4_model, {"language": ["q_proj", "mlp.down_proj"]})
    assert {t.tower for t in targets} == {"language"}
    assert {t.name.rsplit(".", 1)[1] for t in targets} == {"q_proj", "down_proj"}
    assert len(targets) == 4


def test_shapes_are_those_of_the_weight(nf4_model: Any) -> None:
    shapes = {t.name.rsplit(".", 1)[1]: (t.out_features, t.in_features) for t in all_targets(nf4_model)}
    assert shapes["fc1"] == (128, 64)
    assert shapes["down_proj"] == (128, 192)


def test_a_protected_projector_is_the_deepest_vision_layer(nf4_model: Any) -> None:
    extra = {t.name: t for t in find_targets(nf4_model, BOTH_TOWERS, protect_projector=True)}
    target = extra["model.multi_modal_projector.linear_1"]
    assert (target.tower, target.depth, target.num_layers) == ("vision", 1, 2)


def test_a_pattern_without_a_match_is_an_error_that_lists_what_there_is(nf4_model: Any) -> None:
    with pytest.raises(TargetError, match=r"vision.targets \['q_prj'\] match no linear.*self_attn.q_proj"):
        find_targets(nf4_model, {"vision": ["q_prj", "k_proj"], "language": ["all-linear"]})


def test_nothing_to_adapt_is_an_error(nf4_model: Any) -> None:
    with pytest.raises(TargetError, match="nothing to adapt"):
        find_targets(nf4_model, {})


@pytest.mark.parametrize("unknown", ["gpt7", "qwen3_5_moe", "gemma4"])
def test_an_unknown_family_is_an_error(unknown: str, nf4_model: Any) -> None:
    nf4_model.config.model_type = unknown
    with pytest.raises(TargetError, match=f"'{unknown}' is not in the table.*llava"):
        all_targets(nf4_model)


TEXT = sample("words", None, (Turn("what?", "red"),))
PICTURE = sample("picture", Path("0.png"), (Turn("what?", "red"),))
CLIP = sample("clip", None, (Turn("what?", "red"),), Path("0.mp4"))


@pytest.mark.parametrize("shown", [[TEXT], [PICTURE, TEXT], [CLIP, PICTURE, TEXT]])
def test_text_alone_is_refused_where_the_vision_tower_learns_alone(shown: list[Sample]) -> None:
    """Its loss has no gradient: torch would say so in the middle of a stage."""
    config = RunConfig(language=TowerConfig(adapt=False))
    records = {"pictures": ([PICTURE, CLIP], []), "mixed": (shown, [])}
    with pytest.raises(ConfigError, match=f"mixed: 1 of {len(shown)} training records.*'words' first.*language.adapt"):
        check_seen(config, records)
    check_seen(config, {"pictures": ([PICTURE, CLIP], [])})
    check_seen(RunConfig(), records)
