"""The video recipe from its command line: the same report as the image recipe's, from real clips."""

import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.forked import run, run_together
from tests.recipes.conftest import KEEPLORA, ROOT, TEST, VIDEO_TASKS, VideoRecipe, checked, run_example


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, video_data_root: Path) -> VideoRecipe:
    """An uninterrupted run. Tests read it and leave it as it is."""
    recipe = VideoRecipe(tmp_path_factory.mktemp("finished_video"), video_data_root)
    checked(recipe.run())
    return recipe


@pytest.fixture
def fresh(tmp_path: Path, video_data_root: Path) -> VideoRecipe:
    """A run that has not started."""
    return VideoRecipe(tmp_path, video_data_root)


def manifest(recipe: VideoRecipe, stage: int) -> dict[str, Any]:
    name = f"{stage:02d}-{('base', *recipe.tasks)[stage]}"
    return dict(json.loads((recipe.run_dir / "stages" / name / "manifest.json").read_text()))


def test_the_report_holds_every_task_and_the_general_suite_after_every_stage(finished: VideoRecipe) -> None:
    retention = finished.retention()
    assert (tuple(retention["tasks"]), retention["general"]) == (VIDEO_TASKS, ["motions"])
    assert len(retention["rows"]) == 3
    for row in retention["rows"]:
        assert {name: score["n"] for name, score in row["scores"].items()} == dict.fromkeys(
            (*VIDEO_TASKS, "motions"), TEST
        )
    for name in ("report.html", "accuracy_matrix.png", "accuracy_matrix.csv", "adapter/adapter_config.json"):
        assert (finished.run_dir / name).stat().st_size > 100, name


def test_both_towers_learn_in_the_residual_subspace(finished: VideoRecipe) -> None:
    for stage in (1, 2):
        modules = manifest(finished, stage)["modules"]
        assert {m["tower"] for m in modules} == {"vision", "language"}
        assert max(m["leakage"] for m in modules) <= 1e-6
        assert min(m["rank"] for m in modules) == 4


def test_frames_are_cached_and_clips_checked_once(finished: VideoRecipe) -> None:
    cache = finished.directory.parent / "weight_cache"
    assert list((cache / "frames").rglob("*.safetensors"))
    assert list((cache / "preflight").glob("*.json"))


@pytest.mark.slow  # like the image recipe's
def test_a_killed_run_continues_to_the_same_result(finished: VideoRecipe, fresh: VideoRecipe) -> None:
    process = fresh.start()
    moment = fresh.run_dir / "stages/01-drift/checkpoints/checkpoint-3/complete"
    deadline = time.monotonic() + 300
    while not moment.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = fresh.run()
    assert done.returncode == 0, done.stderr
    assert fresh.result() == finished.result()


@pytest.mark.slow  # like the image recipe's
def test_the_leaderboard_repeats_the_run_in_a_fresh_process(finished: VideoRecipe, tmp_path: Path) -> None:
    done = checked(run([*KEEPLORA[1:], "leaderboard", finished.run_dir, "--table", tmp_path]))
    assert "All 3 scores equal" in done.stdout
    [row] = json.loads((tmp_path / "leaderboard.json").read_text())["rows"]
    assert row["equal_to_run"]


def test_chat_gives_the_evaluated_reply(finished: VideoRecipe) -> None:
    rows = finished.data_root / "drift/json_row/test_questions.json"
    question = json.loads(rows.read_text())[0]
    replies = (finished.run_dir / "stages/02-lamps/evaluation/drift.jsonl").read_text().splitlines()
    clip = finished.data_root / "drift/videos" / f"{question['video_name']}.mp4"
    command = [*KEEPLORA[1:], "chat", finished.run_dir, "--video", clip]
    done = run([*command, "--max-new-tokens", "4", question["question"]])
    assert done.stdout.strip() == json.loads(replies[0])["reply"], done.stderr


def test_the_cards_example_answers_about_a_clip_as_the_run_did(finished: VideoRecipe, tmp_path: Path) -> None:
    replies = (finished.run_dir / "stages/02-lamps/evaluation/lamps.jsonl").read_text().splitlines()
    first = json.loads(replies[0])
    [clip] = [part["path"] for part in first["doc"]["asked"][0]["content"] if part["type"] == "video"]
    shutil.copytree(ROOT / "recipes/small/video_base", tmp_path / "recipes/small/video_base")
    card = (finished.run_dir / "adapter/README.md").read_text()
    printed, said = run_example(card, Path(clip), tmp_path)
    assert printed == said == first["reply"]
    assert "pipeline_tag: video-text-to-text" in card


def test_the_export_answers_like_the_run(finished: VideoRecipe, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    done = checked(run([*KEEPLORA[1:], "export", finished.run_dir, "--out", out]))
    assert "dequantized in" not in done.stdout + done.stderr  # transformers says that it does as asked
    difference = json.loads((out / "export.json").read_text())
    assert difference["questions"] == TEST
    assert difference["relative_logits"] < 0.05


def spoil(recipe: VideoRecipe, root: Path) -> VideoRecipe:
    """The last task and the general suite, with one training clip cut short."""
    for task in (VIDEO_TASKS[1], recipe.general):
        shutil.copytree(recipe.data_root / task, root / task)
    clip = root / "lamps/videos/train/00003.mp4"
    clip.write_bytes(clip.read_bytes()[:-400])
    return replace(recipe, data_root=root, tasks=VIDEO_TASKS[1:])


def test_a_damaged_clip_is_refused_with_its_row_before_anything_runs(fresh: VideoRecipe, tmp_path: Path) -> None:
    broken = spoil(fresh, tmp_path / "spoilt")
    done = broken.run()
    assert done.returncode == 2, done.stderr
    message = done.stderr[done.stderr.index("error: ") :]
    assert "lamps/json_row/train_data.json: 1 of 64 records cannot be used" in message
    assert "row 4: " in message
    assert "lamps/videos/train/00003.mp4" in message
    assert not (broken.run_dir / "stages").exists()


def test_a_damaged_clip_is_left_out_and_counted_where_that_is_asked_for(fresh: VideoRecipe, tmp_path: Path) -> None:
    broken = spoil(fresh, tmp_path / "spoilt")
    done = broken.run("--on_bad_record", "skip", "--evaluation.limit", "2", "--train.max_steps", "2")
    assert done.returncode == 0, done.stderr
    counts = manifest(broken, 1)["counts"]
    assert counts["train_samples"] == 63
    assert [record["row"] for record in counts["skipped_records"]] == [4]


def test_loader_workers_decode_clips(fresh: VideoRecipe) -> None:
    short = replace(fresh, tasks=VIDEO_TASKS[:1])
    arguments = ("--train.max_steps", "2", "--evaluation.limit", "2", "--train.dataloader_num_workers", "2")
    checked(short.run(*arguments, "--video.cache_gb", "0"))
    assert [row["task"] for row in short.retention()["rows"]] == [None, "drift"]


@pytest.mark.slow  # like the image recipe's
def test_two_processes_end_in_one_processs_matrix(finished: VideoRecipe, fresh: VideoRecipe) -> None:
    """Each with half of the batch, over gloo; clips are decoded by both and asked about once."""
    for done in run_together(fresh.command("--train.per_device_train_batch_size", "4")[1:]):
        checked(done)
    assert manifest(fresh, 2)["num_processes"] == 2
    for row, expected in zip(fresh.retention()["rows"], finished.retention()["rows"], strict=True):
        for name, score in row["scores"].items():
            other = expected["scores"][name]
            assert score["n"] == TEST
            error = (score["stderr"] ** 2 + other["stderr"] ** 2) ** 0.5
            assert abs(score["value"] - other["value"]) <= 2 * error
