"""Weight bases in the cache: read as they were written, or computed again; a damaged one is never taken."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from safetensors.torch import load_file, save_file

from mllm_keeplora.modeling.families import TargetError
from mllm_keeplora.modeling.loading import load_base
from mllm_keeplora.modeling.targets import Target, find_targets
from mllm_keeplora.probes import protected_bases
from mllm_keeplora.probes.protected_bases import (
    ProtectedBases,
    weight_basis_file,
    weight_basis_files,
    weight_basis_size,
)
from mllm_keeplora.runs.files import ArtifactError, sha256_file
from tests.modules.conftest import model_config

EPS = {"vision": 0.6, "language": 0.6}
Bases = tuple[Any, list[Target], dict[str, Path]]


@pytest.fixture(scope="module")
def bases(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """A model, two of its layers, and their bases."""
    PartialState()
    model, _ = load_base(model_config(tiny_llava, "none"))
    targets = find_targets(model, {"language": ["q_proj"]})
    return model, targets, weight_basis_files(model, targets, EPS, tmp_path_factory.mktemp("bases") / "base-a")


def flip(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def nan(path: Path, other: Path) -> None:
    basis = load_file(path)["basis"]
    basis[0, 0] = torch.nan
    save_file({"basis": basis}, path)


def another_shape(path: Path, other: Path) -> None:
    save_file({"basis": load_file(path)["basis"][:-1, 1:].contiguous()}, path)


def another_name(path: Path, other: Path) -> None:
    save_file({"bases": load_file(path)["basis"]}, path)


def without_header(path: Path, other: Path) -> None:
    save_file(load_file(path), path)


def odd_header(path: Path, other: Path) -> None:
    save_file(load_file(path), path, {"basis": "[1]"})


def another_module(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


def truncated(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "damage",
    [flip, nan, another_shape, another_name, without_header, odd_header, another_module, truncated, empty, None],
)
def test_a_damaged_basis_is_computed_again(
    bases: Bases, tmp_path: Path, damage: Callable[[Path, Path], None] | None, caplog: pytest.LogCaptureFixture
) -> None:
    model, targets, written = bases
    folder = Path(shutil.copytree(next(iter(written.values())).parent, tmp_path / "base-a"))
    path, other = (weight_basis_file(folder, target.name, 0.6) for target in targets[:2])
    before = other.stat().st_mtime_ns
    if damage is not None:
        damage(path, other)
    found = weight_basis_files(model, targets, EPS, folder)
    assert {name: sha256_file(file) for name, file in found.items()} == {
        name: sha256_file(file) for name, file in written.items()
    }
    assert other.stat().st_mtime_ns == before, "what is sound is read"
    assert (str(path) in caplog.text) == (damage is not None)


def test_a_basis_of_another_base_or_energy_share_is_not_taken(bases: Bases, tmp_path: Path) -> None:
    model, targets, written = bases
    path, folder = written[targets[0].name], tmp_path / "base-b"
    folder.mkdir()
    for eps in (0.6, 0.9):
        shutil.copyfile(path, weight_basis_file(folder, targets[0].name, eps))
    other_base = weight_basis_files(model, targets[:1], EPS, folder)[targets[0].name]
    assert sha256_file(other_base) != sha256_file(path), "it names its own base"
    wider = weight_basis_files(model, targets[:1], {"vision": 0.9, "language": 0.9}, folder)[targets[0].name]
    assert (weight_basis_size(wider) or 0) > (weight_basis_size(path) or 0) > 0


def test_what_is_no_file_is_named(bases: Bases, tmp_path: Path) -> None:
    model, targets, _ = bases
    path = weight_basis_file(tmp_path / "base-a", targets[0].name, 0.6)
    for make in (Path.mkdir, os.mkfifo):
        path.parent.mkdir(exist_ok=True)
        make(path)
        with pytest.raises(ArtifactError, match=f"{path.name} is a .*expected a regular file"):
            weight_basis_files(model, targets, EPS, path.parent)
        shutil.rmtree(path.parent)


def test_the_plan_passes_over_what_it_cannot_read(bases: Bases, tmp_path: Path) -> None:
    path = next(iter(bases[2].values()))
    assert weight_basis_size(path) == load_file(path)["basis"].shape[1]
    for damage in (truncated, empty, another_name):
        copy = Path(shutil.copyfile(path, tmp_path / damage.__name__))
        damage(copy, path)
        assert weight_basis_size(copy) is None
    assert weight_basis_size(tmp_path / "nothing") is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_base_with_nan_in_a_weight_is_named(bases: Bases, tmp_path: Path, value: float) -> None:
    model, targets, _ = bases
    weight = model.get_submodule(targets[1].name).weight
    kept = float(weight[0, 0])
    with torch.no_grad():
        weight[0, 0] = value
    try:
        with pytest.raises(TargetError, match=rf"{targets[1].name} holds NaN or infinite values.*fetch it again"):
            weight_basis_files(model, targets, EPS, tmp_path / "base-c")
    finally:
        with torch.no_grad():
            weight[0, 0] = kept


def test_sizes_are_read_from_headers(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As wide as what is loaded: with all three parts, a module that a stage did not reach, and nothing protected."""
    _, (first, second), files = bases
    general, features = tmp_path / "general.safetensors", tmp_path / "features.safetensors"
    save_file({t.name: torch.zeros(t.in_features, 3) for t in (first, second)}, general)
    save_file({first.name: torch.zeros(first.in_features, 5)}, features)
    whole = ProtectedBases(files, general, [features, features], torch.device("cpu"))
    none = ProtectedBases({}, None, [], torch.device("cpu"))
    widths = [bases.load(t).shape[1] for bases in (whole, none) for t in (first, second)]
    monkeypatch.setattr(protected_bases, "_read_if_there", None)  # what reads a whole tensor
    found = [bases.sizes(t) for bases in (whole, none) for t in (first, second)]
    assert [sum(sizes) for sizes in found] == widths
    assert found[0][1:] == (3, 10) and found[1][1:] == (3, 0) and found[2] == found[3] == (0, 0, 0)
    with pytest.raises(ArtifactError, match="cannot read .*delete it to have it computed again"):
        ProtectedBases({first.name: tmp_path / "gone"}, None, [], torch.device("cpu")).sizes(first)
