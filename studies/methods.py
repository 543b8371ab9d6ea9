"""Methods x seeds on one stream: runs, a learning rate per method, paired statistics.

A study is a YAML file (recipes/studies). Every run is an ordinary run of `run_stream`, so it can be killed,
continued and looked at like any other. One process runs them one after the other.
"""

import logging
import math
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from scipy import stats

from mllm_keeplora.config import ConfigError, RunConfig, parse_config
from mllm_keeplora.continual.run import PACKAGES, run_stream
from mllm_keeplora.data.stream import TaskSpec, load_stream
from mllm_keeplora.reports.comparison import Run, draw_comparison, grouped
from mllm_keeplora.reports.page import write_atomically
from mllm_keeplora.runs.files import read_json, replaced_directory, sha256_file, write_json
from mllm_keeplora.runs.manifests import SCHEMA_VERSION

logger = logging.getLogger(__name__)

Settings = dict[str, Any]  # dotted name of a run's setting -> value
Arms = dict[str, Settings]  # name in tables -> what differs from the recipe

METRICS = ("mft", "last", "bwt", "general")


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

    learning_rates: list[float]
    tasks: int
    held_out: int
    seed: int
    data: str


@dataclass(frozen=True)
class Study:
    """A comparison of methods.

    Args:
        recipe: YAML of a run, which all runs start from.
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
        ablations: changes of the reference, at its learning rate.
    """

    recipe: str
    runs: str
    results: str
    reference: str
    seeds: list[int]
    more_seeds: list[int]
    methods: Arms
    settings: Settings = field(default_factory=dict)
    tuning: Tuning | None = None
    candidates: dict[str, list[Settings]] = field(default_factory=dict)
    more_methods: Arms = field(default_factory=dict)
    ablations: Arms = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.reference not in self.methods:
            raise ConfigError(f"reference {self.reference!r} is none of methods: {', '.join(self.methods)}")
        twice = [n for n in {**self.more_methods, **self.ablations} if n in self.methods]
        if twice or set(self.more_methods) & set(self.ablations):
            raise ConfigError(f"two arms of the study have one name: {', '.join(twice)}")
        for name in self.candidates:
            if name not in {**self.methods, **self.more_methods} or self.tuning is None:
                raise ConfigError(
                    f"candidates of {name!r}: no method of the study, or a study without tuning"
                )
        for name in ("seeds", "more_seeds"):
            seeds = getattr(self, name)
            if len(set(seeds)) != len(seeds) or len(seeds) < 2:
                raise ConfigError(f"{name} must be at least two different numbers, got {seeds}")

    def arm(self, name: str) -> Settings:
        """What an arm changes; an ablation changes the reference."""
        if name in self.ablations:
            return {**self.methods[self.reference], **self.ablations[name]}
        return {**self.methods, **self.more_methods}[name]


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    arm: str
    seed: int


def load_study(path: Path) -> Study:
    """Reads a study's YAML.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a value of the wrong type or out of range.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study)
    try:
        values = parser.instantiate(parser.parse_object(yaml.safe_load(path.read_text())))
    except OSError as error:
        raise ConfigError(f"cannot read the study {path}: {error}") from error
    except (ArgumentError, yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return Study(**vars(values))


def jobs_of(study: Study, everything: bool, only: Sequence[str] = ()) -> list[Job]:
    """The runs asked for, seed by seed, so that an interrupted study has seeds of every arm.

    Raises:
        ConfigError: an arm that the study does not have.
    """
    arms = {name: study.seeds for name in study.methods}
    further = dict.fromkeys([*study.more_methods, *study.ablations], study.more_seeds)
    unknown = [name for name in only if name not in {**arms, **further}]
    if unknown:
        raise ConfigError(f"the study has no arm {unknown[0]!r}; it has {', '.join({**arms, **further})}")
    chosen = {n: s for n, s in {**arms, **further}.items() if n in only} if only else arms
    if everything:
        chosen = {**chosen, **further}
    order = list(dict.fromkeys([*study.more_seeds, *study.seeds]))
    return [Job(name, seed) for seed in order for name, seeds in chosen.items() if seed in seeds]


def run_study(study: Study, jobs: Sequence[Job]) -> None:
    """Tunes and runs what is missing; complete runs are left alone.

    Raises:
        KeepLoRAError: of the run that failed; what was complete is kept.
    """
    for number, job in enumerate(jobs, 1):
        logger.info(f"run {number} of {len(jobs)}: {job.arm}, seed {job.seed}")
        rate = learning_rate(study, job.arm)
        settings = best_candidate(study, job.arm, rate)
        _run(_config(study, job.arm, job.seed, run_directory(study, job), rate, **settings))


def run_directory(study: Study, job: Job) -> Path:
    """Where a job's run writes."""
    return Path(study.runs) / _slug(job.arm) / f"seed_{job.seed}"


def _slug(name: str) -> str:
    words = "".join(c if c.isalnum() or c in ".-" else "_" for c in name.replace("+", "p"))
    return words.strip("_")


def _config(
    study: Study, arm: str, seed: int, directory: Path, rate: float | None, **extra: Any
) -> RunConfig:
    settings = {**study.settings, **study.arm(arm), **extra, "run_dir": directory, "seed": seed}
    if rate is not None and "train.learning_rate" not in study.arm(arm):
        settings["train.learning_rate"] = rate
    argv = [part for name, value in settings.items() for part in (f"--{name}", _argument(value))]
    return parse_config("", Path(study.recipe), ["--config", study.recipe, *argv])


def _argument(value: Any) -> str:
    return (
        str(value)
        if isinstance(value, str | Path)
        else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
    )


def _run(config: RunConfig) -> dict[str, Any]:
    """`retention.json` of a run, which is made or continued unless it is complete under these settings."""
    finished, settings = Path(config.run_dir, "retention.json"), Path(config.run_dir, "config.json")
    if finished.exists() and settings.exists() and read_json(settings) == asdict(config):
        return dict(read_json(finished))
    return run_stream(config)


def learning_rate(study: Study, arm: str) -> float | None:
    """The candidate with the highest Last on held-out training records; ties go to the smaller one.

    An ablation has the reference's, and what does not learn has the first. An arm's own setting goes before.
    """
    if study.tuning is None:
        return None
    scores = tuning_scores(study, study.reference if arm in study.ablations else arm)
    return max(sorted(scores), key=lambda rate: scores[rate])


def tuning_scores(study: Study, arm: str) -> dict[float, float]:
    """Candidate -> Last after the split's tasks, a fraction; runs what is missing."""
    tuning = study.tuning
    if tuning is None:
        return {}
    base = _config(study, arm, tuning.seed, Path(), None)
    stream = held_out_stream(Path(base.stream), tuning)
    scores = {}
    for rate in tuning.learning_rates if base.method != "zero_shot" else tuning.learning_rates[:1]:
        directory = Path(study.runs) / _slug(arm) / f"tuning_{rate:g}"
        retention = _run(_config(study, arm, tuning.seed, directory, rate, stream=stream, data_root="."))
        scores[rate] = float(retention["metrics"]["last"])
    return scores


def best_candidate(study: Study, arm: str, rate: float | None) -> Settings:
    """The candidate settings with the highest Last on the split, at the arm's rate; empty for its own ones.

    The arm's own settings, with which the rate was chosen, take part; ties go to them, then to the first.
    """
    tuning, candidates = study.tuning, study.candidates.get(arm, [])
    if tuning is None or rate is None or not candidates:
        return {}
    stream = held_out_stream(Path(_config(study, arm, tuning.seed, Path(), None).stream), tuning)
    chosen, best = {}, tuning_scores(study, arm)[rate]
    for candidate in candidates:
        extra = {"stream": stream, "data_root": ".", **candidate}
        directory = _candidate_directory(study, arm, candidate)
        score = float(_run(_config(study, arm, tuning.seed, directory, rate, **extra))["metrics"]["last"])
        if score > best:
            chosen, best = candidate, score
    return chosen


def _candidate_directory(study: Study, arm: str, candidate: Settings) -> Path:
    return Path(study.runs) / _slug(arm) / f"tuning_{_slug(_argument(candidate))}"


def held_out_stream(stream_file: Path, tuning: Tuning) -> Path:
    """Writes the split once: the first tasks, their last training records turned into questions.

    Returns:
        The split's stream file; its paths start where the run's do.
    """
    target = Path(tuning.data) / "stream.yaml"
    if target.exists():
        return target
    stream = load_stream(stream_file, None)
    with replaced_directory(Path(tuning.data)) as folder:
        tasks = [_split(stream.data_root, task, tuning, folder) for task in stream.tasks[: tuning.tasks]]
        text = yaml.safe_dump({"name": f"{stream.name}_held_out", "data_root": ".", "tasks": tasks})
        (folder / "stream.yaml").write_text(text)
    return target


def _split(root: Path, task: TaskSpec, tuning: Tuning, folder: Path) -> dict[str, Any]:
    records = read_json(root / task.train)
    kept, held_out = records[: -tuning.held_out], records[-tuning.held_out :]
    if not kept:
        raise ConfigError(
            f"tuning.held_out is {tuning.held_out}; {root / task.train} has {len(records)} records"
        )
    (folder / task.name).mkdir()
    write_json(folder / task.name / "train.json", kept)
    write_json(folder / task.name / "test.json", [_question(i, r) for i, r in enumerate(held_out)])
    place = Path(tuning.data) / task.name
    return {
        "name": task.name,
        "train": str(place / "train.json"),
        "test": str(place / "test.json"),
        "media_root": str(root / (task.media_root or ".")),
        "metric": task.metric,
        "max_new_tokens": task.max_new_tokens,
    }


def _question(number: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """One turn of a conversation as a test record, the turns in their order over the records."""
    turns = record["conversations"]
    turn = 2 * (number % (len(turns) // 2))
    text = turns[turn]["value"].removeprefix("<image>\n").removeprefix("<video>\n")
    medium = {key: record[key] for key in ("image", "video") if key in record}
    return {"question_id": number, **medium, "text": text, "answer": turns[turn + 1]["value"]}


def collect(study: Study) -> dict[str, Any]:
    """All complete runs of a study with their statistics: the content of `results.json`.

    Runs that are not there are left out, never filled in.
    """
    arms: dict[str, Any] = {}
    for name in [*study.methods, *study.more_methods, *study.ablations]:
        seeds = dict(_complete_runs(study, name))
        if seeds:
            kind = "ablation" if name in study.ablations else "method"
            arms[name] = {"kind": kind, "settings": study.arm(name), "tuning": _tuned(study, name)}
            arms[name] |= {"seeds": seeds, "summary": _summary(seeds)}
    if study.reference in arms:
        for kind in ("method", "ablation"):  # one family of tests each
            others = {n: a for n, a in arms.items() if n != study.reference and a["kind"] == kind}
            _test_against(arms[study.reference]["seeds"], others)
    return {
        "schema_version": SCHEMA_VERSION,
        "study": asdict(study),
        "reference": study.reference,
        "arms": arms,
        "environment": environment(),
    }


def _complete_runs(study: Study, arm: str) -> Iterator[tuple[str, Any]]:
    for seed in dict.fromkeys([*study.seeds, *study.more_seeds]):
        directory = run_directory(study, Job(arm, seed))
        if (directory / "retention.json").exists():
            retention, config = read_json(directory / "retention.json"), read_json(directory / "config.json")
            last = [read_json(p) for p in sorted(directory.glob("stages/*/manifest.json"))]
            yield (
                str(seed),
                {
                    "learning_rate": config["train"]["learning_rate"],
                    "rows": [{n: s["value"] for n, s in row["scores"].items()} for row in retention["rows"]],
                    "tasks": retention["tasks"],
                    "general_tasks": retention["general"],
                    **_metrics(retention),
                    "seconds": {k: sum(m["timings"].get(k, 0.0) for m in last) for k in ("train", "total")},
                    "feature_directions": sum(m.get("k_f_added", 0) for s in last for m in s["modules"]),
                },
            )


def _metrics(retention: Mapping[str, Any]) -> dict[str, float]:
    """Fractions; `general` is the mean of the general benchmarks after the last stage."""
    final = retention["rows"][-1]["scores"]
    general = fmean(final[name]["value"] for name in retention["general"])
    return {**{m: retention["metrics"][m] for m in METRICS if m != "general"}, "general": general}


def _tuned(study: Study, arm: str) -> dict[str, float]:
    """Learning rate, or settings in YAML's flow style -> score of the tuning runs that are there."""
    if study.tuning is None or arm in study.ablations:
        return {}
    found = {}
    for rate in study.tuning.learning_rates:
        path = Path(study.runs) / _slug(arm) / f"tuning_{rate:g}" / "retention.json"
        if path.exists():
            found[f"{rate:g}"] = read_json(path)["metrics"]["last"]
    for candidate in study.candidates.get(arm, []):
        path = _candidate_directory(study, arm, candidate) / "retention.json"
        if path.exists():
            found[_argument(candidate)] = read_json(path)["metrics"]["last"]
    return found


def _summary(seeds: Mapping[str, Any]) -> dict[str, Any]:
    values = {m: [run[m] for run in seeds.values()] for m in METRICS}
    return {
        m: {"mean": fmean(v), "standard_error": standard_error(v), "n": len(v)} for m, v in values.items()
    }


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, from the spread over seeds; None for one value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _test_against(reference: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Adds paired t-tests over the shared seeds to each arm, with Holm's correction per metric."""
    for metric in METRICS:
        found = {}
        for name, arm in others.items():
            shared = [seed for seed in reference if seed in arm["seeds"]]
            pairs = [(reference[seed][metric], arm["seeds"][seed][metric]) for seed in shared]
            found[name] = paired_test(pairs)
        corrected = holm({n: t["p"] for n, t in found.items() if t["p"] is not None})
        for name, test in found.items():
            others[name].setdefault("against_reference", {})[metric] = {**test, "p_holm": corrected.get(name)}


def paired_test(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Two-sided paired t-test of first - second.

    Returns:
        {"n", "difference": mean of first - second, "p"}; None where it is undefined: under two pairs, or
        differences that are all equal.
    """
    differences = [a - b for a, b in pairs]
    mean = fmean(differences) if differences else None
    if len(differences) < 2 or stdev(differences) == 0.0:
        return {"n": len(differences), "difference": mean, "p": None}
    p = float(stats.ttest_rel([a for a, _ in pairs], [b for _, b in pairs]).pvalue)
    return {"n": len(differences), "difference": mean, "p": p}


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction (1979): adjusted p-values, at most 1, in the order of the p-values."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda n: p_values[n])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def environment() -> dict[str, Any]:
    """What the runs ran on, as far as the collecting process sees it."""
    git: Callable[..., str] = lambda *a: subprocess.run(  # noqa: E731
        ["git", *a], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "processor": processor(),
        "commit": git("rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "lock": sha256_file(Path("constraints.txt")),
    }


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.machine()


def format_results(results: Mapping[str, Any]) -> str:
    """A table in Markdown: means and standard errors in percent and points, p-values by Holm."""
    heads = {"mft": "MFT", "last": "Last", "bwt": "BWT", "general": "general, at the end"}
    lines = ["| | seeds | rate | " + " | ".join(heads.values()) + " | p: Last | p: BWT | p: general |"]
    lines.append("|---" * (6 + len(heads)) + "|")
    for name, arm in results["arms"].items():
        cells = [_cell(arm["summary"][m]) for m in heads]
        tests = arm.get("against_reference", {})
        ps = [_p(tests.get(m, {}).get("p_holm")) for m in ("last", "bwt", "general")]
        rates = sorted({f"{run['learning_rate']:g}" for run in arm["seeds"].values()})
        lines.append(" | ".join([f"| {name}", str(len(arm["seeds"])), "/".join(rates), *cells, *ps]) + " |")
    return "\n".join(lines) + "\n"


def _cell(summary: Mapping[str, Any]) -> str:
    error = summary["standard_error"]
    spread = f" ± {100 * error:.1f}" if error is not None else ""
    return f"{100 * summary['mean']:.1f}{spread}"


def _p(value: float | None) -> str:
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def write_results(study: Study) -> str:
    """Writes `results.json`, `table.md` and `methods.png` (without the ablations); returns the table."""
    results = collect(study)
    folder = Path(study.results)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    table = format_results(results)
    (folder / "table.md").write_text(table)
    if runs := _finished_runs(study, [*study.methods, *study.more_methods]):
        write_atomically(folder / "methods.png", draw_comparison(grouped(runs)))
    return table


def _finished_runs(study: Study, arms: Sequence[str]) -> list[Run]:
    seeds = dict.fromkeys([*study.seeds, *study.more_seeds])
    places = [
        (arm, seed, run_directory(study, Job(arm, seed)) / "retention.json") for arm in arms for seed in seeds
    ]
    return [Run(arm, seed, read_json(path)) for arm, seed, path in places if path.exists()]
