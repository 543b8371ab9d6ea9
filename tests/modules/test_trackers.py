"""Retention in TensorBoard, W&B and trackio, each offline and read back as its own tools read it."""

import json
from pathlib import Path
from typing import Any

import pytest

from mllm_keeplora.config import RunConfig
from mllm_keeplora.reports.trackers import log_stage

SCORES = ({"digits": 0.25, "scenes": 1.0}, {"digits": 0.75, "scenes": 0.5})


def log_both(config: RunConfig) -> None:
    """After stage 0 and after stage 1, in which a task that was appended later was not measured."""
    rows: list[dict[str, Any]] = []
    for stage, scores in enumerate(SCORES):
        row = {name: {"value": value, "stderr": 0.01} for name, value in scores.items()}
        rows.append({"stage": stage, "task": "digits" if stage else None, "scores": {**row, "later": None}})
        log_stage(config, {"tasks": ["digits", "later"], "general": ["scenes"], "rows": list(rows)})


def test_tensorboard_shows_scores_matrix_and_settings(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_both(RunConfig(run_dir=str(tmp_path), report_to=["tensorboard"]))
    found = EventAccumulator(str(tmp_path / "tensorboard/retention"))
    found.Reload()
    assert sorted(found.Tags()["scalars"]) == ["score/digits", "score/scenes"]
    for name in SCORES[0]:
        scalars = found.Scalars(f"score/{name}")
        assert [(s.step, s.value) for s in scalars] == [(n, scores[name]) for n, scores in enumerate(SCORES)]
    assert [(image.step, image.width > 100) for image in found.Images("accuracy matrix")] == [(0, True), (1, True)]
    [settings] = found.Tensors("settings/text_summary")[:1]
    assert "language.rank: " in settings.tensor_proto.string_val[0].decode()


def test_wandb_gets_them_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    log_both(RunConfig(run_dir=str(tmp_path / "run"), report_to=["wandb"]))
    try:
        summary, config = dict(wandb.run.summary), dict(wandb.run.config)
    finally:
        wandb.finish()
    assert summary["stage"] == 1 and summary["score/digits"] == 0.75 and summary["score/scenes"] == 0.5
    assert summary["accuracy matrix"]["_type"] == "image-file"
    assert config["language"]["rank"] == RunConfig().language.rank
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_trackio_gets_them_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("trackio", reason="trackio is not installed")
    import trackio.sqlite_storage as storage

    log_both(RunConfig(run_dir="runs/tried", report_to=["trackio"]))
    logs = storage.SQLiteStorage.get_logs("mllm-keeplora", "runs/tried retention")
    assert [(log["step"], log["score/digits"], log["score/scenes"]) for log in logs] == [
        (n, scores["digits"], scores["scenes"]) for n, scores in enumerate(SCORES)
    ]
    assert all("accuracy matrix" in log for log in logs), json.dumps(logs, default=str)


@pytest.mark.parametrize("names", [[], ["none"], ["mlflow"]])
def test_other_loggers_get_the_training_curves_alone(tmp_path: Path, names: list[str]) -> None:
    log_both(RunConfig(run_dir=str(tmp_path / "run"), report_to=names))
    assert not (tmp_path / "run").exists()
