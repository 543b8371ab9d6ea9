"""The main job from its command line: results, resuming, appending, and refusals that lose nothing."""

import contextlib
import io
import json
import math
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from mllm_keeplora.commands.main import main
from mllm_keeplora.continual.saved_run import load_run
from mllm_keeplora.data.images import load_image
from mllm_keeplora.evaluation.answer import answer
from mllm_keeplora.modeling.linear4bit import guard_linear4bit
from tests.forked import Forked
from tests.recipes.conftest import ROOT, TASKS, TEST, Recipe

SCORE_KEYS = {"value", "native", "native_max", "stderr", "n"}


def stages(recipe: Recipe) -> list[Path]:
    return sorted((recipe.run_dir / "stages").iterdir())


def manifest(stage: Path) -> dict[str, Any]:
    return dict(json.loads((stage / "manifest.json").read_text()))


def test_the_matrix_is_full_and_the_metrics_are_there(finished: Recipe) -> None:
    retention = finished.retention()
    assert (retention["tasks"], retention["general"]) == (["digits", "charts"], ["scenes"])
    assert [(row["stage"], row["task"]) for row in retention["rows"]] == [
        (0, None),
        (1, "digits"),
        (2, "charts"),
    ]
    for row in retention["rows"]:
        for score in row["scores"].values():
            assert set(score) == SCORE_KEYS
            assert score["n"] == TEST
            assert score["value"] == score["native"] / score["native_max"]
            assert 0.0 <= score["value"] <= 1.0
    values = [[row["scores"][t]["value"] for t in retention["tasks"]] for row in retention["rows"]]
    assert retention["metrics"]["last"] == pytest.approx(sum(values[2]) / 2)
    assert retention["metrics"]["bwt"] == pytest.approx(values[2][0] - values[1][0])
    assert retention["metrics"]["transfer"] == pytest.approx(values[1][1])


def test_every_output_file_is_there(finished: Recipe) -> None:
    for name in ("accuracy_matrix.csv", "accuracy_matrix.png", "report.html", "config.json"):
        assert (finished.run_dir / name).stat().st_size > 100, name
    assert list((finished.run_dir / "tensorboard" / "01-digits").glob("events*"))
    assert len((stages(finished)[1] / "evaluation" / "digits.jsonl").read_text().splitlines()) == TEST


def test_no_update_reaches_what_is_protected(finished: Recipe) -> None:
    for stage in stages(finished)[1:]:
        modules = manifest(stage)["modules"]
        assert {m["tower"] for m in modules} == {"vision", "language"}
        assert max(m["leakage"] for m in modules) <= 1e-6
        assert max(m["orthonormality_error"] for m in modules) <= 1e-5
        assert min(m["k_w"] for m in modules) >= 1
    assert sum(m["k_f"] for m in manifest(stages(finished)[2])["modules"]) > 0


def test_layer_scales_rise_within_each_tower(finished: Recipe) -> None:
    modules = manifest(stages(finished)[1])["modules"]
    for tower in ("vision", "language"):
        by_depth = {m["depth"]: m["lambda"] for m in modules if m["tower"] == tower}
        scales = [by_depth[depth] for depth in sorted(by_depth)]
        assert scales[0] == pytest.approx(0.2)
        assert scales[-1] == 1.0
        assert scales == sorted(scales)


def test_stored_factors_and_bases_are_fp32(finished: Recipe) -> None:
    files = list(finished.run_dir.rglob("*.safetensors")) + list(
        finished.directory.parent.rglob("weight_bases/**/*.safetensors")
    )
    assert len(files) > 55
    for path in files:
        assert {t.dtype for t in load_file(path).values()} <= {torch.float32}, path


def test_manifests_are_chained_and_complete(finished: Recipe) -> None:
    second = manifest(stages(finished)[2])
    wanted = [
        "config",
        "seeds",
        "probe_indices",
        "packages",
        "base_model",
        "modules",
        "counts",
        "timings",
        "peak_memory_bytes",
        "scores",
        "data",
    ]
    assert set(wanted) <= set(second)
    assert second["counts"]["steps"] == 6
    assert second["previous"] != manifest(stages(finished)[1])["previous"]
    assert all(math.isfinite(loss) for _, loss in second["loss"])


def test_the_adapter_works_with_stock_peft_on_a_stock_base(finished: Recipe) -> None:
    """As the README shows it: no code of ours but the guard line that CPUs need."""
    adapter = finished.run_dir / "adapter"
    quantization = BitsAndBytesConfig.from_dict(json.loads((adapter / "quantization_config.json").read_text()))
    base_dir = ROOT / "recipes/small/vqa_base"
    base = AutoModelForImageTextToText.from_pretrained(base_dir, quantization_config=quantization, dtype=torch.float32)
    guard_linear4bit(base)
    stock = PeftModel.from_pretrained(base, str(adapter)).eval()
    ours, processor = load_run(finished.run_dir).load_model()
    image = load_image(next((finished.data_root / "digits/images/test").glob("*.png")))
    prompt = "USER: <image>\nWhich digit is written here? ASSISTANT: "
    inputs = AutoProcessor.from_pretrained(base_dir)(text=[prompt], images=[image], return_tensors="pt")
    with torch.no_grad():
        expected, found = ours(**inputs).logits, stock(**inputs).logits
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert answer(ours, processor, "Which digit is written here?", image, 4) == answer(
        stock, processor, "Which digit is written here?", image, 4
    )


def test_the_evaluated_answers_are_those_of_the_stored_adapter(finished: Recipe) -> None:
    model, processor = load_run(finished.run_dir).load_model()
    tests = json.loads((finished.data_root / "charts/test.json").read_text())
    lines = [json.loads(x) for x in (stages(finished)[2] / "evaluation/charts.jsonl").read_text().splitlines()]
    for line in lines[:5]:
        record = tests[line["doc_id"]]
        image = load_image(finished.data_root / "charts" / record["image"])
        assert answer(model, processor, record["text"], image, 4) == line["reply"]


def test_a_finished_run_is_left_alone(copied: Recipe) -> None:
    # The copy lies elsewhere; what counts is content.
    before = {p: p.stat().st_mtime_ns for p in copied.run_dir.rglob("*") if "stages" in p.parts and p.is_file()}
    result = copied.result()
    done = copied.run()
    assert done.returncode == 0, done.stderr
    assert "loading" not in done.stderr
    assert copied.result() == result
    assert {p: p.stat().st_mtime_ns for p in before} == before


def appears(path: Path) -> Callable[[], bool]:
    return path.exists


def kill_when(process: Forked, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    "moment",
    [
        "01-digits/checkpoints/checkpoint-3/complete",
        pytest.param("02-charts/factors.safetensors", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_continues_to_the_same_result(finished: Recipe, fresh: Recipe, moment: str) -> None:
    kill_when(fresh.start(), appears(fresh.run_dir / "stages" / moment))
    assert not (fresh.run_dir / "retention.json").exists()
    done = fresh.run()
    assert done.returncode == 0, done.stderr
    assert fresh.result() == finished.result()


def test_appended_tasks_keep_the_past_and_are_null_before_until_backfilled(copied: Recipe) -> None:
    old = {p: p.read_bytes() for s in stages(copied) for p in s.rglob("*") if p.is_file()}
    longer = replace(copied, tasks=TASKS)
    done = longer.run("--train_overrides", '{"clocks": {"max_steps": 4}}')
    assert done.returncode == 0, done.stderr
    rows = longer.retention()["rows"]
    assert [row["scores"]["clocks"] is None for row in rows] == [True, True, True, False]
    assert longer.retention()["metrics"]["transfer"] is None
    assert longer.retention()["metrics"]["bwt"] is not None
    assert {p: p.read_bytes() for p in old} == old
    done = longer.run("--train_overrides", '{"clocks": {"max_steps": 4}}', "--backfill", "true")
    assert done.returncode == 0, done.stderr
    assert all(row["scores"]["clocks"] for row in longer.retention()["rows"])
    assert longer.retention()["metrics"]["transfer"] is not None
    assert {p: p.read_bytes() for p in old} == old


def test_sequential_lora_runs_on_the_same_path(fresh: Recipe) -> None:
    done = replace(fresh, tasks=TASKS[:1]).run("--method", "lora", "--language.gamma", "1", "--vision.adapt", "false")
    assert done.returncode == 0, done.stderr
    modules = manifest(stages(fresh)[1])["modules"]
    assert {m["tower"] for m in modules} == {"language"}
    assert all(m["k_w"] == m["k_f"] == m["k_f_added"] == 0 for m in modules)
    assert all(m["rank"] == 4 and m["lambda"] == 1.0 for m in modules)
    factors = load_file(stages(fresh)[1] / "factors.safetensors")
    starts = load_file(stages(fresh)[1] / "lora_a.safetensors")
    assert all(not torch.equal(factors[f"{name}.A"], a) for name, a in starts.items()), "A trains in sequential LoRA"


def test_a_stream_may_start_from_an_existing_adapter_and_refine_its_probes(finished: Recipe, fresh: Recipe) -> None:
    done = replace(fresh, tasks=TASKS[2:]).run(
        "--initial_adapter",
        str(finished.run_dir / "adapter"),
        "--probe.refine",
        "true",
        "--projector",
        "protected",
    )
    assert done.returncode == 0, done.stderr
    rows, earlier = fresh.retention()["rows"], finished.retention()["rows"]
    assert rows[0]["scores"]["scenes"] == earlier[-1]["scores"]["scenes"]
    stored = load_file(fresh.run_dir / "adapter" / "adapter_model.safetensors")
    ranks = {name: t.shape[0] for name, t in stored.items() if name.endswith("lora_A.weight")}
    past = load_file(finished.run_dir / "adapter" / "adapter_model.safetensors")
    assert all(ranks[name] == past[name].shape[0] + 4 for name in ranks if name in past)
    assert sum("projector" in name for name in ranks) == 2


def refused(recipe: Recipe, *arguments: str) -> str:
    """What the command says on its way out; in this process, which has imported everything already."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error), pytest.raises(SystemExit) as ended:
        main(["run", *recipe.command(*arguments)[2:]])
    assert ended.value.code == 2
    return error.getvalue()[error.getvalue().index("error: ") :]


def test_other_settings_are_refused(copied: Recipe) -> None:
    message = refused(copied, "--alpha", "7")
    assert "alpha: 32.0 there, 7.0 now" in message
    assert "another run_dir" in message


def test_an_edited_manifest_is_refused(copied: Recipe) -> None:
    path = stages(copied)[1] / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    assert "01-digits" in refused(copied)


def test_a_missing_manifest_before_a_complete_stage_is_refused(copied: Recipe) -> None:
    (stages(copied)[1] / "manifest.json").unlink()
    message = refused(copied)
    assert "01-digits/manifest.json is missing" in message
    assert "02-charts is complete" in message


def test_a_reordered_stream_is_refused(copied: Recipe) -> None:
    assert "appended" in refused(replace(copied, tasks=TASKS[1::-1]))


def test_changed_data_is_refused(copied: Recipe, tmp_path: Path) -> None:
    root = tmp_path / "changed"
    subprocess.run(["cp", "-a", str(copied.data_root), str(root)], check=True)
    path = root / "charts" / "test.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:-1]))
    assert "the data of charts has changed" in refused(replace(copied, data_root=root))


def test_a_rank_beyond_the_residual_space_is_refused_before_the_first_stage(fresh: Recipe) -> None:
    message = refused(fresh, "--vision.eps_w", "1.0")
    assert "rank 4 exceeds its residual space" in message
    assert "lower vision.rank or vision.eps_w" in message


def test_a_bad_record_is_refused_before_anything_runs(fresh: Recipe, tmp_path: Path) -> None:
    root = tmp_path / "bad"
    subprocess.run(["cp", "-a", str(fresh.data_root), str(root)], check=True)
    path = root / "charts" / "train.json"
    records = json.loads(path.read_text())
    (root / "charts" / records[3]["image"]).write_bytes(b"")
    broken = replace(fresh, data_root=root)
    assert "train.json" in refused(broken)
    assert not stages(broken) if (broken.run_dir / "stages").exists() else True
    done = broken.run("--on_bad_record", "skip", "--evaluation.limit", "2", "--train.max_steps", "2")
    assert done.returncode == 0, done.stderr
    skipped = manifest(stages(broken)[2])["counts"]["skipped_records"]
    assert [record["row"] for record in skipped] == [4]


# Each step multiplies B by 1 - 10 * 10: beyond fp32 after some twenty.
DIVERGING = json.dumps(
    {"clocks": {"learning_rate": 10, "weight_decay": 10, "max_steps": 60, "lr_scheduler_type": "constant"}}
)


def test_a_diverging_run_stops_with_its_step_and_keeps_what_was_complete(copied: Recipe) -> None:
    message = refused(
        replace(copied, tasks=TASKS),
        "--train_overrides",
        DIVERGING,
    )
    assert "at step" in message or "not finite" in message
    assert len(manifest(stages(copied)[2])["modules"]) > 0


def test_an_adapter_comes_back_from_the_stages_factors(copied: Recipe) -> None:
    """A removed one; and that of an earlier stage, by a copy without the later ones and their tasks."""
    before = copied.result()
    shutil.rmtree(copied.run_dir / "adapter")
    assert copied.run().returncode == 0
    assert copied.result() == before

    shutil.rmtree(stages(copied)[2])  # the adapter is there, and one stage ahead
    assert replace(copied, tasks=TASKS[:1]).run().returncode == 0
    last, first = before[1], copied.result()[1]
    found, whole = load(first), load(last)
    assert found.keys() == whole.keys()
    for name, factor in found.items():
        rank = min(factor.shape)
        part = whole[name][:rank] if ".lora_A." in name else whole[name][:, :rank]
        assert rank == 4 and torch.equal(factor, part)
    assert len(copied.retention()["rows"]) == 2


def test_a_diverged_stage_is_begun_anew_with_other_settings(copied: Recipe) -> None:
    longer = replace(copied, tasks=TASKS)
    refused(longer, "--train_overrides", DIVERGING)
    done = longer.run("--train_overrides", '{"clocks": {"learning_rate": 0.001}}')
    assert done.returncode == 0, done.stderr
    assert "begins anew" in done.stderr
    assert len(stages(longer)) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--train_overrides", '{"chart": {"max_steps": 3}}'], "names 'chart', no task of the stream"),
        (["--train.lr_scheduler_type", "cosin"], "cosin"),
        (["--model.attn_implementation", "sdpaa"], "sdpaa"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_runs(
    fresh: Recipe, arguments: list[str], message: str
) -> None:
    assert message in refused(fresh, *arguments)
    assert not (fresh.run_dir / "stages").exists()


def test_two_processes_do_not_share_a_run(fresh: Recipe) -> None:
    process = fresh.start()
    try:
        deadline = time.monotonic() + 120
        while not (fresh.run_dir / "stages").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGSTOP)
        assert "another process is running" in refused(fresh)
    finally:
        process.kill()
        process.wait()


def test_accelerate_launch_runs_the_recipe(fresh: Recipe) -> None:
    short = replace(fresh, tasks=TASKS[:1])
    command = short.command("--train.max_steps", "2", "--evaluation.limit", "4")
    # The command itself, as a user types it: it imports torchvision before any code of ours.
    launched = [str(Path(command[0]).with_name("accelerate")), "launch", *command[1:]]
    done = subprocess.run(launched, cwd=ROOT, env=short.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [row["task"] for row in short.retention()["rows"]] == [None, "digits"]
