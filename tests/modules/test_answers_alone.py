"""Logits are made at supervised positions alone, in every pass that learns or measures; pixels travel as computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mllm_keeplora.data.collator import ChatCollator, ready_batch
from mllm_keeplora.modeling.adapters import STAGE, activate, attach
from mllm_keeplora.modeling.families import Media
from mllm_keeplora.modeling.loading import load_base
from mllm_keeplora.modeling.loss import IGNORED_LABEL, answers_alone, reply_logits, supervised_positions
from mllm_keeplora.modeling.targets import find_targets
from mllm_keeplora.probes.activations import sketch_inputs
from mllm_keeplora.probes.gradients import sketch_gradients
from tests.conversations import Turn, sample
from tests.modules.conftest import BOTH_TOWERS, all_targets, batch, model_config
from tests.modules.test_families import CASES, reader, samples, several
from tests.modules.test_training import prepare, train

CPU = torch.device("cpu")


@contextmanager
def positions_with_logits(model: nn.Module) -> Iterator[list[int]]:
    """How many positions the vocabulary's layer is asked for, forward by forward."""
    seen: list[int] = []
    head = next(module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "lm_head")
    with head.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:-1].numel())):
        yield seen


def loss_and_gradients(model: Any, inputs: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs, num_items_in_batch=3).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family, media", CASES)
def test_loss_and_gradients_are_those_of_all_positions(
    family: str,
    media: Media,
    tiny: Any,
    media_root: Path,
) -> None:
    """In batches of one and several turns, of answers of unequal length, and with text alone."""
    model, processor = load_base(model_config(tiny(family), "nf4"))
    targets = find_targets(model, BOTH_TOWERS, media=[media])
    torch.manual_seed(0)
    factors = {t.name: (0.1 * torch.randn(2, t.in_features), 0.1 * torch.randn(t.out_features, 2)) for t in targets}
    adapted = attach(model, STAGE, factors, dict.fromkeys(factors, 1.0))
    activate(adapted, [STAGE], STAGE, "both")
    collator = ChatCollator(processor, None, reader())
    text = sample("text", None, (Turn("is it ?", "no yes no"),))
    for shown in (samples(media_root, media)[:3], [several(media_root, media, 0), text], [text]):
        whole = collator(shown)
        expected, exact = loss_and_gradients(adapted, whole)
        with positions_with_logits(adapted) as seen:
            found, gradients = loss_and_gradients(adapted, answers_alone(whole))
        longest = int(supervised_positions(whole["labels"]).sum(1).max())
        assert seen == [len(shown) * longest] and longest < whole["labels"].shape[1]
        assert found == pytest.approx(expected, rel=1e-5)
        assert gradients.keys() == exact.keys() and len(exact) > 2
        for name, gradient in exact.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("family, media", CASES)
def test_replies_have_their_logits_bit_for_bit_and_pixels_travel_rounded(
    family: str,
    media: Media,
    tiny: Any,
    media_root: Path,
) -> None:
    """The model rounds pixels to its own dtype first; so they may come in it, in half the bytes."""
    model, processor = load_base(model_config(tiny(family), "none"))
    model.to(torch.bfloat16)
    whole = ChatCollator(processor, None, reader())(samples(media_root, media)[:3])
    ready = ready_batch(whole, model.dtype)
    pixels = [key for key in whole if key.startswith("pixel_values")]
    assert pixels and all(ready[key].nbytes * 2 == whole[key].nbytes for key in pixels)
    assert all(torch.equal(ready[key], value) for key, value in whole.items() if key not in pixels)
    with torch.no_grad():
        logits = model(**{key: value for key, value in whole.items() if key != "labels"}).logits
        found = reply_logits(model, ready)
    expected = logits[:, :-1][supervised_positions(whole["labels"])].float()
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
    with torch.no_grad():
        assert torch.equal(found, reply_logits(model, whole))


@pytest.mark.parametrize(
    "labels, kept, expected",
    [
        ([[-100, -100, 7, 8]], [[1, 2]], [[7, 8]]),
        ([[-100, 5, -100, 6], [-100, -100, -100, 9]], [[0, 2], [2, 0]], [[5, 6], [9, -100]]),
        ([[-100, -100, -100]], [[0]], [[-100]]),
        ([[4, 4, -100]], [[0]], [[4]]),  # nothing predicts the first token
    ],
)
def test_positions_are_those_before_supervised_tokens(
    labels: list[list[int]], kept: list[list[int]], expected: list[list[int]]
) -> None:
    found = answers_alone({"labels": torch.tensor(labels)})
    assert found["logits_to_keep"].tolist() == kept
    assert found["shift_labels"].tolist() == expected
    assert answers_alone(found) == found


def test_training_and_probes_ask_for_no_other_logits(tiny_llava: Path, tmp_path: Path) -> None:
    """4 supervised tokens of 23 in a batch; teachers and general samples: `test_general`."""
    model = prepare(tiny_llava)
    with positions_with_logits(model) as seen:
        train(model, tmp_path, gradient_accumulation_steps=2, max_steps=1)
    assert seen == [4 * 4, 4 * 4]
    base = load_base(model_config(tiny_llava, "nf4"))[0]
    columns = {t.name: 4 for t in all_targets(base)}
    with positions_with_logits(base) as seen:
        sketch_gradients(base, all_targets(base), columns, lambda: [batch(3)], seed=0)
        sketch_inputs(base, all_targets(base), columns, lambda: [ready_batch(batch(3), torch.float32)], seed=0)
    assert seen == [3 * 4, 3 * 4]
    silent = {**batch(2), "labels": torch.full((2, 23), IGNORED_LABEL)}
    assert float(base(**answers_alone(silent), num_items_in_batch=1).loss) == 0.0
