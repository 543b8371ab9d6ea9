"""PEFT adapters from their directories, checked: what is in the file is what the model takes, all of it.

Stock `PeftModel.from_pretrained` leaves a factor that it finds no tensor for at B = 0 and passes over a tensor that it
finds no module for. An adapter with other names is then the bare base, without a word (peft#2566). Some
initialisations moreover rewrite the base in place when they are loaded. So the tensors are read here, compared with
the model's modules, and attached by `attach`, which only ever adds.
"""

import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import CONFIG_NAME as CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mllm_keeplora.modeling.adapters import ACCUMULATED, AdapterError, Factors, attach
from mllm_keeplora.modeling.families import FAMILIES
from mllm_keeplora.runs.files import ArtifactError, check_hashes, check_regular, read_json
from mllm_keeplora.runs.run_directory import ADAPTER_HASHES, CARD_FILES

logger = logging.getLogger(__name__)

_LARGEST = 1e9  # of a rank or an alpha, far beyond any sensible one
_PREFIX = "base_model.model."
_VISION = {
    name.removeprefix("model.").partition(".")[0] for f in FAMILIES.values() for name in f.vision_layers.values()
}
_OF_VISION = re.compile(rf"\b({'|'.join(sorted(_VISION))})\.")
# Of a LoRA config, what W x + s B A x is made of, and what says nothing about it.
_UNDERSTOOD = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path"),
}
_NO_MATTER = {
    *(
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("lora_dropout", "runtime_config", "megatron_config", "megatron_core", "ensure_weight_tying", "fan_in_fan_out"),
}
# They leave the base as it is; a config that was saved after PEFT's conversion says true.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


class StoredAdapter(NamedTuple):
    """An adapter as its directory holds it.

    Attributes:
        factors: module name -> (A [r, in], B [out, r]), fp32 on the CPU.
        scales: module name -> s in W x + s B A x.
    """

    factors: Factors
    scales: dict[str, float]

    @property
    def is_untrained(self) -> bool:
        """Whether B A = 0 everywhere: it changes nothing."""
        return not any(a.any() and b.any() for a, b in self.factors.values())


class AdapterFacts(NamedTuple):
    """What an adapter's file says of itself; no model is needed.

    Attributes:
        ranks: module name -> rank.
        dtype: of the factors, such as `F32`.
    """

    ranks: dict[str, int]
    dtype: str

    @property
    def names(self) -> set[str]:
        """Of its modules."""
        return {*self.ranks}

    @property
    def rank(self) -> int:
        """The largest."""
        return max(self.ranks.values())

    @property
    def is_uniform(self) -> bool:
        """Whether all modules have one rank."""
        return len({*self.ranks.values()}) == 1

    @property
    def vision_modules(self) -> int:
        """How many of its modules lie in the vision tower."""
        return sum(bool(_OF_VISION.search(name)) for name in self.ranks)


def adapter_facts(weights: Path) -> AdapterFacts:
    """Reads the header of adapter_model.safetensors.

    Raises:
        ArtifactError: the file is missing, damaged, or holds no factors.
    """
    try:
        with safe_open(check_regular(weights), "pt") as file:
            keys = list(file.keys())
            slices = {key: file.get_slice(key) for key in keys if key.endswith(".lora_A.weight")}
            ranks = {key: part.get_shape()[0] for key, part in slices.items()}
            dtypes = {part.get_dtype() for part in slices.values()}
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read {weights}: {error}; start its run again, which writes it") from error
    if not ranks:
        raise ArtifactError(f"{weights} holds no factors of an adapter; start its run again, which writes it")
    named = {key.removeprefix(_PREFIX).removesuffix(".lora_A.weight"): rank for key, rank in ranks.items()}
    return AdapterFacts(named, " and ".join(sorted(dtypes)))


def read_adapter(model: PreTrainedModel, directory: Path, base_model: str) -> StoredAdapter:
    """Reads a PEFT LoRA adapter for a model, which stays as it is.

    Args:
        model: the base, without adapters.
        directory: with adapter_config.json and adapter_model.safetensors.
        base_model: what the base is called; an adapter that names another one is told of.

    Raises:
        AdapterError: no plain LoRA adapter, or one whose pairs (A, B) are not those that the model takes.
        ArtifactError: a run's adapter of which a file was changed.
    """
    config = _read_config(directory)
    tensors = _read_tensors(directory)
    converted = convert_peft_adapter_state_dict_for_transformers(model, config, tensors)
    modules = dict(model.named_modules())
    pairs = _pairs(_without_copies_of_the_base(converted, modules), directory)
    _check_names(pairs, _wanted(config, modules, directory), modules, directory)
    for name, (a, b) in pairs.items():
        _check_pair(name, a, b, modules[name], config, directory)
    _say_other_base(config, base_model, directory)
    stored = StoredAdapter(
        {name: (a.float(), b.float()) for name, (a, b) in pairs.items()},
        {name: _scale(config, name) for name in pairs},
    )
    zero = [name for name, (a, b) in stored.factors.items() if not (a.any() and b.any())]
    if zero:
        logger.warning(f"adapter {directory}: {len(zero)} of {len(pairs)} updates are zero, {zero[0]} first")
    return stored


def read_initial_adapter(model: PreTrainedModel, directory: Path, base_model: str) -> Factors:
    """Factors of an adapter with the scales absorbed in B: the past of a stream that starts from it.

    Raises:
        AdapterError: see `read_adapter`; or the adapter was never trained.
    """
    stored = read_adapter(model, directory, base_model)
    _refuse_untrained(stored, directory)
    scaled = {name: (a, b * stored.scales[name]) for name, (a, b) in stored.factors.items()}
    beyond = [name for name, (_, b) in scaled.items() if not torch.isfinite(b).all()]
    if beyond:
        raise AdapterError(
            f"adapter {directory}: {beyond[0]}: B times its scale {stored.scales[beyond[0]]} is infinite"
        )
    return scaled


def load_adapter(
    model: PreTrainedModel, directory: Path, base_model: str, *, may_be_untrained: bool = False
) -> PeftModel:
    """The model with an adapter on it, in eval mode; its weights are not touched.

    Args:
        model: the base, without adapters.
        directory: of the adapter.
        base_model: see `read_adapter`.
        may_be_untrained: accept B A = 0, which a run leaves whose method has learnt nothing so far.

    Raises:
        AdapterError: see `read_adapter`; or the adapter was never trained.
    """
    stored = read_adapter(model, directory, base_model)
    if not may_be_untrained:
        _refuse_untrained(stored, directory)
    adapted = attach(model, ACCUMULATED, stored.factors, stored.scales)
    adapted.eval()
    return adapted


def _refuse_untrained(stored: StoredAdapter, directory: Path) -> None:
    if stored.is_untrained:
        raise AdapterError(
            f"adapter {directory} changes nothing: B A is zero in all {len(stored.factors)} modules. It was saved "
            "before it was trained; name a trained one, or none"
        )


def _read_config(directory: Path) -> LoraConfig:
    """The description of a plain LoRA adapter: whatever else it asks for is refused, not passed over."""
    if not (directory / CONFIG).is_file():
        raise AdapterError(f"adapter {directory} has no {CONFIG}: name the directory of a PEFT adapter")
    if (directory / ADAPTER_HASHES).exists():
        check_hashes(directory / ADAPTER_HASHES, "start its run again, which puts its adapter together", CARD_FILES)
    try:
        values = read_json(directory / CONFIG)
    except ArtifactError as error:
        raise AdapterError(str(error)) from error
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        found = values.get("peft_type") if isinstance(values, dict) else values
        raise AdapterError(
            f"adapter {directory}: peft_type is {found!r}, expected 'LORA'; an update of another kind is no product "
            "B A. Merge it into its base (merge_and_unload) and name that as the base model"
        )
    _check_plain(values, directory)
    _check_scaling(values, directory)
    try:
        return LoraConfig(**{key: values[key] for key in _UNDERSTOOD & values.keys()}, peft_type="LORA")
    except (TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"adapter {directory}: {CONFIG} cannot be used: {error}") from error


def _check_plain(values: Mapping[str, Any], directory: Path) -> None:
    start = values.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _PLAIN_STARTS:
        raise AdapterError(
            f"adapter {directory}: init_lora_weights {start!r} goes with a base whose weights it has rewritten, not "
            "with the base itself. Save it again as plain LoRA: "
            "model.save_pretrained(DIR, path_initial_model_for_weight_conversion=ITS_FIRST_STATE)"
        )
    defaults = {f.name: f.default if f.default is not MISSING else None for f in fields(LoraConfig)}
    extra = [
        f"{key}: {value!r}"
        for key, value in values.items()
        if key not in _UNDERSTOOD | _NO_MATTER and value and value != defaults.get(key)
    ]
    if extra:
        raise AdapterError(
            f"adapter {directory}: only plain LoRA (W x + s B A x) can be read exactly, this one also has "
            f"{', '.join(extra)}. Merge it into its base (merge_and_unload) and name that as the base model"
        )


def _check_scaling(values: Mapping[str, Any], directory: Path) -> None:
    """What s is made of: PEFT takes any value, so that the text "false" is true and alpha 0 the bare base."""
    found = {key: values[key] for key in ("r", "lora_alpha") if key in values}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = values.get(key) or {}
        try:
            found |= {f"{key}.{re.compile(name).pattern}": number for name, number in patterns.items()}
        except (re.error, AttributeError) as error:
            raise AdapterError(f"adapter {directory}: {key} in {CONFIG} cannot be used: {error}") from error
    for key, number in found.items():
        kinds = (int,) if key.startswith("r") else (int, float)
        is_number = isinstance(number, kinds) and not isinstance(number, bool) and abs(number) < _LARGEST
        if not is_number or number == 0:
            raise AdapterError(
                f"adapter {directory}: {key} is {number!r} in {CONFIG}, expected a number other than 0, whole for a "
                "rank; save the adapter again"
            )
    if not isinstance(values.get("use_rslora") or False, bool):
        raise AdapterError(
            f"adapter {directory}: use_rslora is {values['use_rslora']!r} in {CONFIG}, expected true or false"
        )


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS
    if not path.exists():
        pickled = sorted(file.name for file in (*directory.glob("*.bin"), *directory.glob("*.pt")))
        raise AdapterError(
            f"adapter {directory} has no {WEIGHTS}"
            + (f", only {pickled[0]}; convert it first, pickled weights are not read" if pickled else "")
        )
    try:
        return load_file(check_regular(path))
    except (OSError, SafetensorError, ArtifactError) as error:
        raise AdapterError(f"adapter {directory}: {WEIGHTS} cannot be read: {error}; copy it again") from error


def _without_copies_of_the_base(tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """PEFT saves an adapted output layer's own weight beside its factors; one that was changed is not left out."""

    def is_copy(key: str, tensor: Tensor) -> bool:
        module = modules.get(key.removeprefix(_PREFIX).removesuffix(".base_layer.weight"))
        if not key.endswith(".base_layer.weight") or not isinstance(module, nn.Linear):
            return False
        weight = module.weight.detach().cpu()
        return weight.shape == tensor.shape and torch.equal(weight, tensor.to(weight.dtype))

    return {key: tensor for key, tensor in tensors.items() if not is_copy(key, tensor)}


def _pairs(tensors: Mapping[str, Tensor], directory: Path) -> Factors:
    """Module name -> (A, B), from PEFT's names; every tensor belongs to a pair."""
    halves: dict[str, dict[str, Tensor]] = {}
    other = []
    for key, tensor in tensors.items():
        module, _, rest = key.removeprefix(_PREFIX).partition(".lora_")
        if key.startswith(_PREFIX) and rest in ("A.weight", "B.weight"):
            halves.setdefault(module, {})[rest[0]] = tensor
        else:
            other.append(key)
    if other:
        raise AdapterError(
            f"adapter {directory}: {len(other)} of {len(tensors)} tensors are no factors of a linear layer, "
            f"{other[0]!r} first; expected {_PREFIX}MODULE.lora_A.weight and .lora_B.weight alone"
        )
    half = [f"{name} (lora_{next(iter(found))} alone)" for name, found in halves.items() if len(found) == 1]
    if half:
        raise AdapterError(
            f"adapter {directory}: {len(half)} of {len(halves)} modules have half a pair, {half[0]} first; the file "
            "is incomplete, save the adapter again"
        )
    if not halves:
        raise AdapterError(f"adapter {directory}: {WEIGHTS} holds no tensor; save the adapter again")
    return {name: (found["A"], found["B"]) for name, found in halves.items()}


def _wanted(config: LoraConfig, modules: Mapping[str, nn.Module], directory: Path) -> list[str]:
    """The modules on which PEFT would put this adapter."""
    if config.target_modules == "all-linear":  # PEFT leaves the output layer out
        return [name for name, module in modules.items() if isinstance(module, nn.Linear) and name != "lm_head"]
    try:
        return [name for name in modules if name and check_target_module_exists(config, name)]
    except (re.error, TypeError) as error:
        raise AdapterError(f"adapter {directory}: target_modules in {CONFIG} cannot be used: {error}") from error


def _check_names(pairs: Factors, wanted: Collection[str], modules: Collection[str], directory: Path) -> None:
    unknown, missing = [n for n in pairs if n not in wanted], [n for n in wanted if n not in pairs]
    parts = []
    if unknown:
        parts.append(f"{len(unknown)} of the file's {len(pairs)} modules are not taken, {unknown[0]!r} first")
    if missing:
        parts.append(f"{len(missing)} modules that its target_modules name are not in the file, {missing[0]!r} first")
    if parts:
        remedy = _other_names(unknown, missing)
        if remedy is None and all(name in modules for name in unknown):
            remedy = f"Name in {CONFIG}'s target_modules what was trained, no more and no less, or save it again"
        remedy = remedy or "It was made on another base model; name the one that it was made on"
        raise AdapterError(f"adapter {directory} does not fit the model: {'; '.join(parts)}. {remedy}")


def _other_names(unknown: Sequence[str], missing: Sequence[str]) -> str | None:
    """What to rename, where the file has other names for the same layers."""
    for name in unknown:
        tail = name.split(".")
        start = tail.index("layers") if "layers" in tail else len(tail)
        end = "".join(f".{part}" for part in tail[start:])
        same = [other for other in missing if end and other.endswith(end)]
        if same:
            there, here = name.removesuffix(end), " or ".join(repr(other.removesuffix(end)) for other in same)
            return (
                f"The file says {there!r} where this model says {here}: it was saved from a text-only model or by "
                f"transformers before 4.52. If it was made on this base, rename its tensors in {WEIGHTS}"
            )
    return None


def _check_pair(name: str, a: Tensor, b: Tensor, module: nn.Module, config: LoraConfig, directory: Path) -> None:
    where = f"adapter {directory}: {name}"
    if not isinstance(module, nn.Linear):
        raise AdapterError(f"{where} is a {type(module).__name__} of the model; only linear layers can be adapted")
    rank = _by_pattern(config.rank_pattern, name, config.r)
    found, expected = (tuple(a.shape), tuple(b.shape)), ((rank, module.in_features), (module.out_features, rank))
    if found != expected:
        raise AdapterError(
            f"{where}: A and B are {found[0]} and {found[1]}, expected {expected[0]} and {expected[1]} (rank {rank} "
            f"says {CONFIG}, the rest the model); it was made on another base model or with another rank"
        )
    for letter, factor in (("A", a), ("B", b)):
        if factor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise AdapterError(
                f"{where}: {letter} holds {factor.dtype}, expected a floating point type of 16 bits or more"
            )
        if not torch.isfinite(factor).all():
            raise AdapterError(f"{where}: {letter} holds NaN or infinite values; its training diverged, take another")


def _scale(config: LoraConfig, name: str) -> float:
    rank = _by_pattern(config.rank_pattern, name, config.r)
    alpha = _by_pattern(config.alpha_pattern, name, config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    return (patterns or {}).get(get_pattern_key(list(patterns or {}), name), default)


def _say_other_base(config: LoraConfig, base_model: str, directory: Path) -> None:
    """A path says little; its last part is the model's name on the hub and in most folders."""
    made_on = config.base_model_name_or_path
    if made_on and Path(str(made_on)).name != Path(base_model).name:
        logger.warning(f"adapter {directory} was made on {made_on}, and the base is {base_model}: is that the same?")
