"""The knowledge analysis: exact parts, untouched neighbours, a killed one that continues, clear refusals."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from mllm_keeplora.config import ConfigError, ModelConfig, RunConfig
from mllm_keeplora.data.stream import load_stream
from mllm_keeplora.linalg.subspace import principal_basis
from mllm_keeplora.modeling.loading import load_dense
from mllm_keeplora.modeling.targets import Target
from mllm_keeplora.probes.protected_bases import weight_basis_files
from mllm_keeplora.runs.files import ArtifactError, hash_files, write_json
from mllm_keeplora.runs.run_directory import RunDirectory
from mllm_keeplora.studies import analysis
from mllm_keeplora.studies.analysis import (
    UNCHANGED,
    Cell,
    analyze,
    cells_of,
    draw_analysis,
    format_analysis,
    leading_directions,
    rebuild,
    rebuilt,
    third_of,
)
from mllm_keeplora.studies.analysis_config import AnalysisConfig, parse_analysis
from tests.modules.conftest import all_targets, batch, model_config

ENERGIES = [0.2, 0.6, 0.9, 0.99, 1.0]
EMBEDDED = Path(__file__).resolve().parents[2] / "recipes" / "configs" / "vqa" / "small.yaml"
Dense = tuple[Any, list[Target], dict[str, Path]]


def decaying(rows: int, columns: int) -> torch.Tensor:
    """A weight whose singular values fall, as trained ones do."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u @ torch.diag(s * 0.8 ** torch.arange(len(s))) @ vh


@pytest.fixture
def dense(tiny_llava: Path, quantization: str, tmp_path: Path) -> Dense:
    """The tiny model with writable weights, its layers and their bases."""
    model, _ = load_dense(model_config(tiny_llava, quantization), None)
    targets = all_targets(model)
    return model, targets, weight_basis_files(model, targets, {"vision": 1.0, "language": 1.0}, tmp_path)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**{key: value for key, value in batch().items() if key != "labels"}).logits


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32)])
@pytest.mark.parametrize("energy", ENERGIES)
def test_the_two_parts_sum_to_the_weight_and_share_nothing(shape: tuple[int, int], energy: float) -> None:
    weight = decaying(*shape)
    directions = leading_directions(weight, principal_basis(weight, 1.0), energy)
    principal, residual = (rebuild(weight, directions, part) for part in analysis.SUBSPACES)
    assert torch.allclose(principal + residual, weight, atol=1e-6 * float(weight.abs().max()), rtol=0)
    assert float((principal @ residual.T).norm()) <= 1e-5 * float(weight.norm()) ** 2
    held = float(principal.square().sum() / weight.square().sum())
    assert held >= energy - 1e-5
    _, s, vh = torch.linalg.svd(weight, full_matrices=False)
    k = directions.shape[1]
    assert torch.allclose(principal, weight @ vh[:k].T @ vh[:k], atol=1e-4 * float(s[0]))


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_one_decomposition_serves_every_energy(shape: tuple[int, int]) -> None:
    weight = decaying(*shape)
    largest = principal_basis(weight, max(ENERGIES))
    for energy in ENERGIES:
        own, found = principal_basis(weight, energy), leading_directions(weight, largest, energy)
        if energy < 1.0:
            assert torch.equal(found, largest[:, : own.shape[1]])
        else:
            assert found.shape[1] == shape[1]


def test_all_energy_in_the_principal_part_leaves_the_logits(dense: Dense) -> None:
    model, targets, files = dense
    before = logits(model)
    with rebuilt(model, targets, Cell("principal", 1.0, "both", "all"), files):
        whole = logits(model)
    with rebuilt(model, targets, Cell("residual", 1.0, "both", "all"), files):
        nothing = logits(model)
    assert torch.equal(whole, before)
    assert not torch.allclose(nothing, before, atol=1e-2 * float(before.abs().max()))


@pytest.mark.parametrize("tower", analysis.TOWERS)
@pytest.mark.parametrize("depth", ["shallow", "all"])
def test_only_the_named_layers_change_and_come_back(dense: Dense, tower: Any, depth: Any) -> None:
    model, targets, files = dense
    cell, before = Cell("residual", 0.6, tower, depth), weights(model)
    chosen = {
        f"{t.name}.weight"
        for t in targets
        if tower in ("both", t.tower) and (depth == "all" or t.depth < 1)  # 2 layers: the first is shallow
    }
    with rebuilt(model, targets, cell, files) as shares:
        during = weights(model)
    assert {f"{name}.weight" for name in shares} == chosen
    assert all(0.0 < share < 1.0 for share in shares.values())
    assert {name for name in before if not torch.equal(before[name], during[name])} == chosen
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())


def test_weights_come_back_from_an_interrupted_cell(dense: Dense) -> None:
    model, targets, files = dense
    before = weights(model)
    with (
        pytest.raises(KeyboardInterrupt),
        rebuilt(model, targets, Cell("principal", 0.2, "both", "all"), files),
    ):
        raise KeyboardInterrupt
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())


@pytest.mark.parametrize(
    ("layers", "counts"),
    [(3, [1, 1, 1]), (4, [2, 1, 1]), (5, [2, 2, 1]), (23, [8, 8, 7]), (32, [11, 11, 10])],
)
def test_thirds_share_the_layers_out(layers: int, counts: list[int]) -> None:
    thirds = [third_of(Target("m", "vision", depth, layers, 4, 4)) for depth in range(layers)]
    assert [thirds.count(third) for third in analysis.DEPTHS[:3]] == counts
    assert thirds == sorted(thirds, key=analysis.DEPTHS.index)


def test_no_cell_twice() -> None:
    names = [cell.name for cell in cells_of(AnalysisConfig(energies=[0.6, 0.2, 0.6], depth_energy=0.6))]
    assert len(names) == len(set(names)) == 3 * 2 * 2 + 3 * 2 * 3


# --------------------------------------------------------------------------------------------------
# a whole analysis of the embedded base, its scores made up


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    """One task and one general benchmark, of one question each."""
    for name in ("birds", "scenes"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "a.png")
        rows = [{"question_id": "0", "image": "a.png", "text": "what?", "answer": "a"}]
        (tmp_path / "data" / name / "test.json").write_text(json.dumps(rows))
    train = [{"id": "0", "image": "a.png", "conversations": []}]
    (tmp_path / "data" / "birds" / "train.json").write_text(json.dumps(train))
    path = tmp_path / "stream.yaml"
    common = {"metric": "exact", "max_new_tokens": 4}
    files = {n: {"name": n, "test": f"{n}/test.json", "media_root": n} for n in ("birds", "scenes")}
    document = {
        "name": "few",
        "data_root": str(tmp_path / "data"),
        "tasks": [{**files["birds"], **common, "train": "birds/train.json"}],
        "general": [{**files["scenes"], **common}],
    }
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def config(stream: Path, tmp_path: Path) -> AnalysisConfig:
    model = ModelConfig(device="cpu", cpu_threads=1)
    return AnalysisConfig(
        out=str(tmp_path / "out"), stream=str(stream), model=model, energies=[0.2, 0.6], limit=1,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the cells that were measured, in order; "stop" among the patience makes one fail."""
    names: list[str] = []

    def measure(model: Any, processor: Any, stream: Any, tasks: Path, output: Path, **_: Any) -> Any:
        if len(names) == 5 and "killed" not in names:
            names.append("killed")
            raise KeyboardInterrupt
        names.append(output.name)
        score = {"native": 1.0, "native_max": 1.0, "stderr": 0.1, "n": 1}
        return {name: {"value": 0.1 * (len(names) % 10), **score} for name in ("birds", "scenes")}

    monkeypatch.setattr(analysis, "evaluate_row", measure)
    yield names


def test_a_killed_analysis_continues_without_measuring_again(
    config: AnalysisConfig, asked: list[str], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        analyze(config)
    kept = json.loads((tmp_path / "out" / "analysis.json").read_text())["cells"]
    assert list(kept) == asked[:5]
    results = analyze(config)
    asked.remove("killed")
    assert asked == [UNCHANGED, *(cell.name for cell in cells_of(config))]  # each once
    assert {name: results["cells"][name] for name in kept} == kept
    assert results == json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert (tmp_path / "out" / "analysis.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "bases").exists()
    count = len(asked)
    assert analyze(config) == results and len(asked) == count


def test_a_further_energy_measures_that_alone(config: AnalysisConfig, asked: list[str]) -> None:
    asked += ["killed"]  # no interruption
    analyze(config)
    count = len(asked)
    settings = {**vars(config), "energies": [0.2, 0.4, 0.6]}
    analyze(AnalysisConfig(**settings))
    assert {name.split("-")[1] for name in asked[count:]} == {"0.4"}


def test_table_and_picture_hold_every_cell(config: AnalysisConfig, asked: list[str]) -> None:
    asked += ["killed"]
    results = analyze(config)
    lines = format_analysis(config, results).splitlines()
    rows = [line for line in lines if " eps " in line and line.startswith(("both", "vision", "language"))]
    assert len(rows) == len(cells_of(config)) / 2
    assert max(map(len, lines)) <= 110
    results["general"] = []  # a stream that watches none
    assert draw_analysis(config, results).startswith(b"\x89PNG")
    assert "None" not in format_analysis(config, results)


def test_another_model_does_not_join_the_results(config: AnalysisConfig, asked: list[str]) -> None:
    asked += ["killed"]
    analyze(config)
    other = AnalysisConfig(**{**vars(config), "model": ModelConfig(quantization="none", device="cpu")})
    with pytest.raises(ArtifactError, match=r"something else .*model.quantization: 'nf4' there, 'none' now"):
        analyze(other)


@pytest.mark.parametrize(
    ("file", "refused"), [("README.md", False), ("accuracy_matrix.png", False), ("adapter_model.safetensors", True)]
)
@pytest.mark.parametrize("before", ["there", "missing", "of an earlier version"])
def test_a_run_s_card_is_no_part_of_what_was_analysed(
    before: str, file: str, refused: bool, config: AnalysisConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run writes it after its last stage, and people may edit it."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_text("weights")
    if before != "missing":
        (adapter / file).write_text("first")
    monkeypatch.setattr(analysis, "_adapter", lambda _: adapter)
    read = load_stream(Path(config.stream), None)
    begun = analysis._open_results(config, read)
    if before == "of an earlier version":
        begun["identity"]["adapter"] = hash_files(adapter)
    write_json(Path(config.out) / analysis.RESULTS, begun)
    (adapter / file).write_text("edited")
    if refused:
        with pytest.raises(ArtifactError, match=r"something else \(adapter.adapter_model.safetensors"):
            analysis._open_results(config, read)
    else:
        assert analysis._open_results(config, read)["cells"] == {}


def test_a_model_too_small_for_thirds_is_refused(config: AnalysisConfig, tiny_llava: Path) -> None:
    small = AnalysisConfig(**{**vars(config), "model": model_config(tiny_llava, "nf4")})
    with pytest.raises(ConfigError, match=r"vision tower has 2 layer.*at least 3"):
        analyze(small)


# --------------------------------------------------------------------------------------------------
# settings


def parse(*argv: str) -> AnalysisConfig:
    return parse_analysis(argv)


def test_a_recipe_gives_the_model_and_the_command_line_wins() -> None:
    video = EMBEDDED.parents[1] / "video" / "small.yaml"
    config = parse("--config", str(video), "--energies", "[0.5]", "--model.compute_dtype", "bfloat16")
    assert config.stream == "recipes/streams/small_video.yaml"
    assert config.model.base_model == "recipes/small/video_base"
    assert (config.energies, config.model.compute_dtype, config.limit) == ([0.5], "bfloat16", 100)
    assert parse().model.cpu_threads == 1  # small.yaml's own


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--energies", "[0.5, 1.5]"], r"energies: expected a number in \(0, 1\], found 1.5"),
        (["--energies", "[0]"], r"energies: expected a number in \(0, 1\], found 0"),
        (["--energies", "[]"], "energies is empty"),
        (["--depth_energy", "-0.1"], r"depth_energy: expected a number in \(0, 1\], found -0.1"),
        (["--limit", "0"], "limit: expected a whole number in .*, found 0"),
        (["--energy", "0.5"], "did you mean '--energies'"),
        (["--lim", "5"], "did you mean '--limit'"),
        (["--run", "a", "--config", "b"], "both given"),
    ],
)
def test_bad_settings_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*argv)


def test_what_is_no_run_and_a_run_that_has_learnt_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere is no directory of a run"):
        parse("--run", str(tmp_path / "nowhere"))
    started = RunDirectory(tmp_path / "started")
    write_json(started.config, asdict(RunConfig()))
    with pytest.raises(ArtifactError, match=r"started holds no adapter/"):
        parse("--run", str(started.path))
    started.adapter.mkdir()
    started.adapter_config.write_text("{}")
    assert parse("--run", str(started.path)).out == str(started.path / "analysis")
