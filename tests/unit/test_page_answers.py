"""Answers on a page: what became of a question, in which order, how much of it, and that none of it is markup."""

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm_keeplora.continual.saved_run import SavedRun, load_run
from mllm_keeplora.evaluation.task_files import ASKED
from mllm_keeplora.reports import answers
from mllm_keeplora.reports.answers import OF_QUESTIONS, Answer, Section, difference_sections, run_sections, story_of
from mllm_keeplora.reports.page import template_environment
from mllm_keeplora.reports.results import ReportError, read_results
from mllm_keeplora.runs.run_directory import RunDirectory
from tests.clips import moving_frames, write_clip
from tests.unit.test_report import HOSTILE, TASKS, Page, check_policy, make_retention, write_run

HOSTILE_TEXTS = [
    HOSTILE,
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "</td></table></details><h1>",
    "]]><!-- <![CDATA[",
    "‮ right to left, and \x07",
    "<svg/onload=alert(1)>",
    "&lt;b&gt; &amp;",
]


def saved_line(number: int, score: float | None, *, reply: str = "a", asked: str = "What?", media: Any = ()) -> dict:
    content = [{"type": kind, "path": str(path)} for kind, path in media] + [{"type": "text", "text": asked}]
    doc = {"question_id": number, "text": "not this", ASKED: [{"role": "user", "content": content}]}
    return {"task": "t", "doc_id": number, "doc": doc, "target": "ref", "reply": reply, "score": score}


def save(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def save_scores(run_dir: Path, name: str, scores: list[list[float | None]], **line: Any) -> None:
    """Scores of each stage, question by question."""
    run = RunDirectory(run_dir)
    for stage, row in enumerate(scores):
        folder = run.stage(stage, TASKS[stage - 1] if stage else None).replies
        said = {"reply": f"said after {stage}", **line}
        save(folder / f"{name}.jsonl", [saved_line(i, score, **said) for i, score in enumerate(row)])


@pytest.fixture
def run(tmp_path: Path) -> SavedRun:
    return load_run(write_run(tmp_path / "run", make_retention()))


def sections(run: SavedRun) -> list[Section]:
    return run_sections(read_results(run), run.reader())


def page_with(found: list[Section]) -> str:
    """The answers alone on a page, without its charts."""
    template = "{% extends 'layout.html.j2' %}{% from 'macros.html.j2' import answers %}{% block content %}"
    template += "{% for section in found %}{{ answers(section, words) }}{% endfor %}{% endblock %}"
    return template_environment().from_string(template).render(found=found, words=OF_QUESTIONS)


@pytest.mark.parametrize(
    ("rights", "kind", "story"),
    [
        ("0010", "lost", "right after 2, wrong after 3"),
        ("1000", "lost", "right for the base, wrong after 1"),
        ("0100", "lost", "right after 1, wrong after 2"),
        ("1010", "lost", "right after 2, wrong after 3"),
        ("01-0", "lost", "right after 1, wrong after 3"),
        ("0000", "never", "never right"),
        ("0101", "back", "wrong after 2, right again after 3"),
        ("1001", "back", "wrong after 2, right again after 3"),
        ("0011", "learnt", "right from 2 on"),
        ("1111", "kept", "right throughout"),
        ("-1-1", "kept", "right throughout"),
        ("????", "unscored", ""),
        ("----", "unscored", ""),
    ],
)
def test_what_became_of_a_question(rights: str, kind: str, story: str) -> None:
    by_sign = {"0": Answer("", False), "1": Answer("", True), "?": Answer("", None), "-": None}
    assert story_of([by_sign[sign] for sign in rights]) == (kind, story)


def test_lost_questions_come_first_and_each_is_right_from_half_of_what_it_can_reach(run: SavedRun) -> None:
    # native_max is 100: one column a question
    scores = [[0, 0, 0, 60, 49.9], [0, 0, 50, 60, 0], [0, 90, 0, 60, 0], [100, 0, 0, 100, 0]]
    save_scores(run.directory.path, "digits", scores)
    [section] = sections(run)
    assert [row.question.kind for row in section.rows] == ["lost", "lost", "never", "learnt", "kept"]
    assert [row.question.story for row in section.rows][:2] == [
        "right after 2, wrong after 3",
        "right after 1, wrong after 2",
    ]
    assert section.kinds["lost"] == ("lost", 2) and "back" not in section.kinds
    assert section.columns == ["base", "1 digits", "2 glyphs", "3 signs"]
    first = section.rows[0].question
    assert (first.text, first.reference) == ("What?", "ref")
    assert [answer and answer.reply for answer in first.answers] == [f"said after {i}" for i in range(4)]
    assert section.files["2 glyphs"] == "stages/02-glyphs/evaluation/digits.jsonl"


@pytest.mark.parametrize("native_max", [1.0, 100.0, 2000.0], ids=["pope", "mvbench", "mme"])
def test_a_benchmarks_question_is_right_by_its_own_score_whatever_the_benchmarks_number(
    native_max: float, tmp_path: Path
) -> None:
    # mvbench, mmvu and videomme give percent of questions that score 1 or 0, mme a sum of its categories
    retention = make_retention()
    for row in retention["rows"]:
        row["scores"]["digits"] |= {"native": row["scores"]["digits"]["value"] * native_max, "native_max": native_max}
    saved = load_run(write_run(tmp_path / "run", retention))
    save_scores(saved.directory.path, "digits", [[0, 1.0], [0, 1.0], [1.0, 0], [1.0, 0.0]])
    [section] = sections(saved)
    assert [row.question.kind for row in section.rows] == ["lost", "learnt"]
    both = {"a": read_results(saved), "b": read_results(_forgetful(saved, tmp_path))}
    [differing] = difference_sections(both, saved.reader())
    assert [row.question.kind for row in differing.rows] == ["right with a alone"]


def _forgetful(run: SavedRun, tmp_path: Path) -> SavedRun:
    """The run whose last replies are all wrong."""
    other = load_run(write_run(tmp_path / "other", read_results(run).retention))
    save_scores(other.directory.path, "digits", [[0, 0]] * 4)
    return other


def test_cells_that_were_measured_later_count_and_those_that_were_not_are_left_open(run: SavedRun) -> None:
    first, last = run.directory.stage(1, "digits"), run.directory.stage(3, "signs")
    save(first.backfilled_replies / "signs.jsonl", [saved_line(0, 100, reply="late")])
    save(last.replies / "signs.jsonl", [saved_line(0, 0), saved_line(1, 0)])
    [section] = sections(run)
    assert [[answer and answer.right for answer in row.question.answers] for row in section.rows] == [
        [None, True, None, False],
        [None, None, None, False],
    ]
    assert section.files == {
        "1 digits": "stages/01-digits/backfill/signs.jsonl",
        "3 signs": "stages/03-signs/evaluation/signs.jsonl",
    }


@pytest.mark.parametrize(
    ("line", "asked", "reference"),
    [
        ({"doc": {"question": "Where?"}, "target": ["a", "b"]}, "Where?", "a | b"),
        ({"doc": {"query": "Who?", "image": "cut"}, "target": 3}, "Who?", "3"),
        ({"doc": {"hint": 1}, "target": None}, '{"hint": 1}', "null"),
        ({"doc": "plain", "target": "x"}, "plain", "x"),
        ({}, '{"question": null}', "null"),
    ],
)
def test_questions_of_stock_benchmarks_are_shown_as_far_as_they_are_known(
    run: SavedRun, line: dict, asked: str, reference: str
) -> None:
    save(
        run.directory.stage(0, None).replies / "scenes.jsonl", [{"task": "mmstar", "doc_id": 0, "reply": ["x"], **line}]
    )
    [section] = sections(run)
    question = section.rows[0].question
    assert (question.text, question.reference, question.answers[0]) == (asked, reference, Answer('["x"]', None))


@pytest.mark.parametrize("text", ["{", '{"task": "t"}', "[]", '{"task": "t", "doc_id": "x"}', "\udcff"])
def test_a_damaged_file_of_replies_is_named(run: SavedRun, text: str) -> None:
    path = run.directory.stage(2, "glyphs").replies / "digits.jsonl"
    path.parent.mkdir()
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ReportError, match=rf"{re.escape(str(path))}.*(edited|not valid JSON)"):
        sections(run)


def test_hostile_texts_stay_texts(run: SavedRun, tmp_path: Path) -> None:
    lines = []
    for number, text in enumerate(HOSTILE_TEXTS):
        media = [("image", tmp_path / f"{text}.png")]
        lines.append(saved_line(number, 0, reply=text, asked=text, media=media) | {"target": text})
    save(run.directory.stage(0, None).replies / "digits.jsonl", lines)
    content = page_with(sections(run))
    page = Page(content)
    check_policy(content)
    page.check_tables()
    assert page.tags.count("script") == 1 and not {"h1", "img"} & set(page.tags)
    for text in HOSTILE_TEXTS:
        assert text in "".join(page.words)
    for address in page.addresses:
        assert address.startswith(("file:///", "stages/", "data:,")) and not re.search("[<>\"' ]", address)


def test_a_lone_surrogate_does_not_end_the_report(run: SavedRun) -> None:
    path = run.directory.stage(0, None).replies / "digits.jsonl"
    line = saved_line(0, 0, media=[("image", Path("x.png"))])
    path.parent.mkdir()
    path.write_text(json.dumps(line).replace("What?", r"\ud800").replace("x.png", r"\ud800.png"))
    assert b"?" in page_with(sections(run)).encode(errors="replace")


def noise(path: Path, seed: int, size: tuple[int, int] = (96, 72)) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_pictures_and_clips_become_small_and_lead_to_their_files(run: SavedRun, tmp_path: Path) -> None:
    wide, clip = noise(tmp_path / "a b.png", 0, (640, 160)), tmp_path / "c.mp4"
    write_clip(clip, moving_frames(12))
    gone, broken = tmp_path / "gone.png", tmp_path / "broken.png"
    broken.write_bytes(wide.read_bytes()[:300])
    media = [("image", wide), ("video", clip), ("image", gone), ("image", broken), ("image", wide)]
    save(run.directory.stage(0, None).replies / "digits.jsonl", [saved_line(0, 0, media=media)])
    [section] = sections(run)
    [row] = section.rows
    assert [(address, len(pictures)) for address, pictures in row.pictures] == [
        (wide.as_uri(), 1),
        (clip.as_uri(), answers.FRAMES),
        (gone.as_uri(), 0),
        (broken.as_uri(), 0),
    ]
    assert sum(len(picture) for _, found in row.pictures for picture in found) < 20_000
    content = page_with([section])
    assert content.count('<img src="data:image/webp;base64,') == 1 + answers.FRAMES
    assert f'<a href="{gone.as_uri()}">file</a>' in content


def test_a_page_has_room_for_so_much_and_says_what_it_leaves_out(
    run: SavedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [noise(tmp_path / f"{i}.png", i, (48, 36)) for i in range(12)]
    for name in ("digits", "glyphs"):
        lines = [saved_line(i, 100.0, reply="so " * 200, media=[("image", pictures[i % 12])]) for i in range(40)]
        lines[30]["score"] = 0.0
        save(run.directory.stage(0, None).replies / f"{name}.jsonl", lines)
    whole = sections(run)
    assert [len(section.rows) for section in whole] == [40, 40]
    one = len(whole[0].rows[0].pictures[0][1][0])
    monkeypatch.setattr(answers, "TEXT_BYTES", 60_000)
    monkeypatch.setattr(answers, "PICTURE_BYTES", 20 * one)
    first, second = sections(run)
    assert 10 < len(first.rows) < 40 and 10 < len(second.rows) < 40
    assert first.total == 40 and first.rows[0].question.kind == "never"
    content = page_with([first, second])
    assert f"{40 - len(first.rows)} more are left out" in content and len(content.encode()) < 60_000 + 20 * one + 20_000
    assert 3 <= sum(bool(row.pictures[0][1]) for row in first.rows) < len(first.rows)


@pytest.mark.slow
def test_ten_thousand_answers_take_20_megabytes_at_most(run: SavedRun, tmp_path: Path) -> None:
    """Ten thousand questions with pictures of noise, which compress worst, after four stages."""
    words = ["what", "where", "how", "many", "which", "colour", "of", "the", "is", "a", "red", "bar"]
    choice = random.Random(0)
    media = [noise(tmp_path / f"{i}.png", i) for i in range(2500)]
    for stage, task in enumerate([None, *TASKS]):
        for name in TASKS:
            lines = [
                saved_line(
                    i,
                    100.0,
                    reply=choice.choice(words),
                    asked=" ".join(choice.sample(words, 9)),
                    media=[("image", media[i % 2500])],
                )
                for i in range(3334)
            ]
            save(run.directory.stage(stage, task).replies / f"{name}.jsonl", lines)
    found = sections(run)
    assert sum(len(section.rows) for section in found) == 10_002
    assert len(page_with(found).encode()) < 19_000_000


def test_differences_are_questions_that_are_right_in_some_runs_alone(tmp_path: Path) -> None:
    scores = {"a": [100, 100, 0, 0, 100], "b": [100, 0, 100, 0, 100], "c": [100, 0, 0, 0, 0]}
    runs = {}
    for label, row in scores.items():
        saved = load_run(write_run(tmp_path / label, make_retention()))
        save(saved.directory.stage(3, "signs").replies / "glyphs.jsonl", [saved_line(i, s) for i, s in enumerate(row)])
        runs[label] = read_results(saved)
    [section] = difference_sections(runs, saved.reader())
    assert section.name == "glyphs" and section.columns == ["a", "b", "c"] and section.total == 3
    assert {words for words, _ in section.kinds.values()} == {
        "right with a alone", "right with b alone", "right with a and b alone",
    }  # fmt: skip
    assert section.rows[0].question.story in section.kinds
