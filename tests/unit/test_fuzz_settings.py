"""Random settings and streams: a valid config or a KeepLoRAError in time, never a traceback.

The short form belongs to the default tests; the long one runs by `--slow`, for KEEPLORA_FUZZ_SECONDS a test
(600 without it).
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mllm_keeplora.commands.plan import parse_flags
from mllm_keeplora.config import RunConfig, config_from_dict, parse_config
from mllm_keeplora.data.stream import GeneralSpec, Hub, Stream, TaskSpec, load_stream
from mllm_keeplora.errors import KeepLoRAError
from mllm_keeplora.methods.base import load_method, method_names
from mllm_keeplora.runs.files import read_json, write_json
from mllm_keeplora.settings import hints_of, setting_names
from mllm_keeplora.studies.analysis_config import parse_analysis

SECONDS = 2.0  # of the process's own time that one example may take
SHORT, LONG = 2.5, float(os.environ.get("KEEPLORA_FUZZ_SECONDS", "600"))
LENGTHS = [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.slow)]

# What people write, and what nobody should.
WORDS = st.sampled_from(
    [
        *("null", "~", "true", "No", "on", "1e-3", "1e400", "-1", "010", "1:30", ".inf", "-.inf", ".nan", "nan"),
        *("2024-05-01", "0x10", "1_000", "", " ", "-", "--", "=", "<<", "*a", "&a b", "!!int x", "!!set {a}", "? a"),
        *("'", '"', "[", "{", "[a", "{a: ", "a: b", "- a", "#", "%", "@", "|", ">", "\t", "\0", "\ud800", "é"),
        *("\u2028", "\ufeff", "a\nb", "../x", "/etc", "/dev/zero", "x" * 300, "a/" * 3000, "9" * 5000, "[" * 200),
        *("4294967296", "-5", "a,b", "%s", "keeplora", "replay", "nf4", "none", "cosine", "all-linear", "exact"),
    ]
)
TEXT = WORDS | st.text(max_size=12)
NUMBERS = st.integers(-3, 3) | st.integers() | st.floats() | st.sampled_from([2**31, 2**32, 10**400, 1e308, 5e-324])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | NUMBERS | st.booleans(), inner, max_size=3),
    max_leaves=6,
)
OPTIONS = setting_names(RunConfig)


def mostly(right: st.SearchStrategy[Any], wrong: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 19).flatmap(lambda n: wrong if n == 19 else right)


def sound(hint: Any) -> st.SearchStrategy[Any]:
    """Values of the kind that an annotation says, within its range."""
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return mappings(hint)
    if origin is Annotated:
        kind, limits = args
        return st.integers(limits.low, limits.high) if kind is int else st.floats(limits.low, limits.high)
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (list, tuple):
        return st.lists(sound(args[0]), max_size=2)
    if origin in (dict, Mapping):
        return st.dictionaries(st.sampled_from(["a", "max_steps", "share", "*", "Yes"]), sound(args[1]), max_size=2)
    if args:
        return st.one_of([sound(part) for part in args])
    kinds = {bool: st.booleans(), str: st.text("abc/._-", max_size=6), type(None): st.none()}
    return kinds.get(hint, VALUES)


def mappings(kind: type, required: tuple[str, ...] = ()) -> st.SearchStrategy[dict[str, Any]]:
    """Some settings of a dataclass, mostly with their true names and sound values."""
    known = {name: mostly(sound(hint), VALUES) for name, hint in hints_of(kind).items()}
    there = {name: known.pop(name) for name in required}
    return st.builds(
        lambda right, wrong: {**wrong, **right},
        st.fixed_dictionaries(there, optional=known),
        mostly(st.just({}), st.dictionaries(TEXT, VALUES, max_size=1)),
    )


def dumped(document: Any) -> str:
    return str(yaml.dump(document, allow_unicode=True, sort_keys=False))


@st.composite
def spoiled(draw: st.DrawFn, documents: st.SearchStrategy[Any]) -> bytes:
    """A document as YAML: whole, as a piece of text too much or too little leaves it, or in other bytes."""
    text = dumped(draw(documents))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 20)))
        text = text[:start] + draw(TEXT) + text[end:]
    coding = draw(st.sampled_from(["utf-8"] * 20 + ["utf-16", "latin-1", "utf-8-sig"]))
    return text.encode(coding, "surrogatepass" if coding.startswith("utf") else "replace")


RUNS = spoiled(mostly(mappings(RunConfig), VALUES))
TASKS = st.lists(mappings(TaskSpec, ("name", "train", "test", "metric")) | VALUES, max_size=3)
GENERAL = st.lists(mappings(GeneralSpec, ("name",)) | VALUES, max_size=2) | VALUES
STREAMS = spoiled(
    st.fixed_dictionaries(
        {"name": st.just("s") | VALUES, "tasks": TASKS | VALUES},
        optional={"data_root": TEXT, "general": GENERAL, "hub": mappings(Hub) | VALUES},
    )
    | mappings(Stream)
    | VALUES
)
GOOD_TASK = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,3}", fullmatch=True),
        "train": mostly(st.sampled_from(["a.json", "b/c.jsonl"]), st.sampled_from(["../a.json", "a.csv"])),
        "test": mostly(st.sampled_from(["a.json", "b.parquet"]), st.just("/a.json")),
        "metric": st.just("exact"),
    },
    optional={
        "max_new_tokens": mostly(st.integers(1, 100), NUMBERS),
        "prompt_suffix": mostly(st.text("ab .", max_size=6), TEXT),
        "test_prompt_suffix": mostly(st.text("ab .", max_size=6), VALUES),
    },
)
GOOD_STREAMS = st.builds(
    lambda tasks: dumped({"name": "s", "data_root": ".", "tasks": tasks}).encode(),
    st.lists(GOOD_TASK, min_size=1, max_size=3, unique_by=lambda task: task["name"].casefold()),
)
ARGUMENTS = st.lists(
    st.tuples(
        st.sampled_from([*OPTIONS, *OPTIONS, "config", "plan", "memory_gb", "measure", "train", "x", "seeds", ""]),
        st.sampled_from(["--{} {}", "--{}={}", "{}={}", "--{}", "{}", "-{} {}"]),
        TEXT | NUMBERS.filter(lambda value: value != 10**400).map(repr) | VALUES.map(dumped),
    ),
    max_size=4,
).map(lambda parts: [piece for name, form, value in parts for piece in _written(name, form, value)])


def _written(name: str, form: str, value: str) -> list[str]:
    pieces = form.split(" ")
    return [piece.replace("{}", name, 1).replace("{}", value) if n == 0 else value for n, piece in enumerate(pieces)]


# --------------------------------------------------------------------------------------------------


# What is said of several settings together, wherever they come from.
ACROSS = ("model", "train", "language", "projector", "vision", "general", "initial", "method", "--")


class Count:
    """What became of the examples, printed at the end: how many, and how many of them were accepted."""

    def __init__(self) -> None:
        self.examples = self.accepted = 0

    @contextmanager
    def example(self, file: str | None = None) -> Iterator[None]:
        """One example ends well, or in a KeepLoRAError on one line, in time."""
        self.examples += 1
        started = time.process_time()
        try:
            yield
            self.accepted += 1
        except KeepLoRAError as error:
            text = str(error)
            assert text and len(text) < 8000 and "Traceback" not in text
            if file is not None:
                assert file in text or text.startswith(ACROSS)
        except SystemExit as ended:
            assert ended.code in (0, 2)  # after --help, or OptionParser's clean end
        assert time.process_time() - started < SECONDS


def search(strategy: st.SearchStrategy[Any], seconds: float, check: Callable[[Any], None]) -> None:
    """Other examples in every run, until the time is over; in the default suite the same few in all runs."""
    end, short = time.monotonic() + seconds, seconds <= SHORT
    batch = settings(
        max_examples=200 if short else 1000,
        derandomize=short,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    batch(given(strategy)(check))()
    while not short and time.monotonic() < end:
        batch(given(strategy)(check))()


def report(name: str, count: Count, least: int) -> None:
    print(f"\n{name}: {count.examples} examples, {count.accepted} accepted")
    assert count.examples >= 10 and count.accepted >= least


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.timeout(LONG + 600)
@pytest.mark.parametrize("seconds", LENGTHS)
def test_any_run_yaml(seconds: float, tmp_path: Path) -> None:
    path, count = tmp_path / "fuzz.yaml", Count()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        with count.example("fuzz.yaml"):
            accept(parse_config("", path, []), tmp_path)

    search(RUNS, seconds, check)
    report("run YAMLs", count, 0)


def accept(config: RunConfig, folder: Path) -> None:
    """A config that is valid can be written down and read again, and its method is made or refused."""
    write_json(folder / "config.json", asdict(config))
    written = read_json(folder / "config.json")  # YAML would read a surrogate pair as two characters
    assert config_from_dict(written, folder) == config
    if config.method in method_names():
        load_method(config)


@pytest.mark.timeout(LONG + 600)
@pytest.mark.parametrize("seconds", LENGTHS)
def test_any_command_line(seconds: float, tmp_path: Path) -> None:
    path, count = tmp_path / "fuzz.yaml", Count()
    path.write_text("seed: 1\n")

    def check(argv: list[str]) -> None:
        with count.example():
            _, rest = parse_flags(argv)
            accept(parse_config("", path, rest), tmp_path)
        with count.example():
            parse_analysis(argv)

    search(ARGUMENTS, seconds, check)
    report("command lines", count, 1)


@pytest.mark.timeout(LONG + 600)
@pytest.mark.parametrize("seconds", LENGTHS)
def test_any_stream_yaml(seconds: float, tmp_path: Path) -> None:
    path, count = tmp_path / "fuzz.yaml", Count()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        for check_files in (False, True):
            with count.example("fuzz.yaml"):
                load_stream(path, check_files=check_files)

    search(STREAMS | GOOD_STREAMS, seconds, check)
    report("stream YAMLs", count, 1)
