"""The small streams that come along: their settings, and their data, which are drawn on first use."""

from typing import Any, Literal

import mllm_keeplora  # noqa: F401  # its guards come before the libraries they guard

# isort: split
from dataclasses import replace
from pathlib import Path

from mllm_keeplora.config import RunConfig, parse_config
from mllm_keeplora.recipes.small.streams import draw_small_stream


def small_config(kind: Literal["vqa", "video"], **settings: Any) -> RunConfig:
    """The settings of a small stream, in the paper's form, with some replaced; its data are there afterwards.

    Args:
        kind: of the stream.
        settings: fields of `RunConfig`.
    """
    files = (f"recipes/configs/{kind}/small.yaml", "recipes/configs/methods/paper.yaml")
    config = parse_config("", Path(files[0]), [text for file in files for text in ("--config", file)])
    draw_small_stream(config.stream)
    return replace(config, **settings)
