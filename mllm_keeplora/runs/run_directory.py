"""Every file and folder of a run by its one name: who reads or writes a run asks here where things lie.

RUN/
  config.json             the settings, as resolved
  eval_tasks/             lmms-eval task files of the stream
  general/                what the base answered to the general prompts, and how far its inputs are protected
  stages/NN-TASK/         one folder a stage: `StageDirectory`
  adapter/                what all stages have learnt, as one PEFT adapter with a model card
  retention.json          the accuracy matrix and its metrics
  report.html, accuracy_matrix.png, accuracy_matrix.csv
  tensorboard/NN-TASK/    training logs
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ADAPTER_HASHES = "hashes.json"
# Of an adapter's folder, what people may edit: its model card, and the picture in that.
CARD, CARD_PICTURE = "README.md", "accuracy_matrix.png"
CARD_FILES = (CARD, CARD_PICTURE)
# What a phase of a stage leaves: `<stem>.safetensors` for tensors, `<stem>.json` for facts.
PHASE_STEMS = {
    "probe": "lora_a",
    "recall": "recalled",
    "train": "factors",
    "guard": "guard",
    "protect": "feature_basis",
    "rehearse": "rehearsal",
    "evaluate": "evaluation",
}


@dataclass(frozen=True)
class StageDirectory:
    """One stage's files.

    Attributes:
        path: `stages/00-base`, `stages/01-<task>`, ..
    """

    path: Path

    @property
    def manifest(self) -> Path:
        """Written last: a stage is complete when it is there."""
        return self.path / "manifest.json"

    @property
    def record(self) -> Path:
        """What an unfinished stage was begun with, and the hashes and seconds of its finished phases."""
        return self.path / "record.json"

    def tensors(self, phase: str) -> Path:
        """The tensors that a phase leaves."""
        return self.path / f"{PHASE_STEMS[phase]}.safetensors"

    def facts(self, phase: str) -> Path:
        """The facts that a phase leaves."""
        return self.path / f"{PHASE_STEMS[phase]}.json"

    def sidecars(self, phase: str) -> list[Path]:
        """Folders with what a phase leaves beside its tensors and facts."""
        return [self.replies] if phase == "evaluate" else []

    @property
    def checkpoints(self) -> Path:
        """The Trainer's own, while the stage trains."""
        return self.path / "checkpoints"

    @property
    def replies(self) -> Path:
        """Folder of what was asked and replied: one `<task>.jsonl` a task or benchmark."""
        return self.path / "evaluation"

    @property
    def backfill(self) -> Path:
        """Scores that were measured after the stage."""
        return self.path / "backfill.json"

    @property
    def backfilled_replies(self) -> Path:
        """The replies behind them, as in `replies`."""
        return self.path / "backfill"


@dataclass(frozen=True)
class RunDirectory:
    """A run's files.

    Attributes:
        path: the run's `run_dir`.
    """

    path: Path

    @property
    def lock(self) -> Path:
        """Held by the process that runs here."""
        return self.path / ".lock"

    @property
    def config(self) -> Path:
        """The settings."""
        return self.path / "config.json"

    @property
    def task_files(self) -> Path:
        """Folder of the stream's lmms-eval task files."""
        return self.path / "eval_tasks"

    @property
    def general_replies(self) -> Path:
        """What the base answered to the general prompts: a JSON list of {"id", "prompt", "reply"}."""
        return self.path / "general" / "replies.json"

    @property
    def general_energy(self) -> Path:
        """How much of the general inputs' energy they hold, per module."""
        return self.path / "general" / "energy.json"

    @property
    def adapter(self) -> Path:
        """The accumulated adapter, a PEFT directory."""
        return self.path / "adapter"

    @property
    def adapter_weights(self) -> Path:
        """Its tensors."""
        return self.adapter / "adapter_model.safetensors"

    @property
    def adapter_config(self) -> Path:
        """PEFT's description of it."""
        return self.adapter / "adapter_config.json"

    @property
    def adapter_hashes(self) -> Path:
        """The hashes of all other files in its folder."""
        return self.adapter / ADAPTER_HASHES

    @property
    def card(self) -> Path:
        """The adapter's model card."""
        return self.adapter / CARD

    @property
    def card_picture(self) -> Path:
        """The accuracy matrix as a picture, for the card."""
        return self.adapter / CARD_PICTURE

    @property
    def edit(self) -> Path:
        """How an adapter was made of a run's stages, where this is no run of its own (`keeplora edit`)."""
        return self.path / "edit.json"

    @property
    def edit_replies(self) -> Path:
        """Folder of what such an adapter was asked and replied."""
        return self.path / "evaluation"

    @property
    def other_tasks(self) -> Path:
        """Folder of what was measured on tasks of lmms-eval that the stream does not have (`keeplora evaluate`)."""
        return self.path / "lmms_eval"

    @property
    def retention(self) -> Path:
        """The accuracy matrix and its metrics."""
        return self.path / "retention.json"

    @property
    def report(self) -> Path:
        """The page."""
        return self.path / "report.html"

    @property
    def matrix_picture(self) -> Path:
        """The accuracy matrix as a picture."""
        return self.path / "accuracy_matrix.png"

    @property
    def matrix_table(self) -> Path:
        """The accuracy matrix as CSV."""
        return self.path / "accuracy_matrix.csv"

    @property
    def judged(self) -> Path:
        """Scores by a judge model, in the form of `retention`, where the run was judged."""
        return self.path / "judged.json"

    @property
    def verdicts(self) -> Path:
        """Folder of the judges' verdicts."""
        return self.path / "judge"

    @property
    def leaderboard(self) -> Path:
        """Folder of lmms-eval's own results, where the run was evaluated again for the leaderboard."""
        return self.path / "leaderboard"

    @property
    def stages(self) -> Path:
        """Folder of the stages."""
        return self.path / "stages"

    def stage(self, number: int, task: str | None) -> StageDirectory:
        """Stage `number`; its task is None for stage 0, the untouched base."""
        return StageDirectory(self.stages / f"{number:02d}-{task or 'base'}")

    @property
    def logs(self) -> Path:
        """Folder of the training logs."""
        return self.path / "tensorboard"

    def log(self, stage: StageDirectory) -> Path:
        """Where the stage's training logs go."""
        return self.logs / stage.path.name

    def found_stages(self) -> Iterator[StageDirectory]:
        """The stage folders that exist, in order."""
        if self.stages.is_dir():
            yield from (StageDirectory(path) for path in sorted(self.stages.iterdir()) if path.is_dir())
