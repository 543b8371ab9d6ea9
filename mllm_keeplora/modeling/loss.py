"""The token loss as transformers computes it, and which tokens count in it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

IGNORED_LABEL = -100  # the label of tokens that transformers' losses leave out
TEACHER_WORDS = 64  # likeliest words of a teacher's answer that are kept apart, of vocabularies of 32 to 152 thousand


def supervised_positions(labels: Tensor) -> Tensor:
    """Where the next token counts: [batch, length] labels -> [batch, length - 1] bool, to index logits."""
    return labels[:, 1:] != IGNORED_LABEL


def answers_alone(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with the positions at which a model needs to give logits: those before a supervised token.

    A vocabulary of 152 thousand words takes 2 MB a position otherwise, prompt and image included. Made where the labels
    are on the CPU it waits for no device.

    Args:
        batch: model inputs with `labels` [batch, length].

    Returns:
        The batch, `logits_to_keep` [batch, k] int64, in order, and `shift_labels` [batch, k], the labels of the tokens
        that follow; k is the largest number of supervised tokens of a row, at least 1. Rows with fewer are filled with
        positions that are not supervised, whose label is -100. A batch that has them is given back as it is.
    """
    if "logits_to_keep" in batch:
        return dict(batch)
    supervised = supervised_positions(batch["labels"])
    count = max(1, int(supervised.sum(1).max()))
    # A stable sort: supervised positions first, in their order.
    kept = (~supervised).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    return {**batch, "logits_to_keep": kept, "shift_labels": batch["labels"][:, 1:].gather(1, kept)}


def reply_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Logits at the supervised positions of a batch with labels: [tokens, vocabulary] fp32."""
    kept = answers_alone(batch)
    logits: Tensor = model(
        **{key: value for key, value in kept.items() if key not in ("labels", "shift_labels")}
    ).logits
    return logits[kept["shift_labels"] != IGNORED_LABEL].float()


def divergence(base: Tensor, model: Tensor) -> Tensor:
    """Sum over tokens of KL(base || model), in nats, of two [tokens, vocabulary] logits; a scalar."""
    return kl_div(log_softmax(model, -1), log_softmax(base, -1), log_target=True, reduction="sum")


class Teacher(NamedTuple):
    """A model's distribution over the next word, in its likeliest words and the rest of the vocabulary as one.

    Attributes:
        words: [tokens, k] int64.
        log_probabilities: [tokens, k] fp32.
        log_rest: [tokens] fp32, of all other words together; -inf where there are none.
    """

    words: Tensor
    log_probabilities: Tensor
    log_rest: Tensor


def as_teacher(logits: Tensor) -> Teacher:
    """Keeps the likeliest words of [tokens, vocabulary] fp32 logits."""
    words = logits.topk(min(TEACHER_WORDS, logits.shape[-1]), -1).indices
    return Teacher(words, *_in_words(logits, words))


def teacher_divergence(teacher: Teacher, logits: Tensor) -> Tensor:
    """Sum over tokens of KL(teacher || model) over the teacher's words and the rest, in nats; a scalar.

    It is never above the divergence over all words, and equal to it where the vocabulary has no others.

    Args:
        teacher: for [tokens].
        logits: the model's, [tokens, vocabulary] fp32.
    """
    log_words, log_rest = _in_words(logits, teacher.words)
    apart = kl_div(log_words, teacher.log_probabilities, log_target=True, reduction="sum")
    if teacher.words.shape[-1] == logits.shape[-1]:
        return apart
    return apart + kl_div(log_rest, teacher.log_rest, log_target=True, reduction="sum")


def _in_words(logits: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities of words and of all others together."""
    whole = logits.logsumexp(-1)
    rest = logits.scatter(-1, words, -torch.inf).logsumexp(-1)
    return logits.gather(-1, words) - whole[:, None], rest - whole


def summed_token_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The sum of the supervised tokens' losses, a scalar.

    transformers divides the sum by `num_items_in_batch`. Means of batches would weigh short batches more.
    """
    loss: Tensor = model(**answers_alone(batch), num_items_in_batch=1).loss
    return loss
