"""Reports are pure functions of a run directory; these tests build small ones by hand."""

import base64
import csv
import hashlib
import html
import io
import itertools
import json
import math
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, ImageColor

from mllm_keeplora.config import RunConfig, TowerConfig, TrainConfig
from mllm_keeplora.continual.saved_run import load_run
from mllm_keeplora.planning.text import _general_lines
from mllm_keeplora.reports import figures
from mllm_keeplora.reports.intervals import Interval, interval_of, mean_of_intervals
from mllm_keeplora.reports.page import write_report
from mllm_keeplora.reports.results import ReportError
from mllm_keeplora.reports.tables import METRICS, TEXT_WIDTH, format_table, matrix_csv
from mllm_keeplora.runs.files import ArtifactError
from mllm_keeplora.runs.manifests import SCHEMA_VERSION
from mllm_keeplora.runs.run_directory import RunDirectory

TASKS = ["digits", "glyphs", "signs"]
HOSTILE = "<script>alert(1)</script>"
METRIC_KEYS = ("last", "mft", "maa", "bwt", "forgetting", "transfer", "average")
PAPERS = ("#ffffff", "#12191f")  # of a page in light and in dark mode


def outputs(run_dir: Path) -> list[Path]:
    """What a report writes."""
    run = RunDirectory(run_dir)
    return [run.matrix_table, run.matrix_picture, run.report]


def make_score(value, stderr=0.012, n=250):
    return {"value": value, "native": 100 * value, "native_max": 100.0, "stderr": stderr, "n": n}


def make_retention(tasks=TASKS, general=("scenes",), method="keeplora"):
    """0.9 on a stage's own task, 0.85 on earlier and 0.2 on later ones; general loses 0.01 a stage."""
    rows = []
    for stage in range(len(tasks) + 1):
        own = stage - 1
        scores = {name: make_score(0.9 if i == own else 0.85 if i < own else 0.2) for i, name in enumerate(tasks)}
        scores |= {name: make_score(0.87 - 0.01 * stage) for name in general}
        rows.append({"stage": stage, "task": tasks[own] if stage else None, "scores": scores})
    metrics = {
        "last": 0.867, "mft": 0.9, "maa": 0.881, "bwt": -0.05, "forgetting": 0.05, "transfer": 0.2,
        "average": 0.6, "retention": dict.fromkeys(general, 0.966),
    }  # fmt: skip
    if len(tasks) == 1:
        metrics |= {"bwt": None, "forgetting": None, "transfer": None}
    return {
        "schema_version": SCHEMA_VERSION, "method": method, "tasks": list(tasks), "general": list(general),
        "rows": rows, "metrics": metrics,
    }  # fmt: skip


def make_modules(stage, method="keeplora", depths=4):
    keeps = method != "lora"
    return [
        {
            "name": f"model.{tower}_model.layers.{depth}.{kind}", "tower": tower, "depth": depth,
            "in_features": 128, "out_features": 64, "k_w": 18 + 2 * depth if keeps else 0,
            "k_g": 0,
            "k_f": 5 * stage if keeps else 0, "rank": 8, "lambda": 0.2 + 0.8 * depth / (depths - 1),
            "leakage": 10.0 ** -(7.5 - 0.1 * depth - 0.1 * stage) if keeps else 0.0,
            "orthonormality_error": 2.1e-7 if keeps else None, "saturated": depth == 1 and kind == "q_proj",
        }
        for tower in ("vision", "language")
        for depth in range(depths)
        for kind in ("q_proj", "mlp.fc1")
    ]  # fmt: skip


def make_manifest(row, method="keeplora", steps=300):
    stage, trained = row["stage"], row["task"] is not None
    timings = {"probe": 2.9, "train": 31.0, "protect": 2.4} if trained else {}
    skipped = [{"file": "train.json", "row": 7, "reason": "image <b>missing</b>"}] if stage == 2 else []
    return {
        "schema_version": SCHEMA_VERSION, "stage": stage, "task": row["task"], "method": method,
        "previous": None, "config": {}, "seeds": {"run": 99, "stage": 100 + stage}, "data": {},
        "packages": {"torch": "2.9.0", "peft": "0.18.0"}, "base_model": {"name": "base", "hash": "abc123"},
        "modules": make_modules(stage, method) if trained else [],
        "counts": {
            "train_samples": 1200, "steps": steps, "trainable_parameters": 43210, "skipped_records": skipped,
        } if trained else {},
        "timings": {**timings, "evaluate": 9.0, "total": 46.5 if trained else 9.5},
        "peak_memory_bytes": 900 * 2**20, "scores": row["scores"], "files": {},
        "loss": [[step, 2.5 * 0.98**step + 0.05] for step in range(1, steps + 1)] if trained else [],
    }  # fmt: skip


def write_run(run_dir: Path, retention) -> Path:
    run = RunDirectory(run_dir)
    for row in retention["rows"]:
        path = run.stage(row["stage"], row["task"]).manifest
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(make_manifest(row, retention["method"])))
    config = RunConfig(
        method=retention["method"],
        method_options={"nested": [{"one": 1}, None]},
        vision=TowerConfig(eps_w=0.625),
        train=TrainConfig(learning_rate=2e-3),
    )
    run.config.write_text(json.dumps(asdict(config)))
    run.retention.write_text(json.dumps(retention))
    return run_dir


def page_of(run_dir: Path, retention) -> str:
    write_report(load_run(write_run(run_dir, retention)))
    return RunDirectory(run_dir).report.read_text()


@pytest.fixture(scope="module")
def default_page(tmp_path_factory) -> str:
    """The page of `make_retention()`: drawing one takes seconds."""
    return page_of(tmp_path_factory.mktemp("default"), make_retention())


class Page(HTMLParser):
    """Collects tags, tables and the text outside <style>, and checks that tags nest."""

    VOID = frozenset({"meta", "link", "wbr", "br", "img", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.tables: list[list[list[str]]] = []  # of rows of cells; a cell over n columns stands n times
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1] += [""] * int(dict(attrs).get("colspan", 1))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")], "code in an attribute"
        self.addresses += [value for name, value in attrs if name in {"src", "href", "xlink:href", "data"}]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> out of order"

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def check_tables(self) -> None:
        """Every row of a table has a cell for each column."""
        assert self.tables
        for rows in self.tables:
            assert len(rows) > 1 and len({len(row) for row in rows}) == 1, rows

    def column(self, header: str) -> list[str]:
        """The cells under the only header of that text."""
        [(rows, index)] = [(t, t[0].index(header)) for t in self.tables if header in t[0]]
        return [row[index] for row in rows[1:]]


def test_csv_holds_every_number_and_reads_back():
    retention = make_retention(tasks=['a, "b"', "c"])
    retention["rows"][0]["scores"]["c"] = None
    retention["rows"][1]["scores"]["c"]["stderr"] = None
    lines = list(csv.DictReader(matrix_csv(retention).splitlines()))
    assert [(line["stage"], line["task"]) for line in lines] == [("0", ""), ("1", 'a, "b"'), ("2", "c")]
    for line, row in zip(lines, retention["rows"], strict=True):
        for name, score in row["scores"].items():
            for column, field in ((name, "value"), (f"{name}:stderr", "stderr"), (f"{name}:n", "n")):
                expected = None if score is None else score[field]
                assert line[column] == "" if expected is None else float(line[column]) == expected


def test_csv_puts_tasks_before_general_benchmarks():
    header = matrix_csv(make_retention(general=["scenes", "pope"])).splitlines()[0].split(",")
    assert header[:7] == ["stage", "task", *TASKS, "scenes", "pope"]


@pytest.mark.parametrize("label", ["digits + signs", "0.5 digits + 2 glyphs", "digits + " + "x" * 80])
def test_the_table_of_a_sum_of_stages_holds_what_a_sum_has(label: str) -> None:
    """An edited adapter is no stage: it has no number, and what needs rows of stages is not listed by dashes."""
    retention = make_retention()
    row = {**retention["rows"][-1], "stage": None, "task": label}
    undefined = dict.fromkeys(METRIC_KEYS) | {"last": 0.5, "retention": {"scenes": 0.9}}
    table = format_table({**retention, "rows": [retention["rows"][0], row], "metrics": undefined})
    assert re.search(rf"^{re.escape(label[:20])}", table, flags=re.M) and "1 digits" not in table
    assert re.findall(r"^(\w+) +[\d.-]+ (?:%|points)", table, flags=re.M) == ["Last", "Retention"]
    assert max(map(len, table.splitlines())) <= TEXT_WIDTH


def test_metrics_that_a_run_does_not_have_yet_are_listed() -> None:
    retention = make_retention(TASKS[:1])
    assert re.search(r"^BWT +- points", format_table(retention), flags=re.M)


def test_table_shows_matrix_metrics_and_own_stages():
    table = format_table(make_retention())
    lines = table.splitlines()
    rows = {line.split()[1]: line for line in lines if re.match(r"\d ", line)}
    rows["base"] = next(line for line in lines if line.startswith("base"))
    assert rows["base"].split() == ["base", "20.0", "20.0", "20.0", "|", "87.0"]
    assert rows["glyphs"].split() == ["2", "glyphs", "85.0", "90.0*", "20.0", "|", "85.0"]
    assert table == "\n".join(line.rstrip() for line in lines)
    # numbers of one column end below each other
    assert len({rows[name].index("|") for name in rows}) == 1
    for metric in ("Last", "MFT", "MAA", "BWT", "Forgetting", "Transfer", "Average", "Retention"):
        assert any(line.startswith(metric) for line in lines), metric
    assert re.search(r"^BWT +-5\.0 points", table, re.MULTILINE)
    assert re.search(r"^Retention +96\.6 % +scenes", table, re.MULTILINE)


@pytest.mark.parametrize("count", [1, 4, 8, 30])
@pytest.mark.parametrize("general", [0, 1, 6])
def test_table_fits_its_width_and_drops_no_column(count, general):
    tasks = [f"remote-sensing-visual-question-answering-part-{i}" for i in range(count)]
    retention = make_retention(tasks, [f"a-general-benchmark-with-a-rather-long-name-{i}" for i in range(general)])
    for index, row in enumerate(retention["rows"]):
        for column, name in enumerate((*tasks, *retention["general"])):
            row["scores"][name] = make_score(column / 100 if index == count else 0.5)
    table = format_table(retention)
    assert max(map(len, table.splitlines())) <= TEXT_WIDTH
    last = [line[24:] for line in table.splitlines() if line.startswith(f"{count} ")]
    cells = re.findall(r"\d+\.\d", " ".join(last))
    assert [float(cell) for cell in cells] == list(range(count + general))


def test_table_survives_nulls_and_control_characters():
    retention = make_retention(["one", "two\x1b[31m"])
    retention["rows"][0]["scores"]["two\x1b[31m"] = None
    retention["metrics"] |= dict.fromkeys(METRIC_KEYS) | {"retention": {"scenes": None}}
    table = format_table(retention)
    assert "\x1b" not in table
    assert re.search(r"^Last +- %", table, re.MULTILINE)
    assert "nan" not in table.lower() and "None" not in table


def test_report_writes_its_files_and_nothing_else(tmp_path):
    run_dir = write_run(tmp_path, make_retention())
    before = {path for path in run_dir.rglob("*")}
    write_report(load_run(run_dir))
    assert set(run_dir.rglob("*")) - before == set(outputs(run_dir))
    assert RunDirectory(run_dir).matrix_picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert RunDirectory(run_dir).matrix_table.read_text() == matrix_csv(make_retention())


def test_heat_map_outlines_the_own_stage_cells():
    def share_of_outline(retention):
        image = Image.open(io.BytesIO(figures.matrix_picture(retention, "run"))).convert("RGB")
        pixels = dict((colour, count) for count, colour in image.getcolors(maxcolors=2**24))
        return pixels.get(ImageColor.getrgb(figures.OWN_COLOUR), 0) / (image.width * image.height)

    untrained = make_retention()
    untrained["rows"] = untrained["rows"][:1]
    assert share_of_outline(untrained) == 0
    assert 0.001 < share_of_outline(make_retention()) < 0.03  # lines, not filled cells


def test_heat_map_takes_names_literally():
    # A formula that is none would be an error.
    assert figures.matrix_picture(make_retention([r"$\frac{$"]), r"$\run{$").startswith(b"\x89PNG")


def test_report_is_a_pure_function_of_its_files(tmp_path):
    run_dir = write_run(tmp_path, make_retention())
    write_report(load_run(run_dir))
    first = [path.read_bytes() for path in outputs(run_dir)]
    write_report(load_run(run_dir))
    assert [path.read_bytes() for path in outputs(run_dir)] == first


def test_page_says_what_was_learnt_and_kept(default_page):
    text = Page(default_page).text
    assert "The model learnt 3 tasks one after another." in text
    assert "a task scores 90.0 % on average, against 20.0 % for the untouched base" in text
    assert "5.0 points were lost" in text
    assert "On the general benchmark scenes it keeps 96.6 % of the untouched base's score." in text
    for _, _, meaning in METRICS.values():
        assert meaning in text
    for part in (
        "torch",
        "2.9.0",
        "abc123",
        "train.learning_rate0.002",
        "vision.eps_w0.625",
        'method_options.nested[{"one": 1}, null]',
        "944 MB",
        "46.5 s",
    ):
        assert part in text, part
    assert "skipped record" in text and "row 7" in text
    assert text.count("model.vision_model.layers.3.mlp.fc1") == len(TASKS)


def check_policy(content: str) -> None:
    """Nothing is loaded, and the one script is the one that the policy names by its hash."""
    [script] = re.findall("<script>(.*?)</script>", content, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', content)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"


def test_page_makes_no_requests_and_runs_no_scripts_but_the_filter(default_page):
    page = Page(default_page)
    assert not {"iframe", "object", "embed", "form"} & set(page.tags)
    assert page.addresses and all(address.startswith(("#", "data:")) for address in page.addresses)
    check_policy(default_page)
    assert not re.search(r"url\((?!#)|@import|https?:", default_page)


def test_text_from_data_is_escaped(tmp_path):
    retention = make_retention([HOSTILE, 'q" onmouseover="x'], general=["<img src=x>"])
    content = page_of(tmp_path, retention)
    page = Page(content)
    assert HOSTILE not in content and "<img" not in content and "<b>missing" not in content
    assert html.escape(HOSTILE) in content
    assert HOSTILE in page.text and "image <b>missing</b>" in page.text
    check_policy(content)
    assert not re.search(r'<[^>]* onmouseover="x', content)


def test_cell_titles_carry_interval_and_count(tmp_path):
    retention = make_retention()
    retention["rows"][1]["scores"]["scenes"]["stderr"] = None
    content = page_of(tmp_path, retention)
    stated = "digits, after stage 1 (digits): 90.0 %, 95 % interval 87.6 to 92.4, n = 250; native score 90 of 100"
    assert stated in content
    assert "scenes, after stage 1 (digits): 86.0 %, interval undefined, n = 250" in content


def test_undefined_numbers_are_dashes(tmp_path):
    retention = make_retention()
    retention["rows"][0]["scores"]["signs"] = None  # a task appended later
    del retention["rows"][1]["scores"]["signs"]
    retention["rows"][2]["scores"]["digits"]["stderr"] = None
    retention["metrics"] |= dict.fromkeys(METRIC_KEYS) | {"retention": {"scenes": None}}
    run_dir = write_run(tmp_path, retention)
    path = RunDirectory(run_dir).stage(1, "digits").manifest
    manifest = json.loads(path.read_text())
    manifest["peak_memory_bytes"] = None
    manifest["modules"][0] |= {"leakage": None, "k_w": None, "lambda": None, "depth": None}
    path.write_text(json.dumps(manifest))
    write_report(load_run(run_dir))
    content = RunDirectory(run_dir).report.read_text()
    assert "None" not in content and "nan" not in re.findall("[a-z]+", content.lower())
    assert 'title="signs, after stage 1 (digits): not measured">-</td>' in content


@pytest.mark.parametrize(
    ("tasks", "general", "method"),
    [
        (["only"], ["scenes"], "keeplora"),
        (TASKS, ["scenes"], "lora"),
        (TASKS, [], "keeplora"),
        ([], ["scenes"], "keeplora"),
    ],
)
def test_small_and_unusual_streams(tmp_path, tasks, general, method):
    retention = make_retention(tasks, general, method)
    if not tasks:
        retention["metrics"] |= dict.fromkeys(METRIC_KEYS)
    page = Page(page_of(tmp_path, retention))
    page.check_tables()
    assert "None" not in page.text
    assert ("watches no general benchmark" in page.text) == (not general)
    assert ("No stage has been trained yet" in page.text) == (not tasks)
    format_table(retention)


def test_unfinished_stream_says_so(tmp_path):
    retention = make_retention()
    retention["rows"] = retention["rows"][:2]
    retention["metrics"] |= dict.fromkeys(METRIC_KEYS)
    assert "The model has learnt 1 of 3 tasks so far." in Page(page_of(tmp_path, retention)).text


def markers(chart: str) -> list[tuple[float, float]]:
    """Places of the points of a chart without error bars, in its own units."""
    return [(float(x), float(y)) for x, y in re.findall(r'<use [^>]* x="([^"]*)" y="([^"]*)"', chart)]


def curve(*values: float | None) -> list[Interval]:
    return [Interval(value, None, None) for value in values]


def test_scores_above_one_stay_inside_their_chart(tmp_path):
    chart = figures.score_chart("signs", [curve(0.2, 0.9, 1.37)], own=None)  # CIDEr may exceed native_max
    [height] = re.findall(r'viewBox="0 0 [0-9.]+ ([0-9.]+)"', chart)
    (_, lowest), _, (_, highest) = markers(chart)
    assert 0 < highest < lowest < float(height)
    retention = make_retention()
    retention["rows"][3]["scores"]["signs"] = make_score(1.37)
    assert "137.0" in page_of(tmp_path, retention)


def test_curves_break_at_gaps():
    chart = figures.score_chart("digits", [curve(0.2, 0.9, None, 0.8, 0.8, 0.7)], own=None)
    shapes = ["".join(re.findall("[A-Z]", path)) for path in re.findall(r'<path d="([^"]*)"', chart)]
    assert "MLMLL" in shapes
    late = figures.score_chart("digits", [curve(None, 0.2, 0.9)], own=None)
    assert "base</text>" in late, "the axis begins at the base"
    assert len(markers(chart)) == 5


def test_the_stage_in_which_a_task_is_learnt_is_marked():
    own = rf'<path d="M ([0-9.]+) [^"]*" [^>]*stroke: {figures.OWN_COLOUR}'
    chart = figures.score_chart("digits", [curve(0.2, 0.3, 0.9, 0.8)], own=2)
    assert [float(x) for x in re.findall(own, chart)] == [markers(chart)[2][0]]
    assert not re.findall(own, figures.score_chart("scenes", [curve(0.2, 0.3)], own=None))


def test_limits_are_drawn_where_they_are_known():
    def bars(*limits):
        chart = figures.score_chart("digits", [[Interval(0.5, *limit) for limit in limits]], own=None)
        return len(markers(chart)) - len(limits)  # a bar ends in two caps

    unknown, known = (None, None), (0.4, 0.55)
    assert (bars(unknown, unknown), bars(known, unknown), bars(known, known)) == (0, 2, 4)


def test_charts_take_their_ink_from_the_page(default_page):
    charts = re.findall("<svg.*?</svg>", default_page, re.DOTALL)
    assert charts and re.search(r"svg text \{ fill: var\(--muted\)", default_page)
    for chart in charts:
        colours = set(re.findall("#[0-9a-f]{6}", chart))
        assert colours <= {*figures.COLOURS, figures.OWN_COLOUR, figures.STYLE["grid.color"]}
    assert "prefers-color-scheme: dark" in default_page
    assert re.findall("--paper: (#[0-9a-f]+)", default_page) == list(PAPERS)


def contrast(first: str, second: str) -> float:
    """By WCAG 2.2."""

    def luminance(colour):
        channels = [value / 255 for value in ImageColor.getrgb(colour)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_curves_are_legible_in_light_and_in_dark_mode():
    for colour, paper in itertools.product((*figures.COLOURS, figures.OWN_COLOUR), PAPERS):
        assert contrast(colour, paper) >= 3, (colour, paper)
    lightness = [ImageColor.getcolor(colour, "L") for colour in figures.COLOURS]
    assert min(abs(a - b) for a, b in itertools.pairwise(lightness)) > 25


def test_no_two_elements_of_a_page_have_one_id(default_page):
    page = Page(default_page)
    assert len(page.ids) > 20 and len(set(page.ids)) == len(page.ids)


def test_every_row_of_a_table_has_a_cell_under_each_header(default_page):
    page = Page(default_page)
    page.check_tables()
    # The matrix, metrics, general ability, training and time; and the modules of each stage.
    assert len(page.tables) == 5 + len(TASKS)
    assert page.column("trainable parameters") == ["-", "43,210", "43,210", "43,210"]
    assert page.column("train samples") == ["-", "1,200", "1,200", "1,200"]
    assert page.column("skipped records") == ["-", "0", "1", "0"]
    assert [cell.replace("\xa0", " ") for cell in page.column("evaluate")] == ["9.0 s"] * 4
    assert page.column("total") == ["9.5\xa0s", *["46.5\xa0s"] * 3]


def test_long_loss_curves_are_thinned_to_means():
    points = [[step, float(step % 7)] for step in range(10_000)]
    thin = figures.thinned(points)
    assert len(thin) <= figures.LOSS_POINTS
    assert sum(loss for _, loss in thin) / len(thin) == pytest.approx(3.0, abs=0.05)
    assert figures.thinned(points[:50]).tolist() == points[:50]


def bar_heights(chart: str, colour: str) -> list[float]:
    paths = re.findall(
        rf'<path d="M [0-9.]+ ([0-9.]+) \nL [0-9.]+ [0-9.]+ \nL [0-9.]+ ([0-9.]+)[^"]*" [^>]*{colour}', chart
    )
    return [float(bottom) - float(top) for bottom, top in paths]


def test_room_charts_put_modules_of_a_depth_together():
    modules = make_modules(stage=2)
    modules[0]["k_f"] = 30  # vision, depth 0, beside 10
    modules[3]["depth"] = None
    frame = figures.module_frame({"modules": modules})
    vision = frame[frame["tower"] == "vision"]
    chart = figures.room_chart("vision", "2 glyphs", vision)
    heights = {words: bar_heights(chart, colour) for words, colour in figures.ROOM.values()}
    assert set(map(len, heights.values())) == {4}
    unit = heights["learnt here"][0] / 8  # the rank
    assert [round(height / unit) for height in heights["past tasks protected"]] == [20, 10, 10, 10]
    assert [round(height / unit) for height in heights["base protected"]] == [18, 20, 22, 24]
    assert heights["general inputs protected"] == [0, 0, 0, 0]
    left = figures.room_left(vision)
    assert left.iloc[0] == pytest.approx(1 - (18 + 30 + 8) / 128)


def training_of(**curves):
    return {name: [[step, value] for step, value in enumerate(values, start=1)] for name, values in curves.items()}


def test_training_curves_are_logarithmic_where_values_fall_by_orders():
    curves = training_of(loss=[4.0, 0.4, 0.04, 0.0], grad_norm=[10.0, 1.0, 1.0, 0.1], learning_rate=[0, 2e-3, 1e-3, 0])
    ranges = {name: (min(v for _, v in points), max(v for _, v in points)) for name, points in curves.items()}
    chart = figures.training_chart("1 digits", curves, ranges)
    loss, norm, rate = re.findall(rf'<path d="([^"]*)" [^>]*stroke: {figures.COLOURS[0]}', chart)
    heights = [[float(y) for y in re.findall(r"[ML] [0-9.]+ ([0-9.]+)", path)] for path in (loss, norm, rate)]
    first, second, third, zero = heights[0]
    assert second - first == pytest.approx(third - second, rel=1e-3) and zero > third + (second - first)
    assert heights[1][1] - heights[1][0] == pytest.approx(heights[1][3] - heights[1][2], rel=1e-3)
    assert heights[2][0] == heights[2][3] > heights[2][2] > heights[2][1]
    for words in ("gradient norm before clipping", "learning rate", ">0.01<"):
        assert words in chart


def test_a_run_of_before_shows_its_loss_alone(default_page):
    assert "gradient norm before clipping" not in default_page and "loss 2.5 to" in default_page


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Of Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_those_of_wilson(right, n, low, high):
    value = right / n
    score = {"value": value, "stderr": math.sqrt(value * (1 - value) / (n - 1)), "n": n}
    assert interval_of(score) == pytest.approx((value, low, high), abs=5e-5)


def test_no_score_is_shown_as_certain(tmp_path):
    assert interval_of({"value": 1.0, "stderr": 0.0, "n": 200}) == pytest.approx((1.0, 0.9812, 1.0), abs=1e-4)
    assert interval_of({"value": 0.7, "stderr": 0.01, "n": 200})[1:] == pytest.approx((0.6804, 0.7196), abs=1e-4)
    assert interval_of({"value": 0.7, "stderr": None, "n": 200})[1:] == (None, None)
    assert interval_of({"value": 1.3, "stderr": 0.0, "n": 9}) == (1.3, 1.3, 1.3)  # no share
    retention = make_retention()
    retention["rows"][1]["scores"]["digits"] = make_score(1.0, stderr=0.0)
    content = page_of(tmp_path, retention)
    assert "± 0.0" not in content and "<small>98.5–100</small>" in content


def test_means_have_the_limits_of_what_they_are_of():
    one = Interval(0.5, 0.4, 0.7)
    assert mean_of_intervals([one]) == pytest.approx(one)
    assert mean_of_intervals([one] * 4) == pytest.approx((0.5, 0.45, 0.6))
    assert mean_of_intervals([one, Interval(0.7, None, None)]) == (pytest.approx(0.6), None, None)
    assert mean_of_intervals([one, Interval(None, None, None)]) == (None, None, None)
    assert mean_of_intervals([]) == (None, None, None)


@pytest.mark.parametrize(("low", "high"), [(0.36, 3.5), (1.1, 1.9), (0.02, 0.8), (2e-5, 4.0), (0.0, 3.0)])
def test_a_logarithmic_axis_has_lines_to_read_it_by(low, high):
    chart = str(figures.training_chart("1 digits", {"loss": [[10, high], [20, low]]}, {"loss": (low, high)}))
    ticks = [float(text) for text in re.findall(r"<text[^>]*>([\d.e+-]+)</text>", chart)]
    assert 2 <= sum(tick not in (10, 12, 14, 16, 18, 20) for tick in ticks) <= 8


def test_several_general_benchmarks_have_a_mean_beside_them(tmp_path):
    page = Page(page_of(tmp_path, make_retention(general=["scenes", "pope"])))
    page.check_tables()
    [matrix] = [table for table in page.tables if table[1][:1] == ["after stage"]]
    assert matrix[1][-3:] == ["scenes", "pope", "mean"] and matrix[2][-1].startswith("87.0")


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ({"language": 0.90625, "vision": 0.90625}, "stage 2 was scaled to 0.91"),
        ({"language": 0.75, "vision": 1.0}, "stage 2 was scaled to 0.75 (language) and 1 (vision)"),
        ({"language": 0.0, "vision": 0.0}, "stage 2 was scaled to 0 and learnt nothing"),
        ({"language": 1.0, "vision": 1.0}, "no stage had to be scaled"),
    ],
)
def test_how_far_stages_were_scaled_is_said_in_words(tmp_path, factors, said):
    run = RunDirectory(write_run(tmp_path, make_retention()))
    config = json.loads(run.config.read_text())
    config["general"] |= {"samples": "builtin", "budget": 0.02}
    run.config.write_text(json.dumps(config))
    for stage, own in ((1, {"language": 1.0, "vision": 1.0}), (2, factors)):
        path = run.stage(stage, TASKS[stage - 1]).manifest
        guard = {"factors": own, "before": 0.0, "unscaled": 0.1, "after": 0.02}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"guard": guard}))
    note = load_run(tmp_path).guard_note()
    assert note == f"General ability kept, each stage within 0.02 nats a token: {said}."
    assert note in format_table(make_retention(), note).replace("\n", " ")
    plan = SimpleNamespace(memory=SimpleNamespace(config=RunConfig(run_dir=str(tmp_path))))
    assert list(_general_lines(plan)) == [f"  so far: {note}"]


@pytest.mark.parametrize("missing", ["retention", "manifest"])
def test_missing_file_is_named(tmp_path, missing):
    run = RunDirectory(write_run(tmp_path, make_retention()))
    path = run.retention if missing == "retention" else run.stage(2, "glyphs").manifest
    path.unlink()
    with pytest.raises(ReportError, match=re.escape(str(path)) + " is missing"):
        write_report(load_run(tmp_path))
    assert not any(path.exists() for path in outputs(tmp_path))


def test_settings_that_are_missing_are_named(tmp_path):
    RunDirectory(write_run(tmp_path, make_retention())).config.unlink()
    with pytest.raises(ArtifactError, match=re.escape(f"{tmp_path} is no directory of a run")):
        write_report(load_run(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:40], "not valid JSON"),
        (lambda text: "[]", "holds a list"),
        (
            lambda text: text.replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 9'),
            f"has schema_version 9, expected {SCHEMA_VERSION}",
        ),
        (lambda text: text.replace('"counts"', '"count"'), "lacks counts"),
        (lambda text: text.replace('"stage": 1,', '"stage": 2,', 1), "has stage 2, expected 1"),
    ],
)
def test_damaged_manifest_is_named(tmp_path, change, message):
    run_dir = write_run(tmp_path, make_retention())
    path = RunDirectory(run_dir).stage(1, "digits").manifest
    path.write_text(change(path.read_text()))
    with pytest.raises(ReportError, match=f"{re.escape(str(path))}.*{message}"):
        write_report(load_run(run_dir))


def test_what_is_kept_of_general_ability_is_accounted_for(tmp_path):
    """Factors under 1, energy held and the base's replies, escaped, from the files of a run."""
    run_dir, retention = tmp_path / "run", make_retention()
    write_run(run_dir, retention)
    run = RunDirectory(run_dir)
    guard = {"factors": {"vision": 1.0, "language": 0.8125}, "before": 0.011, "unscaled": 0.052, "after": 0.0308}
    path = run.stage(3, "signs").manifest
    manifest = json.loads(path.read_text())
    manifest["guard"] = guard
    for module in manifest["modules"]:
        module["k_g"] = 7
    path.write_text(json.dumps(manifest))
    settings = json.loads(run.config.read_text())
    settings["general"] |= {"samples": "builtin", "budget": 0.02}
    run.config.write_text(json.dumps(settings))
    run.general_energy.parent.mkdir()
    energies = {
        "a.q_proj": {"k_g": 7, "held": 0.951, "saturated": False},
        "b": {"k_g": 9, "held": 0.84, "saturated": True},
    }
    run.general_energy.write_text(json.dumps(energies))
    run.general_replies.write_text(json.dumps([{"id": "p1", "prompt": f"Say {HOSTILE}", "reply": "No."}]))
    write_report(load_run(run_dir))
    text = run.report.read_text()
    section = text[text.index('<section id="general">') : text.index('<section id="layers">')]
    for expected in (
        "0.8125",
        "0.0308",
        "0.02 nats a token",
        "was scaled to",
        "of 2 modules 1 saturated; 84.0 %",
        html.escape(HOSTILE),
    ):
        assert expected in section
    frame = figures.module_frame(manifest)
    assert (frame["protected"] == (frame["k_w"] + 7 + frame["k_f"]) / 128).all()


def test_a_run_without_general_samples_says_nothing_of_them(default_page):
    assert "Budget" not in default_page and "General ability kept, each" not in default_page
