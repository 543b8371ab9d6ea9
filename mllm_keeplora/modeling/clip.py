"""CLIP as a classifier: a picture is compared with the prompts of classes, whose features have gradients too.

A class is what a word is to the language models: logits are [batch, 1, classes], and the label of the one position is
the class. So probes, training and checks are theirs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModelForImageTextToText, CLIPModel, CLIPProcessor
from transformers.modeling_outputs import ImageClassifierOutput

from mllm_keeplora.modeling.families import family_of
from mllm_keeplora.modeling.loss import IGNORED_LABEL

PROMPTS = 256  # prompts of classes that pass through the text tower together in an evaluation


class CLIPClassifier(CLIPModel):
    """`CLIPModel`, parameters and their names included, with the forward that a stage trains."""

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        candidates: Tensor,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> ImageClassifierOutput:
        """exp(logit_scale) times the cosine of each picture and each class, and the cross-entropy.

        Args:
            pixel_values: [batch, 3, height, width].
            input_ids: one prompt of each class, [classes, tokens] int64.
            attention_mask: of the prompts, [classes, tokens] int64.
            candidates: [batch, classes] bool, the classes that a picture is chosen from.
            shift_labels: [batch, 1] int64, the picture's class.
            num_items_in_batch: what the sum of the losses is divided by; None for the number of pictures.

        Returns:
            logits [batch, 1, classes] fp32, -inf where a class is no candidate; the loss where there are labels.
        """
        pictures = self.picture_features(pixel_values)
        logits = self.similarities(pictures, self.prompt_features(input_ids, attention_mask))
        logits = logits.masked_fill(~candidates, -torch.inf)
        loss = None
        if shift_labels is not None:
            counted = int(shift_labels.ne(IGNORED_LABEL).sum()) if num_items_in_batch is None else num_items_in_batch
            loss = cross_entropy(logits, shift_labels[:, 0], ignore_index=IGNORED_LABEL, reduction="sum") / counted
        return ImageClassifierOutput(loss=loss, logits=logits[:, None])

    def picture_features(self, pixel_values: Tensor) -> Tensor:
        """[batch, 3, height, width] -> [batch, projection] fp32, of norm 1."""
        return normalize(self.get_image_features(pixel_values).pooler_output.float(), dim=-1)

    def prompt_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[prompts, tokens] -> [prompts, projection] fp32, of norm 1."""
        return normalize(self.get_text_features(input_ids, attention_mask).pooler_output.float(), dim=-1)

    def similarities(self, pictures: Tensor, classes: Tensor) -> Tensor:
        """[batch, projection] and [classes, projection] of norm 1 -> logits [batch, classes] fp32."""
        return self.logit_scale.float().exp() * pictures @ classes.T


# Saved files name the class of the model: readers that do not know this package take the stock one.
CLIPClassifier.__name__, CLIPClassifier.__module__ = CLIPModel.__name__, CLIPModel.__module__


def classifies(processor: Any) -> bool:
    """Whether a processor is that of a model which compares pictures with classes, and writes no text."""
    return isinstance(processor, CLIPProcessor)


def model_class(model_config: Any) -> Any:
    """The class that a base model of that config is loaded as.

    Raises:
        TargetError: an unknown model family.
    """
    return CLIPClassifier if family_of(model_config).classifies else AutoModelForImageTextToText
