"""The small streams that come along: their settings, and their data, which are drawn on first use."""

from typing import Any, Literal

import mllm_keeplora  # noqa: F401  # its guards come before the libraries they guard

# isort: split
from dataclasses import replace
from pathlib import Path

from mllm_keeplora.config import RunConfig, parse_config
from mllm_keeplora.recipes.small.streams import draw_small_stream


def small_config(kind: Literal["vqa", "video"], **settings: Any) -> RunConfig:
    """The settings of a small stream with some of them replaced; its data are there afterwards.

    Args:
        kind: of the stream.
        settings: fields of `RunConfig`.
    """
    config = parse_config("", Path(f"recipes/configs/{kind}/small.yaml"), [])
    draw_small_stream(config.stream)
    return replace(config, **settings)
