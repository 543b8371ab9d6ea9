"""Where nothing answers under the hub's address: one line while its client tries again, and an error that helps."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
import yaml
from PIL import Image

from mllm_keeplora import command_line
from mllm_keeplora.commands.main import main
from mllm_keeplora.config import JudgeConfig, ModelConfig
from mllm_keeplora.evaluation import score
from mllm_keeplora.evaluation.errors import EvaluationError
from mllm_keeplora.evaluation.judge import load_judge
from mllm_keeplora.evaluation.lmms_model import KeepLoRAModel
from mllm_keeplora.evaluation.task_files import ScoredTask
from mllm_keeplora.modeling.loading import load_base, load_processor
from mllm_keeplora.reports.publishing import _upload

CLOSED = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def nothing_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A port that nothing listens on; the hub's client does not sleep between its tries. Nothing is cached."""
    template = f"{CLOSED}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    constants = {"ENDPOINT": CLOSED, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
    for name, value in {**constants, "HF_HUB_CACHE": str(tmp_path / "hub")}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", CLOSED)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.chdir(tmp_path)
    command_line._say_retries.cache_clear()


def stream(train: Any) -> str:
    """The path of a stream with one task."""
    Path("data").mkdir()
    Image.new("RGB", (8, 8)).save("data/a.png")
    Path("data/test.json").write_text('[{"image": "a.png", "text": "q?", "answer": "a"}]')
    task = {"name": "birds", "train": train, "test": "test.json", "metric": "exact"}
    Path("stream.yaml").write_text(yaml.safe_dump({"name": "s", "data_root": "data", "tasks": [task]}))
    return "stream.yaml"


def hub_stream() -> str:
    """The path of a stream whose data are to be fetched."""
    path = Path(stream("train.json"))
    hub = {"repo_id": "nobody/data", "revision": "main", "files": ["*"]}
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "hub": hub}))
    return str(path)


COMMANDS: dict[str, tuple[Callable[[], list[str]], list[str]]] = {
    "the config of a base": (
        lambda: ["plan", "--model.base_model", "nobody/model"],
        ["config of 'nobody/model'", "Connect once, or put its config.json"],
    ),
    "the processor of a base": (
        lambda: ["check", stream("test.json"), "--base_model", "nobody/model"],
        ["processor of 'nobody/model'", "Connect once, or put its config.json"],
    ),
    "a training set": (
        lambda: ["check", stream({"dataset": "nobody/data", "split": "train"})],
        ["dataset nobody/data", "hf download nobody/data --repo-type dataset --local-dir FOLDER"],
    ),
    "a published stream": (
        lambda: ["fetch", hub_stream()],
        ["nobody/data", "fetch where there is a network and copy the folder"],
    ),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_a_command_says_once_that_nothing_answers_and_what_to_do(
    what: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    arguments, expected = COMMANDS[what]
    try:
        status = main(arguments())
    except SystemExit as ended:
        status = int(str(ended.code))
    assert status != 0
    captured = capfd.readouterr()
    said = captured.out + captured.err
    assert all(text in said for text in expected), said
    lines = [line.getMessage() for line in caplog.records] + said.splitlines()
    assert not [line for line in lines if "Retrying in" in line or "thrown while requesting" in line]
    assert sum("the Hugging Face hub does not answer" in line.getMessage() for line in caplog.records) <= 1


def test_the_one_line_names_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(COMMANDS["the config of a base"][0]())
    [line] = [record.getMessage() for record in caplog.records if "does not answer" in record.getMessage()]
    assert "Connection refused" in line


def test_other_lines_of_the_hubs_client_stay() -> None:
    """Such as how long it waits by the hub's own wish."""
    with pytest.raises(SystemExit):
        main(["nothing"])
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.addHandler(handler)
    try:
        for text in ("'x' thrown while requesting GET y", "Retrying in 1s [Retry 1/5].", "Rate limited. Waiting 301s"):
            logger.warning(text)
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == ["Rate limited. Waiting 301s"]


def test_weights_that_cannot_be_fetched() -> None:
    with pytest.raises(Exception, match=r"(?s)'nobody/model'.*hf download nobody/model --local-dir FOLDER") as caught:
        load_base(ModelConfig(base_model="nobody/model"))
    assert type(caught.value).__name__ == "ConfigError"


def test_a_judge_that_cannot_be_fetched(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"(?s)'nobody/judge'.*hf download nobody/judge --local-dir FOLDER") as caught:
        load_judge(JudgeConfig(judge="nobody/judge"), tmp_path)
    assert type(caught.value).__name__ == "JudgeError"


def test_a_benchmark_whose_data_cannot_be_fetched(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An lmms-eval task on data of the hub; lmms-eval tries again as well, whose pauses are left out."""
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    Path("tasks").mkdir()
    task = {"task": "far", "dataset_path": "nobody/benchmark", "test_split": "test", "output_type": "generate_until"}
    task |= {"doc_to_text": "q", "doc_to_target": "a", "metric_list": [{"metric": "exact_match"}]}
    Path("tasks/far.yaml").write_text(yaml.safe_dump(task))
    processor = load_processor(ModelConfig(), str(tiny_llava))
    model = KeepLoRAModel(torch.nn.Linear(1, 1), processor)
    entry = ScoredTask("far", "general", "far", "exact_match", 1.0)
    with pytest.raises(EvaluationError, match=r"far failed with.*nobody/benchmark.*folder HF_HOME.*`general`"):
        score._run_lmms_eval(lambda: model, [entry], Path("tasks"), False, 1, 1)


def test_a_push_that_reaches_nothing(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"me/mine cannot be written: ConnectError.*See to the network") as caught:
        _upload(tmp_path, "me/mine", False, {})
    assert type(caught.value).__name__ == "PushError"
