"""Retention in the loggers that a run reports to, beside the training curves that the Trainer writes there."""

import importlib
import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm_keeplora.config import RunConfig
from mllm_keeplora.continual.trainer import loggers
from mllm_keeplora.reports.figures import matrix_picture
from mllm_keeplora.reports.results import written
from mllm_keeplora.runs.run_directory import RunDirectory

PROJECT = "mllm-keeplora"


def log_stage(config: RunConfig, matrix: Mapping[str, Any]) -> None:
    """Gives a stage's scores (fractions), the matrix as a picture and the settings to TensorBoard, W&B and trackio.

    Args:
        config: the run's; its `report_to` names the loggers. Others get the training curves alone.
        matrix: the rows of scores so far.
    """
    row = matrix["rows"][-1]
    scores = {f"score/{name}": score["value"] for name, score in row["scores"].items() if score is not None}
    for name in loggers(config.report_to):
        if log := _LOGS.get(name):
            picture = Image.open(io.BytesIO(matrix_picture(matrix, Path(config.run_dir).name)))
            log(config, row["stage"], scores, picture)


def _tensorboard(config: RunConfig, stage: int, scores: Mapping[str, float], picture: Image.Image) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(RunDirectory(Path(config.run_dir)).logs / "retention")) as writer:
        for name, value in scores.items():
            writer.add_scalar(name, value, stage)
        writer.add_image("accuracy matrix", np.asarray(picture.convert("RGB")), stage, dataformats="HWC")
        settings = "\n".join(f"    {name}: {value}" for name, value in written(asdict(config)).items())
        writer.add_text("settings", settings, stage)


def _wandb(config: RunConfig, stage: int, scores: Mapping[str, float], picture: Image.Image) -> None:
    wandb = importlib.import_module("wandb")
    if wandb.run is None:  # else the Trainer's own, which goes on
        wandb.init(project=PROJECT, name=config.run_dir)
    wandb.config.update(asdict(config), allow_val_change=True)
    wandb.define_metric("score/*", step_metric="stage")
    wandb.log({"stage": stage, **scores, "accuracy matrix": wandb.Image(picture)})


def _trackio(config: RunConfig, stage: int, scores: Mapping[str, float], picture: Image.Image) -> None:
    trackio = importlib.import_module("trackio")
    trackio.init(project=PROJECT, name=f"{config.run_dir} retention", config=asdict(config), resume="allow")
    trackio.log({**scores, "accuracy matrix": trackio.Image(picture)}, step=stage)
    trackio.finish()


_LOGS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
