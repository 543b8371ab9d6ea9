"""Small copies of the published streams in their exact layouts on disk: folders, file names, keys of records.

One function a benchmark. Images and clips are drawn; questions, answers and ids are made up in the
benchmark's manner, with the suffixes where the published files have them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.clips import moving_frames, write_clip

TRAIN, TEST = 6, 4
ONE_WORD = "\nAnswer the question using a single word or phrase."
THINK_FIRST = " Think first, then answer in <answer> tags."
LETTER = "\nAnswer with the option's letter from the given choices directly."

Records = list[dict[str, Any]]


def write_mllm_dcl(root: Path) -> None:
    """RS, Med, AD, Sci, Fin: `<task>/{images/, train.json, test.json}`."""
    answers = {
        "RS": ["yes", "commercial area"],
        "Med": ["liver", "in the lung"],
        "AD": ["stop", "turn left"],
        "Sci": ["B", "Ohio, Texas"],
        "Fin": ["Yes", "A"],
    }
    for task, pair in answers.items():
        folder = root / task
        # Sci is scored by what an image's name begins with.
        prefix = ["AI2D_", "MapQA_"] if task == "Sci" else [""]
        names = [f"images/{prefix[n % len(prefix)]}{task.lower()}_{n}.png" for n in range(TRAIN + TEST)]
        _draw(folder, names)
        question = "Which states are shown?" if task == "Sci" else f"What is asked in {task}?"
        _dump(folder / "train.json", _training(names[:TRAIN], question, pair))
        _dump(folder / "test.json", _tests(names[TRAIN:], question, pair))


def write_mllm_acl(root: Path) -> None:
    """OCR, Math, VP, APP: training in `<task>`, tests in `<task>_test`, each with images of its own."""
    extra: dict[str, list[dict[str, Any]]] = {
        "OCR": [{"answer_type": "Scene Text-centric VQA"}, {"answer_type": "Regular Text Recognition"}],
        "VP": [{"type": "2D", "task": "Count"}, {"type": "3D", "task": "Depth"}],
    }
    answers: dict[str, list[Any]] = {"OCR": [["open", "OPEN"], ["7 up"]], "Math": ["3", "4.5"]}
    ids = {"Math": "testmini_{}", "APP": "ALL_{}"}
    for task in ("OCR", "Math", "VP", "APP"):
        names = [f"images/{n}.png" for n in range(TRAIN)]
        _draw(root / task, names)
        _draw(root / f"{task}_test", names[:TEST])
        question = f"What does {task} ask?"
        _dump(root / task / "train.json", _training(names, question, ["A", "B"]))
        tests = _tests(names[:TEST], question + " (test)", answers.get(task, ["A", "B"]))
        for n, record in enumerate(tests):
            record["question_id"] = ids.get(task, "{}").format(n)
            record.update(extra.get(task, [{}])[n % len(extra.get(task, [{}]))])
        _dump(root / f"{task}_test" / "test.json", tests)


def write_ucit(root: Path) -> None:
    """Six tasks: `instructions/<folder>/`, images under `datasets/`, COCO captions for two of them."""
    files = {
        "ImageNet-R": ("train", "ImageNet-R/{split}/{n}.png", "What is the object in the image?" + ONE_WORD),
        "ArxivQA": ("train_4w", "ArxivQA/images/{split}{n}.png", "Which curve is higher?" + LETTER),
        "VizWiz": ("train", "VizWiz/{split}/{n}.png", "Describe the image briefly."),
        "IconQA": ("train", "IconQA/iconqa_data/iconqa/{split}{n}.png", "How many are there?" + ONE_WORD),
        "CLEVR": ("train_4w", "CLEVR/images/{split}/{n}.png", "How many cubes are left?" + ONE_WORD),
        "Flickr30k": ("train_brief_4w", "Flickr30k/{split}/{n}.png", "Describe the image briefly."),
    }
    for folder, (train, pattern, question) in files.items():
        shown = [pattern.format(split="train", n=n) for n in range(TRAIN)]
        asked = [pattern.format(split="val", n=n) for n in range(TEST)]
        _draw(root / "datasets", [*shown, *asked])
        caption = folder in ("VizWiz", "Flickr30k")
        answers = ["a dog on grass", "two men at a table"] if caption else ["A", "3"]
        into = root / "instructions" / folder
        _dump(into / f"{train}.json", _training(shown, question, answers))
        _dump(into / "test_3000.json", _tests(asked, question, answers))
        if caption:
            numbers = range(1, TEST + 1)
            notes = [
                {"id": 2 * n + k, "image_id": n, "caption": f"{answers[n % 2]} {k}"} for n in numbers for k in (0, 1)
            ]
            _dump(
                into / "val_coco_type_3000.json",
                {"images": [{"id": n} for n in numbers], "annotations": notes},
            )


def write_coin(root: Path) -> None:
    """Eight tasks: `Instructions_Original/<folder>/`, images under `cl_dataset/`; tests are test or val."""
    images = {
        "ScienceQA": "ScienceQA/images/{split}/{n}/image.png",
        "TextVQA": "TextVQA/train_images/{split}{n}.png",
        "ImageNet": "ImageNet_withlabel/{split}/n0144/{n}.png",
        "GQA": "GQA/images/{split}{n}.png",
        "VizWiz": "VizWiz/{split}/{n}.png",
        "Grounding": "COCO2014/train2014/{split}{n}.png",
        "VQAv2": "COCO2014/{split}2014/v{n}.png",
        "OCRVQA": "OCR-VQA/images/{split}{n}.png",
    }
    own = {"ScienceQA": ["A", "B"], "Grounding": ["[0.1,0.2,0.5,0.6]"], "ImageNet": ["tench", "cock"]}
    for folder, pattern in images.items():
        test = "val" if folder in ("TextVQA", "VizWiz", "VQAv2") else "test"
        shown = [pattern.format(split="train", n=n) for n in range(TRAIN)]
        asked = [pattern.format(split=test, n=n) for n in range(TEST)]
        _draw(root / "cl_dataset", [*shown, *asked])
        question = f"What is asked in {folder}?" + (LETTER if folder == "ScienceQA" else ONE_WORD)
        answers = own.get(folder, ["yes", "two"])
        train, tests = _training(shown, question, answers), _tests(asked, question, answers)
        for n, record in enumerate(tests):
            if folder == "ScienceQA" and n % 2:
                del record["image"]  # a question of text alone
                record["text"] = f"{n}. {record['text']}"
            if folder == "Grounding":
                record["answer_bbox"], record["size"] = record.pop("answer"), [32, 32]
        if folder == "ScienceQA":
            # Not the first: a probe of one sample takes that, and the vision tower needs an image.
            del train[2]["image"]
            train[2]["conversations"][0]["value"] = f"Without an image? {question}"
        into = root / "Instructions_Original" / folder
        _dump(into / "train.json", train)
        _dump(into / f"{test}.json", tests)
        if folder == "TextVQA":
            data = [{"question_id": r["question_id"], "answers": [r["answer"]] * 10} for r in tests]
            _dump(root / "cl_dataset" / "TextVQA" / "TextVQA_0.5.1_val.json", {"data": data})


def write_cl_vista(root: Path) -> None:
    """Eight tasks: questions and answers apart, clips named from the data root, in tests without a suffix."""
    rows = ("json_row/train_data_30k", "json_row/test_questions_2k", "json_row/test_answers_2k")
    own = {
        "Counting": ("json_row/train_data_20k", *rows[1:]),
        "Space": ("json_row/train_30k", *rows[1:]),
        "Movie": (
            "train_json_row/movie_train_subtitle_30k",
            "test_json_row/test_question_2k",
            "test_json_row/test_answer_2k",
        ),
        "STAR": ("json_row/train_data_25k", *rows[1:]),
    }
    for task in ("Counting", "Space", "Traffic", "Movie", "GUI", "Science", "Sports", "STAR"):
        clips = [f"{task}/videos/{n}" for n in range(3)]
        for n, clip in enumerate(clips):
            (root / clip).parent.mkdir(parents=True, exist_ok=True)
            write_clip(root / f"{clip}.mp4", moving_frames(9, height=32, width=32, seed=n))
        train, questions, answers = own.get(task, rows)
        question = f"What happens in {task}?"
        records = _training([f"{clip}.mp4" for clip in clips[:2]] * 2, question, ["yes", "a car", "no", "two"])
        for n, record in enumerate(records):
            record["video"] = record.pop("image")
            record["conversations"][0]["value"] = f"<video>\n{n}. {question}"
        _dump(root / task / f"{train}.json", records)
        tests = range(TEST)
        _dump(
            root / task / f"{questions}.json",
            [{"video_name": clips[2], "question": f"{n}. {question}", "question_id": n} for n in tests],
        )
        _dump(root / task / f"{answers}.json", [{"answer": "yes", "question_id": n} for n in tests])


def write_mllm_ctbench(root: Path) -> None:
    """Seven tasks: `reasoning_{train,test}/<task>.json` of `problem` and `solution`, images under `images/`; fomc and
    numglue have none. Training solutions are thoughts and an answer, test solutions the answer alone."""
    answers = {
        "art": ["Rembrandt van Rijn", "a church"],
        "OCR": ["Total: $12.50", "open"],
        "fomc": ["A", "C"],
        "science": ["B", "D"],
        "numglue": ["12", "0.5"],
        "math": ["B", "145", "yes"],
        "medical": ["left upper lobe", "no fracture"],
    }
    for task, pair in answers.items():
        names = [f"{task}_vqa_datasets/{task.upper()}/{n}.jpg" for n in range(TRAIN + TEST)]
        taught, problem = f"What does {task} teach?{THINK_FIRST}", f"What does {task} ask?{THINK_FIRST}"
        train = [{"problem": f"{n}. {taught}", "solution": thought(pair[n % len(pair)])} for n in range(TRAIN)]
        tests = [
            {"question_id": f"{task}_{n}", "problem": f"{n}. {problem}", "solution": pair[n % len(pair)]}
            for n in range(TEST)
        ]
        if task not in ("fomc", "numglue"):
            _draw(root / "images", names)
            for record, name in zip([*train, *tests], names, strict=True):
                record["image"] = name
        _dump(root / "reasoning_train" / f"{task}.json", train)
        _dump(root / "reasoning_test" / f"{task}.json", tests)


def thought(answer: str) -> str:
    return f"<think> I look, and so it is {answer}. </think><answer>{answer}</answer>"


def write_trigap(root: Path) -> None:
    """Ten tasks: `instructions/<task>/`, images under `datasets/`; of two tasks a question may have several answers."""
    standard, converted = ("train_standard_4w", "test_standard_3k"), ("train_converted", "val_converted")
    files = {
        "PMCVQA": standard,
        "DocVQA": converted,
        "ChartQA": standard,
        "IconQA": ("train", "test_3000"),
        "InfographicVQA": tuple(f"infographicsVQA_{name}" for name in converted),
        "ArxivQA": ("train_4w", "test_3000"),
        "Roadside": standard,
        "ChemVQA": standard,
        "FloodNetVQA": standard,
        "CLEVR": ("train_4w", "test_3000"),
    }
    for task, (train, test) in files.items():
        shown = [f"{task}/images/train{n}.png" for n in range(TRAIN)]
        asked = [f"{task}/images/test{n}.png" for n in range(TEST)]
        _draw(root / "datasets", [*shown, *asked])
        question = f"What is asked in {task}?" + ONE_WORD
        several: list[Any] = [["12 May", "May 12"], "Acme Corp"]
        _dump(root / "instructions" / task / f"{train}.json", _training(shown, question, ["A", "3"]))
        tests = _tests(asked, question, several if task in ("DocVQA", "InfographicVQA") else ["A", "3"])
        _dump(root / "instructions" / task / f"{test}.json", tests)


def write_continual_next(root: Path) -> None:
    """Fifteen tasks: `<task>/{train,test}.json`, both conversations; TextVQA's tests list ten answers as text. Which
    tasks are of text alone, and where images lie, is made up."""
    tasks = "ArxivQA GeoChat IconQA ClevrMath CodeQA ImageNet Flickr30k DocVQA TextVQA MathQA ChartQA PathVQA"
    for task in (*tasks.split(), "Grounding", "ScienceQA", "WikiQA"):
        names = [f"{task}/images/{n}.png" for n in range(TRAIN + TEST)]
        answers = ["[0.1, 0.2, 0.5, 0.6]"] if task == "Grounding" else ["A", "two"]
        train = _training(names[:TRAIN], f"What does {task} teach?{ONE_WORD}", answers)
        tests = _training(names[TRAIN:], f"What does {task} ask?{ONE_WORD}", answers)
        if task == "TextVQA":
            for record in tests:
                record["conversations"][1]["value"] = str(["two"] * 9 + ["2"])
        if task in ("CodeQA", "MathQA", "WikiQA"):
            for n, record in enumerate([*train, *tests]):
                del record["image"]
                question = record["conversations"][0]["value"].removeprefix("<image>\n")
                record["conversations"][0]["value"] = f"{n}. {question}"
        else:
            _draw(root, names)
        _dump(root / task / "train.json", train)
        _dump(root / task / "test.json", tests)


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "mllm_dcl": write_mllm_dcl,
    "mllm_acl": write_mllm_acl,
    "ucit": write_ucit,
    "coin": write_coin,
    "cl_vista": write_cl_vista,
    "mllm_ctbench": write_mllm_ctbench,
    "trigap": write_trigap,
    "continual_next": write_continual_next,
}


def _training(images: list[str], question: str, answers: list[str]) -> Records:
    return [
        {
            "id": f"{n:06}",
            "image": image,
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answers[n % len(answers)]},
            ],
        }
        for n, image in enumerate(images)
    ]


def _tests(images: list[str], question: str, answers: list[Any]) -> Records:
    return [
        {"question_id": str(n), "image": image, "text": question, "answer": answers[n % len(answers)]}
        for n, image in enumerate(images)
    ]


def _draw(folder: Path, names: list[str]) -> None:
    for n, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(n).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


def _dump(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
