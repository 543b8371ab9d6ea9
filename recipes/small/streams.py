"""The small streams that come along: where one is named, its data are drawn on this machine on first use.

So is the base model of one of them, which is built from packages.
"""

import logging
from importlib import import_module
from pathlib import Path

from mllm_keeplora.data.stream import load_stream
from mllm_keeplora.recipes.small.folders import whole_folder
from mllm_keeplora.resources import find, shipped

logger = logging.getLogger(__name__)

# Stream -> the module beside this one that draws its data.
BUILDERS = {
    "recipes/streams/small_vqa.yaml": "build_vqa_data",
    "recipes/streams/small_video.yaml": "build_video_data",
    "recipes/streams/small_classification.yaml": "build_classification_data",
    "recipes/streams/smollm2.yaml": "smollm2.build_data",
}
# Folder of a base model -> the module beside this one that builds it.
BASES = {"data/smollm2/base": "smollm2.build_base"}


def draw_small_stream(stream: str | Path, data_root: str | Path | None = None) -> None:
    """Draws the data of a small stream unless they are there; they appear whole or not at all.

    Args:
        stream: YAML file of any stream; nothing is done for one that is not a small stream.
        data_root: the folder that the settings name for the data. Where they name one, the data in it are
            the user's own, and nothing is drawn.

    Raises:
        ConfigError: packages are missing that hold the data.
    """
    builder = _builder_of(find(stream)) if data_root is None else None
    if builder is None:
        return
    folder = load_stream(Path(stream), check_files=False).data_root
    if not folder.exists():
        logger.info(f"drawing the data of {stream} to {folder} (once)")
        _write(builder, folder)


def build_small_base(base_model: str) -> None:
    """Builds the base model that a setting names, if it is one of ours and not there.

    Raises:
        ConfigError: packages are missing that hold the model.
    """
    builder = BASES.get(Path(base_model).as_posix())
    if builder is not None and not Path(base_model).exists():
        logger.info(f"building the base model {base_model} (once)")
        _write(builder, Path(base_model))


def _write(builder: str, folder: Path) -> None:
    module = import_module(f"mllm_keeplora.recipes.small.{builder}")
    with whole_folder(folder) as staging:
        module.write_all(staging)


def _builder_of(stream: Path) -> str | None:
    """By content, so that it does not matter whether a checkout's or an installed package's file is named."""
    content = stream.read_bytes() if stream.is_file() else None
    return next((name for path, name in BUILDERS.items() if shipped(path).read_bytes() == content), None)
