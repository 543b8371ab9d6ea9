"""Stream YAMLs: what they give, what is refused and in which words, when a task's data count as changed."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mllm_keeplora.data.record_files import HubTable
from mllm_keeplora.data.records import RecordError, load_records, read_records
from mllm_keeplora.data.stream import (
    GeneralSpec,
    Hub,
    Stream,
    StreamError,
    TaskSpec,
    data_hash,
    load_stream,
    load_training_records,
    named_paths,
)
from tests.conversations import shown_by

REPOSITORY = Path(__file__).parents[2]
Change = Callable[[dict[str, Any]], object]


def write_task(data: Path, name: str) -> None:
    (data / name / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(data / name / "images/a.png")
    record = {"question_id": 1, "image": "images/a.png", "text": f"{name}?", "answer": "yes"}
    for split in ("train", "test"):
        (data / name / f"{split}.json").write_text(json.dumps([record]))


def document(data: Path) -> dict[str, Any]:
    tasks = [
        {
            "name": name,
            "train": f"{name}/train.json",
            "test": f"{name}/test.json",
            "media_root": name,
            "metric": "exact",
        }
        for name in ("birds", "tools")
    ]
    general = [{"name": "scenes", "test": "scenes/test.json", "media_root": "scenes", "metric": "exact"}]
    return {"name": "mine", "data_root": str(data), "tasks": tasks, "general": general}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    for name in ("birds", "tools", "scenes"):
        write_task(data, name)
    return data


@pytest.fixture
def load(tmp_path: Path, data: Path) -> Callable[..., Stream]:
    """Loads the stream of `document` after changes to it."""

    def load(*changes: Change, **settings: Any) -> Stream:
        values = document(data)
        for change in changes:
            change(values)
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return load_stream(path, **settings)

    return load


def test_a_stream_keeps_order_and_fills_in_defaults(load: Callable[..., Stream], data: Path) -> None:
    stream = load(lambda d: d["tasks"][1].update(prompt_suffix=" One word.", max_new_tokens=4, allow_text_only=True))
    birds, tools = stream.tasks
    assert (stream.name, stream.data_root, birds.name, tools.name) == ("mine", data, "birds", "tools")
    files = ("birds/train.json", "birds/test.json")
    assert birds == TaskSpec("birds", *files, "exact", None, "birds", "", 128, False)
    assert (tools.prompt_suffix, tools.max_new_tokens, tools.allow_text_only) == (" One word.", 4, True)
    assert stream.general == (GeneralSpec("scenes", "scenes/test.json", "exact", media_root="scenes"),)
    samples, _ = load_records(stream.train_file(birds), stream.media_root(birds))
    assert shown_by(samples[0]) == data / "birds/images/a.png"
    assert stream.test_file(stream.general[0]) == data / "scenes/test.json"


def test_the_data_root_may_come_from_elsewhere(load: Callable[..., Stream], data: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    data.rename(moved)
    assert load(data_root=moved).data_root == moved
    assert load(lambda d: d.pop("data_root"), data_root=moved).data_root == moved
    with pytest.raises(StreamError, match="data_root is null; expected the folder"):
        load(lambda d: d.pop("data_root"))


def test_training_and_test_media_may_lie_apart(load: Callable[..., Stream], data: Path) -> None:
    (data / "birds").rename(data / "old")
    (data / "birds").mkdir()
    for name in ("train.json", "test.json"):
        (data / "old" / name).rename(data / "birds" / name)
    (data / "old").rename(data / "birds_test")
    stream = load(lambda d: d["tasks"][0].update(media_root="birds_test", test_media_root="birds_test"))
    birds = stream.tasks[0]
    assert stream.media_root(birds) == stream.test_media_root(birds) == data / "birds_test"
    load_training_records(stream)
    before = data_hash(stream, birds)
    stream = load(lambda d: d["tasks"][0].update(media_root="birds_test", test_media_root="birds"))
    with pytest.raises(RecordError, match=r"birds/test\.json"):
        load_training_records(stream)
    assert data_hash(stream, stream.tasks[0]) != before
    assert stream.test_media_root(stream.tasks[1]) == stream.media_root(stream.tasks[1])


def test_where_the_data_are_published_is_optional(load: Callable[..., Stream]) -> None:
    assert load().hub is None
    hub = load(lambda d: d.update(hub={"repo_id": "a/b", "files": ["x*"], "elsewhere": {"x": "there"}})).hub
    assert hub == Hub("a/b", "main", ("x*",), {"x": "there"})
    assert hub is not None
    assert hub.url == "https://huggingface.co/datasets/a/b"


def test_files_may_be_missing_where_they_are_to_be_fetched(load: Callable[..., Stream], tmp_path: Path) -> None:
    stream = load(data_root=tmp_path / "nowhere", check_files=False)
    assert named_paths(stream, stream.tasks[0])[0] == tmp_path / "nowhere/birds/train.json"


def test_a_missing_data_root_is_named(load: Callable[..., Stream], tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"mine\.yaml: the data root .*nowhere .* does not exist"):
        load(data_root=tmp_path / "nowhere")


def test_all_missing_files_are_named_together(load: Callable[..., Stream], data: Path) -> None:
    (data / "birds/train.json").unlink()
    shutil.rmtree(data / "scenes")
    with pytest.raises(StreamError, match="not found under the data root") as caught:
        load()
    for path in ("birds/train.json", "scenes/test.json"):
        assert str(data / path) in str(caught.value)
    assert "tools" not in str(caught.value)


STOCK = {"name": "pope", "lmms_eval_task": "pope", "score": "pope_accuracy", "native_max": 1}


def test_a_stock_benchmark_needs_no_file(load: Callable[..., Stream]) -> None:
    stream = load(lambda d: d["general"].append(dict(STOCK)))
    assert stream.general[1].lmms_eval_task == "pope"
    assert stream.test_file(stream.general[1]) is None
    assert load(lambda d: d.pop("general")).general == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.update(taks=d.pop("tasks")), "unknown key 'taks' (did you mean 'tasks'?)"),
        (
            lambda d: d["tasks"][1].update(promt_suffix="x"),
            "(tools): unknown key 'promt_suffix' (did you mean 'prompt_suffix'?)",
        ),
        (lambda d: d["general"][0].update(train="x"), "general[0] (scenes): unknown key 'train'"),
        (lambda d: d.update({True: "x"}), "unknown key true"),
        (lambda d: d["tasks"][0].pop("metric"), "tasks[0] (birds): missing key 'metric'"),
        (lambda d: d.pop("name"), "the stream: missing key 'name'"),
        (lambda d: d["tasks"][1].update(name="birds"), "the name 'birds' is used more than once"),
        (lambda d: d["general"][0].update(name="birds"), "the name 'birds' is used more than once"),
        (lambda d: d["tasks"][0].update(name="a/../b"), "the name of a task or benchmark is 'a/../b'"),
        (lambda d: d["tasks"][0].update(name=2024), "name: expected text, found 2024 (put it in quotes)"),
        (lambda d: d["tasks"][0].update(prompt_suffix=None), "prompt_suffix: expected text, found null"),
        (
            lambda d: d["tasks"][0].update(max_new_tokens=True),
            "max_new_tokens: expected a whole number in [1, 65536], found true",
        ),
        (
            lambda d: d["tasks"][0].update(max_new_tokens=0),
            "max_new_tokens: expected a whole number in [1, 65536], found 0",
        ),
        (lambda d: d["tasks"][0].update(allow_text_only=1), "allow_text_only: expected true or false, found 1"),
        (
            lambda d: d["tasks"][0].update(train="birds/train.csv"),
            "expected a file ending in .json or .jsonl",
        ),
        (
            lambda d: d["tasks"][0].update(train="../birds.json"),
            "'../birds.json', which leaves the data root",
        ),
        (lambda d: d["tasks"][0].update(media_root="/etc"), "'/etc', which leaves the data root"),
        (lambda d: d["tasks"][0].update(train=f"{'x' * 300}.json"), "cannot be read: File name too long; name another"),
        (lambda d: d["tasks"][0].update(media_root="x" * 300), "cannot be read: File name too long; name another"),
        (lambda d: d["general"][0].update(test="a/" * 3000 + "b.json"), "cannot be read: File name too long"),
        (lambda d: d.update(data_root="x" * 300), "cannot be read: File name too long; name another"),
        (lambda d: d.update(data_root="a\0b"), "cannot be read: it holds a NUL or what is no UTF-8"),
        (lambda d: d.update(data_root="\ud800"), "cannot be read: it holds a NUL or what is no UTF-8"),
        (lambda d: d["tasks"][0].update(train="a\0b.json"), "(it holds a NUL or what is no UTF-8)"),
        (lambda d: d["tasks"][0].update(media_root="\udfff"), "(it holds a NUL or what is no UTF-8)"),
        (lambda d: d.update(tasks=[]), "the stream has no tasks"),
        (lambda d: d.update(tasks={"birds": 1}), "'tasks' is {'birds': 1}; expected a list"),
        (lambda d: d.update(tasks=["birds"]), "tasks[0] is 'birds'; expected 'key: value' lines"),
        (lambda d: d["general"][0].pop("metric"), "'scenes': missing metric; expected test, metric"),
        (lambda d: d["general"].append({**STOCK, "test": "a.json"}), "'pope': found test; expected"),
        (
            lambda d: d["general"].append({**STOCK, "max_new_tokens": 4}),
            "'pope': found max_new_tokens; expected",
        ),
        (lambda d: d["general"][0].update(native_max=2.0), "'scenes': found native_max; expected"),
        (
            lambda d: d["general"].append({**STOCK, "native_max": 0}),
            "native_max: expected a number in (0, 1000000000] or null, found 0",
        ),
        (lambda d: d["tasks"][0].update(test_media_root="../x"), "'../x', which leaves the data root"),
        (
            lambda d: d["tasks"][0].update(test_prompt_suffix=3),
            "test_prompt_suffix: expected text or 'name: value' lines, found 3",
        ),
        (
            lambda d: d["tasks"][0].update(test_prompt_suffix={True: "a", "*": "b"}),
            "found true (put it in quotes; YAML reads Yes and No as true and false)",
        ),
        (lambda d: d["tasks"][0].update(test_prompt_suffix={"Yes": "a"}), 'with "*" for the other answers'),
        (lambda d: d.update(hub="a/b"), "hub is 'a/b'; expected 'key: value' lines"),
        (lambda d: d.update(hub={"repo": "a/b"}), "hub: unknown key 'repo' (did you mean 'repo_id'?)"),
        (lambda d: d.update(hub={"revision": "main"}), "hub: missing key 'repo_id'"),
        (lambda d: d.update(hub={"repo_id": "a/b", "revision": 1234}), "as text (in quotes where it is all"),
        (lambda d: d.update(hub={"repo_id": "a/b", "files": "*"}), "hub: expected files as a list"),
    ],
)
def test_bad_streams_are_refused(load: Callable[..., Stream], change: Change, reason: str) -> None:
    with pytest.raises(StreamError) as caught:
        load(change)
    assert str(caught.value).count("mine.yaml: ") == 1
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the stream is null; expected 'key: value' lines"),
        (b"tasks: [a", "not valid YAML"),
        (b"name: \xff", "not UTF-8 text"),
        (b"name: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_stream_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(StreamError, match=re.escape(f"{path}: {reason}")):
        load_stream(path)


def test_a_missing_stream_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"none\.yaml: cannot be read: No such file"):
        load_stream(tmp_path / "none.yaml")


def test_every_file_is_checked_and_only_training_records_may_be_skipped(
    load: Callable[..., Stream], data: Path
) -> None:
    stream = load(lambda d: d["general"].append(dict(STOCK)))
    load_training_records(stream)
    good = json.loads((data / "tools/train.json").read_text())
    for file in (
        "birds/train.json",
        "birds/test.json",
        "tools/train.json",
        "tools/test.json",
        "scenes/test.json",
    ):
        (data / file).write_text(json.dumps([*good, {**good[0], "answer": ""}]))
        with pytest.raises(RecordError, match=f"{file}: 1 of 2 records"):
            load_training_records(stream)
        if "train" in file:
            load_training_records(stream, "skip")
        else:
            with pytest.raises(RecordError, match=f"{file}: 1 of 2 records"):
                load_training_records(stream, "skip")
        (data / file).write_text(json.dumps(good))


def test_the_data_hash_sees_every_change_of_one_task(load: Callable[..., Stream], data: Path) -> None:
    stream = load()
    birds, tools = stream.tasks
    seen = {data_hash(stream, birds)}

    def changed() -> bool:
        """Whether the hash of `birds` is one that was never there before."""
        new = data_hash(stream, birds)
        fresh = new not in seen
        seen.add(new)
        return fresh

    assert not changed()
    (data / "tools/train.json").write_text("[]")
    assert not changed()
    (data / "birds/images/unused.png").touch()
    assert not changed()

    for split in ("train", "test"):
        path = data / f"birds/{split}.json"
        path.write_text(path.read_text().replace("yes", "no"))
        assert changed()
    Image.new("RGB", (9, 9)).save(data / "birds/images/a.png", compress_level=0)
    assert changed()
    (data / "birds/images/a.png").unlink()
    assert changed()
    assert data_hash(stream, replace(birds, prompt_suffix=" One word.")) not in seen
    assert data_hash(stream, tools) not in seen


def test_the_data_hash_of_a_benchmark(load: Callable[..., Stream], data: Path) -> None:
    own, stock = (stream := load(lambda d: d["general"].append(dict(STOCK)))).general
    before = data_hash(stream, own)
    (data / "scenes/test.json").write_text("[]")
    assert data_hash(stream, own) != before
    assert data_hash(stream, stock) != data_hash(stream, replace(stock, native_max=2.0))


def test_the_data_hash_does_not_depend_on_where_the_data_lie(load: Callable[..., Stream], data: Path) -> None:
    stream = load()
    before = [data_hash(stream, task) for task in stream.tasks]
    moved = data.parent / "elsewhere"
    data.rename(moved)
    stream = load(data_root=moved)
    assert [data_hash(stream, task) for task in stream.tasks] == before


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes/streams").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_streams_are_well_formed(path: Path, tmp_path: Path) -> None:
    """Their data are not there yet on a fresh clone, so loading goes exactly as far as finding that out."""
    with pytest.raises(StreamError, match="the data root .* does not exist"):
        load_stream(path, tmp_path / "nowhere")


def fenced_blocks(page: Path) -> dict[str, str]:
    """The page's code blocks by the file name in the line before them, as in **`a.json`**."""
    found = re.findall(r"\*\*`([^`]+)`\*\*[^\n]*\n\n```\w+\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return dict(found)


def test_the_worked_example_of_the_docs_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = fenced_blocks(REPOSITORY / "docs/your_own_data.md")
    assert {"my_stream.yaml", "my_run.yaml"} < blocks.keys()
    monkeypatch.chdir(tmp_path)
    for name, text in blocks.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for image in re.findall(r"images/[\w.]+\.(?:jpg|png)", "".join(blocks.values())):
        for folder in ("birds", "tools"):
            (tmp_path / "my_data" / folder / "images").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "my_data" / folder / image)

    run = yaml.safe_load(blocks["my_run.yaml"])
    stream = load_stream(Path(run["stream"]))
    assert len(stream.tasks) == 2
    load_training_records(stream)
    # Every other form that the page shows is read as well, as training and as test.
    others = [name for name in blocks if name.startswith("my_data/") and "/drives/" not in name]
    assert len(others) == 8
    for name in others:
        samples, _ = load_records(tmp_path / name, (tmp_path / name).parent)
        assert all(sample.media for sample in samples)
    drives = tmp_path / "my_data/drives"
    questions, bad = read_records(drives / "test_questions.json", drives, answers=drives / "test_answers.json")
    assert bad == {} and questions[1].answers == ("yes",)
    train = yaml.safe_load(blocks["hub_entry.yaml"])["train"]
    source = Stream("s", tmp_path, (replace(stream.tasks[0], train=train),)).source(train)
    assert isinstance(source, HubTable) and source.columns["answer"] == "label_text"
