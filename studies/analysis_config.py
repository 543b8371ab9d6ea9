"""Settings of an analysis (`analysis`). They are read before torch is imported, so that `--help` is quick."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mllm_keeplora.command_line import OptionParser
from mllm_keeplora.config import (
    BatchSize,
    ConfigError,
    Count,
    ModelConfig,
    Share,
    VideoConfig,
    flatten,
    parse_config,
)
from mllm_keeplora.settings import build, check_settings

DEFAULT_RECIPE = "recipes/configs/vqa/small.yaml"
# What a run or a recipe says.
FROM_RUN = ("stream", "data_root", "cache_dir", "model", "video", "batch_size")


@dataclass(frozen=True)
class AnalysisConfig:
    """What is analysed, and how finely.

    Args:
        out: Directory of the results; the same command on the same directory continues.
        run: Directory of a run: its base with its adapter is analysed. None takes the base alone.
        stream: YAML file with the tasks and the general benchmarks that are asked.
        data_root: Folder of the stream's data; None takes the stream file's own.
        model: The base model. Its compute_dtype is also that of the rebuilt weights.
        video: How clips become frames.
        batch_size: Questions generated together.
        limit: Questions per task, None = all.
        energies: Shares of a weight's energy that its principal subspace holds.
        depth_energy: The share at which thirds of the depth are compared.
        cache_dir: Hashes of base models, and decoded frames.
    """

    out: str = "runs/analysis"
    run: str | None = None
    stream: str = "recipes/streams/small_vqa.yaml"
    data_root: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    batch_size: BatchSize = 32
    limit: Count | None = 100
    energies: list[Share] = field(default_factory=lambda: [0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99])
    depth_energy: Share = 0.6
    cache_dir: str = "cache"

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.energies:
            raise ConfigError("energies is empty: name at least one share, such as [0.6]")


def parse_analysis(argv: Sequence[str], description: str | None = None) -> AnalysisConfig:
    """Reads the settings; a run, or a recipe's YAML, gives the model, the stream and the video settings.

    Args:
        argv: the command line.
        description: for `--help`.

    Raises:
        SystemExit: after `--help`.
        ConfigError: an unknown setting, one of the wrong type or out of range; both a run and a YAML.
        ArtifactError: a run that is not there, or has not learnt anything yet.
    """
    parser = OptionParser("keeplora analyze", description, "[--run RUN | --config FILE]")
    recipe_help = f"settings of a run, for its base (default: {DEFAULT_RECIPE})"
    parser.add_argument("--config", metavar="FILE", help=recipe_help)
    parser.add_settings(AnalysisConfig, elsewhere=dict.fromkeys(FROM_RUN, "that of --run or --config"))
    given = parser.read(argv)
    run = getattr(given, "run", None)
    if run and given.config:
        raise ConfigError("--config and --run were both given; a run brings its own settings: leave --config out")
    return build(AnalysisConfig, {**_defaults(run, given.config or DEFAULT_RECIPE), **vars(given)})


def _defaults(run: str | None, recipe: str) -> dict[str, Any]:
    """What the run, or else the recipe, says of the model and of what it is asked."""
    if run is None:
        config = parse_config(None, Path(recipe), ["--config", recipe])
    else:
        from mllm_keeplora import load_run

        saved = load_run(run)
        _ = saved.adapter  # says what is wrong with a run that has none
        config = saved.config
    taken = {name: getattr(config, name) for name in ("stream", "data_root", "cache_dir")}
    taken |= flatten({"model": asdict(config.model), "video": asdict(config.video)})
    taken["batch_size"] = config.evaluation.batch_size
    return taken if run is None else {**taken, "out": str(Path(run) / "analysis")}
