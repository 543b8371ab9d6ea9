"""The comparison study: which runs it makes, how it tunes, and its statistics beside references."""

import json
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from scipy import stats

from mllm_keeplora.config import ConfigError, RunConfig
from mllm_keeplora.data.stream import load_stream
from mllm_keeplora.methods.base import load_method
from mllm_keeplora.runs.run_directory import RunDirectory
from mllm_keeplora.studies import methods
from mllm_keeplora.studies.methods import (
    Job,
    Study,
    Tuning,
    config_of,
    held_out_stream,
    jobs_of,
    load_study,
    run_directory,
    run_study,
    tune,
)
from mllm_keeplora.studies.results import (
    METRICS,
    add_statistics,
    collect,
    format_results,
    fronts,
    holm,
    paired_test,
    summary,
    write_results,
)

ROOT = Path(__file__).resolve().parents[2]
RATE = "train.learning_rate"
STUDIES = sorted((ROOT / "recipes/studies").glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes are named from the repository's folder."""
    monkeypatch.chdir(ROOT)


def study(tmp_path: Path, tuned: bool = True) -> Study:
    return Study(
        recipe=["recipes/configs/vqa/small.yaml", "recipes/configs/methods/paper.yaml"],
        runs=str(tmp_path / "runs"),
        results=str(tmp_path / "results"),
        reference="ours",
        seeds=[0, 100, 200],
        more_seeds=[0, 100],
        methods={"plain": {"method": "lora"}, "ours": {"method": "keeplora"}},
        more_methods={"again": {"method": "replay", "method_options": {"share": 0.2}}},
        ablations={"rank 8": {"language.rank": 8}},
        settings={"train.max_steps": 5, "report_to": []},
        tuning=Tuning([1e-3, 2e-3, 4e-3], 2, 1, 9000, str(tmp_path / "held_out")) if tuned else None,
    )


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.name)
def test_every_shipped_study_names_runs_that_the_recipe_takes(path: Path) -> None:
    loaded = load_study(path)
    for job in jobs_of(loaded, everything=True):
        own = loaded.arms[job.arm].get("train.learning_rate", 1e-3)
        config = config_of(loaded, job.arm, {"train.learning_rate": own, "seed": job.seed})
        load_method(config)
        assert (config.seed, config.train.learning_rate) == (job.seed, own)
        arm = {**loaded.settings, **loaded.arms[job.arm]}
        found = {name: attrgetter(name)(config) for name in arm if "." in name}
        assert found == {name: value for name, value in arm.items() if "." in name}
    directories = {run_directory(loaded, job) for job in jobs_of(loaded, everything=True)}
    assert len(directories) == len(jobs_of(loaded, everything=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reference": "theirs"}, "reference 'theirs' is none of methods"),
        ({"seeds": [1]}, "at least two different numbers"),
        ({"seeds": [1, 1]}, "at least two different numbers"),
        ({"sedes": [1, 2]}, "sedes"),
        ({"candidates": {"ours": [{"alpha": 1}]}}, "candidates of 'ours': .* a study without tuning"),
        ({"more_methods": {"ours": {}}}, "two arms of the study have one name: ours"),
    ],
)
def test_a_wrong_study_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**asdict(study(tmp_path, tuned=False)), **change}))
    with pytest.raises(ConfigError, match=message):
        load_study(path)


def test_the_default_set_has_all_seeds_and_all_adds_the_rest(tmp_path: Path) -> None:
    found = study(tmp_path)
    assert set(jobs_of(found, False)) == {Job(a, s) for a in ("plain", "ours") for s in (0, 100, 200)}
    added = set(jobs_of(found, True)) - set(jobs_of(found, False))
    assert added == {Job(a, s) for a in ("again", "rank 8") for s in (0, 100)}
    assert set(jobs_of(found, False, ["again"])) == {Job("again", 0), Job("again", 100)}
    with pytest.raises(ConfigError, match="no arm 'agian'"):
        jobs_of(found, False, ["agian"])


def test_a_study_over_rates_runs_every_method_at_each_and_draws_the_fronts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = replace(study(tmp_path, tuned=False), rates=[4e-3, 1e-3], reference="ours, 0.001", ablations={})
    assert list(found.arms) == [f"{name}, {rate}" for name in ("plain", "ours", "again") for rate in (0.001, 0.004)]
    asked = fake_runs(monkeypatch, lambda config: 100 * config.train.learning_rate)
    run_study(found, jobs_of(found, False))
    assert sorted((config.method, config.train.learning_rate) for config in asked) == sorted(
        (method, rate) for method in ("lora", "keeplora") for rate in (1e-3, 4e-3) for _ in found.seeds
    )
    table = write_results(found)
    assert "| ours, 0.004 | 3 | 0.004 |" in table
    drawn = fronts(found, collect(found)["arms"])
    assert list(drawn["method"]) == ["plain", "plain", "ours", "ours"]  # what has not run is not drawn
    assert list(drawn["last"].round(6)) == [10, 40, 10, 40]
    assert (tmp_path / "results/fronts.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="rates or tuning, not both"):
        replace(study(tmp_path), rates=[1e-3], reference="ours, 0.001")


def test_an_interrupted_study_has_every_arm_for_its_first_seeds(tmp_path: Path) -> None:
    order = [job.seed for job in jobs_of(study(tmp_path), True)]
    assert order == sorted(order)


def fake_runs(monkeypatch: pytest.MonkeyPatch, last: Any) -> list[RunConfig]:
    """Runs that cost nothing and have a given Last; the settings asked for."""
    asked: list[RunConfig] = []

    def run(config: RunConfig) -> dict[str, Any]:
        asked.append(config)

        def row(value: float) -> dict[str, Any]:
            score = {"native": value, "native_max": 1.0, "stderr": None, "n": 4}
            return {"digits": {"value": value, **score}, "scenes": {"value": 0.5, **score}}

        stream = {"mft": 0.9, "last": last(config), "bwt": last(config) - 0.9, "transfer": None, "average": 0.5}
        metrics = {**stream, "forgetting": 0.0}
        retention = {
            "method": config.method,
            "metrics": {**metrics, "retention": {"scenes": 1.0}},
            "rows": [
                {"stage": 0, "task": None, "scores": row(0.1)},
                {"stage": 1, "task": "digits", "scores": row(last(config))},
            ],
            "tasks": ["digits"],
            "general": ["scenes"],
        }
        directory = RunDirectory(Path(config.run_dir))
        directory.path.mkdir(parents=True)
        directory.retention.write_text(json.dumps(retention))
        directory.config.write_text(json.dumps(asdict(config)))
        return retention

    monkeypatch.setattr(methods, "run_stream", run)
    monkeypatch.setattr(methods, "held_out_stream", lambda *_: Path("held_out.yaml"))
    return asked


def test_each_method_gets_its_best_rate_and_an_ablation_the_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = {"lora": 1e-3, "keeplora": 4e-3}
    asked = fake_runs(monkeypatch, lambda c: 0.8 - abs(c.train.learning_rate - best[c.method]))
    found = study(tmp_path)
    chosen = [tune(found, arm) for arm in ("plain", "ours", "rank 8")]
    assert chosen == [{RATE: 1e-3}, {RATE: 4e-3}, {RATE: 4e-3}]
    assert len(asked) == 6, "an ablation is not tuned, and a complete run is not repeated"
    assert {c.seed for c in asked} == {9000}
    assert {c.stream for c in asked} == {"held_out.yaml"}


def test_a_method_chooses_among_its_candidates_at_its_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {0.1: 0.5, 0.2: 0.6, 0.4: 0.7}

    def last(config: RunConfig) -> float:
        return shares.get(config.method_options.get("share", 0.0), 0.4) - config.train.learning_rate

    asked = fake_runs(monkeypatch, last)
    candidates: dict[str, Any] = {
        "again": [{"method_options": {"share": share}} for share in (0.1, 0.4)],
        "ours": [],
    }
    found = replace(study(tmp_path), candidates=candidates)
    assert tune(found, "again") == {RATE: 1e-3, "method_options": {"share": 0.4}}
    assert [(c.train.learning_rate, c.stream) for c in asked[3:]] == [(1e-3, "held_out.yaml")] * 2
    assert tune(found, "ours") == {RATE: 1e-3}
    run_study(found, [Job("again", 0)])
    assert asked[-1].method_options == {"share": 0.4}
    assert collect(found)["arms"]["again"]["tuning"]["{method_options: {share: 0.4}}"] == pytest.approx(0.699)


def test_an_arms_own_settings_win_over_candidates_that_are_no_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_runs(monkeypatch, lambda _: 0.5)
    found = replace(study(tmp_path), candidates={"again": [{"method_options": {"share": 0.1}}]})
    assert tune(found, "again") == {RATE: 1e-3}


def test_equal_candidates_give_the_smaller_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runs(monkeypatch, lambda _: 0.5)
    assert tune(study(tmp_path), "plain") == {RATE: 1e-3}


def test_a_study_runs_what_is_missing_and_reports_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bonus = {"lora": 0.0, "keeplora": 0.2, "replay": 0.1}
    asked = fake_runs(monkeypatch, lambda c: 0.5 + bonus[c.method] + c.seed * 1e-4 * (1 + bonus[c.method]))
    found = study(tmp_path, tuned=False)
    run_study(found, jobs_of(found, False))
    assert len(asked) == 6
    run_study(found, jobs_of(found, False, ["plain", "again"]))
    assert len(asked) == 8

    results = collect(found)
    assert list(results["arms"]) == ["plain", "ours", "again"], "an arm without a run is left out"
    plain = results["arms"]["plain"]
    assert plain["summary"]["last"]["mean"] == pytest.approx(0.51)
    assert plain["summary"]["last"]["standard_error"] == pytest.approx(0.01 / 3**0.5)
    against = plain["against_reference"]["last"]
    assert against["n"] == 3
    assert against["difference"] == pytest.approx(0.202)
    assert against["p"] < 0.001
    assert against["p_holm"] == pytest.approx(2 * against["p"]), "of two comparisons the smaller p counts twice"
    assert results["arms"]["again"]["against_reference"]["last"]["n"] == 2
    table = write_results(found)
    assert (Path(found.results) / "methods.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((Path(found.results) / "results.json").read_text())["arms"].keys() == results["arms"].keys()
    assert table == format_results(results)
    assert "| plain | 3 | 0.00141 | 90.0 ± 0.0 | 51.0 ± 0.6 |" in table


def test_a_run_under_other_settings_is_not_taken_for_the_study_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake_runs(monkeypatch, lambda _: 0.5)
    found = study(tmp_path, tuned=False)
    run_study(found, [Job("plain", 0)])
    stored = RunDirectory(run_directory(found, Job("plain", 0))).config
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "alpha": 1.0}))
    with pytest.raises(FileExistsError):  # the stand-in's refusal; run_stream names the settings
        run_study(found, [Job("plain", 0)])
    assert len(asked) == 2


def test_the_split_asks_about_records_that_training_does_not_show(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    turns = [{"from": f, "value": v} for f, v in (("human", "<image>\nq"), ("gpt", "a"), ("human", "r"), ("gpt", "b"))]
    records = [{"id": i, "image": f"{i}.png", "conversations": turns} for i in range(5)]
    (root / "t.json").write_text(json.dumps(records))
    task = {"name": "t", "train": "t.json", "test": "t.json", "metric": "exact"}
    stream = tmp_path / "stream.yaml"
    stream.write_text(yaml.safe_dump({"name": "s", "data_root": str(root), "tasks": [task]}))
    out = tmp_path / "split"
    path = held_out_stream(stream, Tuning([1e-3], 1, 2, 0, str(out)))
    written = path.read_text()
    assert held_out_stream(stream, Tuning([1e-3], 1, 2, 0, str(out))).read_text() == written
    train = json.loads((out / "t/train.json").read_text())
    test = json.loads((out / "t/test.json").read_text())
    assert [r["image"] for r in train] == ["0.png", "1.png", "2.png"]
    assert [(q["image"], q["text"], q["answer"]) for q in test] == [("3.png", "q", "a"), ("4.png", "r", "b")]
    with pytest.raises(ConfigError, match="held_out is 5"):
        held_out_stream(stream, Tuning([1e-3], 1, 5, 0, str(tmp_path / "none")))


def conversations(number: int, answer: str = "a") -> dict[str, Any]:
    turns = [{"from": "human", "value": f"q{number}"}, {"from": "gpt", "value": answer}]
    return {"id": number, "conversations": turns}


@pytest.mark.parametrize("change", ["held_out", "tasks", "a record", "max_new_tokens", "nothing"])
def test_a_split_of_other_records_is_not_taken_for_this_one(change: str, tmp_path: Path) -> None:
    """What was tuned on it would be read as tuned on this."""
    for name in "tu":
        (tmp_path / f"{name}.json").write_text(json.dumps([conversations(number) for number in range(5)]))
    more: dict[str, Any] = {"metric": "exact", "allow_text_only": True}
    tasks = [{"name": name, "train": f"{name}.json", "test": f"{name}.json", **more} for name in "tu"]
    stream = tmp_path / "stream.yaml"
    stream.write_text(yaml.safe_dump({"name": "s", "data_root": str(tmp_path), "tasks": tasks}))
    tuning = Tuning([1e-3], 2, 2, 0, str(tmp_path / "split"))
    path = held_out_stream(stream, tuning)
    assert all(task["allow_text_only"] for task in yaml.safe_load(path.read_text())["tasks"])
    if change == "a record":
        (tmp_path / "u.json").write_text(json.dumps([conversations(number, "b") for number in range(5)]))
    elif change == "max_new_tokens":
        tasks[1]["max_new_tokens"] = 7
        stream.write_text(yaml.safe_dump({"name": "s", "data_root": str(tmp_path), "tasks": tasks}))
    elif change != "nothing":
        tuning = replace(tuning, **{change: 1})
    if change == "nothing":
        assert held_out_stream(stream, tuning) == path
        return
    with pytest.raises(ConfigError, match="holds another split .*name other folders in tuning.data and runs"):
        held_out_stream(stream, tuning)


@pytest.mark.parametrize(
    "record",
    [
        {"id": 1, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"id": 1, "problem": "q", "solution": "a"},
        ["q", "a"],
    ],
)
def test_records_that_no_question_can_be_made_of_are_named(record: Any, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps([record] * 3))
    task = {"name": "t", "train": "t.json", "test": "t.json", "metric": "exact"}
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump({"name": "s", "data_root": str(tmp_path), "tasks": [task]}))
    with pytest.raises(ConfigError, match="takes records with `conversations`, and .*t.json has others"):
        held_out_stream(tmp_path / "stream.yaml", Tuning([1e-3], 1, 1, 0, str(tmp_path / "split")))


def series(*values: float) -> pd.Series:
    """Values under the seeds 0, 1, .."""
    return pd.Series(values, dtype=float)


def test_the_paired_test_is_scipys() -> None:
    first, second = series(0.5, 0.6, 0.9), series(0.4, 0.45, 0.6)
    found = paired_test(first, second)
    assert found["p"] == pytest.approx(stats.ttest_rel(first, second).pvalue)
    assert found["difference"] == pytest.approx(0.55 / 3)
    assert paired_test(first, second.drop(1))["n"] == 2, "over the seeds that both have"
    assert paired_test(series(0.5), series(0.4))["p"] is None
    assert paired_test(series(0.5, 0.75), series(0.25, 0.5))["p"] is None, "no spread, no test"
    for three in (series(0.95, 0.7, 0.3), series(0.9, 0.6, 0.4), series(0.71, 0.31, 0.91)):  # rounding is no spread
        assert paired_test(three, three - 0.3)["p"] is None and paired_test(three - 0.3, three)["p"] is None
    assert paired_test(series(), series()) == {"n": 0, "difference": None, "p": None}


def test_holm_steps_down() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.5}) == pytest.approx({"a": 1.0, "b": 1.0})
    assert holm({"a": 0.02, "b": None}) == pytest.approx({"a": 0.02}), "an undefined one is not counted"
    assert holm({}) == {}


def test_one_seed_has_no_standard_error() -> None:
    assert summary([0.5]) == {"mean": 0.5, "standard_error": None, "n": 1}
    assert summary([0.4, 0.6])["standard_error"] == pytest.approx(0.1)


@pytest.mark.parametrize("folder", sorted((ROOT / "docs/results").iterdir()), ids=lambda p: p.name)
def test_stored_runs_give_the_stored_statistics_and_table(folder: Path) -> None:
    stored = json.loads((folder / "results.json").read_text())
    kept = ("kind", "settings", "tuning", "seeds")
    arms = {name: {key: arm[key] for key in kept} for name, arm in stored["arms"].items()}
    add_statistics(arms, stored["reference"])
    table = (folder / "table.md").read_text()
    assert format_results({"arms": arms}) == table
    methods_alone = {name: arm for name, arm in arms.items() if arm["kind"] == "method"}
    page = (ROOT / "docs/results.md").read_text()
    assert format_results({"arms": methods_alone}) in page, "the page shows what was generated"
    for name, arm in arms.items():
        assert set(arm) == set(stored["arms"][name])
        for group in set(arm) - set(kept):
            for metric in METRICS:
                assert arm[group][metric] == pytest.approx(stored["arms"][name][group][metric])


def test_the_shipped_split_is_a_stream_of_the_first_tasks() -> None:
    tuning = load_study(ROOT / "recipes/studies/image.yaml").tuning
    assert tuning is not None
    stream = load_stream(ROOT / "recipes/streams/small_vqa.yaml", check_files=False)
    assert 0 < tuning.tasks <= len(stream.tasks)
