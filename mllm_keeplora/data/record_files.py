"""Files and tables of records, read row by row into plain JSON values. What a record means is no matter here.

A `.json` file is one list of records, a `.jsonl` file has one record a line; both may end in `.gz`. A `.parquet`
file and a dataset of the Hugging Face hub have one record a row, media inside included: these are written once into a
folder of their own, by content, and the record then names the file. Rows are counted from 1; the row of a `.jsonl`
record is its line number. A folder of pictures, one folder a class, has one record a picture.
"""

import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mllm_keeplora.errors import KeepLoRAError, without_network
from mllm_keeplora.regular_files import irregular_kind
from mllm_keeplora.runs.files import atomic_path

RECORD_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
# Where media that lie inside tables are written, below a run's cache_dir.
EXTRACTED = "extracted_media"

# A conversation of parts has five levels. Python's own limit depends on who calls.
_DEEPEST = 50
_LONGEST_NUMBER = 400  # digits; Python refuses to convert some thousand
_BATCH = 64  # rows of a table held at once, their media included
_SURROGATE = re.compile("[\ud800-\udfff]")


class RecordError(KeepLoRAError, ValueError):
    """A data file, or records in it, cannot be used; the message names file, rows and remedy."""


class BadRecord(Exception):
    """One record is unusable; the message is the reason, without file and row."""


@dataclass(frozen=True)
class HubTable:
    """A dataset of the Hugging Face hub, or a folder in a dataset's layout, in place of a file.

    Attributes:
        dataset: id on the hub, or a folder.
        split: its split.
        config: its configuration, where it has several.
        revision: commit, tag or branch.
        columns: key of our records -> name of the column that holds it; other columns keep their names.
    """

    dataset: str
    split: str
    config: str | None = None
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Short name, for the ids of records without one."""
        return PurePosixPath(self.dataset).name

    def __str__(self) -> str:
        return f"dataset {self.dataset} (split {self.split})"


Rows = list[tuple[int, Any]]


class Converted(str):
    """A table's value that JSON does not know, as text: a date, a decimal. Nobody knows how its writer would write it,
    and datasets makes dates of texts that look like some; so questions and answers may not be one."""


class Extracted(Converted):
    """The path of a file that was written for bytes in a table. Whether they are a medium is for the reader to say."""


def read_rows(source: Path | HubTable, extracted: Path, classed: bool = True) -> Rows:
    """(row, JSON value) of every record; the value is a `BadRecord` where it cannot be used at all.

    Args:
        source: see the module's docstring.
        extracted: folder for the media that a table holds, an absolute path.
        classed: False where a folder may also hold the pictures themselves, without a class.

    Raises:
        RecordError: the source as a whole cannot be read.
    """
    if isinstance(source, HubTable):
        return _check_values(enumerate(_hub_rows(source, extracted), start=1))
    if is_folder(source):
        return folder_rows(source, classed)
    if not source.name.endswith(RECORD_SUFFIXES):
        raise RecordError(f"{source}: unknown kind of data file; expected one of {', '.join(RECORD_SUFFIXES)}")
    if source.exists() and (kind := irregular_kind(source)) is not None:
        raise RecordError(f"{source} is {kind}; expected a regular file")
    if source.suffix == ".parquet":
        return _check_values(enumerate(_parquet_rows(source, extracted), start=1))
    text = _read_text(source)
    lines = ".jsonl" in source.suffixes[-2:]
    return _check_values(_json_lines(text) if lines else _json_list(source, text))


def is_folder(source: Path | HubTable) -> bool:
    """Whether a source is a folder of pictures, one folder a class."""
    return isinstance(source, Path) and not source.name.endswith(RECORD_SUFFIXES) and source.is_dir()


def folder_rows(folder: Path, classed: bool = True) -> Rows:
    """{"image", "class"} of every file in a folder of one folder a class, in the order of their names.

    Not `classed`, a folder of files alone has {"image"} of each.

    Raises:
        RecordError: a class without files, files beside the classes' folders, or no class.
    """
    rows: list[dict[str, str]] = []
    entries = visible(folder)
    if not classed and entries and not any(path.is_dir() for path in entries):
        return [(row, {"image": path.name}) for row, path in enumerate(entries, start=1)]
    for path in class_folders(folder):
        files = visible(path)
        if not files:
            raise RecordError(f"{path}: the class has no picture; add some, or remove the folder")
        rows += [{"image": f"{path.name}/{file.name}", "class": path.name} for file in files]
    return list(enumerate(rows, start=1))


def class_folders(folder: Path) -> list[Path]:
    """The folders of the classes, by name.

    Raises:
        RecordError: there are none, or files beside them.
    """
    entries = visible(folder)
    beside = [path.name for path in entries if not path.is_dir()]
    if beside or not entries:
        found = f"{beside[0]!r} beside them; move it elsewhere" if beside else "none"
        raise RecordError(f"{folder}: expected one folder a class with pictures in it, found {found}")
    return entries


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, by name; hidden files, which systems leave, do not count.

    Raises:
        RecordError: it cannot be read, or a name is no text.
    """
    try:
        found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise RecordError(f"{folder} cannot be read: {error.strerror}") from error
    if strange := [path.name for path in found if _SURROGATE.search(path.name)]:
        raise RecordError(
            f"{folder}: the names of {len(strange)} entries are not UTF-8, {_shown(strange[0])} first; rename them"
        )
    return found


def content_hash(source: Path | HubTable, extracted: Path) -> str:
    """SHA-256 (hex) of a file's bytes, or of the records of a dataset or a folder.

    Raises:
        RecordError: the source cannot be read.
    """
    if isinstance(source, Path) and not is_folder(source):
        try:
            return hashlib.sha256(source.read_bytes()).hexdigest()
        except OSError as error:
            raise RecordError(f"{source} cannot be read: {error.strerror}") from error
    digest = hashlib.sha256()
    for _, value in read_rows(source, extracted):
        digest.update(json.dumps(str(value) if isinstance(value, BadRecord) else value, sort_keys=True).encode())
    return digest.hexdigest()


# --- JSON ---


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        text = data.decode("utf-8-sig")  # -sig: editors on Windows write a byte order mark
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise RecordError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if "\0" in text[:4]:
        raise RecordError(f"{path} is not UTF-8 text (it seems to have two or four bytes a letter); save it as UTF-8")
    return text


class _Decoder:
    """Decodes one JSON value at a time, and remembers what Python would accept or mistake in it."""

    def __init__(self) -> None:
        self._problem: str | None = None
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_int=self._int, parse_float=self._float, parse_constant=self._constant
        )

    def decode(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at `start` (a `BadRecord` where it cannot be used), and where it ends.

        Raises:
            BadRecord: it is no JSON, so nobody knows where it ends.
        """
        self._problem = None
        try:
            value, end = self._decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise BadRecord(f"not valid JSON: {error}") from error
        except RecursionError as error:
            raise BadRecord(f"lists and objects within each other, more than {_DEEPEST} deep") from error
        return (value if self._problem is None else BadRecord(self._problem)), end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in value if names.count(name) > 1)
            self._problem = f"the key {_shown(twice)} comes twice in one object, and nobody knows which is meant"
        return value

    def _int(self, digits: str) -> int:
        if len(digits) > _LONGEST_NUMBER:
            self._problem = f"a number of {len(digits)} digits"
            return 0
        return int(digits)

    def _float(self, digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            self._problem = f"the number {digits[:20]} is beyond what a computer's floating point holds"
            return 0.0
        return number

    def _constant(self, name: str) -> None:
        self._problem = f"{name}, which is no JSON"


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    decoder = _Decoder()
    # Not splitlines(): JSON strings may hold U+2028 and its like, which are no line ends in JSONL.
    for row, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value, end = decoder.decode(line, len(line) - len(line.lstrip()))
            if line[end:].strip():
                raise BadRecord(f"more than one JSON value: {_shown(line[end:].strip()[:30])} follows")
        except BadRecord as error:
            value = BadRecord(f"the line is {error}" if str(error).startswith("not valid") else str(error))
        yield row, value


def _json_list(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Element by element, so that what is wrong has a row."""
    decoder, position, row = _Decoder(), _skip_space(text, 0), 1
    if text[position : position + 1] != "[":
        try:
            value, _ = decoder.decode(text, position)
        except BadRecord as error:
            raise RecordError(f"{path} is {error}") from error
        raise RecordError(f"{path} holds a JSON {kind(value)}; expected a list of records (one a line: name it .jsonl)")
    position, separator = _skip_space(text, position + 1), ""
    while separator == "," or text[position : position + 1] != "]":
        try:
            value, position = decoder.decode(text, position)
            yield row, value
            position = _skip_space(text, position)
            separator = text[position : position + 1]
            if separator not in (",", "]"):
                raise BadRecord(f"not valid JSON: expected ',' or ']' behind it, found {_shown(separator)}")
        except BadRecord as error:
            raise RecordError(f"{path}, row {row}: {error}") from error
        if separator == ",":
            position, row = _skip_space(text, position + 1), row + 1
    if text[position + 1 :].strip():
        raise RecordError(f"{path} is not valid JSON: {_shown(text[position + 1 :].strip()[:30])} follows the list")


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


# --- Tables ---


def _parquet_rows(path: Path, extracted: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=_BATCH):
                yield from (_plain(row, extracted) for row in batch.to_pylist())
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise RecordError(f"{path} cannot be read as parquet: {type(error).__name__}: {error}") from error


def _hub_rows(table: HubTable, extracted: Path) -> Iterator[Any]:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        # Arrow's own form: media stay as they are stored, undecoded.
        loaded = datasets.load_dataset(
            table.dataset, table.config, split=table.split, revision=table.revision
        ).with_format("arrow")
    except (DatasetsError, HfHubHTTPError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise RecordError(
            f"{table} cannot be read ({type(error).__name__}: {error}); see to its id, config, split and revision, or "
            f"log in by `hf auth login`; {without_network(table.dataset, 'dataset')}"
        ) from error
    missing = [name for name in table.columns.values() if name not in loaded.column_names]
    if missing:
        raise RecordError(
            f"{table} has no column {', '.join(missing)}; its columns are {', '.join(loaded.column_names)}"
        )
    for batch in loaded.iter(batch_size=_BATCH):
        for row in batch.to_pylist():
            renamed = {ours: row[theirs] for ours, theirs in table.columns.items()}
            rest = {name: value for name, value in row.items() if name not in (*table.columns.values(), *renamed)}
            yield _plain({**renamed, **rest}, extracted, stored_paths=True)


def _plain(value: Any, extracted: Path, stored_paths: bool = False) -> Any:
    """A table's value as JSON has it: bytes become the path of a file, dates and the like text.

    Args:
        value: as pyarrow gives it.
        extracted: folder for media.
        stored_paths: whether an absolute path beside no bytes names a file of the dataset itself.
    """
    if isinstance(value, dict) and value and value.keys() <= {"bytes", "path"}:
        data, name = value.get("bytes"), value.get("path")
        if data is None and stored_paths and name is not None and Path(name).is_absolute() and Path(name).is_file():
            data = Path(name).read_bytes()
        return name if data is None else _extract(data, name, extracted)
    if isinstance(value, dict):
        return {str(key): _plain(item, extracted, stored_paths) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, extracted, stored_paths) for item in value]
    if isinstance(value, bytes):
        return _extract(value, None, extracted)
    if isinstance(value, float) and not math.isfinite(value):
        return None  # pandas' way to write that there is nothing
    return value if value is None or isinstance(value, str | bool | int | float) else Converted(value)


def _extract(data: bytes, name: str | None, extracted: Path) -> Extracted:
    """The file that holds the medium: its content's hash is its folder, its own name is kept (rules read it)."""
    digest = hashlib.sha256(data).hexdigest()
    # File systems take 255 bytes, some of them for the temporary name.
    file = PurePosixPath(name or "").name.encode()[-100:].decode(errors="ignore").replace("\0", "")
    file = "medium" if file in ("", "..") else file
    path = extracted / digest[:2] / digest / file
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    return Extracted(path)


# --- What no record may hold ---


def _check_values(rows: Iterable[tuple[int, Any]]) -> Rows:
    checked = []
    for row, value in rows:
        problem = None if isinstance(value, BadRecord) else _hostile(value)
        checked.append((row, value if problem is None else BadRecord(problem)))
    return checked


def _hostile(value: Any) -> str | None:
    """What makes a value unfit for a tokenizer, a file name or a file of JSON."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            return f"lists and objects within each other, more than {_DEEPEST} deep"
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item, *item.values()]
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and not item.isascii() and _SURROGATE.search(item):
                return f"half of a surrogate pair in {_shown(item[:40])}: no text; the file was cut or badly converted"
            elif isinstance(item, str) and "\0" in item:
                return f"a NUL character in {_shown(item[:40])}"
        level = below
    return None


def _shown(text: str) -> str:
    return ascii(text)


def kind(value: object) -> str:
    """JSON's name for the type of a parsed value."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "string" if isinstance(value, str) else "null")
