"""The published streams: their YAMLs on small copies in their own layouts, from the checker to the recipe."""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm_keeplora.config import VideoConfig
from mllm_keeplora.data.preflight import Preflight
from mllm_keeplora.data.records import read_records
from mllm_keeplora.data.stream import Stream, load_stream
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.evaluation.task_files import scored_tasks, write_task_files
from mllm_keeplora.planning.check_stream import Problem, check_stream
from tests.clips import cut
from tests.conversations import read_copy, turns_of
from tests.forked import run
from tests.modules.tiny_families import save_tiny
from tests.recipes.published import LAYOUTS, LETTER, ONE_WORD, TEST, THINK_FIRST, TRAIN

ROOT = Path(__file__).resolve().parents[2]
VIDEO = ("cl_vista",)
FIN_YES = " Only answer with yes or no directly."
FIN_LETTER = " Answer with the given letter directly, e.g., A, B, C, D."

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="captions' METEOR is a Java program")
every_stream = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs_java] if name == "ucit" else []) for name in LAYOUTS]
)


@pytest.fixture(scope="session")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small copy of each benchmark. Tests leave them as they are."""
    folder = tmp_path_factory.mktemp("published")
    for name, write in LAYOUTS.items():
        write(folder / name)
    return {name: folder / name for name in LAYOUTS}


def load(name: str, root: Path) -> Stream:
    return load_stream(ROOT / "recipes" / "streams" / f"{name}.yaml", root)


def problems(name: str, root: Path) -> tuple[Problem, ...]:
    stream = load_stream(ROOT / "recipes" / "streams" / f"{name}.yaml", root, check_files=False)
    return check_stream(stream, Preflight(VideoReader(VideoConfig(), None))).problems


@every_stream
def test_a_stream_finds_its_files_and_the_checker_nothing(name: str, roots: dict[str, Path]) -> None:
    stream = load(name, roots[name])
    assert stream.name == name
    assert stream.hub is not None
    assert problems(name, roots[name]) == ()


ORDERS = {
    "mllm_dcl": "RS Med AD Sci Fin",
    "mllm_acl": "OCR Math VP APP",
    "ucit": "ImageNet-R ArxivQA VizWiz IconQA CLEVR-Math Flickr30k",
    "coin": "ScienceQA TextVQA ImageNet GQA VizWiz Grounding VQAv2 OCR-VQA",
    "cl_vista": "Counting Space Traffic Movie GUI Science Sports STAR",
    "mllm_ctbench": "art OCR fomc science numglue math medical",
    "trigap": "PMCVQA DocVQA ChartQA IconQA InfographicVQA ArxivQA Roadside ChemVQA FloodNetVQA CLEVR",
    "continual_next": (
        "ArxivQA GeoChat IconQA ClevrMath CodeQA ImageNet Flickr30k DocVQA TextVQA MathQA ChartQA PathVQA Grounding "
        "ScienceQA WikiQA"
    ),
}
LENGTHS = {
    "mllm_dcl": [128] * 5,
    "mllm_acl": [2048, 2048, 64, 128],
    "ucit": [1024] * 6,
    "coin": [1024, 128, 1024, 128, 128, 1024, 1024, 128],
    "cl_vista": [256] * 8,
    "mllm_ctbench": [1024] * 7,
    "trigap": [128] * 10,
    "continual_next": [1024] * 15,
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_published_order_and_lengths(name: str, roots: dict[str, Path]) -> None:
    stream = load(name, roots[name])
    assert [task.name for task in stream.tasks] == ORDERS[name].split()
    assert [task.max_new_tokens for task in stream.tasks] == LENGTHS[name]


def _edit(path: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))


def _copy_first_training_record(root: Path) -> None:
    record = json.loads((root / "RS/train.json").read_text())[0]
    question = record["conversations"][0]["value"].removeprefix("<image>\n")
    _edit(root / "RS/test.json", lambda r: r[1].update(image=record["image"], text=question))


FAULTS: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "missing image": (
        "mllm_dcl",
        lambda r: (r / "AD/images/ad_2.png").unlink(),
        "AD",
        "row 3: .*does not exist",
    ),
    "missing image of the test folder": (
        "mllm_acl",
        lambda r: (r / "VP_test/images/1.png").unlink(),
        "VP",
        r"VP_test/test\.json.*row 2: .*does not exist",
    ),
    "truncated image": (
        "ucit",
        lambda r: cut(r / "datasets/CLEVR/images/val/0.png", r / "datasets/CLEVR/images/val/0.png", 0.5),
        "CLEVR-Math",
        "row 1: .*does not decode",
    ),
    "truncated clip": (
        "cl_vista",
        lambda r: cut(r / "STAR/videos/0.mp4", r / "STAR/videos/0.mp4", 0.5),
        "STAR",
        r"row 1: video .*STAR/videos/0\.mp4",
    ),
    "missing clip of a test": (
        "cl_vista",
        lambda r: (r / "Movie/videos/2.mp4").unlink(),
        "Movie",
        "4 of 4 records.*row 1: .*does not exist",
    ),
    "duplicate id": (
        "coin",
        lambda r: _edit(r / "Instructions_Original/GQA/test.json", lambda x: x[1].update(question_id="0")),
        "GQA",
        "row 2 repeats row 1",
    ),
    "empty answer": (
        "cl_vista",
        lambda r: _edit(r / "GUI/json_row/test_answers_2k.json", lambda x: x[3].update(answer="")),
        "GUI",
        "row 4: no answer",
    ),
    "overlap": ("mllm_dcl", _copy_first_training_record, "RS", "row 2 of the test is row 1 of the training"),
    "unequal answers": (
        "cl_vista",
        lambda r: _edit(r / "Movie/test_json_row/test_answer_2k.json", list.pop),
        "Movie",
        "has 4 questions, .* has 3 answers",
    ),
    "wrong key": (
        "coin",
        lambda r: _edit(
            r / "Instructions_Original/Grounding/test.json",
            lambda x: x[0].update(bbox=x[0].pop("answer_bbox")),
        ),
        "Grounding",
        "row 1: no answer",
    ),
    "missing key of the metric": (
        "mllm_acl",
        lambda r: _edit(r / "OCR_test/test.json", lambda x: x[1].pop("answer_type")),
        "OCR",
        "row 2 of .* has no answer_type",
    ),
    "captions of another split": (
        "ucit",
        lambda r: _edit(r / "instructions/VizWiz/test_3000.json", list.pop),
        "VizWiz",
        r"has 3 records, so .* has to caption the images 1\.\.3",
    ),
    "answers of another split": (
        "coin",
        lambda r: _edit(r / "Instructions_Original/TextVQA/val.json", lambda x: x[1].update(question_id="x9")),
        "TextVQA",
        "has no answers to 1 of the 4 questions",
    ),
    "missing image of a thought": (
        "mllm_ctbench",
        lambda r: (r / "images/math_vqa_datasets/MATH/7.jpg").unlink(),
        "math",
        r"reasoning_test/math\.json.*row 2: .*does not exist",
    ),
    "missing solution": (
        "mllm_ctbench",
        lambda r: _edit(r / "reasoning_test/fomc.json", lambda x: x[2].pop("solution")),
        "fomc",
        "row 3: no answer: none of 'solution'",
    ),
    "overlap of texts": (
        "mllm_ctbench",
        lambda r: _edit(
            r / "reasoning_test/numglue.json",
            lambda x: x[1].update(problem=f"4. What does numglue teach?{THINK_FIRST}"),
        ),
        "numglue",
        "row 2 of the test is row 5 of the training",
    ),
    "other answers beside the answer": (
        "trigap",
        lambda r: _edit(r / "instructions/DocVQA/val_converted.json", lambda x: x[1].update(answers=["Acme", "ACME"])),
        "DocVQA",
        "row 2 of .* has 'answers' beside 'answer'",
    ),
    "no picture in a question that shows one": (
        "continual_next",
        lambda r: _edit(r / "GeoChat/test.json", lambda x: x[1].pop("image")),
        "GeoChat",
        "row 2: no image although the question has <image>",
    ),
    "text alone": (
        "mllm_dcl",
        lambda r: _edit(r / "Med/train.json", lambda x: x[0].pop("image")),
        "Med",
        "row 1: no image although",
    ),
}


@pytest.mark.parametrize("name, plant, task, message", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(
    name: str,
    plant: Callable[[Path], object],
    task: str,
    message: str,
    roots: dict[str, Path],
    tmp_path: Path,
) -> None:
    if name == "ucit" and shutil.which("java") is None:
        pytest.skip("captions' METEOR is a Java program")
    root = tmp_path / name
    shutil.copytree(roots[name], root)
    plant(root)
    (problem,) = problems(name, root)
    assert problem.task == task
    text = "\n".join((problem.title, *problem.details))
    assert re.search(message, text, flags=re.DOTALL), text


# The words of the first training question, and of the test questions, as they enter the chat template.
PROMPTS: dict[str, dict[str, tuple[str, set[str]]]] = {
    "mllm_dcl": {
        "RS": ("What is asked in RS?", {"What is asked in RS?"}),
        "Med": (
            "What is asked in Med?",
            {"What is asked in Med? Answer the question with a single word (or phrase)."},
        ),
        "AD": ("What is asked in AD?", {"What is asked in AD?"}),
        "Sci": ("Which states are shown?", {"Which states are shown?"}),
        # Answered Yes and A in turn.
        "Fin": (
            "What is asked in Fin?",
            {f"What is asked in Fin?{FIN_YES}", f"What is asked in Fin?{FIN_LETTER}"},
        ),
    },
    "mllm_acl": {
        task: (f"What does {task} ask?", {f"What does {task} ask? (test)"}) for task in ("OCR", "Math", "VP", "APP")
    },
    "ucit": {
        task: (question, {question})
        for task, question in {
            "ImageNet-R": "What is the object in the image?" + ONE_WORD,
            "ArxivQA": "Which curve is higher?" + LETTER,
            "VizWiz": "Describe the image briefly.",
            "IconQA": "How many are there?" + ONE_WORD,
            "CLEVR-Math": "How many cubes are left?" + ONE_WORD,
            "Flickr30k": "Describe the image briefly.",
        }.items()
    },
    "coin": {
        "ScienceQA": (
            f"What is asked in ScienceQA?{LETTER}",
            {f"{number}What is asked in ScienceQA?{LETTER}" for number in ("", "1. ", "3. ")},
        ),
        **{
            task: (f"What is asked in {folder}?{ONE_WORD}", {f"What is asked in {folder}?{ONE_WORD}"})
            for task, folder in {
                **{name: name for name in ("TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2")},
                "OCR-VQA": "OCRVQA",
            }.items()
        },
    },
    "cl_vista": {
        task: (f"0. What happens in {task}?", {f"{n}. What happens in {task}?" for n in range(TEST)})
        for task in ("Counting", "Space", "Traffic", "Movie", "GUI", "Science", "Sports", "STAR")
    },
    "mllm_ctbench": {
        task: (
            f"0. What does {task} teach?{THINK_FIRST}",
            {f"{n}. What does {task} ask?{THINK_FIRST}" for n in range(TEST)},
        )
        for task in ORDERS["mllm_ctbench"].split()
    },
    "trigap": {
        task: (f"What is asked in {task}?{ONE_WORD}", {f"What is asked in {task}?{ONE_WORD}"})
        for task in ORDERS["trigap"].split()
    },
    "continual_next": {
        task: (f"What does {task} teach?{ONE_WORD}", {f"What does {task} ask?{ONE_WORD}"})
        for task in ORDERS["continual_next"].split()
        if task not in ("CodeQA", "MathQA", "WikiQA")
    }
    | {
        task: (
            f"0. What does {task} teach?{ONE_WORD}",
            {f"{n}. What does {task} ask?{ONE_WORD}" for n in range(TRAIN, TRAIN + TEST)},
        )
        for task in ("CodeQA", "MathQA", "WikiQA")
    },
}


@every_stream
def test_the_words_that_reach_the_chat_template(name: str, roots: dict[str, Path], tmp_path: Path) -> None:
    stream = load(name, roots[name])
    write_task_files(stream, tmp_path)
    found = {}
    for spec, entry in zip(stream.tasks, scored_tasks(stream), strict=False):
        samples, _ = read_records(
            stream.train_file(spec),
            stream.media_root(spec),
            prompt_suffix=spec.prompt_suffix,
            allow_text_only=spec.allow_text_only,
        )
        task = yaml.safe_load((tmp_path / f"{entry.lmms_task}.yaml").read_text())
        found[spec.name] = (turns_of(samples[1])[0].question, _asked(task))
    assert found == PROMPTS[name]


def _asked(task: dict[str, Any]) -> set[str]:
    """The text of every test question's message, by the function that lmms-eval calls."""
    messages = _scoring().doc_to_messages
    texts = set()
    for record in read_copy(task):
        (message,) = messages(record)
        *media, text = message["content"]
        assert len(media) == bool(record.get("image") or record.get("video"))
        texts.add(text["text"])
    return texts


def _scoring() -> Any:
    found = importlib.util.spec_from_file_location("published_utils", ROOT / "eval" / "tasks" / "utils.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


RECIPES = {
    "mllm_dcl": "vqa/llava15_7b_dcl",
    "mllm_acl": "vqa/llava15_7b_acl",
    "ucit": "vqa/llava15_7b_ucit",
    "coin": "vqa/llava15_7b_coin",
    "cl_vista": "video/llava_next_video_7b_cl_vista",
    "mllm_ctbench": "vqa/llava15_7b_ctbench",
    "trigap": "vqa/llava15_7b_trigap",
    "continual_next": "vqa/llava15_7b_next",
}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "name",
    [
        "cl_vista",
        pytest.param("mllm_acl", marks=pytest.mark.slow),
        pytest.param("mllm_dcl", marks=pytest.mark.slow),
        pytest.param("ucit", marks=[needs_java, pytest.mark.slow]),
        pytest.param("coin", marks=pytest.mark.slow),
        pytest.param("mllm_ctbench", marks=pytest.mark.slow),
        pytest.param("trigap", marks=pytest.mark.slow),
        pytest.param("continual_next", marks=pytest.mark.slow),
    ],
)
def test_the_recipe_runs_the_stream_to_its_report(name: str, roots: dict[str, Path], tmp_path: Path) -> None:
    """The shipped recipe and stream on a small model; without the general benchmarks, whose data would need a
    download, and with short replies: a small model goes on to the end of the published lengths."""
    stream = yaml.safe_load((ROOT / "recipes" / "streams" / f"{name}.yaml").read_text())
    del stream["general"]
    for task in stream["tasks"]:
        task["max_new_tokens"] = 8
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(stream, sort_keys=False))
    model = "recipes/small/vqa_base"
    if name in VIDEO:
        model = str(tmp_path / "model")
        save_tiny("llava_next_video", tmp_path / "model")
    settings = {
        "config": f"recipes/configs/{RECIPES[name]}.yaml",
        "run_dir": tmp_path / "run",
        "cache_dir": tmp_path / "cache",
        "stream": path,
        "data_root": roots[name],
        "model.base_model": model,
        "model.device": "cpu",
        "model.compute_dtype": "float32",
        "train.max_steps": 1,
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 1,
        "train.dataloader_num_workers": 0,
        "video.cache_gb": 1,
        "probe.max_samples": 2,
        "language.rank": 2,
        "vision.rank": 2,
        "evaluation.limit": 2,
    }
    options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    done = run([f"recipes/{'video' if name in VIDEO else 'vqa'}.py", *options])
    assert done.returncode == 0, done.stderr[-3000:]
    retention = json.loads((tmp_path / "run" / "retention.json").read_text())
    tasks = ORDERS[name].split()
    assert retention["tasks"] == tasks
    assert [row["task"] for row in retention["rows"]] == [None, *tasks]
    assert all(row["scores"][task]["n"] == 2 for row in retention["rows"] for task in tasks)
