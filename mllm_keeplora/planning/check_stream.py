"""Reads a stream's data completely and finds everything that is wrong with them, all in one pass.

Every record is read, every image and clip decoded and, where a base model is named, every record collated, as a
run does before its first stage. Beyond what a run refuses, it looks for what would make scores worth less: ids and
records that repeat, and test questions that training has shown; of pictures with a class also those that stand in two
classes, and classes without a test.
"""

import tempfile
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Literal

import pandas as pd

from mllm_keeplora.data.chat_template import ProcessorError
from mllm_keeplora.data.classification import check_every_class
from mllm_keeplora.data.conversation import MediaFile, Sample
from mllm_keeplora.data.preflight import Preflight
from mllm_keeplora.data.record_files import HubTable
from mllm_keeplora.data.records import (
    RecordError,
    clean_question,
    named_media,
    read_records,
    select_evenly,
    with_suffixes,
)
from mllm_keeplora.data.stream import GeneralSpec, Stream, StreamError, TaskSpec, check_kind, named_paths
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.evaluation.errors import EvaluationError
from mllm_keeplora.evaluation.task_files import write_task_files
from mllm_keeplora.modeling.families import Media
from mllm_keeplora.runs.files import file_state, found_hash
from mllm_keeplora.units import GB, format_bytes

Spec = TaskSpec | GeneralSpec
Asked = tuple[tuple[MediaFile, ...], str]  # what a question shows, and its words

SHOWN = 10  # lines of one list, unless all are asked for
_STAT_THREADS = 16  # network file systems answer many questions at once, one at a time slowly
_SAMPLED_CLIPS = 8


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        task: name of the task or benchmark.
        title: what is wrong, in one line.
        details: one line each; long lists are cut when they are shown.
        stops: whether a run would refuse it.
    """

    task: str
    title: str
    details: tuple[str, ...] = ()
    stops: bool = True


@dataclass(frozen=True)
class Counts:
    """What one task, or all together, hold: records, distinct files, and their size in bytes."""

    name: str
    train: int
    test: int
    images: int
    clips: int
    text_only: int
    size: int


@dataclass(frozen=True)
class Report:
    """What `check_stream` found.

    Attributes:
        trained: task -> its tokens and its longest samples, in lines; empty where no base model is named.
        advice: where missing data come from.
    """

    stream: str
    data_root: Path
    counts: tuple[Counts, ...]
    problems: tuple[Problem, ...]
    trained: Mapping[str, Sequence[str]]
    advice: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class _DataFile:
    """One file of records as read; rows are counted from 1."""

    spec: Spec
    kind: Literal["train", "test"]
    path: Path | HubTable
    samples: dict[int, Sample] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)
    refused: str | None = None  # why the file as a whole cannot be used
    media: set[MediaFile] = field(default_factory=set)


def check_stream(stream: Stream, preflight: Preflight) -> Report:
    """Reads everything that a stream's entries name.

    Args:
        stream: loaded with `check_files=False`; files may be missing.
        preflight: decodes images and clips, each once however many records and tasks show it, and collates records.
    """
    check_kind(stream, preflight.processor)
    specs = [spec for spec in stream.specs if spec.test is not None]  # those with files of their own
    files = [file for spec in specs for file in _read_files(stream, spec)]
    damaged = preflight.media({shown for file in files for shown in file.media}, stream.name)
    for file in files:
        # As the run reads them: with the suffix in training files, which no comparison of questions needs.
        task, suffix = (file.spec.name, file.spec.prompt_suffix) if file.kind == "train" else (None, "")
        sound = {row: with_suffixes(sample, suffix) for row, sample in file.samples.items() if row not in file.bad}
        try:
            file.bad |= preflight.records(sound, file.path.name, task).bad
        except ProcessorError as error:
            file.refused = f"classes: {error}"
    media = {shown.path for file in files for shown in file.media}
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        states = dict(zip(media, pool.map(file_state, media), strict=True))
    sizes = {path: state[0] for path, state in states.items() if state is not None}
    problems: list[Problem] = []
    for spec in specs:
        own = [file for file in files if file.spec is spec]
        # Once what is wrong with the training and the test alike, such as their classes.
        problems += dict.fromkeys(_problems_of_task(stream, spec, own, damaged, sizes))
    named = [path for spec in specs for path in _missing(stream, spec)]
    missing = [*dict.fromkeys(named), *sorted(media - sizes.keys())]
    return Report(
        stream=stream.name,
        data_root=stream.data_root,
        counts=(
            *(_count(spec.name, [f for f in files if f.spec is spec], sizes) for spec in specs),
            _count("all together", files, sizes),
        ),
        problems=tuple(problems),
        trained=preflight.trained,
        advice=tuple(_advice(stream, missing)),
        notes=tuple(_notes(preflight, _paths(files, "video") - damaged.keys(), sizes)),
    )


def _read_files(stream: Stream, spec: Spec) -> Iterator[_DataFile]:
    test, answers = stream.test_file(spec), stream.answers_file(spec)
    if isinstance(spec, TaskSpec) and _is_there(stream.train_file(spec)):
        yield _read(stream, _DataFile(spec, "train", stream.train_file(spec)), stream.media_root(spec))
    if test is not None and _is_there(test):
        root, file = stream.test_media_root(spec), _DataFile(spec, "test", test)
        if answers is not None and not answers.is_file():
            file.media = _named_clips(stream, test, root)  # they can be checked without the answers
            yield file
        else:
            yield _read(stream, file, root, answers)


def _is_there(source: Path | HubTable) -> bool:
    return isinstance(source, HubTable) or source.exists()


def _read(stream: Stream, file: _DataFile, root: Path, answers: Path | None = None) -> _DataFile:
    try:
        classes = stream.classes(file.spec)
        file.samples, file.bad = read_records(
            file.path,
            root,
            answers=answers,
            allow_text_only=file.spec.allow_text_only,
            extracted=stream.extracted,
            classes=classes,
        )
        if classes is not None and file.kind == "train":
            check_every_class(file.samples.values(), classes, file.path)
    except (RecordError, StreamError) as error:
        file.refused = str(error)
    if file.refused is None and not file.samples and not file.bad:
        file.refused = f"{file.path} holds no records; expected a list of at least one"
    if file.refused is not None:
        # Questions that do not go with their answers still name clips, which may be wrong as well.
        file.media = _named_clips(stream, file.path, root) if answers is not None else set()
        return file
    file.media = {shown for sample in file.samples.values() for shown in sample.media}
    return file


def _named_clips(stream: Stream, path: Path | HubTable, root: Path) -> set[MediaFile]:
    try:
        return {MediaFile("video", clip) for clip in named_media(path, root, stream.extracted)}
    except RecordError:  # said already, as the reason why the file is refused
        return set()


# --- What is wrong ---


def _missing(stream: Stream, spec: Spec) -> list[Path]:
    return [path for path in named_paths(stream, spec) if not path.exists()]


def _problems_of_task(
    stream: Stream, spec: Spec, files: Sequence[_DataFile], damaged: Mapping[Path, str], sizes: Mapping[Path, int]
) -> Iterator[Problem]:
    missing = _missing(stream, spec)
    if missing:
        title = f"{len(missing)} of the files and folders it names are missing"
        yield Problem(spec.name, title, (*map(str, missing),))
    for file in files:
        yield from _problems_of_file(file, damaged)
        yield from _repetitions(file)
    yield from _overlap(spec, files, sizes)
    if spec.classes is not None:
        yield from _class_problems(files, sizes)
    # A metric's own needs are looked at where the records are fine; else the same fault would be told twice.
    test = next((file for file in files if file.kind == "test"), None)
    if not missing and test is not None and test.refused is None and not test.bad:
        yield from _metric_problems(stream, spec)


def _problems_of_file(file: _DataFile, damaged: Mapping[Path, str]) -> Iterator[Problem]:
    if file.refused is not None:
        yield Problem(file.spec.name, file.refused)
    if not file.samples and not file.bad:  # nor any rows: questions alone, for want of their answers
        reasons = sorted(damaged[shown.path] for shown in file.media if shown.path in damaged)
        if reasons:
            yield Problem(file.spec.name, f"{file.path}: {len(reasons)} of its clips are bad", (*reasons,))
        return
    bad = file.bad
    if bad:
        total = len(file.samples.keys() | bad.keys())
        details = (f"row {row}: {bad[row]}" for row in sorted(bad))
        yield Problem(file.spec.name, f"{file.path}: {len(bad)} of {total} records cannot be used", (*details,))


def _repetitions(file: _DataFile) -> Iterator[Problem]:
    """Ids and records that occur twice in one file. Ids that a run refuses are among its bad records."""
    rows = {row: sample for row, sample in file.samples.items() if row not in file.bad}
    for what, pairs in (
        (
            "records have the id of an earlier one",
            _repeated((row, sample.id) for row, sample in rows.items()),
        ),
        (
            "records are identical with an earlier one",
            _repeated((row, s.messages) for row, s in rows.items()),
        ),
    ):
        if pairs:
            details = (f"row {row} repeats row {first} (id {rows[row].id})" for row, first in pairs)
            yield Problem(file.spec.name, f"{file.path}: {len(pairs)} {what}", (*details,), stops=False)


def _repeated(items: Iterable[tuple[int, object]]) -> list[tuple[int, int]]:
    """(row, first row with the same key), for every row but those first ones."""
    first: dict[object, int] = {}
    return [(row, first[key]) for row, key in items if first.setdefault(key, row) != row]


def _overlap(spec: Spec, files: Sequence[_DataFile], sizes: Mapping[Path, int]) -> Iterator[Problem]:
    """Test questions that training shows too: the same words, and what is shown has the same bytes."""
    what = "questions" if spec.classes is None else "pictures"
    for file in (file for file in files if file.kind == "test"):
        for trained in (other for other in files if other.kind == "train"):
            if pairs := _alike(file, trained, sizes):
                details = (
                    f"{_place(file, row)} of the test is {_place(trained, other)} of the training"
                    for row, other in pairs
                )
                title = f"{file.path}: {len(pairs)} {what} are in the training file too (same media and words)"
                yield Problem(spec.name, title, (*details,), stops=False)


def _alike(file: _DataFile, other: _DataFile, sizes: Mapping[Path, int]) -> list[tuple[int, int]]:
    """(row, row of the other file that asks the same first). Bytes are read only where words and sizes agree."""
    content = cache(lambda path: found_hash(path) or str(path))

    def at_sight(asked: Asked) -> Hashable:
        return tuple(sizes.get(shown.path) for shown in asked[0]), asked[1]

    def read(asked: Asked) -> Hashable:
        return tuple(content(shown.path) for shown in asked[0])

    groups: dict[Hashable, list[tuple[int, Asked]]] = {}
    for row, asked in _questions(other):
        groups.setdefault(at_sight(asked), []).append((row, asked))
    exact: dict[Hashable, dict[Hashable, int]] = {}
    pairs = []
    for row, asked in _questions(file):
        group = groups.get(key := at_sight(asked), [])
        if len(group) <= (file is other):  # nothing but itself
            continue
        if key not in exact:
            exact[key] = {read(theirs): number for number, theirs in reversed(group)}
        if (found := exact[key].get(read(asked))) is not None:
            pairs.append((row, found))
    return pairs


def _questions(file: _DataFile) -> Iterator[tuple[int, Asked]]:
    for row, sample in file.samples.items():
        yield from ((row, (sample.media, clean_question(m.text))) for m in sample.messages if m.role == "user")


def _place(file: _DataFile, row: int) -> str:
    """Where a record stands; of a picture with a class, which may be no line of a file, its name."""
    return f"row {row}" if file.spec.classes is None else file.samples[row].id


def _class_problems(files: Sequence[_DataFile], sizes: Mapping[Path, int]) -> Iterator[Problem]:
    """Pictures that training shows in two classes, and classes of which the test has no picture."""
    for file in (file for file in files if file.kind == "train"):
        samples = file.samples
        pairs = [(a, b) for a, b in _alike(file, file, sizes) if samples[a].answers != samples[b].answers]
        if pairs:
            details = (f"{_place(file, row)} is {_place(file, other)}" for row, other in pairs)
            title = f"{file.path}: {len(pairs)} pictures stand in another class too"
            yield Problem(file.spec.name, title, (*details,), stops=False)
    for file in (file for file in files if file.kind == "test" and file.samples):
        asked = {sample.answers[0] for sample in file.samples.values()}
        classes = next(iter(file.samples.values())).classes
        names = () if classes is None else classes.names
        if untested := [name for name in names if name not in asked]:
            title = (
                f"{file.path}: {len(untested)} of {len(names)} classes have no picture, {untested[0]!r} first; scores "
                "say nothing about them"
            )
            yield Problem(file.spec.name, title, stops=False)


def _metric_problems(stream: Stream, spec: Spec) -> Iterator[Problem]:
    """What the task's scoring function misses: keys of records, reference captions, Java."""
    alone = replace(stream, tasks=(_as_task(spec),), general=())
    with tempfile.TemporaryDirectory() as folder:
        try:
            write_task_files(alone, Path(folder))
        except (EvaluationError, RecordError) as error:
            yield Problem(spec.name, str(error))


def _as_task(spec: Spec) -> TaskSpec:
    """A stream has to have a task: a benchmark is looked at as one that trains on its own test file."""
    if isinstance(spec, TaskSpec):
        return spec
    known = {item.name for item in fields(TaskSpec)}
    shared = {item.name: getattr(spec, item.name) for item in fields(spec) if item.name in known}
    return TaskSpec(train=shared["test"], **shared)


# --- What is there, and where the rest is ---


def _count(name: str, files: Sequence[_DataFile], sizes: Mapping[Path, int]) -> Counts:
    """Media that several files share count once."""
    images, clips = _paths(files, "image"), _paths(files, "video")
    rows = [(file.kind, len(file.samples.keys() | file.bad.keys())) for file in files]
    return Counts(
        name=name,
        train=sum(number for kind, number in rows if kind == "train"),
        test=sum(number for kind, number in rows if kind == "test"),
        images=len(images),
        clips=len(clips),
        text_only=sum(not sample.media for file in files for sample in file.samples.values()),
        size=sum(sizes.get(path, 0) for path in images | clips),
    )


def _paths(files: Sequence[_DataFile], kind: Media) -> set[Path]:
    return {shown.path for file in files for shown in file.media if shown.kind == kind}


def _advice(stream: Stream, missing: Sequence[Path]) -> Iterator[str]:
    """One line per source: how many files it misses, and what to do."""
    if not missing or stream.hub is None:
        if missing:
            yield f"Files missing under {stream.data_root}: {len(missing)}; the stream names no source."
        return
    hub, rest = stream.hub, list(missing)
    for folder, source in hub.elsewhere.items():
        here = [path for path in rest if path.is_relative_to(stream.data_root / folder)]
        rest = [path for path in rest if not path.is_relative_to(stream.data_root / folder)]
        if here:
            yield f"{len(here)} files under {stream.data_root / folder}: get them from {source}"
    if rest:
        yield (
            f"{len(rest)} files or folders, the first {rest[0]}: published as {hub.url} (revision "
            f"{hub.revision}); keeplora fetch STREAM.yaml --data_root {stream.data_root} gets what is there"
        )


def _notes(preflight: Preflight, clips: set[Path], sizes: Mapping[Path, int]) -> Iterator[str]:
    if preflight.processor is None:
        yield (
            "no base model is named, so nothing was put through its processor: tokens are not counted, and what it "
            "refuses is not found. Name the run's settings (--config RUN.yaml) or a model (--base_model MODEL)."
        )
    yield from _cache_notes(preflight.reader, clips, sizes)


def _cache_notes(reader: VideoReader | None, clips: set[Path], sizes: Mapping[Path, int]) -> Iterator[str]:
    """Whether a run's cache holds the decoded frames of all clips; estimated from a few of them."""
    if reader is None or not clips:
        return
    ordered = sorted(clips)
    sampled = [ordered[index] for index in select_evenly(len(ordered), 1.0, _SAMPLED_CLIPS)]
    decoded = len(clips) * sum(reader.read(path).frames.nbytes for path in sampled) // len(sampled)
    allowed = int(reader.config.cache_gb * GB)
    verdict = (
        "all fit" if decoded <= allowed else f"{allowed / decoded:.0%} of them fit, the others are decoded every time"
    )
    yield (
        f"{len(clips)} clips, {format_bytes(sum(sizes.get(path, 0) for path in clips))}; decoded to "
        f"{reader.config.frames} frames each about {format_bytes(decoded)}. Of video.cache_gb, "
        f"{format_bytes(allowed)}: {verdict}."
    )


# --- Showing it ---


def format_report(report: Report, shown: int | None = SHOWN) -> str:
    """The report as text, ending in a line break; of a list of details `shown` lines, None for all."""
    lines = [f"Stream {report.stream}, data root {report.data_root}", "", _table(report.counts)]
    lines += [f"\nNote: {note}" for note in report.notes]
    for task, found in report.trained.items():
        lines += ["", f"{task} trains on", *(f"  {line}" for line in found)] if found else []
    lines += ["", _summary(report.problems)]
    for task in dict.fromkeys(problem.task for problem in report.problems):
        lines += ["", task]
        for problem in report.problems:
            if problem.task == task:
                lines += _lines(problem, shown)
    if report.advice:
        lines += ["", "Missing data", *(f"  {line}" for line in report.advice)]
    return "\n".join(lines) + "\n"


def _summary(problems: Sequence[Problem]) -> str:
    if not problems:
        return "Nothing wrong found."
    stopping = sum(problem.stops for problem in problems)
    tasks = len({problem.task for problem in problems})
    return (
        f"Problems: {len(problems)}, tasks concerned: {tasks}. {stopping} stop a run (!), "
        f"{len(problems) - stopping} make its scores worth less (?)."
    )


def _lines(problem: Problem, shown: int | None) -> list[str]:
    first, *others = problem.title.splitlines()
    lines = [f"  {'!' if problem.stops else '?'} {first}", *(f"    {line}" for line in others)]
    lines += [f"      {detail}" for detail in problem.details[:shown]]
    if shown is not None and len(problem.details) > shown:
        lines.append(f"      ... and {len(problem.details) - shown} more (--all shows every one)")
    return lines


def _table(counts: Sequence[Counts]) -> str:
    rows = {
        c.name: {
            "train": c.train,
            "test": c.test,
            "images": c.images,
            "clips": c.clips,
            "text only": c.text_only,
            "media": format_bytes(c.size),
        }
        for c in counts
    }
    return pd.DataFrame.from_dict(rows, orient="index").to_string()
