"""The command `keeplora`: quick help, whole names of options, and an end in one line where that is enough."""

import ast
import errno
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

from mllm_keeplora.command_line import with_underscores
from mllm_keeplora.commands.main import COMMANDS, main
from mllm_keeplora.errors import ConfigError, did_you_mean

ROOT = Path(__file__).resolve().parents[2]

# What a command has to be given, before anything else can be wrong.
REQUIRED = {
    "check": ["stream.yaml"],
    "fetch": ["stream.yaml"],
    "chat": ["run"],
    "edit": ["run", "--out", "there"],
    "evaluate": ["run"],
    "export": ["run", "--out", "there"],
    "push": ["run", "me/mine"],
    "leaderboard": ["run"],
    "compare": ["run"],
    "judge": ["run", "--judge", "model"],
}


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def refused(*argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr with which a command is refused."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    return message


# --------------------------------------------------------------------------------------------------
# help


def test_help_needs_nothing_that_is_slow_to_import() -> None:
    """One process asks for every help, so that whatever one command imports is seen."""
    script = (
        "import contextlib, sys\n"
        "from mllm_keeplora.commands.main import COMMANDS, main\n"
        "main(['--help'])\n"
        "for name in COMMANDS:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main([name, '--help'])\n"
        "slow = {'torch', 'transformers', 'peft', 'pandas', 'matplotlib', 'lmms_eval', 'PIL', 'numpy'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"usage: keeplora {name} " in done.stdout


def test_the_help_lists_every_command_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        summary = (import_module(f"mllm_keeplora.commands.{name}").__doc__ or "").splitlines()[0]
        assert re.search(rf"^  {name} +{re.escape(summary)}$", text, re.M)
        assert len(summary) <= 100


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_shows_how_to_call_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(rf"^    keeplora {name}( |$)", help_of(name, capsys), re.M)


@pytest.mark.parametrize(
    ("argv", "listed"),
    [
        (["run"], {"--plan": "do not begin it", "--memory_gb GB": "of so many GB"}),
        (["plan"], {"--memory_gb GB": "of so many GB", "--measure": "run here in a temporary folder"}),
        (["check"], {"--all": "every bad record"}),
        (["check", "--config", "none.yaml"], {"--all": "every bad record"}),
    ],
)
def test_what_a_command_reads_itself_is_listed_with_what_it_does(
    argv: list[str], listed: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*argv, "--help"])
    text = capsys.readouterr().out
    options = text[text.index("\noptions:\n") :].partition("\n\n")[0]
    for option, meaning in listed.items():
        assert re.search(rf"^  {option}\s+\S", options, re.M), options
        assert meaning in re.sub(r"\s+", " ", options)


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"keeplora {version('mllm-keeplora')}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_no_help_speaks_of_null_as_a_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = re.sub(r"\s+", " ", help_of(name, capsys))
    assert "default: null" not in text and "default: None" not in text and "==SUPPRESS==" not in text


def test_the_help_of_an_analysis_says_what_a_run_gives(capsys: pytest.CaptureFixture[str]) -> None:
    text = re.sub(r"\s+", " ", help_of("analyze", capsys))
    for name in ("stream", "cache_dir", "batch_size", "model.base_model", "video.fps"):
        assert re.search(rf"--{re.escape(name)} VALUE [^-]*default: that of --run or --config\)", text), name
    assert re.search(r"--depth_energy VALUE [^-]*default: 0.6\)", text)


# --------------------------------------------------------------------------------------------------
# names of options


@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_may_be_abbreviated(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = set(re.findall(r"^  (?:-h, )?(--[a-z][\w.]+)|\[(--[a-z_]+)", help_of(name, capsys), re.M))
    options = {listed or flag for listed, flag in options}
    assert {"--help"} < options
    for option in options:
        short = option[:-1]
        if short in options:
            continue
        message = refused(name, *REQUIRED.get(name, []), short, "1", capsys=capsys)
        assert f"unrecognized arguments: {short}" in message, message
        alike = [other[2:] for other in options if other.startswith(short)]
        assert "did you mean" in message and any(other in message for other in alike), message


def test_no_parser_anywhere_takes_abbreviations() -> None:
    """OptionParser is the one class of ours; its own call is the `super().__init__` of command_line.py."""
    found = 0
    for folder in ("mllm_keeplora", "recipes", "eval", "studies", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                own = path.name == "command_line.py" and called == "super().__init__"
                if own or called.endswith("ArgumentParser"):
                    assert "allow_abbrev=False" in ast.unparse(node), f"{path.name}: {ast.unparse(node)}"
                    found += 1
    assert found >= 3


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["run", "--train.learning_rat", "1"], "'--train.learning_rate'"),
        (["run", "--tr.learning_rate", "1"], "'--train.learning_rate'"),
        (["run", "--learning_rate=1"], "'--train.learning_rate'"),
        (["run", "--rank", "8"], "'--language.rank' or '--vision.rank'"),
        (["run", "--see", "1"], "'--seed'"),
        (["run", "--conf", "x.yaml"], "'--config'"),
        (["run", "--pla"], "'--plan'"),
        (["run", "--memory", "24"], "'--memory_gb'"),
        (["plan", "--mem", "24"], "'--memory_gb'"),
        (["analyze", "--model.dev", "cpu"], "'--model.device'"),
        (["check", "s.yaml", "--video.fram", "4"], "'--video.frames'"),
        (["chat", "run", "--imag", "x.png"], "'--image'"),
        (["export", "run", "--ou", "x"], "'--out'"),
        (["judge", "run", "--judge", "x", "--batc", "4"], "'--batch_size'"),
    ],
)
def test_a_wrong_name_is_refused_with_the_right_one(
    argv: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"(did you mean {meant}?)" in refused(*argv, capsys=capsys)


def test_a_name_like_no_other_is_refused_with_the_way_to_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert "(keeplora run --help lists every option)" in refused("run", "--xyz", "1", capsys=capsys)
    assert refused("run", "--seed", capsys=capsys).startswith("error: --seed: expected a value behind it, found none (")
    assert "--seed: expected a value behind it, found --alpha (" in refused("run", "--seed", "--alpha", capsys=capsys)
    assert refused("run", "seed=x", capsys=capsys).startswith(
        "error: --seed: expected a whole number in [0, 4000000000]"
    )
    assert "unrecognized arguments: sed=1 (did you mean '--seed'?) (" in refused("run", "sed=1", capsys=capsys)
    assert "(keeplora chat --help lists every option)" in refused("chat", "run", "--xyz", capsys=capsys)
    assert "--train (a group of settings, each --train.NAME) (" in refused("run", "--train", "{}", capsys=capsys)
    assert "'runn' is no command of keeplora (did you mean 'run'?)" in refused("runn", capsys=capsys)
    assert "judge)" in refused("xyz", capsys=capsys)


def test_what_is_required_is_named_as_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    message = "error: the following arguments are required: --judge (keeplora judge --help lists every option)\n"
    assert refused("judge", capsys=capsys) == message
    assert "required: --judge (" in refused("judge", "run", capsys=capsys)
    assert "required: --out (" in refused("export", capsys=capsys)
    assert "required: run (" in refused("chat", capsys=capsys)
    assert "required: stream (" in refused("check", capsys=capsys)


def test_a_value_may_begin_with_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("-inf", "-.inf", "-1e-3", "-x"):
        assert f"--alpha: expected a number in (0, 1000000], found {value.replace('-.', '-')}" in refused(
            "run", "--alpha", value, capsys=capsys
        ).replace("'", "").replace("-0.001", "-1e-3")


@pytest.mark.parametrize("name", ["judge", "leaderboard", "export", "chat"])
def test_a_folder_that_is_no_run_is_said_to_be_none(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(name, str(tmp_path), *REQUIRED[name][1:], capsys=capsys)
    assert f"{tmp_path} is no directory of a run: it holds no config.json" in message


@pytest.mark.parametrize("name", ["leaderboard", "export", "chat", "compare", "edit", "push", "evaluate"])
def test_a_model_and_a_folder_inside_a_run_are_told_from_a_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "mine"
    (run / "eval_tasks").mkdir(parents=True)
    for inside in ("adapter", "stages/01-digits", "stages/01-digits/evaluation"):
        (run / inside).mkdir(parents=True, exist_ok=True)
        message = refused(name, str(run / inside), *REQUIRED[name][1:], capsys=capsys)
        assert message.endswith(f"it lies in that of a run: name {run}\n")
    for config in ({"model_type": "llava", "architectures": ["Llava"]}, {"model_type": "qwen2_5_vl"}):
        (tmp_path / "exported").mkdir(exist_ok=True)
        (tmp_path / "exported/config.json").write_text(json.dumps(config))
        message = refused(name, str(tmp_path / "exported"), *REQUIRED[name][1:], capsys=capsys)
        assert "exported is a model of transformers" in message and "another version" not in message


@pytest.mark.parametrize("name", ["leaderboard", "export", "chat", "compare", "edit", "push", "evaluate"])
def test_a_folder_that_cannot_be_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "circle").symlink_to("circle")
    long = refused(name, "x" * 300, *REQUIRED[name][1:], capsys=capsys)
    assert long.startswith("error: ") and "File name too long" in long and "name another" in long
    assert "is no directory of a run" in refused(name, str(tmp_path / "circle"), *REQUIRED[name][1:], capsys=capsys)


def test_a_wrong_method_is_refused_before_data_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn = "mllm_keeplora.recipes.small.streams.draw_small_stream"
    monkeypatch.setattr(drawn, lambda *_: pytest.fail("drawn"))
    assert "did you mean 'keeplora'?" in refused("run", "--method", "keplora", capsys=capsys)
    assert not list(tmp_path.iterdir())


def test_an_option_may_be_spelled_with_dashes() -> None:
    given = ["--run-dir", "a-b", "--max-new-tokens=3-4", "--train.max-steps", "-1", "--", "text"]
    expected = ["--run_dir", "a-b", "--max_new_tokens=3-4", "--train.max_steps", "-1", "--", "text"]
    assert with_underscores(given) == expected


def test_a_setting_may_be_spelled_without_dashes_and_a_value_may_look_like_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lr=3.yaml").write_text("name: x\n")
    for argv in (["data_root=lr=3", "--cache_dir", "lr=3"], ["--data_root", "lr=3", "cache_dir=lr=3"]):
        assert "lr=3.yaml" in refused("check", str(tmp_path / "lr=3.yaml"), *argv, capsys=capsys)


def test_the_last_part_of_a_name_decides_what_is_meant() -> None:
    known = ["train.learning_rate", "language.rank", "vision.rank", "seed"]
    assert did_you_mean("seeds", known) == " (did you mean 'seed'?)"
    assert did_you_mean("vision.rnk", known) == " (did you mean 'vision.rank'?)"
    assert (
        did_you_mean("general.eps_", [*known, "language.eps_w", "general.eps_g"]) == " (did you mean 'general.eps_g'?)"
    )
    assert did_you_mean("lang.rank", known) == " (did you mean 'language.rank' or 'vision.rank'?)"
    assert did_you_mean("train.xyz", known) == did_you_mean("train.", known) == did_you_mean("q", []) == ""


# --------------------------------------------------------------------------------------------------
# how a command ends


def ends(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of a command in which this happens, in a package with two extras."""

    def fail(argv: list[str]) -> None:
        raise error

    extras = ['lmms-eval>=0.7.3; extra == "eval"', 'av<16,>=15.1; extra == "video"', "torch>=2.13"]
    monkeypatch.setattr("mllm_keeplora.command_line.requires", lambda name: extras)
    monkeypatch.setattr("mllm_keeplora.commands.fetch.main", fail)
    with pytest.raises(SystemExit) as ended:
        main(["fetch"])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command continues"),
        (ConfigError("seed is wrong"), 2, "error: seed is wrong"),
        (OSError(errno.ENOSPC, "No space left"), 2, "error: [Errno 28] No space left; make room"),
        (
            ModuleNotFoundError("No module named 'lmms_eval'", name="lmms_eval.tasks"),
            2,
            "error: lmms_eval.tasks is not installed; pip install 'mllm-keeplora[eval]' brings it",
        ),
        (ModuleNotFoundError("No module named 'av'", name="av"), 2, "pip install 'mllm-keeplora[video]'"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(
    error: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ends(error, monkeypatch) == status
    message = capsys.readouterr().err
    assert line in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "error", [ValueError("a defect"), ModuleNotFoundError("nonsense", name="nonsense"), OSError(5, "broken")]
)
def test_any_other_error_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error)):
        ends(error, monkeypatch)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_a_reader_that_has_gone_away_is_no_error(arguments: list[str]) -> None:
    script = (
        f"import sys, time; from mllm_keeplora.commands.main import main; time.sleep(0.3); sys.exit(main({arguments}))"
    )
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", script], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    os.close(reading)
    assert process.communicate()[1] == "" and process.returncode in (0, 141)  # argparse keeps it to itself


def test_another_pipe_that_breaks_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BrokenPipeError):
        ends(BrokenPipeError(errno.EPIPE, "a worker's"), monkeypatch)


# --------------------------------------------------------------------------------------------------
# scripts


@pytest.mark.parametrize("script", ["run_vqa_stream.sh", "run_video_stream.sh", "run_classification_stream.sh"])
def test_a_script_stays_in_the_users_folder(script: str, tmp_path: Path) -> None:
    """A relative name is the user's own file; a shipped one is found all the same."""
    (tmp_path / "my.yaml").write_text("seed: my own\n")
    environment = {**os.environ, "KEEPLORA_PYTHON": sys.executable}
    for arguments, expected in (
        (["--config", "my.yaml"], "my own"),
        (["--config", "recipes/configs/video/small.yaml", "--seed", "none"], "none"),
        (["--train.learning_rat", "1"], "did you mean '--train.learning_rate'"),
    ):
        done = subprocess.run(
            ["bash", str(ROOT / "scripts" / script), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2 and expected in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["my.yaml"]


def test_the_leaderboard_script_passes_its_arguments_on(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "scripts/evaluate_leaderboard.sh"), "run", "--limi", "3"]
    environment = {**os.environ, "KEEPLORA_PYTHON": sys.executable}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "did you mean '--limit'" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [
        ([], "-m not slow"),
        (["--slow"], ""),
        (["-k", "a b", "--slow"], "-k a b"),
        (["--slow", "tests/unit"], "tests/unit"),
        (["-x"], "-m not slow -x"),
    ],
)
def test_the_test_script_takes_slow_anywhere(arguments: list[str], passed: str, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/test.sh").write_text((ROOT / "scripts/test.sh").read_text())
    setup = f"REPOSITORY={tmp_path} PYTHON=echo\nsetup_environment() {{ :; }}\n"
    (tmp_path / "scripts/_setup.sh").write_text(setup)
    command = ["bash", str(tmp_path / "scripts/test.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    last = done.stdout.splitlines()[-1]
    assert last.partition("--no-loadscope-reorder")[2].strip() == passed
