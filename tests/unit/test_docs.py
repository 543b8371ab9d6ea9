"""The documents keep up with the code: what they name exists, their diffs apply, and the site builds."""

import ast
import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm_keeplora.commands.main import COMMANDS
from mllm_keeplora.data.stream import TaskSpec
from tests.unit.test_layers import LAYERS, MODULES

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/api").glob("*.md")),
]
FOLDERS = ("mllm_keeplora", "recipes", "eval", "studies", "benchmarks", "scripts", "tests", "docs")
PLACEHOLDER = re.compile(r"FILE|NAME|RUN\b|NN-|[*{}<>]|\.\.\.")
OF_OTHERS = ("scripts/LLaVA/", "scripts/HiDe/", "eval/accuracy/")  # in the repositories of published benchmarks
LONGEST_LINE = 120

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))


def fenced(text: str, languages: str) -> list[str]:
    """Contents of the fenced blocks in these languages."""
    return re.findall(rf"^```(?:{languages})\n(.*?)^```", text, flags=re.S | re.M)


def diffs() -> list[str]:
    return fenced((ROOT / "CONTRIBUTING.md").read_text(), "diff")


def added_by_diffs() -> set[str]:
    """Files that the examples of CONTRIBUTING.md would create."""
    return set(re.findall(r"^\+\+\+ b/(\S+)", "".join(diffs()), flags=re.M))


def current(path: Path) -> str:
    """A document's text; of the tables of the changes (`| before | now |`) what is there now."""
    text = path.read_text()
    if path.name == "CHANGELOG.md":
        text = re.sub(r"^\|.*\|(.*\|)$", r"|\1", text, flags=re.M)
    return text


def in_code(text: str) -> list[str]:
    """What stands between single backticks outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def commands(text: str) -> list[list[str]]:
    """Shell commands of fenced blocks and inline code, as words."""
    lines = [line for block in fenced(text, "bash|sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += [code for code in in_code(text) if re.match(r"(bash|accelerate|python|keeplora) ", code)]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


# What the documents name


@each_document
def test_files_that_a_document_names_exist(path: Path) -> None:
    text = current(path)
    named = {word for words in commands(text) for word in words} | set(in_code(text))
    for name in named - added_by_diffs():
        if (
            re.match(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*$", name)
            and not PLACEHOLDER.search(name)
            and not name.startswith(OF_OTHERS)
        ):
            assert (ROOT / name).exists(), f"{path.name} names {name}"


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text()):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{path.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{path.name}: {name} has no heading {anchor}"


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@each_document
def test_python_names_in_a_document_exist(path: Path) -> None:
    for name in in_code(current(path)):
        if re.fullmatch(r"mllm_keeplora(\.\w+)+", name):
            assert exists(name), f"{path.name} names {name}"


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(name)
        return True
    module, attribute = name.rsplit(".", 1)
    return hasattr(importlib.import_module(module), attribute)


@each_document
def test_tests_that_a_document_names_exist(path: Path) -> None:
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    keys = {field.name for field in fields(TaskSpec)}
    for name in in_code(current(path)):
        if re.fullmatch(r"test_\w+", name) and name not in keys:
            assert f"def {name}(" in tests, f"{path.name} names {name}"


def test_every_equation_names_a_test() -> None:
    rows = [line for line in (ROOT / "docs/equations.md").read_text().splitlines() if line.startswith("| E")]
    assert [row.split()[1] for row in rows] == [f"E{i}" for i in range(1, 10)]
    assert all(re.search(r"`test_\w+`", row) for row in rows)


# What the documents tell a reader to type


SAME_AS = {
    "run_vqa_stream.sh": "run",
    "run_video_stream.sh": "run",
    "run_classification_stream.sh": "run",
    "vqa.py": "run",
    "video.py": "run",
    "classification.py": "run",
    "evaluate_leaderboard.sh": "leaderboard",
}


def keeplora_commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """The subcommand and the words behind it, of every command that ends up in `keeplora`."""
    for words in commands(text):
        for position, word in enumerate(words):
            name = words[position + 1] if word == "keeplora" and words[position + 1 :] else SAME_AS.get(Path(word).name)
            if name is not None and not name.startswith("-"):
                yield name, words[position + 1 + (word == "keeplora") :]
                break


@cache
def options(name: str) -> frozenset[str]:
    """The long options that a subcommand's own --help lists, `_` for `-`."""
    module: Any = importlib.import_module(f"mllm_keeplora.commands.{name}")
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        module.main(["--help"])
    return frozenset(normal(option) for option in re.findall(r"--[\w.-]+", shown.getvalue()))


def normal(option: str) -> str:
    return option.split("=")[0].lstrip("-").replace("-", "_")


@each_document
def test_keeplora_commands_and_their_options_exist(path: Path) -> None:
    found = list(keeplora_commands(current(path)))
    for name, words in found:
        assert name in COMMANDS, f"{path.name}: keeplora {name}"
        for option in (word for word in words if word.startswith("--")):
            assert normal(option) in options(name), f"{path.name}: keeplora {name} {option}"


@each_document
def test_options_of_other_programs_exist(path: Path) -> None:
    """Of benchmarks and studies: the program's source has the option."""
    for words in commands(current(path)):
        script = next((w for w in words if re.match(r"benchmarks/\w+\.py$|mllm_keeplora\.studies\.", w)), None)
        if script is None:
            continue
        file = (
            ROOT / script
            if script.endswith(".py")
            else ROOT / f"{script.removeprefix('mllm_keeplora.').replace('.', '/')}.py"
        )
        for option in (word for word in words if word.startswith("--")):
            assert normal(option) in re.sub("-", "_", file.read_text()), f"{path.name}: {script} {option}"


@each_document
def test_options_by_themselves_exist(path: Path) -> None:
    """`--seed 1` in a sentence belongs to some command of keeplora, or to a benchmark or script."""
    known = frozenset().union(*(options(name) for name in COMMANDS))
    sources = [
        *(ROOT / "benchmarks").glob("*.py"),
        *(ROOT / "studies").glob("*.py"),
        ROOT / "scripts/test.sh",
    ]
    text = "\n".join(source.read_text() for source in sources)
    for code in in_code(current(path)):
        for option in re.findall(r"--[\w.-]+", code) if code.startswith("--") else ():
            assert normal(option) in known or option in text, f"{path.name}: {option}"


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_the_help_stand_on_lines_of_their_own(name: str) -> None:
    """Indented, so that neither the help nor the pages of the API run them together."""
    text = importlib.import_module(f"mllm_keeplora.commands.{name}").__doc__ or ""
    lines = re.sub(r"`[^`]*`", "", text).splitlines()[1:]
    examples = [line for line in lines if "keeplora " in line]
    assert examples
    assert all(line.startswith("    ") and line.count("keeplora ") == 1 for line in examples)


def test_the_commands_are_all_in_the_documents() -> None:
    text = "".join(path.read_text() for path in DOCUMENTS)
    named = {name for name, _ in keeplora_commands(text)}
    assert set(COMMANDS) <= named


# How they are written


@each_document
def test_no_document_names_a_place_of_one_machine(path: Path) -> None:
    assert not re.search(r"(?<![\w.])/(?:work|root|home|opt|tmp)/", path.read_text())


@each_document
def test_lines_are_short(path: Path) -> None:
    """Tables cannot be broken, and neither can lines of JSON."""
    text = re.sub(r"^```json\n.*?^```", "", path.read_text(), flags=re.S | re.M)
    long = [line for line in text.splitlines() if len(line) > LONGEST_LINE and not line.lstrip().startswith("|")]
    assert not long, f"{path.name}: {long[0]}"


# The examples of CONTRIBUTING.md


def test_the_diffs_apply(tmp_path: Path) -> None:
    assert len(diffs()) == 3
    for number, diff in enumerate(diffs()):
        [file] = re.findall(r"^\+\+\+ b/(\S+)", diff, flags=re.M)  # one file each
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, tmp_path / file)
        (tmp_path / f"{number}.diff").write_text(diff)
        subprocess.run(["git", "apply", f"{number}.diff"], cwd=tmp_path, check=True)
        if file.endswith(".py"):
            compile((tmp_path / file).read_text(), file, "exec")


# The site


def test_the_architecture_page_has_the_layers_of_the_test() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    [table] = re.findall(r"^\| layer \|.*?\n\n", text, flags=re.S | re.M)
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.M) == [*reversed(LAYERS)]


PACKAGES = {path.parent.name for path in (ROOT / "mllm_keeplora").glob("*/__init__.py")}
BESIDE = {"recipes", "studies", "eval"}  # folders of the repository that travel as packages
FILES_THAT_COUNT = {"config"}  # other files beside the packages are a few lines each


def test_the_picture_has_the_packages_in_the_order_of_the_test() -> None:
    picture = (ROOT / "docs/pictures/layers.svg").read_text()
    shown = [layer for layer in reversed(LAYERS) if layer in PACKAGES | BESIDE | FILES_THAT_COUNT]
    assert re.findall(r'class="name"[^>]*>(\w+)<', picture) == shown


def test_every_package_has_a_page_of_its_api() -> None:
    pages = list((ROOT / "docs/api").glob("*.md"))
    assert {page.stem for page in pages} == PACKAGES | FILES_THAT_COUNT
    assert all(f"::: mllm_keeplora.{page.stem}\n" in page.read_text() for page in pages)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors."""
    pytest.importorskip("mkdocs", reason="the site needs mkdocs-material and mkdocstrings, which `.[dev]` has")
    pytest.importorskip("mkdocstrings_handlers.python", reason="mkdocstrings[python] is not installed")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_builds_and_shows_the_stage(site: Path) -> None:
    page = (site / "architecture/index.html").read_text()
    assert "check_no_leakage" in re.sub(r"<[^>]+>", "", page)
    assert "run_stage" in (site / "api/continual/index.html").read_text()


def test_the_site_fetches_nothing(site: Path) -> None:
    """Neither scripts nor styles nor pictures nor fonts come from elsewhere."""
    for page in site.rglob("*.html"):
        text = page.read_text()
        fetched = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(https?:[^\"\s>]+)", text)
        fetched += re.findall(r"<link[^>]+href=\"?(https?:[^\"\s>]+)", text)
        assert not fetched, f"{page.relative_to(site)}: {fetched[0]}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_hold_no_html(path: Path) -> None:
    """The pages of the API would swallow `<task>`: it belongs between backticks, or into an indented example."""
    tree = ast.parse(path.read_text())
    texts = [re.sub(r"^    .*$", "", ast.get_docstring(tree) or "", flags=re.M)]
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef))
    texts += [ast.get_docstring(node) or "" for node in nodes]
    for text in texts:
        assert not re.search(r"<[A-Za-z_]+>", re.sub(r"`[^`]*`", "", text)), text


# Files for other tools


def test_the_citation_names_both_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    papers = {paper["identifiers"][0]["value"] for paper in citation["references"]}
    assert papers == {"arXiv:2606.16256", "arXiv:2601.19659"}
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert version and citation["version"] == version[1]


def test_the_workflow_runs_the_command_of_a_developer() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    job = workflow["jobs"]["tests"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert job["steps"][-1] == {"run": "bash scripts/test.sh"}
    assert "${{ secrets" not in (ROOT / ".github/workflows/tests.yml").read_text()


def test_the_hooks_check_what_the_tests_check() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    tests = (ROOT / "scripts/test.sh").read_text()
    for hook in hooks:
        [tool] = re.findall(r"-m (ruff check|ruff format --check|mypy)", hook["entry"])
        assert f'"$PYTHON" -m {tool}' in tests
    assert len(hooks) == 3
