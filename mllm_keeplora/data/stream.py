"""Streams: the ordered tasks a model learns and the general benchmarks it is watched on, from one YAML file.

For example:

    name: birds_then_tools
    data_root: my_data             # relative to the working directory; the run YAML may override it
    tasks:                         # learnt in this order
      - name: birds
        train: birds/train.json    # relative to data_root; forms: see `mllm_keeplora.data.record_forms`
        test: birds/test.json
        media_root: birds          # the records' image paths are relative to data_root/media_root
        metric: exact              # a scoring function of eval/tasks
    hub:                           # optional: where `keeplora fetch` gets the data from
      repo_id: somebody/birds
    general:                       # watched, never trained on: an own file, or a stock lmms-eval task
      - name: pope
        lmms_eval_task: pope
        score: pope_accuracy
        native_max: 1.0
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar

from mllm_keeplora.config import ConfigError, NewTokens
from mllm_keeplora.data.classification import build_classes
from mllm_keeplora.data.conversation import Classes, Sample
from mllm_keeplora.data.preflight import IMAGES_ONLY, Preflight
from mllm_keeplora.data.record_files import EXTRACTED, RECORD_SUFFIXES, HubTable, content_hash, is_folder
from mllm_keeplora.data.records import OTHER_ANSWERS, SkippedRecord, load_records, named_media, suffix_for
from mllm_keeplora.errors import KeepLoRAError, did_you_mean
from mllm_keeplora.modeling.clip import classifies
from mllm_keeplora.resources import find, is_there, unusable
from mllm_keeplora.runs.files import file_state
from mllm_keeplora.settings import Range, check_settings, shown
from mllm_keeplora.yaml_files import read_yaml

# Names become folder, file and lmms-eval task names.
_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")

_Spec = TypeVar("_Spec")


class StreamError(KeepLoRAError, ValueError):
    """A stream YAML, or the data it names, cannot be used; the message names file, entry and remedy."""


@dataclass(frozen=True)
class Hub:
    """Where a stream's data are published.

    Attributes:
        repo_id: dataset repository of the Hugging Face hub.
        revision: commit, tag or branch of it.
        files: patterns of the files that the stream needs of it; `*` also matches `/`.
        elsewhere: folder under the data root -> where its files come from, for what the repository lacks.
    """

    repo_id: str
    revision: str = "main"
    files: tuple[str, ...] = ("*",)
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        texts = [self.repo_id, self.revision, *self.files, *self.elsewhere, *self.elsewhere.values()]
        if not self.files or not all(isinstance(text, str) and text for text in texts):
            raise StreamError(
                "hub: expected repo_id and revision as text (in quotes where it is all digits), files as a "
                f"list of patterns, elsewhere as 'folder: where from' lines; found {self}"
            )

    @property
    def url(self) -> str:
        """Its page."""
        return f"https://huggingface.co/datasets/{self.repo_id}"


@dataclass(frozen=True)
class TaskSpec:
    """One task that is learnt; files and `media_root` are relative to the stream's data root.

    Attributes:
        name: unique in the stream; letters, digits, `_`, `.`, `-`.
        train: file of training records; or a dataset of the hub: the fields of `HubTable`.
        test: test records, likewise.
        metric: name of the scoring function in eval/tasks.
        test_answers: file of the answers, where `test` holds the questions alone; paired by position.
        media_root: folder that the records' image and video paths are relative to.
        test_media_root: the same for the test records, where that is another folder.
        prompt_suffix: appended to every question, in training and test.
        test_prompt_suffix: appended after it in evaluation alone, for benchmarks whose runner adds what their
            training questions hold already. Or one suffix per reference answer, `"*"` for all others.
        max_new_tokens: longest answer generated in evaluation, in tokens.
        allow_text_only: accept records without an image.
        references: COCO file of reference captions, for a metric that needs one; images are numbered from 1
            in the order of the test records. Or TextVQA's annotation file, for `vqa_accuracy`.
        classes: names and prompts of what a picture is told to show, for a model that compares it with them, or a YAML
            of these beside the stream's (`data.classification`); `train` and `test` may then be folders.
    """

    name: str
    train: str | Mapping[str, Any]
    test: str | Mapping[str, Any]
    metric: str
    test_answers: str | None = None
    media_root: str = "."
    prompt_suffix: str = ""
    max_new_tokens: NewTokens = 128
    allow_text_only: bool = False
    test_media_root: str | None = None
    test_prompt_suffix: str | Mapping[str, str] = ""
    references: str | None = None
    classes: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _check_common(self)
        for key in ("train", "test", "test_answers"):
            _check_record_file(self, key, getattr(self, key))
        _check_references(self)
        _check_classes(self)


@dataclass(frozen=True)
class GeneralSpec:
    """One general benchmark watched for retention: an own test file, or a stock lmms-eval task.

    Attributes:
        name: as in `TaskSpec`.
        test: test records, as in `TaskSpec`; None for a stock task.
        metric, test_answers, media_root, prompt_suffix, max_new_tokens, allow_text_only, references, classes: as
            in `TaskSpec`; own file only.
        lmms_eval_task: name of the stock task; None for an own file.
        score: which number of the stock task's result to read.
        native_max: that number's largest value, so that value = native / native_max.
    """

    name: str
    test: str | Mapping[str, Any] | None = None
    metric: str | None = None
    test_answers: str | None = None
    media_root: str = "."
    prompt_suffix: str = ""
    max_new_tokens: NewTokens = 128
    allow_text_only: bool = False
    lmms_eval_task: str | None = None
    score: str | None = None
    native_max: Annotated[float, Range(0, 1_000_000_000, "(]")] | None = None
    references: str | None = None
    classes: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _check_common(self)
        self._check_kind()
        for key in ("test", "test_answers"):
            _check_record_file(self, key, getattr(self, key))
        _check_references(self)
        _check_classes(self)

    def _check_kind(self) -> None:
        """Either an own file or a stock task: refuses keys that the other kind alone would read."""
        own, stock = ("test", "metric"), ("lmms_eval_task", "score", "native_max")
        own_only = (
            *own,
            "test_answers",
            "media_root",
            "prompt_suffix",
            "max_new_tokens",
            "allow_text_only",
            "references",
            "classes",
        )
        wanted, unwanted = (own, stock) if self.lmms_eval_task is None else (stock, own_only)
        defaults = {field.name: field.default for field in fields(self)}
        missing = [key for key in wanted if getattr(self, key) is None]
        extra = [key for key in unwanted if getattr(self, key) != defaults[key]]
        if missing or extra:
            found = f"missing {', '.join(missing)}" if missing else f"found {', '.join(extra)}"
            raise StreamError(
                f"general benchmark {self.name!r}: {found}; expected {', '.join(own)} (and optionally "
                f"{', '.join(own_only[2:])}) for an own file, or {', '.join(stock)} for a stock one"
            )


@dataclass(frozen=True)
class Stream:
    """An ordered sequence of tasks with the general benchmarks, and the folder that holds their data.

    Attributes:
        name, data_root, tasks, general, hub: as in the YAML.
        extracted: folder for the media that lie inside tables of records.
    """

    name: str
    data_root: Path
    tasks: tuple[TaskSpec, ...]
    general: tuple[GeneralSpec, ...] = ()
    hub: Hub | None = None
    extracted: Path = field(default_factory=lambda: Path("cache").absolute() / EXTRACTED)

    def __post_init__(self) -> None:
        _check_name(self.name, "the stream")
        if not self.tasks:
            raise StreamError("the stream has no tasks; expected at least one")
        names = [task.name for task in self.tasks] + [benchmark.name for benchmark in self.general]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise StreamError(
                f"the name {shown(repeated[0])} is used more than once; give every task and benchmark its own"
            )

    @property
    def specs(self) -> tuple[TaskSpec | GeneralSpec, ...]:
        """The tasks, then the general benchmarks."""
        return (*self.tasks, *self.general)

    def question_suffix(self, name: str) -> str:
        """What evaluation adds to a question of a task or benchmark if its answer is not known.

        Raises:
            StreamError: the stream has none of that name.
        """
        for spec in self.specs:
            if spec.name == name:
                return spec.prompt_suffix + (suffix_for(spec.test_prompt_suffix) if isinstance(spec, TaskSpec) else "")
        named = ", ".join(spec.name for spec in self.specs)
        raise StreamError(f"the stream {self.name} has no task {shown(name)}; it has {named}")

    def train_file(self, task: TaskSpec) -> Path | HubTable:
        """The task's training records."""
        return self.source(task.train)

    def test_file(self, spec: TaskSpec | GeneralSpec) -> Path | HubTable | None:
        """The test records; None for a stock lmms-eval task."""
        return None if spec.test is None else self.source(spec.test)

    def source(self, named: str | Mapping[str, Any]) -> Path | HubTable:
        """Where the records lie that an entry names: a file, or a dataset of the hub (or a folder like one)."""
        if isinstance(named, str):
            return self.data_root / named
        table = HubTable(**named)
        folder = self.data_root / table.dataset
        return replace(table, dataset=str(folder)) if is_there(folder) and folder.is_dir() else table

    def classes(self, spec: TaskSpec | GeneralSpec) -> Classes | None:
        """What the pictures of a task or benchmark may show; None where answers are words.

        Raises:
            StreamError: its `classes` cannot be used.
            RecordError: the folders that name them cannot be read.
        """
        if not isinstance(spec.classes, Mapping):
            return None
        named = self.source(spec.train) if isinstance(spec, TaskSpec) else self.test_file(spec)
        if "names" not in spec.classes and isinstance(named, Path) and not is_there(named):
            raise StreamError(f"{spec.name!r}: classes: {named} is not there, whose folders name them")
        try:
            return build_classes(spec.classes, named if isinstance(named, Path) and is_folder(named) else None)
        except ConfigError as error:
            raise StreamError(f"{spec.name!r}: classes: {error}") from error

    def answers_file(self, spec: TaskSpec | GeneralSpec) -> Path | None:
        """Path of the answers to the test questions; None where these lie in the test file itself."""
        return None if spec.test_answers is None else self.data_root / spec.test_answers

    def references_file(self, spec: TaskSpec | GeneralSpec) -> Path | None:
        """Path of the reference captions; None for a task that is scored without."""
        return None if spec.references is None else self.data_root / spec.references

    def media_root(self, spec: TaskSpec | GeneralSpec) -> Path:
        """Folder that the image and video paths in the spec's training records are relative to."""
        return self.data_root / spec.media_root

    def test_media_root(self, spec: TaskSpec | GeneralSpec) -> Path:
        """The same for its test records."""
        other = spec.test_media_root if isinstance(spec, TaskSpec) else None
        return self.data_root / (spec.media_root if other is None else other)


def load_stream(
    path: Path, data_root: Path | None = None, *, check_files: bool = True, cache_dir: str | Path = "cache"
) -> Stream:
    """Reads a stream YAML and checks that the files it names are there.

    What is in the files is checked by `load_records`.

    Args:
        path: the YAML file.
        data_root: used in place of the YAML's own `data_root` when given.
        check_files: False where the files may yet be missing.
        cache_dir: as of the run; media that lie inside tables of records are written below it.

    Raises:
        StreamError: the file is missing or no YAML, a key is unknown, missing or of the wrong type, a name is
            used twice, the data root or files under it are missing, or a path leaves the data root.
    """
    path = find(path)
    try:
        document = _with_classes(_with_suite(_read_yaml(path), path.parent), path.parent)
        stream = _build_stream(document, data_root)
        stream = replace(stream, extracted=Path(cache_dir).absolute() / EXTRACTED)
        if check_files:
            _check_files(stream)
    except StreamError as error:
        raise StreamError(f"{path}: {error}") from error
    return stream


def load_training_records(
    stream: Stream,
    on_bad_record: Literal["error", "skip"] = "error",
    checker: Preflight = IMAGES_ONLY,
) -> dict[str, tuple[list[Sample], list[SkippedRecord]]]:
    """Reads and checks every record that the stream's files hold, test files included, with what they show.

    To be called before a run's first stage, so that a bad record of the last task is not found after hours.
    `on_bad_record` concerns the training files; a test file with a bad record is always refused, as leaving
    questions out would change what the scores mean.

    Returns:
        Task name -> (training samples, records left out).

    Raises:
        RecordError: a file cannot be used; names the bad records of the first such file.
        StreamError: a task that is not of the model's kind (`check_kind`).
    """
    check_kind(stream, checker.processor)
    training = {}
    for spec in stream.specs:
        text_only = spec.allow_text_only
        if isinstance(spec, TaskSpec):
            training[spec.name] = load_records(
                stream.train_file(spec),
                stream.media_root(spec),
                prompt_suffix=spec.prompt_suffix,
                allow_text_only=text_only,
                on_bad_record=on_bad_record,
                checker=checker,
                extracted=stream.extracted,
                task=spec.name,
                classes=stream.classes(spec),
            )
        test, answers = stream.test_file(spec), stream.answers_file(spec)
        if test is not None:
            load_records(
                test,
                stream.test_media_root(spec),
                answers=answers,
                allow_text_only=text_only,
                checker=checker,
                extracted=stream.extracted,
                classes=stream.classes(spec),
            )
    return training


def check_kind(stream: Stream, processor: Any) -> None:
    """Compares what a stream asks with what a model can do: choose among classes, or answer in words.

    Args:
        stream: to be learnt.
        processor: the model's; None where there is none yet.

    Raises:
        StreamError: names the first task that is of the other kind.
    """
    if processor is None:
        return
    chooses = classifies(processor)
    for spec in stream.specs:
        if (spec.classes is not None) != chooses:
            raise StreamError(
                f"{spec.name!r} has {'no `classes`' if chooses else '`classes`'}, and the base model "
                + ("chooses among classes: give them, or take it out" if chooses else "answers in words: take a CLIP")
            )


def data_hash(stream: Stream, spec: TaskSpec | GeneralSpec) -> str:
    """SHA-256 (hex) that changes when the data of a task or benchmark, or its treatment, changes.

    Covers its own entry in the stream (every key, defaults filled in), the bytes of its record files (a stock
    lmms-eval task has none) and of its reference captions, and path and size in bytes of every image and clip
    the records name (a missing file counts as such). It does NOT cover the media's content: an image edited
    in place to the same size goes unnoticed. The data root is left out, so that moved data stay the same.

    Cost: one read of the record files and one `stat` per image or clip.

    Raises:
        RecordError: one of the files cannot be read.
    """
    entry = {key: value for key, value in asdict(spec).items() if key != "classes" or value is not None}
    digest = hashlib.sha256(json.dumps(entry, sort_keys=True).encode())
    classes = stream.classes(spec)
    train = stream.train_file(spec) if isinstance(spec, TaskSpec) else None
    for file in _record_sources(stream, spec):
        root = stream.media_root(spec) if file == train else stream.test_media_root(spec)
        named = sorted(named_media(file, root, stream.extracted, classes))
        # Media of a table are part of its own bytes, wherever they are kept.
        sizes = [
            (os.path.relpath(path, root), _size(path)) for path in named if not path.is_relative_to(stream.extracted)
        ]
        digest.update(bytes.fromhex(content_hash(file, stream.extracted)))
        digest.update(json.dumps(sizes).encode())
    references = stream.references_file(spec)
    if references is not None:
        digest.update(hashlib.sha256(references.read_bytes()).digest())
    return digest.hexdigest()


def _size(path: Path) -> int | None:
    state = file_state(path)
    return None if state is None else state[0]


def _read_yaml(path: Path) -> object:
    try:
        return read_yaml(path)
    except ConfigError as error:
        raise StreamError(str(error)) from error


def _with_suite(document: object, folder: Path) -> object:
    """`general: FILE` stands for the entries of that YAML, which lies beside the stream's."""
    suite = document.get("general") if isinstance(document, dict) else None
    if not isinstance(suite, str):
        return document
    return {**document, "general": _read_part("general", folder / suite)}  # type: ignore[dict-item]


def _read_part(key: str, file: Path) -> object:
    try:
        return _read_yaml(file)
    except StreamError as error:
        raise StreamError(f"{key}: {file}: {error}") from error


def _with_classes(document: object, folder: Path) -> object:
    """`classes: FILE` stands for the content of that YAML, which lies beside the stream's."""
    if not isinstance(document, dict):
        return document
    return {**document, **{key: _in_full(document[key], folder) for key in ("tasks", "general") if key in document}}


def _in_full(entries: object, folder: Path) -> object:
    if not isinstance(entries, list):
        return entries
    full = []
    for entry in entries:
        file = entry.get("classes") if isinstance(entry, dict) else None
        full.append({**entry, "classes": _read_part("classes", folder / file)} if isinstance(file, str) else entry)
    return full


def _build_stream(document: object, data_root: Path | None) -> Stream:
    values = _check_keys(document, Stream, "the stream", optional=("data_root",))
    if "extracted" in values:  # no key of the YAML: the run's cache_dir decides
        raise StreamError("the stream: unknown key 'extracted'")
    root = data_root if data_root is not None else values.get("data_root")
    if not isinstance(root, str | Path) or not str(root):
        raise StreamError(
            f"data_root is {shown(root)}; expected the folder that holds the data, here or in the run YAML"
        )
    if reason := unusable(root):
        raise StreamError(f"data_root {shown(str(root))} cannot be read: {reason}; name another")
    return Stream(
        name=values["name"],
        data_root=Path(root),
        tasks=_build_specs(values["tasks"], TaskSpec, "tasks"),
        general=_build_specs(values.get("general", []), GeneralSpec, "general"),
        hub=_build_hub(values.get("hub")),
    )


def _build_hub(entry: object) -> Hub | None:
    if entry is None:
        return None
    values = _check_keys(entry, Hub, "hub")
    if not isinstance(values.get("files", []), list) or not isinstance(values.get("elsewhere", {}), dict):
        raise StreamError("hub: expected files as a list and elsewhere as 'folder: where from' lines")
    return Hub(**{**values, "files": tuple(values.get("files", Hub.files))})


def _build_specs(items: object, kind: type[_Spec], key: str) -> tuple[_Spec, ...]:
    if not isinstance(items, list):
        raise StreamError(f"{key!r} is {shown(items)}; expected a list of entries, each beginning with '- name: ...'")
    specs = []
    for index, item in enumerate(items):
        name = item.get("name") if isinstance(item, dict) else None
        where = f"{key}[{index}]" + (f" ({name})" if name is not None else "")
        specs.append(kind(**_check_keys(item, kind, where)))
    return tuple(specs)


def _check_keys(values: object, kind: type, where: str, optional: Sequence[str] = ()) -> dict[str, Any]:
    """Returns `values` when it is a mapping whose keys are fields of `kind` with none missing."""
    if not isinstance(values, dict):
        raise StreamError(f"{where} is {shown(values)}; expected 'key: value' lines")
    known = [field.name for field in fields(kind)]
    for key in values:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise StreamError(f"{where}: unknown key {shown(key)}{hint}; known keys: {', '.join(known)}")
    required = [
        item.name
        for item in fields(kind)
        if item.default is MISSING and item.default_factory is MISSING and item.name not in optional
    ]
    missing = [key for key in required if key not in values]
    if missing:
        raise StreamError(f"{where}: missing key {', '.join(map(repr, missing))}")
    return values


def _check_types(spec: TaskSpec | GeneralSpec) -> None:
    try:
        check_settings(spec)
    except ConfigError as error:
        raise StreamError(f"task or benchmark {shown(spec.name)}: {error}") from error


def _check_common(spec: TaskSpec | GeneralSpec) -> None:
    _check_name(spec.name, "a task or benchmark")
    _check_inside(spec, "media_root", spec.media_root)
    if isinstance(spec, TaskSpec):
        _check_inside(spec, "test_media_root", spec.test_media_root or ".")
        _check_suffix(spec)


def _check_suffix(spec: TaskSpec) -> None:
    suffix = spec.test_prompt_suffix
    if isinstance(suffix, str):
        return
    if OTHER_ANSWERS not in suffix:
        raise StreamError(
            f"{spec.name!r}: test_prompt_suffix is {shown(dict(suffix))}; expected text, or 'answer: text' lines "
            f'with "{OTHER_ANSWERS}" for the other answers'
        )


def _check_name(name: object, what: str) -> None:
    if not isinstance(name, str) or not _NAME_PATTERN.fullmatch(name):
        raise StreamError(
            f"the name of {what} is {shown(name)}; expected at most 100 letters, digits, '_', '.' and '-' (it names "
            "files)"
        )


def _check_record_file(spec: TaskSpec | GeneralSpec, key: str, value: str | Mapping[str, Any] | None) -> None:
    if value is None:
        return
    if isinstance(value, Mapping):
        _check_table(spec, key, value)
        return
    _check_inside(spec, key, value)
    if spec.classes is None and not value.endswith(RECORD_SUFFIXES):
        raise StreamError(
            f"{spec.name!r}: {key} is {shown(value)}; expected a file ending in {' or '.join(RECORD_SUFFIXES)}. "
            "A folder of pictures needs `classes`"
        )


def _check_table(spec: TaskSpec | GeneralSpec, key: str, value: Mapping[str, Any]) -> None:
    where = f"{spec.name!r}: {key}"
    given = _check_keys(dict(value), HubTable, where)
    columns = given.get("columns", {})
    texts = [item for name, item in given.items() if name != "columns" and item is not None]
    if isinstance(columns, Mapping):
        texts += [*columns, *columns.values()]
    if not isinstance(columns, Mapping) or not all(isinstance(text, str) and text for text in texts):
        raise StreamError(f"{where} is {shown(dict(value))}; expected text, and columns as 'our key: its column' lines")


def _check_references(spec: TaskSpec | GeneralSpec) -> None:
    if spec.references is None:
        return
    _check_inside(spec, "references", spec.references)
    if PurePath(spec.references).suffix != ".json":
        raise StreamError(
            f"{spec.name!r}: references is {shown(spec.references)}; expected a COCO captions file ending in .json"
        )


def _check_classes(spec: TaskSpec | GeneralSpec) -> None:
    """A task of this kind has no words to ask, and one score."""
    if spec.classes is None:
        return
    defaults = {item.name: item.default for item in fields(spec)}
    others = ("test_answers", "prompt_suffix", "test_prompt_suffix", "allow_text_only", "references")
    given = [key for key in others if getattr(spec, key, defaults.get(key)) != defaults.get(key)]
    if given or spec.metric != "exact":
        found = f"{given[0]} beside them" if given else f"the metric {shown(spec.metric)}"
        raise StreamError(f"{spec.name!r}: classes: found {found}; expected the metric exact alone")
    if isinstance(spec.classes, Mapping) and "names" in spec.classes:
        try:
            build_classes(spec.classes, None)
        except ConfigError as error:
            raise StreamError(f"{spec.name!r}: classes: {error}") from error


def _check_inside(spec: TaskSpec | GeneralSpec, key: str, value: str) -> None:
    path = PurePath(value)
    if path.is_absolute() or ".." in path.parts:
        raise StreamError(
            f"{spec.name!r}: {key} is {shown(value)}, which leaves the data root; give a path relative to it"
        )
    if reason := unusable(value):
        raise StreamError(f"{spec.name!r}: {key} {shown(value)} cannot be read: {reason}; name another")


def _check_files(stream: Stream) -> None:
    if not stream.data_root.is_dir():
        raise StreamError(
            f"the data root {stream.data_root} (seen from {Path.cwd()}) does not exist or is no folder; set "
            "'data_root' in the stream or run YAML to the folder that holds the data"
        )
    missing = [path for spec in stream.specs for path in named_paths(stream, spec) if not is_there(path)]
    if missing:
        raise StreamError(f"not found under the data root {stream.data_root}: {', '.join(map(str, missing))}")


def named_paths(stream: Stream, spec: TaskSpec | GeneralSpec) -> list[Path]:
    """Every file and media folder that an entry names; none for a stock lmms-eval task."""
    references = stream.references_file(spec)
    paths = [*record_files(stream, spec), *([] if references is None else [references])]
    if spec.test is not None:
        # Once where training and test records share one folder.
        paths += dict.fromkeys([stream.media_root(spec), stream.test_media_root(spec)])
    return paths


def record_files(stream: Stream, spec: TaskSpec | GeneralSpec) -> list[Path]:
    """The files of records that an entry names; none for a stock lmms-eval task and for datasets of the hub."""
    return [source for source in _record_sources(stream, spec) if isinstance(source, Path)]


def _record_sources(stream: Stream, spec: TaskSpec | GeneralSpec) -> list[Path | HubTable]:
    train = stream.train_file(spec) if isinstance(spec, TaskSpec) else None
    return [file for file in (train, stream.test_file(spec), stream.answers_file(spec)) if file is not None]
