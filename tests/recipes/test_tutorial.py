"""The tutorial from its first line to its last: files as shown, commands in their order, the small model in place."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mllm_keeplora.command_line import INTERRUPTED
from mllm_keeplora.commands.main import main
from mllm_keeplora.continual.saved_run import load_run
from mllm_keeplora.reports import trackers
from tests.recipes.conftest import ROOT, Recipe

PAGE = (ROOT / "docs/tutorial.md").read_text()
# A file with its name in the line before, or commands.
STEPS = re.compile(r"\*\*`([^`]+)`\*\*[^\n]*\n\n```\w+\n(.*?)^```|^```bash\n(.*?)^```", flags=re.S | re.M)
NOT_RUN = {"git", "bash", "source", "vllm", "curl"}  # what made this environment, and what the page says has not run
SMALL = {
    "model": {
        "base_model": "recipes/small/vqa_base",
        "compute_dtype": "float32",
        "device": "cpu",
        "chat_template": None,
    },
    "language": {"rank": 4},
    "vision": {"rank": 4},
    "general": {"max_samples": 8, "max_new_tokens": 4},
    "train": {"max_steps": 1, "warmup_ratio": 0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
    "report_to": [],
}


def write(path: Path, text: str) -> None:
    """A file of the page, with what the page says of the rest; one that is there already gets it at its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + text)
    if path.suffix != ".jsonl":
        return
    if path.name == "train.jsonl":  # "The `test.jsonl` of each is alike, with other pictures."
        write(path.with_name("test.jsonl"), text.replace("001.jpg", "003.jpg").replace("002.jpg", "004.jpg"))
    for line in text.splitlines():
        picture = path.parent / json.loads(line)["image"]
        picture.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (int(picture.stem), 0, 0)).save(picture)


class Tutorial:
    """Somebody who follows the page in an empty folder.

    Attributes:
        ran: the commands of keeplora, in their order, with their exit status.
    """

    def __init__(self) -> None:
        self.ran: list[tuple[str, int]] = []
        Path("small.yaml").write_text(yaml.safe_dump(SMALL))

    def follow(self) -> None:
        for name, text, commands in STEPS.findall(PAGE):
            if name:
                write(Path(name), text)
            for line in commands.splitlines():
                self.type(shlex.split(line, comments=True))
                if self.ran and self.ran[-1][1] == INTERRUPTED:  # "The same command goes on"
                    self.type(shlex.split(line, comments=True))

    def type(self, words: list[str]) -> None:
        if words[0] in NOT_RUN:
            return
        assert words[0] == "keeplora", words
        if "--config" in words:
            words += ["--config", "small.yaml"]
        try:
            status = main(words[1:])
        except SystemExit as ended:
            status = int(str(ended.code))
        self.ran.append((words[1], status))


def test_the_tutorial_works_as_written(
    finished: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a Ctrl-C in the first run, after which the same command is given again, as the page says."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished.directory.parent / "weight_cache", "cache")  # of the same base
    stages: list[Any] = []

    def interrupt_once(_: Any, matrix: dict[str, Any]) -> None:
        stages.append(matrix["rows"][-1]["task"])
        if stages == [None, "meters"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(trackers, "log_stage", interrupt_once)
    tutorial = Tutorial()
    tutorial.follow()
    expected = "check 0, plan 0, run 130, run 0, run 0, chat 0, edit 0, push 0, export 0"
    assert ", ".join(f"{name} {status}" for name, status in tutorial.ran) == expected
    assert stages == [None, "meters", "faults", "labels"]
    run = load_run("runs/factory")
    assert list(run.matrix.index) == ["base", "meters", "faults", "labels"] and not run.matrix.isna().any().any()
    assert list(load_run("runs/before_labels").matrix.index) == ["base", "meters", "faults"]
    assert (tmp_path / "runs/factory/report.html").is_file() and (tmp_path / "exported/model.safetensors").is_file()
    said = capsys.readouterr().out
    assert "Nothing wrong found." in said and "nothing was sent to USER/factory" in said
    json.loads(Path("question.json").read_text())
