"""Hooks on the layers of a model for as long as a probe lasts."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from mllm_keeplora.modeling.adapters import base_of


@contextmanager
def hooked(
    model: nn.Module, hooks: Mapping[str, Callable[..., Any]], when: Literal["before", "after"]
) -> Iterator[None]:
    """Registers one hook a layer and takes all of them off again.

    Args:
        model: base model, or a PeftModel: then the hooks see a layer together with its adapters.
        hooks: module name in the base model -> torch's forward pre-hook or forward hook.
        when: the layer computes, the hook runs.
    """
    base, handles = base_of(model), []
    try:
        for name, hook in hooks.items():
            layer = base.get_submodule(name)
            register = layer.register_forward_pre_hook if when == "before" else layer.register_forward_hook
            handles.append(register(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
