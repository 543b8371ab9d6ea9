"""Methods x seeds on one stream: a learning rate for each method, then runs under several seeds.

    for every arm and seed:    chosen = tune(arm)      on records held out from training
                               run(arm, seed, chosen)
    mllm_keeplora.studies.results: collect the runs, test the arms against the reference, write the tables

A study is a YAML file (recipes/studies). Its runs are ordinary ones: each can be killed, continued and looked
at like any other. One process makes them one after the other.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mllm_keeplora import RunConfig, load_run, run_stream
from mllm_keeplora.config import ConfigError, Count, LearningRate, Seed, parse_config
from mllm_keeplora.continual.saved_run import SavedRun
from mllm_keeplora.data.record_files import read_rows
from mllm_keeplora.data.stream import Stream, TaskSpec, load_stream
from mllm_keeplora.resources import find
from mllm_keeplora.runs.files import read_json, replaced_directory, write_json
from mllm_keeplora.runs.run_directory import RunDirectory
from mllm_keeplora.settings import build, flat_settings, shown
from mllm_keeplora.yaml_files import read_yaml

logger = logging.getLogger(__name__)

Settings = dict[str, Any]  # dotted name of a run's setting -> value
Arms = dict[str, Settings]  # name in tables -> what differs from the recipe

RATE = "train.learning_rate"


# --------------------------------------------------------------------------------------------------
# what a study is


@dataclass(frozen=True)
class Tuning:
    """How each method gets its learning rate.

    Args:
        learning_rates: candidates, the same for all methods.
        tasks: the first tasks of the stream, learnt at each candidate.
        held_out: last training records of each task that are asked about instead of trained on.
        seed: of these runs.
        data: folder for the split's records.
    """

    learning_rates: list[LearningRate]
    tasks: Count
    held_out: Count
    seed: Seed
    data: str


@dataclass(frozen=True)
class Study:
    """A comparison of methods.

    Args:
        recipe: YAML files of a run's settings, later ones over earlier ones, which all runs start from.
        runs: folder of the run directories.
        results: folder of the tables and figures.
        reference: the arm that the others are tested against.
        seeds: of the default set.
        more_seeds: of what `--all` adds.
        methods: the default set.
        settings: what all runs change in the recipe.
        tuning: learning rates; None keeps the recipe's.
        candidates: arm -> settings that it chooses among as well, at its learning rate, on the same split.
        more_methods: further methods.
        rates: every method is run at each of these, as an arm of its own (`NAME, RATE`), which shows a front between
            learning and keeping; in place of `tuning`.
        ablations: changes of the reference, which keep what was tuned for it.
    """

    recipe: list[str]
    runs: str
    results: str
    reference: str
    seeds: list[Seed]
    more_seeds: list[Seed]
    methods: Arms
    settings: Settings = field(default_factory=dict)
    tuning: Tuning | None = None
    candidates: dict[str, list[Settings]] = field(default_factory=dict)
    more_methods: Arms = field(default_factory=dict)
    rates: list[LearningRate] = field(default_factory=list)
    ablations: Arms = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.recipe:
            raise ConfigError("recipe names no YAML of a run")
        if self.reference not in self.default:
            raise ConfigError(f"reference {shown(self.reference)} is none of methods: {', '.join(self.default)}")
        if self.rates and self.tuning is not None:
            raise ConfigError("a study has rates or tuning, not both")
        names = [*self.default, *self.further, *self.ablations]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"two arms of the study have one name: {', '.join(sorted(twice))}")
        for name in self.candidates:
            if name not in {**self.default, **self.further} or self.tuning is None:
                raise ConfigError(f"candidates of {shown(name)}: no method of the study, or a study without tuning")
        for name in ("seeds", "more_seeds"):
            seeds = getattr(self, name)
            if len(set(seeds)) != len(seeds) or len(seeds) < 2:
                raise ConfigError(f"{name} must be at least two different numbers, got {seeds}")

    @property
    def default(self) -> Arms:
        """The arms of the default set."""
        return self._at_rates(self.methods)

    @property
    def further(self) -> Arms:
        """Those of further methods."""
        return self._at_rates(self.more_methods)

    @property
    def arms(self) -> Arms:
        """What each arm changes in the recipe; an ablation changes it in the reference's settings."""
        reference = self.default[self.reference]
        ablations = {name: {**reference, **change} for name, change in self.ablations.items()}
        return {**self.default, **self.further, **ablations}

    def _at_rates(self, methods: Arms) -> Arms:
        if not self.rates:
            return methods
        return {
            f"{name}, {rate:g}": {**own, RATE: rate} for name, own in methods.items() for rate in sorted(self.rates)
        }


class Job(NamedTuple):
    """One run of a study."""

    arm: str
    seed: int


def load_study(path: Path) -> Study:
    """Reads a study's YAML.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a value of the wrong type or out of range.
    """
    try:
        return build(Study, flat_settings(Study, read_yaml(find(path))))
    except ConfigError as error:
        raise ConfigError(f"the study {path}: {error}") from error


def jobs_of(study: Study, everything: bool, only: Sequence[str] = ()) -> list[Job]:
    """The runs asked for, seed by seed, so that an interrupted study has the first seeds of every arm.

    Args:
        study: whose runs.
        everything: the further methods and the ablations too.
        only: these arms in place of the default set.

    Raises:
        ConfigError: an arm that the study does not have.
    """
    if unknown := [name for name in only if name not in study.arms]:
        raise ConfigError(f"the study has no arm {shown(unknown[0])}; it has {', '.join(study.arms)}")
    chosen = {*(only or study.default), *(study.arms.keys() - study.default.keys() if everything else ())}
    seeds = {arm: study.seeds if arm in study.default else study.more_seeds for arm in study.arms}
    order = dict.fromkeys([*study.more_seeds, *study.seeds])
    return [Job(arm, seed) for seed in order for arm in study.arms if arm in chosen and seed in seeds[arm]]


# --------------------------------------------------------------------------------------------------
# what a study does


def run_study(study: Study, jobs: Sequence[Job]) -> None:
    """Tunes and runs what is missing; complete runs are left alone.

    Raises:
        KeepLoRAError: of the run that failed; what was complete is kept.
    """
    for number, job in enumerate(jobs, 1):
        logger.info(f"run {number} of {len(jobs)}: {job.arm}, seed {job.seed}")
        place = {"run_dir": run_directory(study, job), "seed": job.seed}
        _retention_of(config_of(study, job.arm, {**tune(study, job.arm), **place}))


def tune(study: Study, arm: str) -> Settings:
    """What the held-out records choose for an arm: its learning rate, then the best candidate at that rate.

    The highest Last wins. Of equals it is the smaller rate, and the arm's own settings before a candidate's.
    An ablation keeps what was chosen for the reference.
    """
    if study.tuning is None:
        return {}
    method = study.reference if arm in study.ablations else arm
    score = partial(_held_out_score, study, study.tuning, method)
    rates, candidates = choices(study, method)
    rate = max(rates, key=score)  # the first of equals
    return max([rate, *({**rate, **candidate} for candidate in candidates)], key=score)


def choices(study: Study, method: str) -> tuple[list[Settings], list[Settings]]:
    """The rates, rising, and the candidates that a method is tuned over; a rate of its own stands alone."""
    if study.tuning is None:
        return [], []
    own = study.arms[method].get(RATE)
    rates = sorted(study.tuning.learning_rates) if own is None else [own]
    return [{RATE: rate} for rate in rates], study.candidates.get(method, [])


def choice_name(choice: Settings) -> str:
    """What a choice is called in results: its rate, or the settings of its candidate in YAML's flow style."""
    candidate = {name: value for name, value in choice.items() if name != RATE}
    return _yaml(candidate) if candidate else f"{choice[RATE]:g}"


def _held_out_score(study: Study, tuning: Tuning, method: str, choice: Settings) -> float:
    """Last after the split's tasks, a fraction; of the run that is there, or made now."""
    split = held_out_stream(Path(config_of(study, method, {}).stream), tuning)
    place = {"run_dir": tuning_directory(study, method, choice), "seed": tuning.seed}
    data = {"stream": split, "data_root": "."}
    retention = _retention_of(config_of(study, method, {**choice, **place, **data}))
    return float(retention["metrics"]["last"])


def config_of(study: Study, arm: str, chosen: Settings) -> RunConfig:
    """A run's settings: the recipe's; over them the study's, the arm's, what was chosen, the ablation's.

    Raises:
        ConfigError: a setting that a run does not have or take.
    """
    settings = {**study.settings, **study.arms[arm], **chosen, **study.ablations.get(arm, {})}
    argv = [part for name, value in settings.items() for part in (f"--{name}", _yaml(value))]
    files = [text for file in study.recipe for text in ("--config", file)]
    return parse_config(None, Path(study.recipe[0]), [*files, *argv])


def _retention_of(config: RunConfig) -> dict[str, Any]:
    """The accuracy matrix of a run, made or continued unless the run is complete under these settings."""
    found = complete_run(Path(config.run_dir))
    return run_stream(config) if found is None or found.config != config else found.retention


def complete_run(directory: Path) -> SavedRun | None:
    """The run, where one has come to its end."""
    return load_run(directory) if RunDirectory(directory).retention.exists() else None


def run_directory(study: Study, job: Job) -> Path:
    """Where a job's run writes."""
    return Path(study.runs) / _file_name(job.arm) / f"seed_{job.seed}"


def tuning_directory(study: Study, method: str, choice: Settings) -> Path:
    """Where the run of a choice on the held-out split writes."""
    return Path(study.runs) / _file_name(method) / f"tuning_{_file_name(choice_name(choice))}"


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in text.replace("+", "p")).strip("_")


def _yaml(value: Any) -> str:
    """A setting as the command line takes it, on one line."""
    if isinstance(value, str | Path):
        return str(value)
    return str(yaml.safe_dump(value, default_flow_style=True, width=float("inf"))).splitlines()[0]


# --------------------------------------------------------------------------------------------------
# held-out records


def held_out_stream(stream_file: Path, tuning: Tuning) -> Path:
    """Writes the split once: the first tasks, their last training records turned into questions.

    Returns:
        The split's stream file; its paths start where the run's do.

    Raises:
        ConfigError: the folder holds another split, or records that cannot be turned into questions.
    """
    target = Path(tuning.data) / "stream.yaml"
    stream = load_stream(stream_file)
    tasks: list[dict[str, Any]] = []
    files: dict[str, list[Any]] = {}
    for task in stream.tasks[: tuning.tasks]:
        kept, asked = _split(stream, task, tuning)
        tasks.append(_entry(stream, task, tuning))
        files |= {f"{task.name}/train.json": kept, f"{task.name}/test.json": asked}
    split = {"name": f"{stream.name}_held_out", "data_root": ".", "tasks": tasks}
    if target.exists():
        found = {name: target.parent / name for name in files}
        changed = [name for name, path in found.items() if not path.exists() or read_json(path) != files[name]]
        if changed or read_yaml(target) != split:
            raise ConfigError(
                f"tuning.data {tuning.data} holds another split than tuning and its records say now "
                f"({(changed or [target.name])[0]} first); what was tuned on it is of no use: name other folders in "
                "tuning.data and runs, or remove that one and the study's tuning_* runs"
            )
        return target
    with replaced_directory(target.parent) as folder:
        for name, records in files.items():
            write_json(folder / name, records)
        (folder / target.name).write_text(yaml.safe_dump(split))
    return target


def _split(stream: Stream, task: TaskSpec, tuning: Tuning) -> tuple[list[Any], list[dict[str, Any]]]:
    """A task's records to train on, and the others as questions."""
    if task.classes is not None:
        raise ConfigError(f"tuning.held_out takes records with questions; {task.name} has `classes`, leave tuning out")
    records = [value for _, value in read_rows(stream.train_file(task), stream.extracted)]
    kept, held_out = records[: -tuning.held_out], records[-tuning.held_out :]
    if not kept:
        raise ConfigError(f"tuning.held_out is {tuning.held_out}; {stream.train_file(task)} has {len(records)} records")
    if not all(isinstance(record, Mapping) and len(record.get("conversations") or ()) > 1 for record in held_out):
        raise ConfigError(
            f"tuning.held_out takes records with `conversations`, and {stream.train_file(task)} has others; leave "
            "tuning out, or write them so"
        )
    return kept, [_question(i, r) for i, r in enumerate(held_out)]


def _entry(stream: Stream, task: TaskSpec, tuning: Tuning) -> dict[str, Any]:
    """A task in the split's stream file."""
    place = Path(tuning.data) / task.name
    return {
        "name": task.name,
        "train": str(place / "train.json"),
        "test": str(place / "test.json"),
        "media_root": str(stream.media_root(task)),
        "prompt_suffix": task.prompt_suffix,
        "metric": task.metric,
        "max_new_tokens": task.max_new_tokens,
        **({"allow_text_only": True} if task.allow_text_only else {}),
    }


def _question(number: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """One turn of a conversation as a test record, the turns in their order over the records."""
    turns = record["conversations"]
    turn = 2 * (number % (len(turns) // 2))
    text = turns[turn]["value"].removeprefix("<image>\n").removeprefix("<video>\n")
    medium = {key: record[key] for key in ("image", "video") if key in record}
    return {"question_id": number, **medium, "text": text, "answer": turns[turn + 1]["value"]}
