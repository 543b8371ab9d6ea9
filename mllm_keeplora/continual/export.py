"""Merges a run's adapter into its base, dequantised to 16 bit, and measures what rounding costs."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import GENERATION_CONFIG_NAME

from mllm_keeplora.continual.saved_run import SavedRun, load_run
from mllm_keeplora.data.collator import collator_of, ready_batch
from mllm_keeplora.data.records import load_records, select_evenly
from mllm_keeplora.evaluation.answer import generation_settings
from mllm_keeplora.modeling.linear4bit import free_4bit_weights
from mllm_keeplora.modeling.loading import DTYPES, load_dense
from mllm_keeplora.modeling.loss import reply_logits
from mllm_keeplora.runs.files import ArtifactError, replaced_directory, write_json


class OutputDifference(NamedTuple):
    """Merged model beside the 4-bit base with its adapter, on answer tokens."""

    relative_logits: float  # ||difference||_F / ||reference||_F
    same_top_token: float  # fraction of positions
    questions: int


def export(run_dir: Path, out: Path, dtype: str = "bfloat16", questions: int = 32) -> OutputDifference:
    """Writes the merged model and its processor to `out`, with `export.json` beside them.

    Args:
        run_dir: a run with an adapter.
        out: directory to create.
        dtype: of the merged weights, a name in `DTYPES`.
        questions: test questions of the run's last task on which the difference is measured.

    Raises:
        ArtifactError: `out` exists, or the run has no adapter.
        StreamError: the run's test data, needed for the measurement, is gone.
    """
    if out.exists():
        raise ArtifactError(f"{out} exists; name a directory that does not")
    run = load_run(run_dir)
    model, processor = run.load_model()
    batches = _test_batches(run, processor, questions)
    reference = [_answer_logits(model, batch) for batch in batches]
    del model  # the merged model takes its place in memory
    free_4bit_weights()
    merged = merge(run, DTYPES[dtype])
    difference = _difference(reference, [_answer_logits(merged, batch) for batch in batches])
    with replaced_directory(out) as temporary:
        merged.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        generation = generation_settings(merged, processor)
        if generation is not None:
            write_json(temporary / GENERATION_CONFIG_NAME, generation)
        write_json(temporary / "export.json", {"run": str(run_dir), "dtype": dtype, **difference._asdict()})
    return difference


def merge(run: SavedRun, dtype: torch.dtype) -> Any:
    """The base, dequantised to its compute dtype, with the adapter added and rounded to `dtype`."""
    merged, _ = load_dense(run.config.model, run.adapter)
    return merged.to(dtype)


def _test_batches(run: SavedRun, processor: Any, questions: int) -> list[dict[str, Tensor]]:
    stream = run.stream()
    task = stream.tasks[-1]
    samples, _ = load_records(
        stream.source(task.test),
        stream.test_media_root(task),
        answers=stream.answers_file(task),
        prompt_suffix=stream.question_suffix(task.name),
        allow_text_only=task.allow_text_only,
        checker=None,
        extracted=stream.extracted,
        classes=stream.classes(task),
    )
    collator = collator_of(processor, run.reader())
    # Evenly spaced: records may be in the order of their classes.
    return [collator([samples[index]]) for index in select_evenly(len(samples), 1.0, questions)]


@torch.no_grad()
def _answer_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    ready = ready_batch(batch, model.dtype)
    return reply_logits(model, {key: value.to(model.device) for key, value in ready.items()}).cpu()


def _difference(reference: list[Tensor], merged: list[Tensor]) -> OutputDifference:
    first, second = torch.cat(reference), torch.cat(merged)
    same = (first.argmax(-1) == second.argmax(-1)).float().mean()
    return OutputDifference(float((first - second).norm() / first.norm()), float(same), len(reference))
