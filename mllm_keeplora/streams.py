"""Streams: the ordered tasks a model learns and the general benchmarks it is watched on, from one YAML file.

For example:

    name: birds_then_tools
    data_root: my_data             # relative to the working directory; the run YAML may override it
    tasks:                         # learnt in this order
      - name: birds
        train: birds/train.json    # relative to data_root; record forms: see `mllm_keeplora.data.records`
        test: birds/test.json
        image_root: birds          # the records' image paths are relative to data_root/image_root
        metric: exact              # a scoring function of eval/tasks
    general:                       # watched, never trained on: an own file, or a stock lmms-eval task
      - name: pope
        lmms_eval_task: pope
        score: pope_accuracy
        native_max: 1.0
"""

import difflib
import hashlib
import json
import re
import types
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path, PurePath
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import yaml

from mllm_keeplora.data.records import RECORD_SUFFIXES, Sample, SkippedRecord, load_records, named_images
from mllm_keeplora.errors import KeepLoRAError

# Names become folder, file and lmms-eval task names.
_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

_Spec = TypeVar("_Spec")


class StreamError(KeepLoRAError, ValueError):
    """A stream YAML, or the data it names, cannot be used; the message names file, entry and remedy."""


@dataclass(frozen=True)
class TaskSpec:
    """One task that is learnt; `train`, `test` and `image_root` are relative to the stream's data root.

    Attributes:
        name: unique in the stream; letters, digits, `_`, `.`, `-`.
        train: file of training records.
        test: file of test records.
        metric: name of the scoring function in eval/tasks.
        image_root: folder that the records' image paths are relative to.
        prompt_suffix: appended to every question, in training and test.
        max_new_tokens: longest answer generated in evaluation, in tokens.
        allow_text_only: accept records without an image.
    """

    name: str
    train: str
    test: str
    metric: str
    image_root: str = "."
    prompt_suffix: str = ""
    max_new_tokens: int = 128
    allow_text_only: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        _check_common(self)
        _check_record_file(self, "train", self.train)
        _check_record_file(self, "test", self.test)


@dataclass(frozen=True)
class GeneralSpec:
    """One general benchmark watched for retention: an own test file, or a stock lmms-eval task.

    Attributes:
        name: as in `TaskSpec`.
        test: file of test records; None for a stock task.
        metric, image_root, prompt_suffix, max_new_tokens, allow_text_only: as in `TaskSpec`; own file only.
        lmms_eval_task: name of the stock task; None for an own file.
        score: which number of the stock task's result to read.
        native_max: that number's largest value, so that value = native / native_max.
    """

    name: str
    test: str | None = None
    metric: str | None = None
    image_root: str = "."
    prompt_suffix: str = ""
    max_new_tokens: int = 128
    allow_text_only: bool = False
    lmms_eval_task: str | None = None
    score: str | None = None
    native_max: float | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _check_common(self)
        self._check_kind()
        if self.test is not None:
            _check_record_file(self, "test", self.test)
        if self.native_max is not None and not self.native_max > 0:
            raise StreamError(
                f"general benchmark {self.name!r}: native_max is {self.native_max}; expected a number > 0"
            )

    def _check_kind(self) -> None:
        """Either an own file or a stock task: refuses keys that the other kind alone would read."""
        own, stock = ("test", "metric"), ("lmms_eval_task", "score", "native_max")
        own_only = (*own, "image_root", "prompt_suffix", "max_new_tokens", "allow_text_only")
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
    """An ordered sequence of tasks with the general benchmarks, and the folder that holds their data."""

    name: str
    data_root: Path
    tasks: tuple[TaskSpec, ...]
    general: tuple[GeneralSpec, ...] = ()

    def __post_init__(self) -> None:
        _check_name(self.name, "the stream")
        if not self.tasks:
            raise StreamError("the stream has no tasks; expected at least one")
        names = [task.name for task in self.tasks] + [benchmark.name for benchmark in self.general]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise StreamError(
                f"the name {repeated[0]!r} is used more than once; give every task and benchmark its own"
            )

    def train_file(self, task: TaskSpec) -> Path:
        """Path of the task's training records."""
        return self.data_root / task.train

    def test_file(self, spec: TaskSpec | GeneralSpec) -> Path | None:
        """Path of the test records; None for a stock lmms-eval task."""
        return None if spec.test is None else self.data_root / spec.test

    def image_root(self, spec: TaskSpec | GeneralSpec) -> Path:
        """Folder that the image paths in the spec's records are relative to."""
        return self.data_root / spec.image_root


def load_stream(path: Path, data_root: Path | None = None) -> Stream:
    """Reads a stream YAML and checks that the files it names are there.

    What is in the files is checked by `load_records`.

    Args:
        path: the YAML file.
        data_root: used in place of the YAML's own `data_root` when given.

    Raises:
        StreamError: the file is missing or no YAML, a key is unknown, missing or of the wrong type, a name is
            used twice, the data root or files under it are missing, or a path leaves the data root.
    """
    try:
        stream = _build_stream(_read_yaml(path), data_root)
        _check_files(stream)
    except StreamError as error:
        raise StreamError(f"{path}: {error}") from error
    return stream


def load_training_records(
    stream: Stream, on_bad_record: Literal["error", "skip"] = "error"
) -> dict[str, tuple[list[Sample], list[SkippedRecord]]]:
    """Reads and checks every record that the stream's files hold, test files included, and decodes every
    image.

    To be called before a run's first stage, so that a bad record of the last task is not found after hours.
    `on_bad_record` concerns the training files; a test file with a bad record is always refused, as leaving
    questions out would change what the scores mean.

    Returns:
        Task name -> (training samples, records left out).

    Raises:
        RecordError: a file cannot be used; names the bad records of the first such file.
    """
    training = {}
    specs: list[TaskSpec | GeneralSpec] = [*stream.tasks, *stream.general]
    for spec in specs:
        root, text_only = stream.image_root(spec), spec.allow_text_only
        if isinstance(spec, TaskSpec):
            training[spec.name] = load_records(
                stream.train_file(spec),
                root,
                prompt_suffix=spec.prompt_suffix,
                allow_text_only=text_only,
                on_bad_record=on_bad_record,
            )
        test = stream.test_file(spec)
        if test is not None:
            load_records(test, root, allow_text_only=text_only)
    return training


def data_hash(stream: Stream, spec: TaskSpec | GeneralSpec) -> str:
    """SHA-256 (hex) that changes when the data of a task or benchmark, or its treatment, changes.

    Covers its own entry in the stream (every key, defaults filled in), the bytes of its train and test files
    (a stock lmms-eval task has none), and path and size in bytes of every image these name (a missing image
    counts as such). It does NOT cover the images' content: an image edited in place to the same size goes
    unnoticed. The data root is left out, so that moved data stay the same.

    Cost: one read of both files and one `stat` per image.

    Raises:
        RecordError: one of the two files cannot be read.
    """
    digest = hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode())
    train = stream.train_file(spec) if isinstance(spec, TaskSpec) else None
    for file in (train, stream.test_file(spec)):
        if file is None:
            continue
        names = sorted(named_images(file))
        digest.update(hashlib.sha256(file.read_bytes()).digest())
        sizes = [(name, _size_in_bytes(stream.image_root(spec) / name)) for name in names]
        digest.update(json.dumps(sizes).encode())
    return digest.hexdigest()


def _size_in_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _read_yaml(path: Path) -> object:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StreamError(f"the stream file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise StreamError(f"not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise StreamError(f"not valid YAML: {error}") from error


def _build_stream(document: object, data_root: Path | None) -> Stream:
    values = _check_keys(document, Stream, "the stream", optional=("data_root",))
    root = data_root if data_root is not None else values.get("data_root")
    if not isinstance(root, str | Path) or not str(root):
        raise StreamError(
            f"data_root is {root!r}; expected the folder that holds the data, here or in the run YAML"
        )
    return Stream(
        name=values["name"],
        data_root=Path(root),
        tasks=_build_specs(values["tasks"], TaskSpec, "tasks"),
        general=_build_specs(values.get("general", []), GeneralSpec, "general"),
    )


def _build_specs(items: object, kind: type[_Spec], key: str) -> tuple[_Spec, ...]:
    if not isinstance(items, list):
        raise StreamError(
            f"{key!r} is {items!r}; expected a list of entries, each beginning with '- name: ...'"
        )
    specs = []
    for index, item in enumerate(items):
        name = item.get("name") if isinstance(item, dict) else None
        where = f"{key}[{index}]" + (f" ({name})" if name is not None else "")
        specs.append(kind(**_check_keys(item, kind, where)))
    return tuple(specs)


def _check_keys(values: object, kind: type, where: str, optional: Sequence[str] = ()) -> dict[str, Any]:
    """Returns `values` when it is a mapping whose keys are fields of `kind` with none missing."""
    if not isinstance(values, dict):
        raise StreamError(f"{where} is {values!r}; expected 'key: value' lines")
    known = [field.name for field in fields(kind)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise StreamError(f"{where}: unknown key {key!r}{hint} (known keys: {', '.join(known)})")
    required = [
        field.name for field in fields(kind) if field.default is MISSING and field.name not in optional
    ]
    missing = [key for key in required if key not in values]
    if missing:
        raise StreamError(f"{where}: missing key {', '.join(map(repr, missing))}")
    return values


def _check_types(spec: TaskSpec | GeneralSpec) -> None:
    for key, hint in get_type_hints(type(spec)).items():
        value = getattr(spec, key)
        allowed = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        accepted = (*allowed, int) if float in allowed else allowed
        # bool is an int to Python; `max_new_tokens: yes` is not a number to anybody else.
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in allowed):
            expected = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in allowed)
            quote = " (put it in quotes)" if str in allowed and isinstance(value, int | float) else ""
            raise StreamError(
                f"task or benchmark {spec.name!r}: {key} is {value!r}; expected {expected}{quote}"
            )


def _check_common(spec: TaskSpec | GeneralSpec) -> None:
    _check_name(spec.name, "a task or benchmark")
    _check_inside(spec, "image_root", spec.image_root)
    if spec.max_new_tokens < 1:
        raise StreamError(f"{spec.name!r}: max_new_tokens is {spec.max_new_tokens}; expected at least 1")


def _check_name(name: object, what: str) -> None:
    if not isinstance(name, str) or not _NAME_PATTERN.fullmatch(name):
        raise StreamError(
            f"the name of {what} is {name!r}; expected letters, digits, '_', '.' and '-' (it names files)"
        )


def _check_record_file(spec: TaskSpec | GeneralSpec, key: str, value: str) -> None:
    _check_inside(spec, key, value)
    if PurePath(value).suffix not in RECORD_SUFFIXES:
        raise StreamError(
            f"{spec.name!r}: {key} is {value!r}; expected a file ending in {' or '.join(RECORD_SUFFIXES)}"
        )


def _check_inside(spec: TaskSpec | GeneralSpec, key: str, value: str) -> None:
    path = PurePath(value)
    if path.is_absolute() or ".." in path.parts:
        raise StreamError(
            f"{spec.name!r}: {key} is {value!r}, which leaves the data root; give a path relative to it"
        )


def _check_files(stream: Stream) -> None:
    if not stream.data_root.is_dir():
        raise StreamError(
            f"the data root {stream.data_root} (seen from {Path.cwd()}) does not exist or is no folder; set "
            "'data_root' in the stream or run YAML to the folder that holds the data"
        )
    missing = [path for path in _named_paths(stream) if not path.exists()]
    if missing:
        raise StreamError(f"not found under the data root {stream.data_root}: {', '.join(map(str, missing))}")


def _named_paths(stream: Stream) -> list[Path]:
    """Every file and image folder that the stream's entries name, in their order."""
    paths = []
    specs: list[TaskSpec | GeneralSpec] = [*stream.tasks, *stream.general]
    for spec in specs:
        if isinstance(spec, TaskSpec):
            paths.append(stream.train_file(spec))
        test = stream.test_file(spec)
        if test is not None:
            paths += [test, stream.image_root(spec)]
    return paths
