"""What `keeplora chat` asks: the question with what the stream adds to those of a task."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mllm_keeplora.commands import chat
from mllm_keeplora.config import RunConfig
from mllm_keeplora.continual.saved_run import SavedRun, load_run
from mllm_keeplora.data.stream import StreamError
from tests.unit.test_report import make_retention, write_run

DCL = "recipes/streams/mllm_dcl.yaml"
OWN = """
name: own
data_root: .
tasks:
  - {name: birds, train: t.json, test: t.json, metric: exact, prompt_suffix: "\\nIn one word."}
  - name: drives
    train: t.json
    test: t.json
    metric: exact
    prompt_suffix: " Why?"
    test_prompt_suffix: {"A": " B", "*": " C"}
  - {name: plain, train: t.json, test: t.json, metric: exact}
general:
  - {name: scenes, test: t.json, metric: exact, prompt_suffix: " Be brief."}
  - {name: stock, lmms_eval_task: mmstar, score: average, native_max: 1}
"""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Asks a run on a stream; its model says what it was asked."""
    (tmp_path / "own.yaml").write_text(OWN)
    run = load_run(write_run(tmp_path / "run", make_retention()))
    monkeypatch.setattr(SavedRun, "load_model", lambda self: (None, None))
    for module in ("evaluation.answer", "continual.saved_run"):
        monkeypatch.setattr(f"mllm_keeplora.{module}.answer", lambda model, processor, question, *_: f"[{question}]")

    def ask(stream: str, *options: str) -> None:
        path = tmp_path / stream if stream in ("own.yaml", "gone.yaml") else Path(stream)
        config: RunConfig = replace(run.config, stream=str(path))
        monkeypatch.setattr("mllm_keeplora.continual.saved_run.load_run", lambda _: SavedRun(run.directory, config))
        chat.main([str(run.directory.path), "What?", *options])

    return ask


@pytest.mark.parametrize(
    ("stream", "task", "added"),
    [
        ("own.yaml", "birds", "\nIn one word."),
        ("own.yaml", "drives", " Why? C"),
        ("own.yaml", "plain", ""),
        ("own.yaml", "scenes", " Be brief."),
        ("own.yaml", "stock", ""),
        (DCL, "Med", " Answer the question with a single word (or phrase)."),
        (DCL, "Fin", " Answer with the given letter directly, e.g., A, B, C, D."),
        (DCL, "RS", ""),
    ],
)
def test_a_named_tasks_words_are_added(stream: str, task: str, added: str, asked: Any, capsys: Any) -> None:
    asked(stream, "--task", task)
    assert capsys.readouterr() == (f"[What?{added}]\n", "")


def test_without_a_task_nothing_is_added_and_the_user_is_told(asked: Any, capsys: Any) -> None:
    asked("own.yaml")
    said, told = capsys.readouterr()
    assert said == "[What?]\n"
    assert "--task adds" in told and "birds, drives, scenes" in told and "plain" not in told


@pytest.mark.parametrize("stream", ["gone.yaml", "recipes/streams/small_vqa.yaml"])
def test_a_stream_that_adds_nothing_or_is_gone_is_not_needed(stream: str, asked: Any, capsys: Any) -> None:
    asked(stream)
    assert capsys.readouterr() == ("[What?]\n", "")


@pytest.mark.parametrize(
    ("stream", "reason"), [("own.yaml", "no task 'brids'; it has birds, drives"), ("gone.yaml", "gone")]
)
def test_a_task_that_cannot_be_found_is_refused(stream: str, reason: str, asked: Any) -> None:
    with pytest.raises(StreamError, match=reason):
        asked(stream, "--task", "brids")
