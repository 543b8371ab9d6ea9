"""`model.max_pixels`: the same bound in training, evaluation and the plan; refused where it would do nothing."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mllm_keeplora.config import ConfigError, ModelConfig, RunConfig, VideoConfig
from mllm_keeplora.data.collator import prepare_questions
from mllm_keeplora.data.conversation import Message
from mllm_keeplora.data.video.reader import Clip
from mllm_keeplora.modeling.families import FAMILIES, Media
from mllm_keeplora.modeling.loading import load_processor
from mllm_keeplora.planning.skeleton import assumed_shape, build_processor, build_skeleton
from tests.modules.tiny_families import PATCH, WRITING

QWEN = [name for name, family in FAMILIES.items() if family.clips_of_any_length]
TOKEN = (2 * PATCH) ** 2  # pixels


def pixels(processor: Any, media: Media, height: int, width: int, frames: int = 8) -> int:
    """Of the picture, or of each frame, as the model sees it."""
    if media == "image":
        part: Any = Image.new("RGB", (width, height))
    else:
        part = Clip(np.zeros((frames, height, width, 3), np.uint8), tuple(range(frames)), 8.0, frames)
    asked = prepare_questions(processor, [[Message("user", (part, "what ?"))]], torch.device("cpu"))
    _, rows, columns = asked[f"{media}_grid_thw"][0].tolist()
    return int(rows * columns * PATCH**2)


@pytest.mark.parametrize("media", ["image", "video"])
@pytest.mark.parametrize("family", QWEN)
def test_no_picture_or_frame_has_more_pixels(family: str, media: Media, tiny: Any) -> None:
    """Also where the processor's own least is above it."""
    base = ModelConfig(base_model=str(tiny(family)), device="cpu")
    for most in (TOKEN, 3 * TOKEN, 20 * TOKEN):
        processor = load_processor(replace(base, max_pixels=most), str(tiny(family)))
        for height, width in ((64, 64), (480, 640), (200, 1000))[: 2 + (most > 5 * TOKEN)]:  # each side takes a token
            assert pixels(processor, media, height, width) <= most, (most, height, width)
    large = load_processor(replace(base, max_pixels=100 * TOKEN), str(tiny(family)))
    assert pixels(large, media, 480, 480, frames=2) > pixels(load_processor(base, base.base_model), media, 480, 480)


@pytest.mark.parametrize("family", QWEN)
def test_the_plan_reckons_with_it(family: str, tiny: Any) -> None:
    shapes = []
    for most in (None, 4 * TOKEN, TOKEN):
        model = ModelConfig(base_model=str(tiny(family)), device="cpu", max_pixels=most)
        config = RunConfig(model=model, video=VideoConfig(frames=8))
        shapes.append(assumed_shape(build_processor(model), build_skeleton(model), config))
    assert shapes[2].tokens < shapes[1].tokens and shapes[2].vision_tokens == 4 * TOKEN // PATCH**2
    assert shapes[2].pixels < shapes[1].pixels


@pytest.mark.parametrize("family", [name for name in WRITING if name not in QWEN])
def test_a_family_of_one_size_refuses_it(family: str, tiny: Any) -> None:
    with pytest.raises(ConfigError, match=r"model.max_pixels is for models.*preprocessor_config.json"):
        load_processor(ModelConfig(max_pixels=10_000), str(tiny(family)))


def test_less_than_a_token_is_refused(tiny: Any) -> None:
    with pytest.raises(ConfigError, match=rf"max_pixels is {TOKEN - 1}, expected at least {TOKEN}: .*32 x 32 pixels"):
        load_processor(ModelConfig(max_pixels=TOKEN - 1), str(tiny(QWEN[0])))
    with pytest.raises(ConfigError, match="model.max_pixels"):
        ModelConfig(max_pixels=0)
