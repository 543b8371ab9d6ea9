"""The protected basis M of every module, from files: its weight basis (cached), a feature basis per stage."""

import json
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mllm_keeplora.config import ModelConfig, Tower
from mllm_keeplora.distributed.processes import own_share, wait_for_everyone
from mllm_keeplora.distributed.progress import progress
from mllm_keeplora.linalg.subspace import principal_basis
from mllm_keeplora.modeling.families import TargetError
from mllm_keeplora.modeling.linear4bit import computed_weight
from mllm_keeplora.modeling.precision import exact_products
from mllm_keeplora.modeling.targets import Target
from mllm_keeplora.runs.files import ArtifactError, check_regular, save_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProtectedBases:
    """M per module, read from disk one module at a time (a 7B model's bases are gigabytes).

    Attributes:
        weight_files: module name -> file with its weight basis; empty for a method that protects nothing.
        general_file: directions of general inputs per module (G2); None where none are protected.
        feature_files: one file per past stage, oldest first, with the directions that the stage added per
            module.
        device: where bases are put.
    """

    weight_files: Mapping[str, Path]
    general_file: Path | None
    feature_files: Sequence[Path]
    device: torch.device

    def load(self, target: Target) -> Tensor:
        """M, [in, k_w + k_g + k_f] fp32; [in, 0] when nothing is protected."""
        parts = [self.weight_basis(target), self.general_basis(target)]
        for path in self.feature_files:
            parts += _read_if_there(path, target.name, self.device)
        return torch.cat(parts, dim=1)

    def sizes(self, target: Target) -> tuple[int, int, int]:
        """(k_w, k_g, k_f), of which the files' headers alone are read."""
        weight = self.weight_files.get(target.name)
        k_w = [] if weight is None else _columns_if_there(weight, "basis")
        k_g = [] if self.general_file is None else _columns_if_there(self.general_file, target.name)
        k_f = [k for path in self.feature_files for k in _columns_if_there(path, target.name)]
        return sum(k_w), sum(k_g), sum(k_f)

    def general_basis(self, target: Target) -> Tensor:
        """Directions of general inputs beside U_w, [in, k_g] fp32; [in, 0] where none are protected."""
        found = _read_if_there(self.general_file, target.name, self.device) if self.general_file else []
        return found[0] if found else torch.zeros(target.in_features, 0, device=self.device)

    def weight_basis(self, target: Target) -> Tensor:
        """U_w, [in, k_w] fp32."""
        if target.name not in self.weight_files:
            return torch.zeros(target.in_features, 0, device=self.device)
        return _read(self.weight_files[target.name], "basis", self.device)


def _read(path: Path, name: str, device: torch.device) -> Tensor:
    """One tensor of a file, without the others."""
    found = _read_if_there(path, name, device)
    if not found:
        raise ArtifactError(f"{path} has no tensor {name!r}; delete it to have it computed again")
    return found[0]


def _read_if_there(path: Path, name: str, device: torch.device) -> list[Tensor]:
    """The tensor of that name, or nothing: a stage adds no directions to a module that its data do not
    reach."""
    with _opened(path, device) as file:
        return [file.get_tensor(name)] if name in file.keys() else []  # noqa: SIM118


def _columns_if_there(path: Path, name: str) -> list[int]:
    """How many columns that tensor has, likewise."""
    with _opened(path, torch.device("cpu")) as file:
        return [file.get_slice(name).get_shape()[1]] if name in file.keys() else []  # noqa: SIM118


@contextmanager
def _opened(path: Path, device: torch.device) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except (FileNotFoundError, SafetensorError) as error:
        raise ArtifactError(f"cannot read {path}: {error}; delete it to have it computed again") from error


def weight_basis_directory(cache_dir: Path, base_hash: str, config: ModelConfig) -> Path:
    """Where the weight bases of a base model lie, for the weights that it computes with."""
    return cache_dir / "weight_bases" / f"{base_hash[:16]}-{config.quantization}-{config.compute_dtype}"


def weight_basis_file(directory: Path, module: str, eps_w: float) -> Path:
    """The file of one module's weight basis; its `basis` is [in, k_w] fp32."""
    return directory / f"{module}-eps{eps_w!r}.safetensors"


def weight_basis_size(file: Path) -> int | None:
    """k_w of the weight basis in a file, of which the header alone is read; None where there is no sound one."""
    try:
        with safe_open(check_regular(file), framework="pt") as opened:
            return int(opened.get_slice("basis").get_shape()[1])
    except (OSError, SafetensorError, IndexError):
        return None


def weight_basis_files(
    model: nn.Module, targets: Sequence[Target], eps_w: Mapping[Tower, float], directory: Path
) -> dict[str, Path]:
    """Computes the weight bases that `directory` does not hold as they were written (E1), one layer at a time.

    Several processes share the modules; each basis is one process's file, which all read.

    Cost: per module one Gram product and one symmetric eigenproblem of size min(out, in); afterwards a file
    read.

    Args:
        model: the base model without adapters.
        targets: the adapted layers.
        eps_w: energy share per tower.
        directory: `weight_basis_directory`.

    Returns:
        Module name -> file with `basis` [in, k_w] fp32.

    Raises:
        ArtifactError: something else than a file in a basis's place.
        TargetError: a weight with NaN or infinite values.
        PrecisionError: a device whose fp32 products are not.
    """
    exact_products(next(model.parameters()).device)
    files = {t.name: weight_basis_file(directory, t.name, eps_w[t.tower]) for t in targets}
    wait_for_everyone()  # nobody looks at what another one is writing
    missing = [target for target in own_share(targets) if not _is_sound(files[target.name], target)]
    for target in progress("weight bases", "modules", missing):
        weight = computed_weight(model.get_submodule(target.name))
        if not torch.isfinite(weight).all():
            raise TargetError(
                f"the base model's weight of {target.name} holds NaN or infinite values; its file is damaged or its "
                "training diverged: fetch it again, or take another"
            )
        basis = principal_basis(weight, eps_w[target.tower]).cpu().contiguous()
        facts = _facts(files[target.name], basis)
        save_tensors(files[target.name], {"basis": basis}, {"basis": json.dumps(facts)})
    wait_for_everyone()
    return files


def _facts(file: Path, basis: Tensor) -> dict[str, Any]:
    """What a file says of its basis: of which base, module and energy share it is, and its checksum.

    A file that is copied or renamed to another place is not the one that is expected there.
    """
    return {"of": f"{file.parent.name}/{file.stem}", "crc32": zlib.crc32(basis.numpy().data)}


def _is_sound(file: Path, target: Target) -> bool:
    """Whether the file holds the basis that was written for this place; a bit flip in it would go unnoticed else."""
    if not check_regular(file).exists():
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            basis, said = opened.get_tensor("basis"), json.loads((opened.metadata() or {})["basis"])
            sound = len(basis) == target.in_features and said == _facts(file, basis)
    # A header that is no JSON object of ours is a ValueError, KeyError or TypeError.
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        logger.warning(f"{file} is not as it was written, or by another version; it is computed again")
    return sound
