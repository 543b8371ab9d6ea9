"""Why a finished run forgot: how strongly each stage's update answers the inputs of earlier tasks.

    python benchmarks/interference.py runs/vqa_small

For every stage t and every earlier task i, means over the adapted layers of a tower, in percent:

    reached     ||dW_t X_i||^2 / ||dW_t X_t||^2    its answer to these inputs, over that to its own
    protected   ||M_t^T X_i||^2 / ||X_i||^2        energy of these inputs inside what was protected

X_i are a layer's inputs on task i at the model before stage t (sketched from the probe sample), dW_t what the
stage added, M_t its protected basis. With 0 reached a layer computes on task i's inputs what it did before.
"""

import argparse
from pathlib import Path
from statistics import fmean

import mllm_keeplora  # noqa: F401  # its guards come before the libraries they guard
from mllm_keeplora.command_line import command
from mllm_keeplora.config import parse_config
from mllm_keeplora.continual.run import _History, _open_workplace, _past_factors
from mllm_keeplora.data.stream import load_stream
from mllm_keeplora.distributed.processes import start_processes
from mllm_keeplora.methods.base import load_method
from mllm_keeplora.methods.context import Stage, attach_accumulated, detach
from mllm_keeplora.modeling.loading import resolve_device
from mllm_keeplora.runs.files import ArtifactError, load_tensors


def measure(stage: Stage, earlier: Stage) -> dict[str, dict[str, float]]:
    """Tower -> {"reached", "protected"}, means over its modules, fractions."""
    model = attach_accumulated(stage.work.model, stage.accumulated)
    own, other = stage.sketch_inputs(model, 0), earlier.sketch_inputs(model, 0)
    detach(model)
    factors = load_tensors(stage.directory / "factors.safetensors")
    found: dict[str, dict[str, list[float]]] = {}
    for t in stage.targets:
        update = factors[f"{t.name}.B"] @ factors[f"{t.name}.A"]
        basis, x, y = stage.bases.load(t).cpu(), other[t.name], own[t.name]
        tower = found.setdefault(t.tower, {"reached": [], "protected": []})
        tower["reached"].append(float((x @ update.T).square().sum() / (y @ update.T).square().sum()))
        tower["protected"].append(float((x @ basis).square().sum() / x.square().sum()))
    return {tower: {k: fmean(v) for k, v in shares.items()} for tower, shares in found.items()}


def stages_of(run_dir: Path) -> list[Stage]:
    """The stages of a finished run, each with its own past.

    Raises:
        ArtifactError: not a finished run, or one whose stages do not add to the past.
    """
    if not (run_dir / "retention.json").is_file():
        raise ArtifactError(f"{run_dir} is no finished run: it has no retention.json")
    config = parse_config("", run_dir / "config.json", [])
    method = load_method(config)
    if method.continues or not method.learns(2):
        raise ArtifactError(f"{run_dir}: the stages of method {config.method} do not add updates to the past")
    stream = load_stream(Path(config.stream), Path(config.data_root) if config.data_root else None)
    history = _History.read(config, stream, run_dir)
    work = _open_workplace(history, method)
    directories = [history.directory(n) for n in range(1, len(stream.tasks) + 1)]
    stages = []
    for number, task in enumerate(stream.tasks, 1):
        past = _past_factors(work, history, number - 1)
        stages.append(Stage(work, number, task, past, directories[: number - 1]))
    return stages


def main() -> None:
    """Prints one line per stage and earlier task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="directory of a finished run")
    run_dir = parser.parse_args().run
    with command():
        config = parse_config("", run_dir / "config.json", []) if (run_dir / "config.json").exists() else None
        start_processes(cpu=config is None or resolve_device(config.model).type == "cpu")
        stages = stages_of(run_dir)
        print(f"{'stage':12s}{'inputs of':12s}{'tower':10s}{'reached %':>12s}{'protected %':>13s}")
        for stage in stages[1:]:
            for earlier in stages[: stage.number - 1]:
                for tower, shares in measure(stage, earlier).items():
                    reached, protected = 100 * shares["reached"], 100 * shares["protected"]
                    name, other = stage.task.name, earlier.task.name
                    print(f"{name:12s}{other:12s}{tower:10s}{reached:12.1f}{protected:13.1f}")


if __name__ == "__main__":
    main()
