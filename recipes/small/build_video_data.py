"""Writes the small video stream: H.264 files and JSON in the layout of CL-VISTA.

    python -m mllm_keeplora.recipes.small.build_video_data --out data/small_video

    <out>/{drift,lamps,beacons,race}/json_row/train_data.json     conversations of several turns each
    <out>/<task>/json_row/{test_questions,test_answers}.json      single questions, paired by position
    <out>/<task>/videos/{train,test}/*.mp4
    <out>/motions/...                                             the general benchmark has no training half
    <out>/motions/{general.json,videos/general/*.mp4}             general samples: other clips, for `general.samples`

Test questions are balanced over the kinds of question. The same seed writes the same bytes. The folder
appears in one rename, so it is whole or absent.
"""

from pathlib import Path
from typing import Any

import av
import numpy as np
from tqdm import tqdm

from mllm_keeplora.recipes.small import draw_video
from mllm_keeplora.recipes.small.build_vqa_data import (
    SEED,
    Draw,
    build_command,
    conversation,
    digit_drawer,
    generator,
    pick_question,
    progress_bar,
    unnumbered,
    write_json,
)
from mllm_keeplora.recipes.small.draw import Question
from mllm_keeplora.recipes.small.draw_video import Clip, Pixels

TRAIN_CLIPS = 1000  # a task
TEST_QUESTIONS = 200  # a task
GENERAL_QUESTIONS = 304  # a multiple of the kinds of question
GENERAL_SAMPLES = 256


def main() -> None:
    build_command(__doc__, Path("data/small_video"), write_all)


def write_mp4(path: Path, frames: Pixels) -> None:
    """Encodes frames [n, height, width, 3] as H.264, the same frames to the same bytes.

    Hence one thread, and no macroblock tree: with it about one clip in ten came out different now and then.
    """
    with av.open(str(path), "w") as container:
        options = {"crf": "8", "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=8, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def read_mp4(path: Path) -> Pixels:
    """All frames of a file, [n, height, width, 3]."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames)


def write_all(root: Path, seed: int = SEED) -> None:
    """Writes the whole stream into an empty folder."""
    halves: list[tuple[str, str, Draw[Clip], int]] = [
        ("motions", "test", draw_video.asked_scene, GENERAL_QUESTIONS),
        ("motions", "general", draw_video.asked_scene, GENERAL_SAMPLES),
        ("drift", "train", digit_drawer(draw_video.drift, seed, offset=0), TRAIN_CLIPS),
        ("drift", "test", digit_drawer(draw_video.drift, seed, offset=TRAIN_CLIPS), TEST_QUESTIONS),
    ]
    for name, function in draw_video.DOMAINS.items():
        drawer = unnumbered(function)
        halves += [(name, "train", drawer, TRAIN_CLIPS), (name, "test", drawer, TEST_QUESTIONS)]
    with progress_bar(sum(count for *_, count in halves), "clip") as progress:
        for task, half, drawer, count in halves:
            rng = generator(seed, f"{task}/{half}")
            questions = _write_clips(root / task / "videos" / half, drawer, count, rng, progress)
            rows = root / task / "json_row"
            rows.mkdir(exist_ok=True)
            if half == "train":
                write_json(rows / "train_data.json", _conversations(task, "train", questions))
            elif half == "general":
                write_json(root / task / "general.json", _conversations(task, "videos/general", questions))
            else:
                _write_test(rows, questions)


def _write_clips(
    folder: Path, drawer: Draw[Clip], count: int, rng: np.random.Generator, progress: "tqdm[Any]"
) -> list[list[Question]]:
    """Draws and encodes `count` clips; returns what can be asked about each."""
    folder.mkdir(parents=True)
    questions = []
    for index in range(count):
        clip = drawer(rng, index)
        write_mp4(folder / f"{index:05d}.mp4", clip.frames)
        questions.append(clip.questions)
        progress.update()
    return questions


def _conversations(task: str, folder: str, questions: list[list[Question]]) -> list[dict[str, Any]]:
    """What is asked about each clip, in the LLaVA form."""
    return [
        {
            "id": f"{task}-{index:05d}",
            "video": f"{folder}/{index:05d}.mp4",
            "conversations": conversation(asked, "<video>"),
        }
        for index, asked in enumerate(questions)
    ]


def _write_test(folder: Path, questions: list[list[Question]]) -> None:
    """Questions and answers are paired by position; a video's name has no ending there."""
    asked = [pick_question(index, choices) for index, choices in enumerate(questions)]
    records = [
        {"video_name": f"test/{index:05d}", "question": question.text, "question_id": index}
        for index, question in enumerate(asked)
    ]
    write_json(folder / "test_questions.json", records)
    write_json(folder / "test_answers.json", [{"answer": question.answer} for question in asked])


if __name__ == "__main__":
    main()
