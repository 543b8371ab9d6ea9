"""General benchmarks: suites that lmms-eval knows, rules in place of judges, subsets that say so."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmms_eval
import pytest
import yaml
from lmms_eval.api.task import _resolve_hf_datasets_cache_dir
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config

from mllm_keeplora.config import ConfigError, EvaluationConfig, ModelConfig, RunConfig, TrainConfig
from mllm_keeplora.continual.run_stream import run_stream
from mllm_keeplora.data.stream import GeneralSpec, Stream, StreamError, TaskSpec, load_stream
from mllm_keeplora.evaluation import score
from mllm_keeplora.evaluation.errors import EvaluationError
from mllm_keeplora.evaluation.score import _by_limit, check_logins, read_score
from mllm_keeplora.evaluation.task_files import TEMPLATES, ScoredTask, _TemplateLoader, write_task_files
from mllm_keeplora.reports.tables import format_table, subset_note

ROOT = Path(__file__).resolve().parents[2]
STREAMS = ROOT / "recipes/streams"
SUITES = {
    name: yaml.safe_load((STREAMS / f"suites/{name}.yaml").read_text()) for name in ("general_image", "general_video")
}
ENTRIES = [(suite, entry["name"]) for suite, entries in SUITES.items() for entry in entries]


def documents(task: str) -> list[dict[str, Any]]:
    """A task's YAML, those it includes or groups, from lmms-eval's package or this project's own."""
    own = TEMPLATES / "general" / f"{task}.yaml"
    folder = Path(lmms_eval.__file__).parent / "tasks"
    paths = [own] if own.is_file() else [p for p in folder.rglob("*.yaml") if p.stem == task]
    assert len(paths) == 1, (task, paths)
    document = yaml.load(paths[0].read_text(), Loader=_TemplateLoader)
    found = [document]
    if "include" in document:
        found.append(yaml.load((paths[0].parent / document["include"]).read_text(), Loader=_TemplateLoader))
    for leaf in document.get("task", []) if "group" in document else []:
        found += documents(leaf)
    return found


@pytest.mark.parametrize("suite, name", ENTRIES)
def test_a_suite_names_a_task_and_a_number_that_lmms_eval_has(suite: str, name: str) -> None:
    [entry] = [entry for entry in SUITES[suite] if entry["name"] == name]
    GeneralSpec(**entry)
    found = documents(entry["lmms_eval_task"])
    metrics = {m["metric"] for document in found for m in document.get("metric_list", [])}
    assert entry["score"] in metrics
    kinds = {document["output_type"] for document in found if "output_type" in document}
    assert kinds <= {"generate_until"}


@pytest.mark.parametrize(
    "name", ["mllm_dcl", "mllm_acl", "ucit", "coin", "trigap", "mllm_ctbench", "continual_next", "cl_vista"]
)
def test_the_published_streams_watch_a_whole_suite(name: str) -> None:
    suite = "general_video" if name == "cl_vista" else "general_image"
    stream = load_stream(STREAMS / f"{name}.yaml", Path("none"), check_files=False)
    assert stream.general == tuple(GeneralSpec(**entry) for entry in SUITES[suite])


def test_a_suite_that_is_not_there_is_named(tmp_path: Path) -> None:
    task = {"name": "t", "train": "t.json", "test": "t.json", "metric": "exact"}
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "data_root": ".", "tasks": [task], "general": "none.yaml"}))
    with pytest.raises(StreamError, match=r"general: .*none.yaml: cannot be read"):
        load_stream(path, check_files=False)


# Rules in place of a judge


@pytest.fixture
def rules() -> Any:
    spec = importlib.util.spec_from_file_location("rules", TEMPLATES / "general/rules.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mmvu_is_scored_without_asking_a_judge(rules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(*_: Any) -> None:
        raise AssertionError("a judge was asked")

    monkeypatch.setattr(rules.mmvu, "evaluate_with_llm_judge", judge)
    monkeypatch.setattr(rules.mmvu, "_get_pipeline", judge)
    choices = {"A": "1", "B": "2", "C": "3", "D": "4", "E": "5"}
    asked = {"video_path": "x/Art/1.mp4", "choices": choices, "question": "?"}
    letter = {**asked, "question_type": "multiple-choice", "answer": "B"}
    opened = {**asked, "question_type": "open-ended", "answer": "binary search"}
    replies = [
        (letter, "Therefore, the final answer is: B", 1),
        (letter, "Therefore, the final answer is: C", 0),
        (opened, "Therefore, the final answer is: binary search", 1),
        (opened, "A tree is walked.", 0),
    ]
    found = [rules.mmvu_process_results(doc, [reply])["accuracy"] for doc, reply, _ in replies]
    assert [score["score"] for score in found] == [expected for *_, expected in replies]
    assert rules.mmvu_aggregate(found) == 50.0


def test_a_variant_of_ours_is_written_where_lmms_eval_looks(tmp_path: Path) -> None:
    spec = GeneralSpec("mmvu", lmms_eval_task="mmvu_val_rules", score="accuracy", native_max=100.0)
    (tmp_path / "t.json").write_text(json.dumps([{"question_id": 0, "text": "?", "answer": "yes"}]))
    task = TaskSpec("t", train="t.json", test="t.json", metric="exact", allow_text_only=True)
    write_task_files(Stream("s", tmp_path, (task,), (spec,)), tmp_path / "tasks")
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    assert "mmvu_val_rules" in manager.all_tasks
    loaded = load_yaml_config(str(tmp_path / "tasks/mmvu_val_rules.yaml"))
    assert loaded["process_results"].__name__ == "mmvu_process_results"
    assert loaded["dataset_path"] == "lmms-eval/MMVU"


# Groups and subsets


def test_a_group_without_a_number_scores_the_mean_of_its_tasks() -> None:
    entry = ScoredTask("mvbench", "general", "mvbench", "mvbench_accuracy", 100.0)
    samples = [{"doc_id": n, "mvbench_accuracy": {"correct": 1}} for n in range(2)]
    results: dict[str, Any] = {
        "results": {
            "mvbench": {"alias": "mvbench"},
            "a": {"mvbench_accuracy,none": 40.0},
            "b": {"mvbench_accuracy,none": 60.0},
        },
        "group_subtasks": {"mvbench": ["a", "b"], "a": [], "b": []},
        "samples": {"a": samples, "b": samples},
        "n-samples": {"a": {"effective": 2}, "b": {"effective": 2}},
    }
    score = read_score(results, entry)
    assert (score["value"], score["native"], score["n"], score["stderr"]) == (0.5, 50.0, 4, None)
    del results["results"]["b"]["mvbench_accuracy,none"]
    with pytest.raises(EvaluationError, match="expected one finite number"):
        read_score(results, entry)


def test_tasks_and_general_benchmarks_have_their_own_limits() -> None:
    task, general = (ScoredTask(kind, kind, kind, "exact", 1.0) for kind in ("task", "general"))  # type: ignore[arg-type]
    assert _by_limit([task, general], None, None) == [(None, [task, general])]
    assert _by_limit([task, general], None, 5) == [(None, [task]), (5, [general])]
    assert _by_limit([general], 3, 5) == [(5, [general])]
    assert EvaluationConfig(limit=3).limits() == {"task": 3, "general": 3}
    assert EvaluationConfig(limit=3, general_limit=5).limits() == {"task": 3, "general": 5}
    with pytest.raises(ConfigError, match="evaluation.general_limit: expected a whole number in"):
        EvaluationConfig(general_limit=0)


def test_a_subset_says_so() -> None:
    assert subset_note({"limits": {"task": None, "general": None}}) == ""
    assert subset_note({}) == "", "runs from before limits were recorded"
    note = subset_note({"limits": {"task": None, "general": 500}})
    assert note == "A subset: scores are of the first 500 of each general benchmark alone."
    metrics = dict.fromkeys(("last", "mft", "maa", "bwt", "forgetting", "transfer", "average"))
    retention = {
        "tasks": ["t"],
        "general": [],
        "rows": [],
        "method": "lora",
        "limits": {"task": 2, "general": 2},
    }
    text = format_table({**retention, "metrics": {**metrics, "retention": {}}})
    assert "A subset: scores are of the first 2 of each task and the first 2 of each" in text


# Logins


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """lmms-eval's own tasks, few of them, and nobody logged in."""
    folder = tmp_path / "listed"
    folder.mkdir()
    tasks = Path(lmms_eval.__file__).parent / "tasks"
    for name in ("pope", "mmmu_val", "mvbench_action_count", "mmvu_val_rules"):
        own = TEMPLATES / "general" / f"{name}.yaml"
        source = own if own.is_file() else next(tasks.rglob(f"{name}.yaml"))
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"include": str(source), "task": name}))
    (folder / "mvbench.yaml").write_text(yaml.safe_dump({"group": "mvbench", "task": ["mvbench_action_count"]}))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr("lmms_eval.tasks.TaskManager", lambda **_: manager)
    monkeypatch.setattr(score, "is_offline_mode", lambda: False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr(score, "get_token", lambda: None)
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    _resolve_hf_datasets_cache_dir.cache_clear()
    yield folder
    _resolve_hf_datasets_cache_dir.cache_clear()


STOCK = ["pope", "mmmu_val", "mvbench", "mmvu_val_rules"]


def test_benchmarks_that_need_a_login_are_named_with_the_way_to_log_in(listed: Path) -> None:
    with pytest.raises(EvaluationError, match="^pope, mvbench, mmvu_val_rules: .*`hf auth login`, or set HF_TOKEN"):
        check_logins(STOCK, listed)
    check_logins(["mmmu_val"], listed)
    check_logins([], listed)


@pytest.mark.parametrize(
    "members",
    [["pope"], ["mmmu_val", {"group": "inner", "task": ["pope"]}], [{"task": "pope"}], ["tagged"]],
    ids=["names", "a group inside", "a changed task", "a tag"],
)
@pytest.mark.parametrize("asked", ["outer", "tagged"])
def test_a_login_is_asked_for_whatever_the_form_of_a_group(asked: str, members: list[Any], listed: Path) -> None:
    for name, other in {"pope": ["tagged"], "mmmu_val": []}.items():
        task = yaml.safe_load((listed / f"{name}.yaml").read_text())
        (listed / f"{name}.yaml").write_text(yaml.safe_dump({**task, "tag": other}))
    (listed / "outer.yaml").write_text(yaml.safe_dump({"group": "outer", "task": members}))
    manager = lmms_eval.tasks.TaskManager()
    manager._task_index = manager.initialize_tasks(include_path=str(listed), include_defaults=False)
    with pytest.raises(EvaluationError, match=f"^{asked}: .*`hf auth login`"):
        check_logins([asked], listed)


def test_a_tag_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    for name in ("one", "two"):
        task = {"task": name, "tag": "both", "dataset_path": "json", "output_type": "generate_until"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    entry = ScoredTask("x", "general", "both", "exact", 1.0)

    def wrapper() -> Any:
        raise AssertionError("the model was wrapped")

    with pytest.raises(EvaluationError, match="^x: both is a tag, .*: one, two$"):
        score._run_lmms_eval(wrapper, [entry], tmp_path, False, 1, None)


@pytest.mark.parametrize("how", ["token", "hub offline", "datasets offline", "cached"])
def test_no_login_is_asked_for_where_none_is_needed(
    how: str, listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = STOCK
    if how == "token":
        monkeypatch.setattr(score, "get_token", lambda: "hf_x")
    elif how == "hub offline":
        monkeypatch.setattr(score, "is_offline_mode", lambda: True)
    elif how == "datasets offline":
        monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    else:
        names = ["pope"]
        (tmp_path / "cache/lmms-lab-encoder___pope/default/0.0.0/0123456789").mkdir(parents=True)
    check_logins(names, listed)


def test_a_login_is_asked_for_before_the_model_is_loaded(
    listed: Path, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("mllm_keeplora.continual.run.load_base", load)
    with pytest.raises(EvaluationError, match="^pope: .*hf auth login"):
        run_stream(pope_run(tmp_path, tiny_llava))


def test_a_benchmark_that_cannot_be_loaded_stops_before_training(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The untouched base is measured on everything first: nothing is learnt that could not be judged."""
    monkeypatch.setattr(score, "is_offline_mode", lambda: True)
    with pytest.raises(EvaluationError, match="pope"):
        run_stream(pope_run(tmp_path, tiny_llava))
    assert not list((tmp_path / "run/stages").glob("01-*"))


def pope_run(tmp_path: Path, base: Path) -> RunConfig:
    """One task of one question, and POPE."""
    turns = [{"from": "human", "value": "what is this ?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "train.json").write_text(json.dumps([{"id": 0, "conversations": turns}]))
    asked = {"question_id": 0, "text": "what is this ?", "answer": "red"}
    (tmp_path / "test.json").write_text(json.dumps([asked]))
    task = {
        "name": "t",
        "train": "train.json",
        "test": "test.json",
        "metric": "exact",
        "allow_text_only": True,
    }
    pope = {"name": "pope", "lmms_eval_task": "pope", "score": "pope_accuracy", "native_max": 1.0}
    stream = {"name": "s", "data_root": str(tmp_path), "tasks": [task], "general": [pope]}
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump(stream))
    return RunConfig(
        run_dir=str(tmp_path / "run"),
        stream=str(tmp_path / "stream.yaml"),
        model=ModelConfig(base_model=str(base), device="cpu"),
        train=TrainConfig(max_steps=1),
        cache_dir=str(tmp_path / "cache"),
        method="lora",
        report_to=[],
    )
