"""Input activations of linear layers, sketched like task gradients: Y = Omega^T X.

X [tokens, in] stacks what a layer reads over all tokens of a sample. Omega [tokens, q] is Gaussian. So Y [q, in] is
the input-side range sketch of X, and Y^T Y / q estimates X^T X. E4 and E8 take such a sketch where they take one of
gradients. They then find the directions that a task's inputs occupy, not those along which its loss changes a weight.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mllm_keeplora.distributed.processes import process_index, sum_of_all
from mllm_keeplora.modeling.loss import supervised_positions
from mllm_keeplora.modeling.precision import exact_products
from mllm_keeplora.modeling.targets import Target
from mllm_keeplora.probes.gradients import Batches, GradientError, module_generator
from mllm_keeplora.probes.hooks import hooked


@torch.no_grad()
def sketch_inputs(
    model: nn.Module, targets: Sequence[Target], columns: Mapping[str, int], batches: Batches, seed: int
) -> dict[str, Tensor]:
    """Y = Omega^T X / sqrt(tokens) of every target at the current model.

    Cost: one forward per batch and a Gaussian matrix [tokens, q] per module and batch. Padding is left out;
    every image patch counts as a token in a vision tower.

    Args:
        model: base model, or a PeftModel with the adapters that belong to the current model.
        targets: the layers to measure.
        columns: q per module name.
        batches: returns an iterable of model inputs with `attention_mask` and `labels` [batch, length], on
            the model's device: this process's share. A batch without a supervised token counts for nothing.
        seed: of Omega.

    Returns:
        Module name -> Y [q, in], fp32 on the CPU, the same on all processes.

    Raises:
        GradientError: a module that no token reaches, or inputs with NaN.
    """
    device = next(model.parameters()).device
    exact_products(device)
    sums = {t.name: torch.zeros(columns[t.name], t.in_features, device=device) for t in targets}
    tokens = dict.fromkeys(sums, 0)
    towers = {t.name: t.tower for t in targets}
    generators = {name: module_generator(seed, f"{process_index()}/{name}", device) for name in sums}
    # Of the current batch: the shape of its mask, and which rows it keeps; empty for one that only keeps a collective
    # going. The host waits for the device once a batch, to know their number.
    kept: list[tuple[torch.Size, Tensor]] = []

    def add(name: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Adds what a module is about to read [.., in] to its sketch; a hook before its forward."""
        if not kept:
            return
        inputs, (shape, places) = arguments[0], kept[0]
        rows = inputs.reshape(-1, inputs.shape[-1])
        if towers[name] == "language" and inputs.shape[:-1] == shape:
            rows = rows[places]
        omega = torch.randn(len(rows), columns[name], generator=generators[name], device=device)
        with torch.autocast(device.type, enabled=False):
            sums[name] += omega.T @ rows.float()
        tokens[name] += len(rows)

    model.eval()
    with hooked(model, {name: partial(add, name) for name in sums}, "before"):
        for batch in batches():
            mask = batch["attention_mask"] * supervised_positions(batch["labels"]).any()
            places = mask.flatten().nonzero().squeeze(1)
            kept[:] = [(mask.shape, places)] if len(places) else []
            model(**{key: value for key, value in batch.items() if key not in ("labels", "shift_labels")})
    return {name: _mean(name, sums[name], tokens[name]) for name in sums}


def _mean(name: str, own: Tensor, tokens: int) -> Tensor:
    total = int(sum_of_all(torch.tensor(tokens, device=own.device)))
    if total == 0:
        raise GradientError(
            f"{name} received no input: no sample of the probe passes through it. Raise probe.fraction or "
            "probe.max_samples until some do, or leave the module out of the tower's targets"
        )
    sketch = sum_of_all(own) / total**0.5
    if not torch.isfinite(sketch).all():
        raise GradientError(f"{name}: its inputs have NaN or infinite entries")
    return sketch.cpu()
