"""Runs side by side: what is averaged, what is refused, and a page that is safe and complete."""

import html
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from mllm_keeplora.commands import compare
from mllm_keeplora.evaluation.metrics import retention_ratios, summarize
from mllm_keeplora.reports import comparison, figures
from mllm_keeplora.reports.comparison import GENERAL, LEARNT, Run, compare_runs, format_comparison, grouped
from mllm_keeplora.reports.intervals import Interval
from mllm_keeplora.reports.results import ReportError
from mllm_keeplora.reports.tables import TEXT_WIDTH
from mllm_keeplora.runs.run_directory import RunDirectory
from tests.unit.test_report import (
    HOSTILE,
    METRIC_KEYS,
    TASKS,
    Page,
    check_policy,
    make_retention,
    make_score,
    write_run,
)

BENCHMARKS = ("scenes",)


def retention_of(own: float, kept: float, *, method: str = "keeplora", tasks: Any = TASKS) -> dict[str, Any]:
    """Each task scores `own` in its stage and `kept` afterwards; scenes loses 0.1 a stage."""
    retention = make_retention(tasks, BENCHMARKS, method)
    for row in retention["rows"]:
        for index, name in enumerate(tasks):
            learnt = row["stage"] - 1
            value = own if index == learnt else kept if index < learnt else 0.1
            row["scores"][name] = make_score(value, stderr=0.03)
        row["scores"]["scenes"] = make_score(0.9 - 0.1 * row["stage"], stderr=0.02)
    values = [{name: score["value"] for name, score in row["scores"].items()} for row in retention["rows"]]
    retention["metrics"] = summarize([[row[name] for name in tasks] for row in values])
    retention["metrics"]["retention"] = retention_ratios(
        {"scenes": values[0]["scenes"]}, {"scenes": values[-1]["scenes"]}
    )
    return retention


def save_run(
    run_dir: Path,
    retention: dict[str, Any],
    *,
    seed: int = 0,
    data: str = "abc",
    **settings: Any,
) -> Path:
    """A run directory whose last manifest says what the stream runner's does."""
    write_run(run_dir, retention)
    path = max(RunDirectory(run_dir).stages.glob("**/manifest.json"))
    manifest = json.loads(path.read_text())
    names = [*retention["tasks"], *retention["general"]]
    manifest |= {
        "config": {
            "run_dir": str(run_dir), "seed": seed, "method": retention["method"], "alpha": 32.0,
            "language": {"rank": 16, "gamma": 0.2}, **settings,
        },
        "seeds": {"run": seed, "stage": seed + 3}, "data": dict.fromkeys(names, data),
    }  # fmt: skip
    path.write_text(json.dumps(manifest))
    return run_dir


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """KeepLoRA with two seeds, LoRA with one."""
    return [
        save_run(tmp_path / "a", retention_of(0.9, 0.8), seed=0),
        save_run(tmp_path / "b", retention_of(0.94, 0.7), seed=1),
        save_run(tmp_path / "c", retention_of(0.95, 0.2, method="lora"), seed=0),
    ]


def test_seeds_of_a_label_become_mean_and_standard_error() -> None:
    finals = (0.8, 0.7, 0.75)
    [group] = grouped([Run("keep", seed, retention_of(0.9, kept)) for seed, kept in enumerate(finals)])
    assert group.seeds == (0, 1, 2)
    lasts = [(2 * kept + 0.9) / 3 for kept in finals]
    expected = statistics.fmean(lasts), statistics.stdev(lasts) / math.sqrt(3)
    assert group.shown(group.metrics["bwt"], signed=True) == "-15.0 ± 2.9"
    assert group.metrics["mft"] == pytest.approx((0.9, 0.9, 0.9))
    mean, error = expected
    assert group.metrics["last"] == pytest.approx((mean, mean - error, mean + error))
    assert group.shown(group.metrics["last"]) == "80.0 ± 1.9"
    assert group.curves[LEARNT][-1] == group.metrics["last"]  # after the last stage all tasks are learnt
    assert [e.value for e in group.curves[GENERAL]] == pytest.approx([0.9, 0.8, 0.7, 0.6])
    assert group.kept["scenes"].value == pytest.approx(0.6 / 0.9)
    assert len(group.curves[LEARNT]) == len(group.curves["digits"]) == 4


def test_a_single_run_has_the_error_of_its_questions_where_there_is_one() -> None:
    [group] = grouped([Run("keep", 5, retention_of(0.9, 0.8))])
    for found, value, error in (
        (group.metrics["mft"], 0.9, 0.03 / math.sqrt(3)),
        (group.curves[LEARNT][2], 0.85, 0.03 / math.sqrt(2)),
        (group.curves[GENERAL][0], 0.9, 0.02),
    ):
        assert found == pytest.approx((value, value - 1.96 * error, value + 1.96 * error), abs=1e-5)
    assert group.shown(group.metrics["mft"]) == "90.0 (86–94)"
    for paired in (group.metrics["bwt"], group.metrics["forgetting"], group.kept["scenes"]):
        assert paired.value is not None and paired.low is None


def test_groups_come_in_the_order_of_their_labels_and_are_drawn_apart() -> None:
    labels = [f"method {i}" for i in (3, 1, 2)]
    groups = grouped([Run(label, 0, retention_of(0.9, 0.8)) for label in labels])
    assert [group.label for group in groups] == labels
    many = grouped([Run(f"method {i}", 0, retention_of(0.9, 0.8)) for i in range(14)])
    looks = [(s["color"], s["linestyle"], s["marker"]) for s in figures.styles(len(many))]
    assert len({look[:2] for look in looks}) == len({look[2] for look in looks}) == 14


def test_a_method_has_one_colour_on_every_page() -> None:
    own = {method: figures.method_styles([method])[0] for method in figures.METHODS}
    assert len({(look["color"], look["linestyle"]) for look in own.values()}) == len(own)
    for methods in (["lora", "keeplora"], ["gpm", "unheard of", "lora", "ewc"], ["zero_shot", "joint"]):
        for method, look in zip(methods, figures.method_styles(methods), strict=True):
            assert method not in own or look == own[method]
    several = figures.method_styles(["keeplora", "lora", "keeplora", "keeplora", "unheard of"])
    assert several[0] == own["keeplora"] and several[1] == own["lora"]
    assert len({look["color"] for look in several}) == 5


def test_axes_do_not_make_small_differences_look_large() -> None:
    groups = grouped([Run("keep", 0, retention_of(0.92, 0.9)), Run("lora", 0, retention_of(0.91, 0.9))])
    for draw in comparison._panels(groups).values():
        axes = Figure().add_subplot()
        draw(axes)
        assert axes.get_ylim() == (0, 100)
    assert axes.get_xlim() == (0, 100)  # learning against keeping
    above = grouped([Run("keep", 0, retention_of(1.4, 1.3))])  # captions
    axes = Figure().add_subplot()
    comparison.plot_over_stages(axes, above, LEARNT)
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 140


def test_undefined_numbers_stay_undefined() -> None:
    retention = make_retention()
    retention["metrics"] |= dict.fromkeys(METRIC_KEYS) | {"retention": {"scenes": None}}
    retention["rows"][0]["scores"]["signs"] = None
    retention["rows"][1]["scores"]["scenes"]["stderr"] = None
    groups = grouped([Run("keep", 0, retention), Run("keep", 1, retention), Run("lora", 0, retention)])
    assert groups[0].metrics["bwt"] == Interval(None, None, None)
    assert comparison.draw_comparison(groups).startswith(b"\x89PNG")
    text = format_comparison(groups)
    assert "None" not in text and "nan" not in text.lower()


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "no run was given"),
        (
            [Run("a", 0, retention_of(0.9, 0.8)), Run("b", 0, retention_of(0.9, 0.8, tasks=["x", "y"]))],
            "b, seed 0 has tasks x, y, but a, seed 0 has digits, glyphs, signs",
        ),
        ([Run("a", 3, retention_of(0.9, 0.8))] * 2, "two runs are 'a' with seed 3"),
    ],
)
def test_runs_that_do_not_compare_are_refused(runs: list[Run], message: str) -> None:
    with pytest.raises(ReportError, match=message):
        grouped(runs)


def test_an_unfinished_run_is_refused(runs: list[Path]) -> None:
    run = RunDirectory(runs[1])
    path = run.retention
    retention = json.loads(path.read_text())
    retention["rows"] = retention["rows"][:3]
    path.write_text(json.dumps(retention))
    with pytest.raises(ReportError, match=rf"{runs[1]} is at stage 2 of 3; .* to finish it"):
        compare_runs(runs, runs[0].parent / "out")
    assert not (runs[0].parent / "out").exists()


@pytest.mark.parametrize("missing", ["retention", "manifest"])
def test_a_missing_file_is_named(runs: list[Path], missing: str) -> None:
    run = RunDirectory(runs[2])
    path = run.retention if missing == "retention" else run.stage(3, "signs").manifest
    path.unlink()
    with pytest.raises(ReportError, match=rf"{path} is missing"):
        compare_runs(runs, runs[0].parent / "out")


@pytest.mark.parametrize("key", ["value", "native", "n", "stderr"])
def test_a_score_that_is_no_number_is_named(runs: list[Path], key: str) -> None:
    path = RunDirectory(runs[1]).retention
    retention = json.loads(path.read_text())
    retention["rows"][2]["scores"]["signs"][key] = "0.9"
    path.write_text(json.dumps(retention))
    with pytest.raises(ReportError, match=rf"{path}: the score of signs in the row of stage 2 is .*expected numbers"):
        compare_runs(runs, runs[0].parent / "out")


@pytest.mark.parametrize("content", ["high", [0.9], {"value": None}])
def test_a_metric_that_is_no_number_is_named(runs: list[Path], content: object) -> None:
    path = RunDirectory(runs[1]).retention
    retention = json.loads(path.read_text())
    retention["metrics"]["bwt"] = content
    path.write_text(json.dumps(retention))
    with pytest.raises(ReportError, match=rf"{path}: .*bwt.*expected"):
        compare_runs(runs, runs[0].parent / "out")


def test_other_data_are_refused(runs: list[Path], tmp_path: Path) -> None:
    other = save_run(tmp_path / "d", retention_of(0.9, 0.8), seed=7, data="def")
    with pytest.raises(ReportError, match=rf"digits, glyphs, signs, scenes: {other} was trained or asked on oth"):
        compare_runs([*runs, other], tmp_path / "out")


def test_the_same_run_twice_is_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="two runs are 'keeplora' with seed 0"):
        compare_runs([runs[0], runs[0]], tmp_path / "out")


def test_runs_of_one_method_with_other_settings_are_kept_apart(runs: list[Path], tmp_path: Path) -> None:
    other = save_run(tmp_path / "d", retention_of(0.9, 0.8), language={"rank": 16, "gamma": 1.0})
    groups = compare_runs([runs[0], other, runs[2]], tmp_path / "out")
    labels = [group.label for group in groups]
    assert labels == ["keeplora: language.gamma 0.2", "keeplora: language.gamma 1.0", "lora"]


def test_the_page_shows_what_differs_and_only_that(runs: list[Path], tmp_path: Path) -> None:
    other = save_run(tmp_path / "d", retention_of(0.9, 0.8, method="ewc"), alpha=8.0)
    compare_runs([*runs, other], tmp_path / "out")
    content = (tmp_path / "out" / "comparison.html").read_text()
    settings = Page(content[content.index('<section id="settings">') : content.index('<section id="runs">')])
    assert "methodkeeploraloraewc" in settings.text and "alpha32.032.08.0" in settings.text
    assert not re.search("rank|seed|run_dir|torch", settings.text)
    text = Page(content).text
    for run in (*runs, other):
        assert str(run) in text
    assert "92.0 ± 2.0" in text  # MFT of 90 and 94
    assert content.count("<svg") == 3 + len(TASKS) + 1


def test_the_page_makes_no_requests_and_escapes_text(tmp_path: Path) -> None:
    tasks = [HOSTILE, 'q" onmouseover="x', "$\\frac{$"]
    runs = [
        save_run(tmp_path / "a", retention_of(0.9, 0.8, tasks=tasks)),
        save_run(tmp_path / "b", retention_of(0.9, 0.8, tasks=tasks, method="<img src=x>")),
    ]
    compare_runs(runs, tmp_path / "out")
    content = (tmp_path / "out" / "comparison.html").read_text()
    found = Page(content)
    assert HOSTILE not in content and html.escape(HOSTILE) in content and "<img src=x>" not in content
    assert not {"iframe", "object", "embed", "form"} & set(found.tags)
    assert found.addresses and all(address.startswith(("#", "data:")) for address in found.addresses)
    assert not re.search(r'<[^>]* onmouseover="x', content)
    check_policy(content)


def test_the_same_runs_give_the_same_bytes(runs: list[Path], tmp_path: Path) -> None:
    for out in ("one", "two"):
        compare_runs(runs, tmp_path / out)
    for name in (comparison.PAGE, comparison.PICTURE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one" / comparison.PICTURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [1, 2, 14])
def test_table_shows_every_group_within_its_width(count: int) -> None:
    runs = [
        Run(f"a-method-with-a-rather-long-name-of-number-{i}", seed, retention_of(0.9, 0.8 - seed / 20))
        for i in range(count)
        for seed in (0, 1)
    ]
    table = format_comparison(grouped(runs))
    assert max(map(len, table.splitlines())) <= TEXT_WIDTH
    assert len(re.findall(r"number-\d+ +2 +90\.0 ± 0\.0 +81\.7 ± 1\.7 +-12\.5 ± 2\.5", table)) == count
    assert "66.7 ± 0.0" in table and "mean ± standard error over their seeds" in table


@pytest.mark.parametrize("count", [1, 3, 30])
def test_runs_of_one_method_are_numbered_and_what_tells_them_apart_is_said_whole(count: int) -> None:
    """However much differs: a label cut in its middle told nothing."""
    runs = []
    for value in ("one", "two"):
        details = ", ".join(f"train.setting_number_{i} {value}{i}" for i in range(count))
        runs.append(Run(f"keeplora: {details}", 0, retention_of(0.9, 0.8)))
    groups = grouped([*runs, Run("lora", 0, retention_of(0.9, 0.3, method="lora"))])
    table = format_comparison(groups)
    assert max(map(len, table.splitlines())) <= TEXT_WIDTH
    assert [line.split("  ")[0] for line in table.splitlines()[3:6]] == ["keeplora 1", "keeplora 2", "lora"]
    words = " ".join(table.split())
    for number, run in enumerate(runs, start=1):
        assert run.label.replace("keeplora:", f"keeplora {number}:") in words
    labels = comparison.picture_labels(groups)
    assert len(set(labels)) == 3 and all(len(label) <= comparison.LABEL_WIDTH for label in labels)
    assert labels[2] == "lora"


def test_settings_that_differ_may_hold_any_characters() -> None:
    runs = [Run(f"keeplora: train.optim {odd}", 0, retention_of(0.9, 0.8)) for odd in ("a\x1b[2Jb", "a\nb")]
    table = format_comparison(grouped(runs))
    assert "\x1b" not in table and "keeplora 2: train.optim a?b" in table


def test_every_row_of_a_table_has_a_cell_under_each_header(runs: list[Path], tmp_path: Path) -> None:
    other = save_run(tmp_path / "d", retention_of(0.9, 0.8), alpha=8.0)
    compare_runs([*runs, other], tmp_path / "out")
    page = Page((tmp_path / "out" / comparison.PAGE).read_text())
    page.check_tables()
    assert len(page.tables) == 4  # metrics, scores, settings, runs
    assert page.column("runs") == ["2", "1", "1"]
    assert page.column("seed") == ["0", "1", "0", "0"]
    assert [cell.replace("\xa0", " ") for cell in page.column("BWT")] == ["-17.0 ± 7.0", "-75.0", "-10.0"]
    assert len(set(page.ids)) == len(page.ids)


def test_the_command_writes_the_files_and_prints_the_table(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    compare.main([*map(str, runs), "--out", str(out)])
    printed = capsys.readouterr().out
    assert re.search(r"^lora +1 +95\.0", printed, re.MULTILINE)
    assert {path.name for path in out.iterdir()} == {comparison.PAGE, comparison.PICTURE}
    assert all(str(path) in printed for path in out.iterdir())
