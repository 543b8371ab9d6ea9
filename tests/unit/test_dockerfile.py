"""The Dockerfile without Docker: what it copies is there and enough, its commands are those of scripts/_setup.sh."""

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "Dockerfile", ROOT / ".dockerignore"]


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each, lines that go on joined."""
    text = re.sub(r"\\\n", " ", FILES[0].read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def copied() -> dict[str, str]:
    """Source -> destination, relative to the folder of the image."""
    found = {}
    for name, rest in instructions():
        if name == "COPY":
            *sources, destination = shlex.split(rest)
            found |= {s: f"{destination}{s}" if destination.endswith("/") else destination for s in sources}
    return found


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A folder with what is copied, of the files that git knows."""
    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for source, destination in copied().items():
        files = [file for file in known if file == source or file.startswith(f"{source}/")]
        assert files, f"COPY {source}: git knows no such file"
        for file in files:
            target = tmp_path / f"{destination}{file.removeprefix(source)}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, target)
    return tmp_path


def test_what_is_copied_and_nothing_else_goes_to_docker() -> None:
    lines = [line for line in FILES[1].read_text().splitlines() if not line.startswith("#")]
    first, *rest = lines
    assert first == "*"  # everything is left out, and these are not
    assert {line.removeprefix("!") for line in rest if line.startswith("!")} == {*copied()}


def test_what_is_copied_is_enough_to_install_the_package(image: Path) -> None:
    settings = tomllib.loads((image / "pyproject.toml").read_text())
    folders = settings["tool"]["setuptools"]["package-dir"]
    for package in settings["tool"]["setuptools"]["packages"]:
        home = max((name for name in folders if f"{package}.".startswith(f"{name}.")), key=len)
        path = image / folders[home] / package.removeprefix(home).strip(".").replace(".", "/")
        assert path.is_dir(), f"{package} is to lie in {path.relative_to(image)}"
    for file in (settings["project"]["readme"], *settings["project"]["license-files"]):
        assert (image / file).is_file()


def test_the_environment_is_made_by_the_commands_of_the_scripts_from_the_lock(image: Path, tmp_path: Path) -> None:
    """The image's own RUN, with an interpreter that writes down what it is asked to do."""
    [command] = [rest for name, rest in instructions() if name == "RUN"]
    calls, folder = tmp_path / "calls", tmp_path / "bin"
    folder.mkdir()
    recorder = folder / "python3"
    recorder.write_text(
        f'#!/bin/sh\necho "$PIP_EXTRA_INDEX_URL|$*" >>{calls}\n'
        f'if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && cp {recorder} "$3/bin/python"; fi\n'
    )
    recorder.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "PIP_EXTRA_INDEX_URL": "an-index"}
    subprocess.run(["sh", "-c", command], cwd=image, env=environment, check=True, capture_output=True)
    done = [line.removeprefix("an-index|") for line in calls.read_text().splitlines()]
    installed = [line for line in done if " install " in line]
    written = re.findall(r"-m pip (install .*?) &&", (ROOT / "scripts/_setup.sh").read_text())
    assert installed == [f"-m pip {line}".replace("'", "") for line in written] and len(installed) == 2
    assert all("-c constraints.txt" in line for line in installed)
    assert done[-1] == "-m mllm_keeplora.commands.main --version"
    assert "install_at_every_start" in done[-2]


def test_the_command_of_the_image_is_on_its_path() -> None:
    settings = dict(instructions())  # the last of each
    where = [rest for name, rest in instructions() if name == "WORKDIR"]
    assert json.loads(settings["ENTRYPOINT"]) == ["keeplora"]
    assert f"PATH={where[0]}/.venv/bin:$PATH" in settings["ENV"]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert "keeplora" in scripts


def test_the_image_names_no_place_of_one_machine() -> None:
    """Neither a registry nor an index nor a folder: base images and packages come from where docker and pip look."""
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"https?://|\b[\w-]+\.(?:com|org|io|net|internal|local)\b", text)
        assert not re.search(r"(?<![\w.])/(?:work|root|home|opt|tmp)/", text)
    python = re.findall(r"^FROM python:(\d+\.\d+)-slim$", FILES[0].read_text(), flags=re.M)
    assert python and python[0] in (ROOT / ".github/workflows/tests.yml").read_text()
