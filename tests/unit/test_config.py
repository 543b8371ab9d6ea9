"""Settings: strict, documented, and every shipped YAML readable by the real parser."""

import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mllm_keeplora.config import (
    ConfigError,
    RunConfig,
    TrainConfig,
    differences,
    flatten,
    identity,
    parse_config,
)
from mllm_keeplora.data.stream import load_stream

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))


def parse(tmp_path: Path, text: str, *argv: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return parse_config("test", path, list(argv))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_is_read_by_the_real_parser(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = parse_config("test", path, [])
    assert Path(config.stream).is_file()
    assert path.read_text().startswith(("# bash scripts/run_", "# accelerate launch ")), "its command first"


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    config = parse(tmp_path, "seed: 3\nlanguage: {rank: 8, gamma: 0.5}", "--language.rank", "4")
    assert (config.seed, config.language.rank, config.language.gamma) == (3, 4, 0.5)


OPTIONS = "method: keeplora\nmethod_options: {features_from: activations}"


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], {"features_from": "activations"}),
        (["--method", "keeplora"], {"features_from": "activations"}),
        (["--method", "lora"], {}),
        (["--config", "recipes/configs/methods/lora.yaml"], {}),
        (["--config", "recipes/configs/methods/lora.yaml", "--method", "keeplora"], {}),
        (["--config", "recipes/configs/methods/paper.yaml"], {"features_from": "gradients"}),
        (["--method", "replay", "--method_options", "{share: 0.5}"], {"share": 0.5}),
    ],
)
def test_another_method_leaves_the_options_of_the_first_behind(
    tmp_path: Path, argv: list[str], expected: dict[str, Any]
) -> None:
    (tmp_path / "own.yaml").write_text(OPTIONS)
    assert parse(tmp_path, OPTIONS, "--config", str(tmp_path / "own.yaml"), *argv).method_options == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("run_dirr: x", "run_dirr.*did you mean 'run_dir'"),
        ("language: {epsw: 0.5}", "epsw.*did you mean 'language.eps_w'"),
        ("language: {eps_w: 0}", r"language.eps_w: expected a number in \(0, 1\], found 0"),
        ("vision: {eps_f: 1.5}", r"vision.eps_f: expected a number in \(0, 1\], found 1.5"),
        ("vision: {gamma: 2}", r"vision.gamma: expected a number in \[0, 1\], found 2"),
        ("vision: {rank: 0}", r"vision.rank: expected a whole number in \[1, 16384\], found 0"),
        ("seed: many", "seed: expected a whole number in .*, found 'many'"),
        ("train: {max_steps: 0}", "train.max_steps: expected -1 or a whole number in .*, found 0"),
        ("train_overrides: {Med: {epochs: 3}}", "train_overrides.Med.epochs is not a setting"),
        (
            "train_overrides: {Med: {learning_rate: abc}}",
            "train_overrides.Med.learning_rate: expected a number in .*, found 'abc'",
        ),
        ("train_overrides: {Med: {activation_checkpointing: true}}", "set it in train"),
        ("evaluation: 3", "evaluation: expected 'name: value' lines, found 3"),
        ("model: {cpu_threads: 0}", "model.cpu_threads: expected a whole number in .* or null, found 0"),
        ("language: {adapt: false}\nvision: {adapt: false}", "nothing to learn"),
        ("projector: protected\nvision: {adapt: false}", "vision.adapt: true"),
        ("probe: {fraction: 0}", r"probe.fraction: expected a number in \(0, 1\]"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(tmp_path, text)


@pytest.mark.parametrize("name", ["run_dir", "stream", "data_root", "initial_adapter", "cache_dir", "model.base_model"])
@pytest.mark.parametrize(
    "path, message",
    [("", "name a path"), ("~/x", "not written out"), ("$HOME/x", "not written out"), ("a/${DATA}", "not written out")],
)
def test_a_path_that_a_shell_was_to_complete_is_refused(tmp_path: Path, name: str, path: str, message: str) -> None:
    """`--initial_adapter "$UNSET"` would start from the bare base, `~/x` make a folder of that name."""
    with pytest.raises(ConfigError, match=f"{name} (is empty|.*{message})"):
        parse(tmp_path, "seed: 0", f"--{name}", path)


PATHS = [
    *("run_dir", "stream", "data_root", "initial_adapter", "cache_dir"),
    *("model.base_model", "model.chat_template", "general.samples", "general.media_root"),
]


@pytest.mark.parametrize("path", ["x" * 300, "a/" * 3000, "circle/run"])
@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_nothing_can_have_is_refused(
    name: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before a plan, which says nothing of what is not there yet: this never will be."""
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")
    with pytest.raises(ConfigError, match=f"{name} .* cannot be read: (File name too long|Too many levels)"):
        parse(tmp_path, "seed: 0", f"--{name}", path)


@pytest.mark.parametrize(
    "name", ["run_dir", "data_root", "initial_adapter", "cache_dir", "model.base_model", "general.media_root"]
)
def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"{name} is '.*file', a file; name a folder"):
        parse(tmp_path, "seed: 0", f"--{name}", str(tmp_path / "file"))


def test_a_path_with_such_a_name_that_is_there_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a$b").mkdir()
    assert parse(tmp_path, "seed: 0", "--data_root", str(tmp_path / "a$b")).data_root == str(tmp_path / "a$b")
    assert parse(tmp_path, "seed: 0", "--data_root", "costs 5$/a~").data_root == "costs 5$/a~"


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "attn_implementation: flash_attention_4",
            "expected one of sdpa, eager, flash_attention_2, flash_attention_3, or",
        ),
        ("attn_implementation: paged|sdpa", "or a kernel of the hub .OWNER/NAME., found 'paged|sdpa'"),
        ("attn_implementation: sdpaa", "found 'sdpaa' .did you mean 'sdpa'"),
        ("attn_implementation: a/b/c", "found 'a/b/c'"),
        ("attn_implementation: kernels-community/flash-attn2", "bfloat16 on GPUs alone, found compute_dtype float32"),
        ("attn_implementation: somebody/their-kernel, compute_dtype: bfloat16", "native code of somebody.*read it"),
        ("attn_implementation: flash_attention_3, compute_dtype: bfloat16, device: cpu", "on GPUs alone"),
        ("attn_implementation: flash_attention_2", "bfloat16 on GPUs alone, found compute_dtype float32"),
        (
            "attn_implementation: flash_attention_2, compute_dtype: bfloat16, device: cpu",
            "on GPUs alone, found .* device cpu",
        ),
    ],
)
def test_an_attention_that_cannot_run_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"model.attn_implementation: .*{message}"):
        parse(tmp_path, f"model: {{{text}}}")


@pytest.mark.parametrize(
    "name, more",
    [
        ("flash_attention_2", ""),
        ("flash_attention_3", ""),
        ("kernels-community/vllm-flash-attn3", ""),
        ("kernels-community/flash-attn2@v4:flash_attn_varlen_func", ""),
        ("somebody/their-kernel", ", trust_remote_code: true"),
    ],
)
def test_kernels_of_attention_are_taken(tmp_path: Path, name: str, more: str) -> None:
    model = parse(tmp_path, f'model: {{attn_implementation: "{name}", compute_dtype: bfloat16{more}}}').model
    assert model.attn_implementation == name


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        parse_config("test", tmp_path / "nowhere.yaml", [])


def test_help_lists_every_setting_with_its_default(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        parse(tmp_path, "seed: 0", "--help")
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for group in fields(RunConfig):
        value = getattr(RunConfig(), group.name)
        for setting in fields(value) if is_dataclass(value) else [group]:
            name = f"--{group.name}.{setting.name}" if is_dataclass(value) else f"--{group.name}"
            entry = re.search(rf"{re.escape(name)} .*?default: ", text)
            assert entry, f"{name} is not in --help with a default"


def test_overrides_apply_to_their_task_alone() -> None:
    config = RunConfig(train_overrides={"Med": {"num_train_epochs": 3.0}})
    assert config.train_for("Med").num_train_epochs == 3.0
    assert config.train_for("Sci") == config.train


def test_identity_ignores_what_changes_no_number() -> None:
    config = RunConfig()
    free = replace(config, run_dir="elsewhere", report_to=[], cache_dir="x", backfill=True, stream="y")
    free = replace(free, train=replace(free.train, logging_steps=1, save_steps=50, max_length=9))
    free = replace(free, on_bad_record="skip", probe=replace(free.probe, batch_size=1))
    free = replace(free, train=replace(free.train, activation_checkpointing=True))
    assert identity(config, "a") == identity(free, "a")
    assert identity(config, "a") != identity(replace(config, seed=1), "a")
    assert identity(config, "a") != identity(replace(config, train=TrainConfig(learning_rate=1.0)), "a")


def test_identity_of_one_task_is_untouched_by_the_overrides_of_another() -> None:
    changed = RunConfig(train_overrides={"new": {"learning_rate": 1.0}})
    assert identity(RunConfig(), "old") == identity(changed, "old")
    assert identity(RunConfig(), "new") != identity(changed, "new")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "streams").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_stream_is_read_by_the_real_loader(path: Path, tmp_path: Path) -> None:
    for name in re.findall(r"(?:train|test|test_answers|references): ([\w/.-]+)", path.read_text()):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("[]")
    for name in re.findall(r"media_root: ([\w/.-]+)", path.read_text()):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    assert load_stream(path, tmp_path).tasks


def test_nested_settings_differ_by_their_dotted_names() -> None:
    old = {"alpha": 32.0, "train": {"max_steps": 5, "optim": "adamw_torch"}, "report_to": ["a"]}
    assert flatten(old)["train.max_steps"] == 5
    assert differences(old, {**old}) == []
    new = {"alpha": 32.0, "train": {"max_steps": 6}, "report_to": ["a"], "seed": 0}
    assert differences(old, new) == [
        "train.max_steps: 5 there, 6 now",
        "train.optim: 'adamw_torch' there, null now",
        "seed: null there, 0 now",
    ]
