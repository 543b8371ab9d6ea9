"""LoRA factors on a model through PEFT: attach, activate, freeze, read back.

Two adapters can be present. `default` is the accumulated past (PEFT saves an adapter of that name at the
top of its directory, where every PEFT user looks for it), `stage` is what the running stage learns. All
factors are fp32.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from mllm_keeplora.errors import KeepLoRAError

ACCUMULATED = "default"
STAGE = "stage"

# Module name -> (A [r, in], B [out, r]), the update being scale * B A.
Factors = dict[str, tuple[Tensor, Tensor]]
Trainable = Literal["none", "A", "B", "both"]


Model = PreTrainedModel | PeftModel


class AdapterError(KeepLoRAError, ValueError):
    """Factors that do not fit the model they are attached to."""


def attach(
    model: nn.Module,
    adapter: str,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    scales: Mapping[str, float],
    dropout: float = 0.0,
) -> PeftModel:
    """Adds an adapter with given factors; the base and other adapters stay as they are.

    Args:
        model: a base model, or the PeftModel of an earlier call.
        adapter: its PEFT name.
        factors: module name -> (A [r, in], B [out, r]); ranks may differ between modules.
        scales: module name -> s in W x + s B A x. PEFT computes alpha / r, hence alpha = s r per module.
        dropout: on the input of A.

    Returns:
        The PeftModel, with this adapter alone active and everything frozen: see `activate`.

    Raises:
        AdapterError: no factors, or a shape that does not fit its module.
    """
    if not factors:
        raise AdapterError(f"adapter {adapter!r} has no module: nothing to attach")
    ranks = {name: a.shape[0] for name, (a, _) in factors.items()}
    alphas = {name: scales[name] * rank for name, rank in ranks.items()}
    # One rank and alpha for all but the exceptions: PEFT matches every module against every pattern.
    (rank, alpha), _ = Counter((ranks[name], alphas[name]) for name in factors).most_common(1)[0]
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),
        target_modules=list(factors),
        # The keys are regular expressions matched at the end of a module's name: `layers.2.q_proj` would hit
        # both towers.
        rank_pattern={_exactly(name): r for name, r in ranks.items() if r != rank},
        alpha_pattern={_exactly(name): a for name, a in alphas.items() if a != alpha},
        lora_dropout=dropout,
        bias="none",
    )
    # PEFT's own factors are made without storage: random numbers for them would only be overwritten.
    if isinstance(model, PeftModel):
        model.add_adapter(adapter, config, low_cpu_mem_usage=True)
        peft_model = model
    else:
        peft_model = PeftModel(cast(Any, model), config, adapter_name=adapter, low_cpu_mem_usage=True)
    _write(peft_model, adapter, factors)
    activate(peft_model, [adapter])
    return peft_model


def _exactly(name: str) -> str:
    return "^" + re.escape(name)


@torch.no_grad()
def _write(model: PeftModel, adapter: str, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, pair in factors.items():
        parameters = factor_parameters(model, adapter, name)
        layer = cast(LoraLayer, model.get_base_model().get_submodule(name))
        device = cast(nn.Linear, layer.base_layer).weight.device
        for tensor, parameter, factor in zip(pair, parameters, "AB", strict=True):
            if tensor.shape != parameter.shape:
                raise AdapterError(
                    f"{name}: {factor} is {tuple(tensor.shape)}, the model takes {tuple(parameter.shape)}"
                )
            given = tensor.detach().to(device, torch.float32, copy=True)
            own = {"A": layer.lora_A, "B": layer.lora_B}[factor][adapter]
            own.weight = nn.Parameter(given, parameter.requires_grad)


def factor_parameters(model: PeftModel, adapter: str, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """The live factors (A [r, in], B [out, r]) of an adapter on base module `name`.

    Raises:
        AdapterError: the module carries no LoRA layer.
    """
    layer = model.get_base_model().get_submodule(name)
    if not isinstance(layer, LoraLayer):
        raise AdapterError(f"{name} is a {type(layer).__name__} without a LoRA adapter")
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    return cast(nn.Parameter, a.weight), cast(nn.Parameter, b.weight)


def live_factors(model: PeftModel, adapter: str) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Name -> `factor_parameters`, of every module that carries the adapter: one without room in a stage does not."""
    modules = model.get_base_model().named_modules()
    carrying = [name for name, module in modules if isinstance(module, LoraLayer) and adapter in module.lora_A]
    return {name: factor_parameters(model, adapter, name) for name in carrying}


def activate(
    model: PeftModel, adapters: Sequence[str], train: str | None = None, trainable: Trainable = "none"
) -> list[str]:
    """Makes exactly `adapters` take part in the forward result and exactly the named factors trainable.

    PEFT's `set_adapter` makes A and B of every active adapter trainable again, hence freezing comes after it.

    Args:
        model: the PeftModel; modified in place.
        adapters: names, in the order in which their outputs are added.
        train: the adapter that trains, if any.
        trainable: which of its factors.

    Returns:
        Names of the trainable parameters.
    """
    cast(Any, model.base_model).set_adapter(list(adapters))
    model.requires_grad_(False)
    wanted = {"none": (), "A": ("lora_A",), "B": ("lora_B",), "both": ("lora_A", "lora_B")}[trainable]
    names = []
    for name, parameter in model.named_parameters():
        if any(f".{factor}.{train}." in name for factor in wanted):
            parameter.requires_grad_(True)
            names.append(name)
    return names


def read_factors(model: PeftModel, adapter: str, names: Sequence[str]) -> Factors:
    """Copies of an adapter's factors, fp32 on the CPU."""
    factors = {}
    for name in names:
        a, b = factor_parameters(model, adapter, name)
        factors[name] = (a.detach().float().cpu().clone(), b.detach().float().cpu().clone())
    return factors


def base_of(model: nn.Module) -> nn.Module:
    """The base model, whether or not adapters are on it; its layers carry them."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def attach_accumulated(model: PreTrainedModel, accumulated: Factors) -> Model:
    """The current model: the base, or the base with the folded past (E7)."""
    return attach(model, ACCUMULATED, accumulated, dict.fromkeys(accumulated, 1)) if accumulated else model


def detach(model: Model) -> None:
    """Takes every adapter off again."""
    if isinstance(model, PeftModel):
        model.unload()


def active_adapters(model: Model) -> list[str]:
    """The adapters that take part in the forward result; none on the bare base."""
    return list(model.active_adapters) if isinstance(model, PeftModel) else []


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The bare base inside the block; what is active and what trains stays as it is.

    PEFT's own `disable_adapter` makes A and B of every active adapter trainable when the block ends.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Sets every dropout probability to 0 inside the block, so that train() mode is deterministic."""
    saved = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    for module, _ in saved:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in saved:
            module.p = p
