"""The token loss as transformers computes it, and which tokens count in it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

IGNORED_LABEL = -100  # the label of tokens that transformers' losses leave out


def supervised_positions(labels: Tensor) -> Tensor:
    """Where the next token counts: [batch, length] labels -> [batch, length - 1] bool, to index logits."""
    return labels[:, 1:] != IGNORED_LABEL


def reply_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Logits at the supervised positions of a batch with labels: [tokens, vocabulary] fp32."""
    logits: Tensor = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return logits[:, :-1][supervised_positions(batch["labels"])].float()


def divergence(base: Tensor, model: Tensor) -> Tensor:
    """Sum over tokens of KL(base || model), in nats, of two [tokens, vocabulary] logits; a scalar."""
    return kl_div(log_softmax(model, -1), log_softmax(base, -1), log_target=True, reduction="sum")


def summed_token_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The sum of the supervised tokens' losses, a scalar.

    transformers divides the sum by `num_items_in_batch`. Means of batches would weigh short batches more.
    """
    loss: Tensor = model(**batch, num_items_in_batch=1).loss
    return loss
