"""Reading a run from its directory, whether it is finished or goes on."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from peft import PeftModel
from PIL import Image

from mllm_keeplora.config import RunConfig, config_from_dict
from mllm_keeplora.data.classification import process_pictures
from mllm_keeplora.data.images import load_image
from mllm_keeplora.data.stream import Stream, load_stream
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.evaluation.answer import answer, class_features, inference_state, name_classes
from mllm_keeplora.evaluation.errors import EvaluationError
from mllm_keeplora.evaluation.task_files import classes_of, has_classes
from mllm_keeplora.modeling.loading import load_base
from mllm_keeplora.modeling.saved_adapters import load_adapter
from mllm_keeplora.runs.files import ArtifactError, read_json, read_sealed
from mllm_keeplora.runs.run_directory import RunDirectory


@dataclass(frozen=True)
class SavedRun:
    """What a run has left so far.

    Attributes:
        directory: its files.
        config: its settings, as resolved when it was started last.
    """

    directory: RunDirectory
    config: RunConfig

    @cached_property
    def manifests(self) -> list[dict[str, Any]]:
        """Of the complete stages, the base's row first; read as they are, their hashes are not checked."""
        found = [stage.manifest for stage in self.directory.found_stages()]
        return [read_json(path) for path in found if path.exists()]

    @cached_property
    def retention(self) -> dict[str, Any]:
        """The accuracy matrix and its metrics.

        Raises:
            ArtifactError: the run has not come to its end yet, or the file was edited.
        """
        retention = read_json(self.directory.retention)
        try:
            self._check_rows(retention["rows"])
            if not (retention["rows"] and {"tasks", "general"} <= retention.keys()):
                raise KeyError("an empty or shortened file")
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ArtifactError(
                f"{self.directory.retention} is not what a run writes ({error}); start the run again, which writes it"
            ) from error
        return dict(retention)

    def _check_rows(self, rows: list[dict[str, Any]]) -> None:
        """Scores are those of the stages, which measured them; what was backfilled is in no manifest."""
        for row in rows:
            for name, score in row["scores"].items():
                if score is not None and not _is_score(score):
                    raise ArtifactError(
                        f"{self.directory.retention}: the score of {name} in the row of stage {row['stage']} is "
                        f"{str(score)[:80]}, expected numbers; start the run again, which writes the file anew"
                    )
            if self.edit is not None:  # its scores are of no stage
                continue
            manifest = self.directory.stage(row["stage"], row["task"]).manifest
            measured = read_json(manifest).get("scores", {}) if manifest.exists() else {}
            wrong = [name for name, score in row["scores"].items() if measured.get(name, score) != score]
            if wrong:
                raise ArtifactError(
                    f"{self.directory.retention}: the score of {wrong[0]} in the row of stage {row['stage']} is not "
                    f"that of {manifest}; start the run again, which writes the file anew"
                )

    def guard_note(self) -> str:
        """How far stages were scaled down for `general.budget` (G4), in one sentence; empty without a budget."""
        held = [manifest for manifest in self.manifests if "guard" in manifest]
        if not held:
            return ""
        said = [f"stage {m['stage']} {_scaled(m['guard']['factors'])}" for m in held if min(_factors(m)) < 1]
        budget = f"each stage within {self.config.general.budget:g} nats a {'picture' if self.chooses else 'token'}"
        return f"General ability kept, {budget}: {'; '.join(said) or 'no stage had to be scaled'}."

    @property
    def adapter(self) -> Path:
        """The accumulated adapter.

        Raises:
            ArtifactError: no stage has learnt anything yet.
        """
        if not self.directory.adapter_config.is_file():
            raise ArtifactError(
                f"{self.directory.path} holds no adapter/: name the directory of a run that has learnt a task"
            )
        return self.directory.adapter

    @cached_property
    def edit(self) -> dict[str, Any] | None:
        """How the adapter was made of another run's stages (`keeplora edit`); None for a run of its own.

        Raises:
            ArtifactError: the file was edited.
        """
        file = self.directory.edit
        return read_sealed(file, "make the adapter again") if file.exists() else None

    def stream(self, *, check_files: bool = True) -> Stream:
        """The stream that the run was given; its YAML has to be where it was.

        Args:
            check_files: whether its data have to be there, too.

        Raises:
            StreamError: they are not.
        """
        root = Path(self.config.data_root) if self.config.data_root else None
        return load_stream(Path(self.config.stream), root, check_files=check_files, cache_dir=self.config.cache_dir)

    def reader(self) -> VideoReader:
        """Decodes clips as the run did; nothing is cached."""
        return VideoReader(self.config.video, cache_dir=None)

    @cached_property
    def model(self) -> tuple[PeftModel, Any]:
        """What `load_model` gives, loaded once for this object."""
        return self.load_model()

    def ask(
        self,
        question: str,
        image: Image.Image | str | Path | None = None,
        video: str | Path | None = None,
        max_new_tokens: int = 128,
        task: str | None = None,
    ) -> str:
        """The model's greedy answer, prompted as in training; the model is loaded at the first question.

        Args:
            question: text of the user's turn.
            image: what it is about, opened or as a file.
            video: a clip's file in place of an image, sampled as the run sampled its clips.
            max_new_tokens: longest answer, in tokens.
            task: of the stream; what the stream adds to this task's questions is added. None adds nothing.

        Raises:
            ArtifactError, ConfigError, AdapterError: see `load_model`.
            StreamError: the stream is not where it was, or has no such task.
            KeepLoRAError: a picture or a clip that cannot be read, or a question that cannot be asked this model.
        """
        shown: Any = image
        if video is not None:
            shown = self.reader().read(Path(video))
        elif isinstance(image, str | Path):
            shown = load_image(Path(image))
        suffix = self.stream(check_files=False).question_suffix(task) if task is not None else ""
        model, processor = self.model
        return answer(model, processor, question + suffix, shown, max_new_tokens)

    @property
    def chooses(self) -> bool:
        """Whether the model names the classes of pictures, and writes no text."""
        return has_classes(self.directory.task_files)

    def name_class(self, image: Image.Image | str | Path, task: str | None = None) -> str:
        """The class that is nearest to a picture, as in evaluation; the model is loaded at the first picture.

        Args:
            image: opened or as a file.
            task: task or benchmark of the stream whose classes are chosen from; None where it has one alone.

        Raises:
            EvaluationError: a model that answers in words, or a task that is not one of the stream.
            ArtifactError, ConfigError, AdapterError: see `load_model`.
            ImageError: a picture that cannot be read.
        """
        if not self.chooses:
            raise EvaluationError(f"the model of {self.directory.path} answers in words: ask it a question")
        classes = classes_of(self.directory.task_files, task)
        picture = load_image(Path(image) if isinstance(image, str) else image)
        model, processor = self.model
        with inference_state(model):
            features = class_features(model, processor, classes)
            return name_classes(model, classes, features, process_pictures(processor, [picture]))[0]

    @cached_property
    def matrix(self) -> pd.DataFrame:
        """The accuracy matrix, fractions: a row for each stage, a column for each task and general benchmark.

        Raises:
            ArtifactError: see `retention`.
        """
        retention = self.retention
        names = [*retention["tasks"], *retention["general"]]
        cells = [[(row["scores"].get(name) or {}).get("value") for name in names] for row in retention["rows"]]
        stages = pd.Index([row["task"] or "base" for row in retention["rows"]], name="after")
        return pd.DataFrame(cells, stages, names, dtype=float)

    def load_model(self) -> tuple[PeftModel, Any]:
        """The model as the last stage that has learnt left it, in eval mode, and its processor.

        Raises:
            ArtifactError: no stage has learnt anything yet, or a file of the adapter was changed since.
            ConfigError: the base model cannot be loaded.
            AdapterError: the adapter does not fit the base model.
        """
        adapter = self.adapter
        model, processor = load_base(self.config.model)
        return load_adapter(model, adapter, self.config.model.base_model, may_be_untrained=True), processor


def _factors(manifest: Mapping[str, Any]) -> list[float]:
    return list(manifest["guard"]["factors"].values())


def _scaled(factors: Mapping[str, float]) -> str:
    if not any(factors.values()):
        return "was scaled to 0 and learnt nothing"
    by_tower = [f"{c:.2g} ({tower})" for tower, c in factors.items()]
    one = len(set(factors.values())) == 1
    return f"was scaled to {f'{next(iter(factors.values())):.2g}' if one else ' and '.join(by_tower)}"


def _is_score(score: Any) -> bool:
    """Whether it is as `evaluation.score.Score`."""
    numbers = [score.get(key) for key in ("value", "native", "native_max", "n")]
    return all(type(number) in (int, float) for number in numbers) and type(score.get("stderr")) in (
        *(int, float),
        type(None),
    )


def load_run(path: str | Path) -> SavedRun:
    """Opens a run's directory for reading; no model is loaded.

    Raises:
        ArtifactError: no run has been started there, or its settings cannot be read.
    """
    directory = RunDirectory(Path(path))
    if not directory.config.is_file():
        raise ArtifactError(f"{path} is no directory of a run: it holds no {directory.config.name}{_run_above(path)}")
    settings = read_json(directory.config)
    if isinstance(settings, dict) and "model_type" in settings:  # transformers' own config.json
        raise ArtifactError(
            f"{path} is a model of transformers (as keeplora export writes it), no directory of a run: name the run"
        )
    return SavedRun(directory, config_from_dict(settings, directory.config))


def _run_above(path: str | Path) -> str:
    """Where somebody has named a folder inside a run: which one to name instead."""
    above = [folder for folder in Path(path).absolute().parents[:3] if RunDirectory(folder).task_files.is_dir()]
    return f"; it lies in that of a run: name {above[0]}" if above else ""
