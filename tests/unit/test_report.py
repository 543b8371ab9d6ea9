"""Reports are pure functions of a run directory; these tests build small ones by hand."""

import csv
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageColor

from mllm_keeplora.reports import page, report
from mllm_keeplora.reports.report import ReportError, format_table, matrix_csv, write_report

TASKS = ["digits", "glyphs", "signs"]
HOSTILE = "<script>alert(1)</script>"
METRIC_KEYS = ("last", "mft", "maa", "bwt", "forgetting", "transfer", "average")
OUTPUTS = ("accuracy_matrix.csv", "accuracy_matrix.png", "report.html")


def make_score(value, stderr=0.012, n=250):
    return {"value": value, "native": 100 * value, "native_max": 100.0, "stderr": stderr, "n": n}


def make_retention(tasks=TASKS, general=("scenes",), method="keeplora"):
    """0.9 on a stage's own task, 0.85 on earlier and 0.2 on later ones; general loses 0.01 a stage."""
    rows = []
    for stage in range(len(tasks) + 1):
        own = stage - 1
        scores = {
            name: make_score(0.9 if i == own else 0.85 if i < own else 0.2) for i, name in enumerate(tasks)
        }
        scores |= {name: make_score(0.87 - 0.01 * stage) for name in general}
        rows.append({"stage": stage, "task": tasks[own] if stage else None, "scores": scores})
    metrics = {
        "last": 0.867, "mft": 0.9, "maa": 0.881, "bwt": -0.05, "forgetting": 0.05, "transfer": 0.2,
        "average": 0.6, "retention": dict.fromkeys(general, 0.966),
    }  # fmt: skip
    if len(tasks) == 1:
        metrics |= {"bwt": None, "forgetting": None, "transfer": None}
    return {
        "schema_version": 2, "method": method, "tasks": list(tasks), "general": list(general), "rows": rows,
        "metrics": metrics,
    }  # fmt: skip


def make_modules(stage, method="keeplora", depths=4):
    keeps = method != "lora"
    return [
        {
            "name": f"model.{tower}_model.layers.{depth}.{kind}", "tower": tower, "depth": depth,
            "in_features": 128, "out_features": 64, "k_w": 18 + 2 * depth if keeps else 0,
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
    timings = {"weight_bases": 0.4, "probe": 2.5, "train": 31.0, "feature_basis": 2.4} if trained else {}
    skipped = [{"file": "train.json", "row": 7, "reason": "image <b>missing</b>"}] if stage == 2 else []
    return {
        "schema_version": 2, "stage": stage, "task": row["task"], "method": method, "previous": None,
        "config": {}, "seeds": {"stage": 100 + stage}, "probe_indices": [0, 5],
        "packages": {"torch": "2.9.0", "peft": "0.18.0"}, "base_model": {"name": "base", "hash": "abc123"},
        "modules": make_modules(stage, method) if trained else [],
        "counts": {
            "train_samples": 1200 if trained else 0, "steps": steps if trained else 0,
            "trainable_parameters": 43210, "skipped_records": skipped,
        },
        "timings": {**timings, "evaluation": 9.0, "total": 46.5 if trained else 9.5},
        "peak_memory_bytes": 900 * 2**20, "scores": row["scores"], "files": {},
        "loss": [[step, 2.5 * 0.98**step + 0.05] for step in range(1, steps + 1)] if trained else [],
    }  # fmt: skip


def write_run(run_dir: Path, retention) -> Path:
    for row in retention["rows"]:
        name = (row["task"] or "base").replace("/", "_")
        stage_dir = run_dir / "stages" / f"{row['stage']:02d}-{name}"
        stage_dir.mkdir(parents=True)
        (stage_dir / "manifest.json").write_text(json.dumps(make_manifest(row, retention["method"])))
    config = {
        "stream": "recipes/streams/small_vqa.yaml",
        "method": {"name": retention["method"], "eps_w": {"vision": 0.6, "language": 0.6}, "gamma": 0.2},
        "training": {"learning_rate": 2e-3, "rank": 8, "resume_from": None, "targets": ["q_proj", "fc1"]},
    }
    (run_dir / "config.json").write_text(json.dumps(config))
    (run_dir / "retention.json").write_text(json.dumps(retention))
    return run_dir


def page_of(run_dir: Path, retention) -> str:
    write_report(write_run(run_dir, retention))
    return (run_dir / "report.html").read_text()


class Page(HTMLParser):
    """Collects tags and the text outside <style>, and checks that tags nest."""

    VOID = frozenset({"meta", "link", "wbr", "br", "img"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in {"src", "href", "xlink:href", "data"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> out of order"

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


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


def test_table_shows_matrix_metrics_and_own_stages():
    table = format_table(make_retention())
    lines = table.splitlines()
    rows = {line.split()[1]: line for line in lines if re.match(r" \d ", line)}
    assert rows["base"].split() == ["0", "base", "20.0", "20.0", "20.0", "|", "87.0"]
    assert rows["glyphs"].split() == ["2", "glyphs", "85.0", "90.0*", "20.0", "|", "85.0"]
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
    retention = make_retention(
        tasks, [f"a-general-benchmark-with-a-rather-long-name-{i}" for i in range(general)]
    )
    for index, row in enumerate(retention["rows"]):
        for column, name in enumerate((*tasks, *retention["general"])):
            row["scores"][name] = make_score(column / 100 if index == count else 0.5)
    table = format_table(retention)
    assert max(map(len, table.splitlines())) <= page.TEXT_WIDTH
    last = [line[24:] for line in table.splitlines() if line.startswith(f"{count:>2} ")]
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
    write_report(run_dir)
    assert {path.name for path in set(run_dir.rglob("*")) - before} == set(OUTPUTS)
    assert (run_dir / "accuracy_matrix.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert (run_dir / "accuracy_matrix.csv").read_text() == matrix_csv(make_retention())


def test_heat_map_outlines_the_own_stage_cells():
    def share_of_outline(retention):
        image = Image.open(io.BytesIO(report._heat_map_png(retention, "run"))).convert("RGB")
        pixels = dict((colour, count) for count, colour in image.getcolors(maxcolors=2**24))
        return pixels.get(ImageColor.getrgb(report.OWN_COLOUR), 0) / (image.width * image.height)

    untrained = make_retention()
    untrained["rows"] = untrained["rows"][:1]
    assert share_of_outline(untrained) == 0
    assert 0.001 < share_of_outline(make_retention()) < 0.03  # lines, not filled cells


def test_heat_map_takes_names_literally():
    # A formula that is none would be an error.
    assert report._heat_map_png(make_retention([r"$\frac{$"]), r"$\run{$").startswith(b"\x89PNG")


def test_report_is_a_pure_function_of_its_files(tmp_path):
    run_dir = write_run(tmp_path, make_retention())
    write_report(run_dir)
    first = {name: (run_dir / name).read_bytes() for name in OUTPUTS}
    write_report(run_dir)
    assert {name: (run_dir / name).read_bytes() for name in OUTPUTS} == first


def test_page_says_what_was_learnt_and_kept(tmp_path):
    text = Page(page_of(tmp_path, make_retention())).text
    assert "The model learnt 3 tasks one after another." in text
    assert "a task scores 90.0 % on average, against 20.0 % for the untouched base" in text
    assert "5.0 points were lost" in text
    assert "On the general benchmark scenes it keeps 96.6 % of the untouched base's score." in text
    for _, _, _, meaning in report.METRICS:
        assert meaning in text
    for part in (
        "torch",
        "2.9.0",
        "abc123",
        "training.learning_rate",
        "method.eps_w.vision",
        "900 MiB",
        "46.5 s",
    ):
        assert part in text, part
    assert "skipped record" in text and "row 7" in text
    assert text.count("model.vision_model.layers.3.mlp.fc1") == len(TASKS)


def test_page_makes_no_requests_and_runs_no_scripts(tmp_path):
    content = page_of(tmp_path, make_retention())
    page = Page(content)
    assert not {"script", "iframe", "img", "object", "embed", "form"} & set(page.tags)
    assert page.addresses and all(address.startswith(("#", "data:")) for address in page.addresses)
    assert "default-src 'none'" in content
    assert not re.search(r"url\(|@import|https?:", content)


def test_text_from_data_is_escaped(tmp_path):
    retention = make_retention([HOSTILE, 'q" onmouseover="x'], general=["<img src=x>"])
    content = page_of(tmp_path, retention)
    page = Page(content)
    assert HOSTILE not in content and "<img" not in content and "<b>missing" not in content
    assert html.escape(HOSTILE) in content
    assert HOSTILE in page.text and "image <b>missing</b>" in page.text
    assert "script" not in page.tags
    assert not re.search(r'<[^>]* onmouseover="x', content)


def test_cell_titles_carry_standard_error_and_count(tmp_path):
    retention = make_retention()
    retention["rows"][1]["scores"]["scenes"]["stderr"] = None
    content = page_of(tmp_path, retention)
    assert "digits, after stage 1 (digits): 90.0 % ± 1.2, n = 250; native score 90 of 100" in content
    assert "scenes, after stage 1 (digits): 86.0 % standard error undefined, n = 250" in content


def test_undefined_numbers_are_dashes(tmp_path):
    retention = make_retention()
    retention["rows"][0]["scores"]["signs"] = None  # a task appended later
    del retention["rows"][1]["scores"]["signs"]
    retention["rows"][2]["scores"]["digits"]["stderr"] = None
    retention["metrics"] |= dict.fromkeys(METRIC_KEYS) | {"retention": {"scenes": None}}
    run_dir = write_run(tmp_path, retention)
    path = run_dir / "stages" / "01-digits" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["peak_memory_bytes"] = None
    manifest["modules"][0] |= {"leakage": None, "k_w": None, "lambda": None, "depth": None}
    path.write_text(json.dumps(manifest))
    write_report(run_dir)
    content = (run_dir / "report.html").read_text()
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
    assert "None" not in page.text
    assert ("watches no general benchmark" in page.text) == (not general)
    assert ("No stage has been trained yet" in page.text) == (not tasks)
    format_table(retention)


def test_unfinished_stream_says_so(tmp_path):
    retention = make_retention()
    retention["rows"] = retention["rows"][:2]
    retention["metrics"] |= dict.fromkeys(METRIC_KEYS)
    assert "The model has learnt 1 of 3 tasks so far." in Page(page_of(tmp_path, retention)).text


def test_scores_above_one_stay_inside_their_chart(tmp_path):
    retention = make_retention()  # captions: CIDEr may exceed native_max
    retention["rows"][3]["scores"]["signs"] = make_score(1.37)
    for chart in report._score_charts(retention):
        assert all(page.TOP <= dot["y"] <= page.HEIGHT - page.BOTTOM for dot in chart["lines"][0]["dots"])
    highest = [dot["y"] for dot in report._score_charts(retention)[2]["lines"][0]["dots"]]
    assert highest[3] < highest[2]
    assert "137.0" in page_of(tmp_path, retention)


def test_curves_break_at_gaps():
    retention = make_retention([f"t{i}" for i in range(5)])
    retention["rows"][2]["scores"]["t0"] = None
    line = report._score_charts(retention)[0]["lines"][0]
    assert [len(piece.split()) for piece in line["pieces"]] == [2, 3]
    assert [dot["is_hollow"] for dot in line["dots"]] == [True, False, False, False, False]


def test_long_loss_curves_are_thinned_to_means():
    points = [[step, float(step % 7)] for step in range(10_000)]
    thin = report._thin(points)
    assert len(thin) <= report.LOSS_POINTS
    assert sum(loss for _, loss in thin) / len(thin) == pytest.approx(3.0, abs=0.05)
    assert report._thin(points[:50]) == [tuple(point) for point in points[:50]]


def test_layer_panels_put_modules_of_a_depth_together():
    modules = make_modules(stage=2)
    modules[0]["k_f"], modules[0]["leakage"] = 30, 5e-7  # vision, depth 0, beside 10 and 10**-7.3
    k_f = report._over_depth(report.PANELS[1], "vision", modules)
    leakage = report._over_depth(report.PANELS[-1], "vision", modules)
    assert (k_f[0], k_f[1]) == (20, 10)
    assert leakage[0] == 5e-7


@pytest.mark.parametrize("missing", ["retention.json", "config.json", "stages/02-glyphs/manifest.json"])
def test_missing_file_is_named(tmp_path, missing):
    run_dir = write_run(tmp_path, make_retention())
    (run_dir / missing).unlink()
    with pytest.raises(ReportError, match=re.escape(str(run_dir / missing)) + " is missing"):
        write_report(run_dir)
    assert not any((run_dir / name).exists() for name in OUTPUTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:40], "not valid JSON"),
        (lambda text: "[]", "holds a list"),
        (
            lambda text: text.replace('"schema_version": 2', '"schema_version": 9'),
            "schema version 9, expected 2",
        ),
        (lambda text: text.replace('"counts"', '"count"'), "lacks counts"),
        (lambda text: text.replace('"stage": 1,', '"stage": 2,', 1), "is of stage 2"),
    ],
)
def test_damaged_manifest_is_named(tmp_path, change, message):
    run_dir = write_run(tmp_path, make_retention())
    path = run_dir / "stages" / "01-digits" / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ReportError, match=f"{re.escape(str(path))}.*{message}"):
        write_report(run_dir)
