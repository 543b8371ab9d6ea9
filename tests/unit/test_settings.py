"""Every value of a setting: its kind, its range, and what is said of one that cannot be used."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch
from transformers.integrations import integration_utils

import mllm_keeplora.methods
from mllm_keeplora.commands.main import main
from mllm_keeplora.config import JudgeConfig, RunConfig, TrainConfig, config_from_dict, parse_config
from mllm_keeplora.continual.saved_run import load_run
from mllm_keeplora.continual.trainer import check_loggers, check_settings
from mllm_keeplora.data.stream import GeneralSpec, StreamError, TaskSpec, load_stream
from mllm_keeplora.errors import ConfigError, KeepLoRAError
from mllm_keeplora.methods.base import Method, load_method, method_names
from mllm_keeplora.settings import Range, build, expected, flat_settings, hints_of, typed
from mllm_keeplora.studies.analysis_config import AnalysisConfig, parse_analysis
from mllm_keeplora.studies.methods import Study
from mllm_keeplora.yaml_files import LARGEST_FILE, MOST_VALUES, parse_yaml, read_yaml


def methods() -> list[type]:
    return [type(load_method(RunConfig(method=name))) for name in method_names()]


def numbers_of(hint: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every part of an annotation that takes a number, ranges included."""
    if is_dataclass(hint):
        for inner, annotation in hints_of(hint).items():
            yield from numbers_of(annotation, f"{name}.{inner}")
    elif hint in (int, float) or get_origin(hint) is Annotated:
        yield name, hint
    elif get_origin(hint) is not Literal:
        for part in get_args(hint):
            yield from numbers_of(part, name)


KINDS = (RunConfig, JudgeConfig, AnalysisConfig, Study, TaskSpec, GeneralSpec, *methods())
NUMBERS = [found for kind in KINDS for found in numbers_of(kind, kind.__name__)]


# --------------------------------------------------------------------------------------------------
# ranges


def test_the_walk_finds_numbers_wherever_they_may_stand() -> None:
    names = {name for name, _ in NUMBERS}
    assert {"RunConfig.train.max_steps", "RunConfig.video.fps", "AnalysisConfig.energies", "Ewc.strength"} <= names
    assert {"Study.tuning.learning_rates", "Study.seeds", "TaskSpec.max_new_tokens"} <= names
    assert len(NUMBERS) > 50
    hint = list[int] | None
    assert list(numbers_of(hint, "x")) == [("x", int)]


@pytest.mark.parametrize(("name", "hint"), NUMBERS, ids=[name for name, _ in NUMBERS])
def test_every_number_has_a_range_and_is_refused_outside(name: str, hint: Any) -> None:
    """A setting that is added without a range fails here: its annotation is a bare int or float."""
    assert get_origin(hint) is Annotated, f"{name} states no range"
    kind, limits = get_args(hint)
    assert isinstance(limits, Range) and limits.low < limits.high < float("inf")
    step = 1 if kind is int else 1e-9 * max(1, limits.high)
    for value in (limits.low - step, limits.high + step, float("inf"), float("-inf"), float("nan")):
        with pytest.raises(ConfigError, match=rf"^{name}: expected .*\{limits.ends[0]}{limits.low}, .*, found"):
            typed(value, hint, name)
    for end, belongs in ((limits.low, limits.ends[0] == "["), (limits.high, limits.ends[1] == "]")):
        if belongs:
            assert typed(end, hint, name) == end
        else:
            with pytest.raises(ConfigError):
                typed(end, hint, name)
    for value in ("1e-3", "", True, [1], {"a": 1}, 2.5 if kind is int else "2.5"):
        with pytest.raises(ConfigError, match=rf"^{name}: expected a (whole )?number in"):
            typed(value, hint, name)


def test_defaults_lie_in_their_ranges() -> None:
    for made in (RunConfig(), AnalysisConfig(), JudgeConfig("x"), *(kind() for kind in methods())):
        values = asdict(made)
        assert build(type(made), flat_settings(type(made), values)) == made


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("alpha", "inf"),
        ("alpha", ".inf"),
        ("alpha", "-1e-3"),
        ("train.learning_rate", ".nan"),
        ("train.learning_rate", "nan"),
        ("train.num_train_epochs", "1e999"),
        ("train.weight_decay", "-1"),
        ("train.save_steps", "-1"),
        ("train.max_steps", "-7"),
        ("train.dataloader_num_workers", "-1"),
        ("train.dataloader_num_workers", "5000"),
        ("probe.columns_per_rank", "1000000"),
        ("model.cpu_threads", "100000"),
        ("seed", "-5"),
        ("seed", "-1"),
        ("seed", "4294967296"),
        ("seed", "010"),
        ("seed", "1:30"),
        ("seed", "9" * 5000),
        ("language.rank", "2.0"),
        ("evaluation.limit", "true"),
        ("video.fps", "1e400"),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(setting: str, value: str, tmp_path: Path) -> None:
    """On the command line and in a YAML."""
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=rf"^--{setting}: .*\(keeplora run --help lists every option\)$"):
        parse_config("", path, [f"--{setting}", value])
    group, _, name = setting.rpartition(".")
    path.write_text(f"{group}: {{{name}: {value}}}" if group else f"{name}: {value}")
    with pytest.raises(ConfigError, match=rf"^{path}: ({setting}: expected .* in .*, found|not valid YAML)"):
        parse_config("", path, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: 3", "train: expected 'name: value' lines, found 3"),
        ("train: [1]", r"train: expected 'name: value' lines, found \[1\]"),
        ("train: null", "train: expected 'name: value' lines, found null"),
        ("language: null", "language: expected 'name: value' lines, found null"),
        ("video:", "video: expected 'name: value' lines, found null"),
        ("", "expected 'name: value' lines, found null"),
        ("- seed: 1", "expected 'name: value' lines, found"),
        ("seed: 1\nseed: 2", "line 2, column 1: 'seed' is there twice"),
        ("train: {optim: x}\nseed: 1\ntrain: {}", "line 3, column 1: 'train' is there twice"),
        ("train: {max_steps: 1, max_steps: 2}", "'max_steps' is there twice"),
        ("train_overrides: {a: {max_steps: 1}, 'a': {}}", "'a' is there twice"),
        ("train_overrides: {Med: {learning_rate: '1e-3'}}", "train_overrides.Med.learning_rate: expected a number"),
        ("train_overrides: {Med: {learning_rate: true}}", "expected a number in .*, found true"),
        ("train_overrides: {Med: {max_steps: 2.5}}", "expected -1 or a whole number in .*, found 2.5"),
        ("train_overrides: {Med: {optim: 3}}", r"expected text, found 3 \(put it in quotes\)"),
        ("train_overrides: {Med: null}", "train_overrides.Med: expected 'name: value' lines, found null"),
        ("train_overrides: {3: {max_steps: 1}}", "expected names that are text, found 3"),
        ("method_options: {share: .nan}", "method_options.share: expected a finite value, found nan"),
        ("method_options: {a: [{b: .inf}]}", "expected a finite value, found inf"),
        ("method_options: {No: 1}", "found false .*YAML reads Yes and No as true and false"),
        ("run_dir: 2024", r"run_dir: expected text, found 2024 \(put it in quotes\)"),
        ('run_dir: "a\\0b"', r"run_dir: expected text, found 'a\\x00b' \(it holds a NUL or what is no UTF-8\)"),
        ('stream: "\\ud800"', "stream: expected text"),
        ("report_to: tensorboard", r"report_to: expected a list such as \[a, b\], each text, found 'tensorboard'"),
        ("report_to: [1]", "report_to: expected text, found 1"),
        ("language: {targets: []}", "language.targets is empty"),
        ("backfill: 1", "backfill: expected true or false, found 1"),
        ("model: {quantization: int8}", "model.quantization: expected nf4 or none, found 'int8'"),
        ("config: other.yaml", "config is no setting"),
        ("language.rank: 8", "language.rank is no setting; expected 'rank' in the group 'language'"),
        ("learning_rate: 1", "did you mean 'train.learning_rate'"),
        ("trian: {}", "trian is no setting .did you mean 'train'"),
    ],
)
def test_a_yaml_that_says_something_else_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as refused:
        parse_config("", path, [])
    assert str(refused.value).startswith(f"{path}: ") or "targets is empty" in message or "train_overrides" in text


def test_numbers_are_what_yaml_1_2_reads(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = "alpha: 32\ntrain: {learning_rate: 1e-3, max_steps: 1_000}\ntrain_overrides: {a: {weight_decay: 1}}\n"
    path.write_text(text)
    config = parse_config("", path, ["--seed=3", "train.warmup_ratio=0.5", "--report_to", "[]", "--data_root", "null"])
    assert (config.alpha, config.train.learning_rate, config.train.max_steps) == (32.0, 1e-3, 1000)
    assert isinstance(config.alpha, float) and isinstance(config.train_for("a").weight_decay, float)
    assert (config.seed, config.train.warmup_ratio, config.report_to, config.data_root) == (3, 0.5, [], None)


def test_of_two_files_the_later_wins_and_the_command_line_wins_over_both(tmp_path: Path) -> None:
    for name, text in (("a", "seed: 1\nalpha: 1"), ("b", "seed: 2")):
        (tmp_path / name).write_text(text)
    files = ["--config", str(tmp_path / "a"), f"--config={tmp_path / 'b'}"]
    found = parse_config("", Path("none"), ["--train.max_steps", "7", *files])
    assert (found.seed, found.alpha, found.train.max_steps) == (2, 1.0, 7)


def test_settings_made_in_python_are_checked_too() -> None:
    for make in (
        lambda: RunConfig(seed="x"),  # type: ignore[arg-type]
        lambda: RunConfig(train=None),  # type: ignore[arg-type]
        lambda: TrainConfig(learning_rate=float("nan")),
        lambda: JudgeConfig("x", batch_size=0),
        lambda: AnalysisConfig(energies=[float("inf")]),
    ):
        with pytest.raises(ConfigError, match="expected"):
            make()


def test_annotations_in_words() -> None:
    assert expected(Annotated[int, Range(1, 4)] | None) == "a whole number in [1, 4] or null"
    assert expected(Literal["a", "b", "c"]) == "one of a, b, c"
    assert expected(dict[str, Any]) == "'name: value' lines"
    assert expected(Path | None) == "a path or null"


def test_a_run_that_would_start_from_its_own_adapter_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "run"
    (own / "adapter").mkdir(parents=True)
    (tmp_path / "link").symlink_to(own / "adapter")
    for adapter in (own / "adapter", own / "x/../adapter", tmp_path / "link", own):
        with pytest.raises(ConfigError, match="initial_adapter .* lies in run_dir"):
            RunConfig(run_dir=str(own), initial_adapter=str(adapter))
    RunConfig(run_dir=str(own), initial_adapter=str(tmp_path / "run2/adapter"))


# --------------------------------------------------------------------------------------------------
# files


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


HOSTILE = {
    "billion laughs": (laughs(9).encode(), f"more than {MOST_VALUES} values"),
    "merged laughs": (
        "\n".join(
            ["m0: &m0 {x: 1}", *(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}" for n in range(1, 9))]
        ).encode(),
        f"more than {MOST_VALUES} values",
    ),
    "recursive list": (b"name: &a [*a]", "it holds itself"),
    "recursive mapping": (b"tasks: &a {b: {c: *a}}", "it holds itself"),
    "deep list": (b"[" * 3000, "nested deeper than"),
    "deep mapping": (b"{a: " * 3000, "nested deeper than"),
    "deep block": (b"- " * 50_000, "nested deeper than"),
    "UTF-16": ("name: x".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
    "UTF-16 without mark": ("name: x".encode("utf-16-le"), "holds NUL characters"),
    "Latin-1": ("name: Zürich".encode("latin-1"), r"not UTF-8 text \(byte 7\)"),
    "binary": (bytes(range(256)), "not UTF-8 text|NUL"),
    "NUL": (b"name: a\0b", "holds NUL characters"),
    "huge": (b"#" * (LARGEST_FILE + 1), f"is larger than {LARGEST_FILE} bytes"),
    "many values": (b"[" + b"1," * 100_000 + b"]", f"more than {MOST_VALUES} values"),
    "control character": (b"name: a\x07b", "special characters are not allowed"),
    "object": (b"name: !!python/object/apply:os.getcwd []", "the tag .* is not read here"),
    "set": (b"name: !!set {a, b}", "the tag .* is not read here"),
    "bad int": (b"name: !!int abc", "invalid literal"),
    "bad bool": (b"name: !!bool maybe", "maybe"),
    "two documents": (b"name: a\n---\nname: b", "found another document"),
    "unknown alias": (b"name: *a", "undefined alias"),
    "anchor twice": (b"- &a 1\n- &a 2", "second occurrence"),
    "list as name": (b"? [a]\n: 1", "unhashable"),
    "unclosed": (b"name: 'a", "unexpected end of stream"),
    "tab": (b"a:\n\tb: 1", "cannot start any token"),
}


def readers(path: Path, tmp_path: Path) -> list[tuple[str, Callable[[], object]]]:
    """Whatever reads a YAML."""
    stream = tmp_path / "stream.yaml"
    stream.write_text(f"name: s\ndata_root: .\ntasks: []\ngeneral: {json.dumps(str(path))}")
    return [
        ("run", lambda: parse_config("", path, [])),
        ("stream", lambda: load_stream(path)),
        ("suite", lambda: load_stream(stream)),
    ]


def refused_in_time(read: Callable[[], object], message: str) -> None:
    started = time.process_time()
    with pytest.raises(KeepLoRAError, match=message):
        read()
    assert time.process_time() - started < 4  # where the machine is busy; what hangs takes longer


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_yaml_is_refused_in_time(kind: str, tmp_path: Path) -> None:
    content, message = HOSTILE[kind]
    path = tmp_path / "hostile.yaml"
    path.write_bytes(content)
    for _, read in readers(path, tmp_path):
        refused_in_time(read, rf"hostile\.yaml: .*({message})")


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a device", "a socket", "missing", "endless"])
def test_what_is_no_file_is_refused_in_a_second(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    message = f"is {'a named pipe .FIFO.' if kind == 'a pipe' else kind}; expected a YAML file"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind in ("a device", "endless"):
        path.symlink_to("/dev/null" if kind == "a device" else "/dev/zero")
        message = "is a character device; expected a YAML file"
    elif kind == "a socket":
        path = Path(os.path.relpath(path))  # a socket's name has at most 108 bytes
        socket.socket(socket.AF_UNIX).bind(str(path))
        message = "cannot be read|is a socket"
    else:
        message = "cannot be read: No such file"
    for _, read in readers(path.absolute(), tmp_path):
        refused_in_time(read, message)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800", "a/" * 3000])
def test_a_path_that_no_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_config("", Path(name), [])
    with pytest.raises(StreamError, match="cannot be read"):
        load_stream(Path(name))


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"", b"{\0}"])
def test_a_damaged_config_json_of_a_run_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    refused_in_time(lambda: load_run(tmp_path), "config.json is not valid JSON")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": None}, "train: expected 'name: value' lines"),
        ({"seed": "x"}, "seed: expected a whole number"),
        ({"alpha": float("nan")}, "alpha: expected a number"),
        ({"new": 1}, "new is no setting"),
    ],
)
def test_a_config_json_that_was_edited_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = json.loads(json.dumps({**to_json(RunConfig()), **change}))
    with pytest.raises(ConfigError, match=f"^{tmp_path} was written by another version .*{message}"):
        config_from_dict(values, tmp_path)
    assert config_from_dict(to_json(RunConfig()), tmp_path) == RunConfig()
    with pytest.raises(ConfigError, match="expected 'name: value' lines"):
        config_from_dict([1], tmp_path)  # type: ignore[arg-type]


def to_json(config: RunConfig) -> dict[str, Any]:
    return {f.name: vars(value) if is_dataclass(value := getattr(config, f.name)) else value for f in fields(RunConfig)}


def test_anchors_and_merges_that_people_write_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("\ufeffa: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: [*a, *a]\nd: 2024-05-01\ne: on\nf: ~\ng: 0x10\n")
    assert read_yaml(path) == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 3, "y": 2},
        "c": [{"x": 1, "y": 2}] * 2,
        "d": "2024-05-01",
        "e": True,
        "f": None,
        "g": "0x10",
    }
    assert parse_yaml("[1, -2, 3.5, .5, 1e3, -1.5e-3, 1., 12e03, 0, 00, 1e, .e3, '1']") == [
        *(1, -2, 3.5, 0.5, 1000.0, -0.0015, 1.0, 12000.0, 0, "00", "1e", ".e3", "1")
    ]


# --------------------------------------------------------------------------------------------------
# what a run would find out late


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "adam"}, "not a valid OptimizerNames"),
        ({"optim": "lomo"}, "You need to install `lomo_optim`"),
        ({"lr_scheduler_type": "cos"}, "not a valid SchedulerType"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "eval strategy"),
    ],
)
def test_what_cannot_train_is_said_before_a_run(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^train: optim or lr_scheduler_type cannot be used: .*{message}"):
        check_settings(TrainConfig(**settings), torch.device("cpu"))
    check_settings(TrainConfig(), torch.device("cpu"))


@pytest.mark.parametrize(
    "read",
    [
        lambda path, long: parse_config("", path, [f"run_dir{long}=1"]),
        lambda path, long: parse_analysis([f"run_dir={long}", long]),
        lambda path, long: parse_config("", path, ["--run_dir", f"~{long}"]),
        lambda path, long: load_stream(_written(path, f"name: s\ndata_root: [{long}]\ntasks: []")),
        lambda path, long: load_stream(_written(path, f"name: s\ntasks: [{{name: a, train: {long}, test: {long}}}]")),
    ],
)
def test_a_message_quotes_no_more_than_the_beginning_of_what_was_given(
    read: Callable[[Path, str], object], tmp_path: Path
) -> None:
    with pytest.raises(KeepLoRAError) as refused:
        read(_written(tmp_path / "given.yaml", "seed: 1\n"), "a/" * 3000)
    assert len(str(refused.value)) < 1000


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_an_unknown_or_missing_logger_is_said_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    for fine in ([], ["none"], ["tensorboard"], ["all"]):
        check_loggers(fine)
    with pytest.raises(ConfigError, match="^report_to: tensorbord is not supported, only .*tensorboard"):
        check_loggers(["tensorbord"])
    for name in ("wandb", "mlflow", "comet_ml", "clearml", "flyte"):
        with pytest.raises(ConfigError, match=f"^report_to: the package of {name} is not installed"):
            check_loggers(["tensorboard", name])


@pytest.mark.parametrize(
    ("mode", "key", "fine"),
    [("online", None, False), ("online", "k", True), ("offline", None, True), ("disabled", None, True)],
)
def test_wandb_needs_a_login_or_to_be_offline(
    mode: str, key: str | None, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`wandb.setup().settings.mode` and `wandb.api.api_key` are where wandb 0.25 keeps both."""
    settings = SimpleNamespace(settings=SimpleNamespace(mode=mode))
    fake = SimpleNamespace(setup=lambda: settings, api=SimpleNamespace(api_key=key), run=None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    if fine:
        check_loggers(["wandb"])
    else:
        with pytest.raises(ConfigError, match="wandb has no login here; run `wandb login`, set WANDB_MODE=offline"):
            check_loggers(["wandb"])


def test_a_methods_file_without_a_method_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty_method.py").write_text("from mllm_keeplora.methods.base import Method\n")
    monkeypatch.setattr(mllm_keeplora.methods, "__path__", [*mllm_keeplora.methods.__path__, str(tmp_path)])
    with pytest.raises(ConfigError, match=r"empty_method\.py defines no class derived from Method"):
        load_method(RunConfig(method="empty_method"))
    sys.modules.pop("mllm_keeplora.methods.empty_method")
    assert issubclass(type(load_method(RunConfig())), Method)


def test_a_command_states_the_range_of_its_own_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (
        ["chat", "run", "--max_new_tokens", "0"],
        ["leaderboard", "run", "--limit", "-1"],
        ["plan", "--memory_gb", "inf"],
        ["plan", "--memory_gb", "nan"],
        ["run", "--plan", "--memory_gb", "-3"],
        ["judge", "run", "--judge", "x", "--batch_size", "1e9"],
        ["analyze", "--energies", "[2]"],
        ["check", "s.yaml", "--video.timeout", "inf"],
    ):
        with pytest.raises(SystemExit):
            main(argv)
        assert f"error: {argv[-2]}: expected a " in (found := capsys.readouterr().err) and " in " in found
    sources = [Path(str(import_module(f"mllm_keeplora.commands.{name}").__file__)) for name in ("chat", "leaderboard")]
    assert not any("type=int" in source.read_text() for source in sources)
