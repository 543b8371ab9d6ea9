"""Random records, JSON values and bytes: the outcome is samples or a RecordError, in time; forms agree."""

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mllm_keeplora.data.conversation import Sample
from mllm_keeplora.data.record_files import RECORD_SUFFIXES, RecordError
from mllm_keeplora.data.record_forms import _ANSWERS, _QUESTIONS, _REFUSED_KEYS, _SWITCHES, MEDIA_KEYS
from mllm_keeplora.data.records import read_records
from mllm_keeplora.data.stream import Stream, TaskSpec
from mllm_keeplora.evaluation.task_files import write_task_files

QUICK = settings(
    max_examples=100, deadline=10_000, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
LONG = settings(max_examples=50_000, deadline=10_000, suppress_health_check=list(HealthCheck), database=None)

KEYS = (*MEDIA_KEYS, *_QUESTIONS, *_ANSWERS, *_REFUSED_KEYS, *_SWITCHES, "messages", "conversations", "history")
KEYS += ("system", "input", "id", "question_id", "label", "role", "content", "from", "value", "type", "url", "path")
WORDS = ("<image>", "<video>", "user", "assistant", "human", "gpt", "text", "image", "a.png", "b.mp4", "", " ", "\0")
WORDS += ("file:///a.png", "http://a/b.png", "data:image/png;base64,AA", "../x", "/etc/passwd", "\ud800", "x" * 300)
texts = st.sampled_from(WORDS) | st.text(max_size=8) | st.lists(st.sampled_from(WORDS[:10])).map(" ".join)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | texts, inner, max_size=5),
    max_leaves=12,
)
records = st.dictionaries(st.sampled_from(KEYS), values, max_size=6)
parts = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image", "video", "audio"])}, optional={"text": texts}),
    max_size=4,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": texts | parts},
        optional={"loss": st.booleans(), "name": texts},
    ),
    max_size=5,
)
near_chats = st.fixed_dictionaries({"messages": messages}, optional={"images": st.lists(texts, max_size=3)})


def check(folder: Path, path: Path) -> None:
    """Samples are whole, and their copy can be written; else the error says which file."""
    try:
        samples, bad = read_records(path, folder, allow_text_only=True, extracted=folder / "extracted")
    except RecordError as error:
        assert str(path) in str(error)
        return
    assert not samples.keys() & bad.keys()
    for sample in samples.values():
        assert sample.questions and all(message.text.strip() for message in sample.messages)
    if samples and not bad:
        task = TaskSpec("t", path.name, path.name, "exact", allow_text_only=True)
        write_task_files(Stream("s", folder, (task,), extracted=folder / "extracted"), folder / "tasks")


def run(data: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / f"r{suffix}"
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
        check(Path(name), path)


def dump(rows: list[Any], suffix: str) -> bytes:
    lines = [json.dumps(row, ensure_ascii=True) for row in rows]
    return ("\n".join(lines) if "jsonl" in suffix else f"[{','.join(lines)}]").encode()


def any_records(rows: list[Any], suffix: str) -> None:
    run(dump(rows, suffix), suffix)


def any_bytes(data: bytes, suffix: str) -> None:
    run(data, suffix)


def flipped_bytes(rows: list[Any], at: int, to: int, suffix: str) -> None:
    data = bytearray(dump(rows, suffix))
    data[at % len(data)] = to
    run(bytes(data), suffix)


def any_table(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "r.parquet"
        try:
            pq.write_table(pa.Table.from_pylist(rows), path)
        except (pa.ArrowException, ValueError, OverflowError, TypeError):
            return  # such rows no table holds
        check(Path(name), path)


json_suffixes = st.sampled_from([suffix for suffix in RECORD_SUFFIXES if suffix != ".parquet"])
rows = st.lists(records | near_chats | values, min_size=1, max_size=3)
table_rows = st.lists(st.dictionaries(st.sampled_from(KEYS), scalars | st.binary(max_size=4), max_size=4), max_size=3)
# hypothesis takes settings for a function once: each test makes its own.
FUZZ: dict[str, Callable[[], Callable[..., None]]] = {
    "records": lambda: given(rows, json_suffixes)(any_records),
    "bytes": lambda: given(st.binary(max_size=200), st.sampled_from(RECORD_SUFFIXES))(any_bytes),
    "flipped bytes": lambda: given(rows, st.integers(0, 10**6), st.integers(0, 255), json_suffixes)(flipped_bytes),
    "tables": lambda: given(table_rows)(any_table),
}


@pytest.mark.parametrize("what", FUZZ)
def test_whatever_is_read_gives_samples_or_a_record_error(what: str) -> None:
    QUICK(FUZZ[what]())()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("what", FUZZ)
def test_whatever_is_read_for_long(what: str) -> None:
    LONG(FUZZ[what]())()


# --- Round trip ---

# Words that no form takes for something else.
words = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zs", "Zl", "Zp"), exclude_characters="<>"), min_size=1)
turns = st.lists(st.tuples(words, words), min_size=1, max_size=3)


def forms(turns: list[tuple[str, str]], system: str | None, images: list[str]) -> dict[str, dict[str, Any]]:
    """One conversation in every form that can say it; images stand before the first question."""
    place = "<image>" * len(images)
    first = [(place + turns[0][0], turns[0][1]), *turns[1:]]
    (*marked, end) = first
    head = {"id": "x", "images": images, **({} if system is None else {"system": system})}
    said = [(role, text) for pair in first for role, text in zip(("user", "assistant"), pair, strict=True)]
    names = {"user": "human", "assistant": "gpt"}
    chat = [{"role": role, "content": text} for role, text in said]
    bare = [{"role": role, "content": text.removeprefix(place)} for role, text in said]
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in bare]
    parts[0]["content"][:0] = [{"type": "image", "image": image} for image in images]
    inline = {key: value for key, value in head.items() if key != "images"}
    said_first = [{"role": "system", "content": system}] if system is not None else []
    return {
        "messages": {**head, "messages": chat},
        "messages without placeholders": {**head, "messages": bare},
        "system message": {"id": "x", "images": images, "messages": [*said_first, *chat]},
        "sharegpt": {**head, "conversations": [{"from": names[role], "value": text} for role, text in said]},
        "swift": {**head, "query": end[0], "response": end[1], "history": [list(pair) for pair in marked]},
        "alpaca": {**head, "instruction": end[0], "output": end[1], "history": [list(pair) for pair in marked]},
        "inline": {**inline, "messages": parts},
    }


@given(turns, st.none() | words, st.lists(st.sampled_from(["1.png", "2.png"]), max_size=2))
@settings(max_examples=60, deadline=10_000, derandomize=True, database=None)
def test_a_conversation_is_the_same_sample_in_every_form(
    turns: list[tuple[str, str]], system: str | None, images: list[str]
) -> None:
    found: dict[str, Sample] = {}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "r.json"
        written = forms(turns, system, images)
        path.write_text(json.dumps([*written.values()]))
        samples, bad = read_records(path, Path(name), allow_text_only=True)
    assert bad == {}
    found = dict(zip(written, samples.values(), strict=True))
    for form, sample in found.items():
        assert sample == found["messages"], form
