"""The plan as a page of text."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mllm_keeplora.continual.saved_run import load_run
from mllm_keeplora.modeling.families import family_of
from mllm_keeplora.planning.plan import Plan, needed
from mllm_keeplora.planning.time_model import (
    CARDS,
    DECOMPOSITIONS,
    LAUNCH_SECONDS,
    PRODUCTS,
    TRAFFIC,
    TimeModel,
)
from mllm_keeplora.runs.run_directory import RunDirectory
from mllm_keeplora.units import GB, format_count


def format_plan(plan: Plan) -> str:
    """The plan as one block of text."""
    sections = (_model_lines, _memory_lines, _disk_lines, _work_lines, _time_lines)
    return "\n".join(line for section in sections for line in section(plan))


def _model_lines(plan: Plan) -> Iterator[str]:
    memory, shape, config = plan.memory, plan.memory.shape, plan.memory.config
    kind = f"{memory.model.config.model_type}, {config.model.quantization}, {config.model.compute_dtype}"
    yield f"base model   {config.model.base_model} ({kind}): {plan.weights}"
    for tower, settings in config.towers().items():
        found = [t for t in memory.targets if t.tower == tower]
        weights = sum(t.in_features * t.out_features for t in found)
        factors = sum(settings.rank * (t.in_features + t.out_features) for t in found)
        yield (
            f"  {tower:9s}  {len(found)} modules adapted, {format_count(weights)} weights, "
            f"rank {settings.rank}: {format_count(factors)} factor parameters a stage"
        )
    for reason, number in plan.excluded.items():
        yield f"  left out   {number} linear layers: {reason}"
    prompts = f"{shape.prompts} prompts of " if shape.prompts else ""
    yield f"sample       {prompts}{shape.tokens} tokens, {shape.vision_tokens} rows of the vision tower"
    yield f"             {shape.source}"
    limit = config.train.max_length
    if limit is not None and shape.tokens > limit:
        yield f"             longer than train.max_length {limit}: the run would stop at it"


def _memory_lines(plan: Plan) -> Iterator[str]:
    memory, train = plan.memory, plan.memory.config.train
    other = replace(train, activation_checkpointing=not train.activation_checkpointing)
    changed = replace(memory, config=replace(memory.config, train=other)).phases()
    word = "with" if other.activation_checkpointing else "without"
    phases = memory.phases()
    yield f"memory, GB   {'':18s}" + "".join(f"{phase:>14s}" for phase in phases)
    for item in dict.fromkeys(item for items in phases.values() for item in items):
        yield _gigabytes(item, [items.get(item) for items in phases.values()])
    yield _gigabytes("sum", [sum(items.values()) for items in phases.values()])
    yield _gigabytes(f"sum {word} checkpointing", [sum(items.values()) for items in changed.values()])
    verdict = "fits" if needed(memory) <= plan.available else "does NOT fit"
    yield (
        f"  peak {memory.peak() / GB:.2f} GB, {needed(memory) / GB:.2f} with headroom; "
        f"{plan.available / GB:.2f} GB are there ({plan.device}): {verdict}"
    )


def _gigabytes(name: str, sizes: Sequence[int | None]) -> str:
    cells = (f"{'-':>14s}" if size is None else f"{size / GB:14.3f}" for size in sizes)
    return f"  {name:29s}" + "".join(cells)


def _disk_lines(plan: Plan) -> Iterator[str]:
    towers, stages, cached = plan.memory.config.towers(), len(plan.work), len(plan.cached_bases)
    modules, rank = len(plan.memory.targets), max(tower.rank for tower in towers.values())
    how = "exact" if cached == modules else f"at most, {cached} of {modules} cached"
    shares = ", ".join(f"k <= {tower.eps_w:g} min(in, out) for {name}" for name, tower in towers.items())
    notes = {
        "weight bases": f"  ({how}; {shares})",
        "feature bases": f"  (at most, {stages} stages)",
        "adapter": f"  (rank {rank * stages} in the end, and the one it replaces)",
        "checkpoints": "  (two and the one being written, during a stage)",
        "frames": "  (at most: video.cache_gb)",
        "sum": "  (answers and logs come on top)",
    }
    disk = plan.disk()
    yield "disk, GB"
    for name, size in {**disk, "sum": sum(disk.values())}.items():
        yield f"  {name:17s}{size / GB:9.3f}{notes.get(name, '')}"


def _work_lines(plan: Plan) -> Iterator[str]:
    yield _row("stages", "samples", "probe", "epochs", "steps", f"{_asked(plan)}s")
    for work in plan.work:
        train = plan.memory.config.train_for(work.task)
        probe = f"{work.probe_passes} x {_known(work.probe_samples)}" if work.probe_passes else "-"
        epochs = "-" if train.max_steps > 0 or work.steps == 0 else f"{train.num_train_epochs:g}"
        counts = map(_known, (work.samples, work.steps, work.questions))
        yield _row(f"  {work.task}", next(counts), probe, epochs, *counts)
    for name, questions in plan.general.items():
        yield _row(f"  {name}", "", "", "", "", _known(questions))
    yield from _general_lines(plan)
    asked, unknown = sum(n or 0 for n in plan.questions), plan.questions.count(None)
    more = f" and {unknown} unknown" if unknown else ""
    yield f"  evaluations: {len(plan.work) + 1} rows of {asked} {_asked(plan)}s{more}"


def _asked(plan: Plan) -> str:
    """What an evaluation asks one after another."""
    return "picture" if family_of(plan.memory.model.config).classifies else "question"


def _general_lines(plan: Plan) -> Iterator[str]:
    config = plan.memory.config
    general, train = config.general, config.train
    batch, passes = train.per_device_train_batch_size, train.gradient_accumulation_steps
    said = []
    if general.given:
        said.append(f"{general.samples}, at most {general.max_samples}")
        if general.eps_g is not None and plan.memory.method.projects:
            said.append("inputs protected")
    if general.rehearsed:
        what = {"picture": "pictures", "question": "prompts"}[_asked(plan)]
        said.append(f"{general.rehearsed} {what} of each past task rehearsed")
    if general.share:
        said.append(
            f"{sum(general.beside(batch, passes))} beside each {batch * passes} of a task's, by {general.distil}"
        )
    if general.budget is not None:
        unit = {"picture": "picture", "question": "token"}[_asked(plan)]
        said.append(f"each stage scaled down to raise the divergence by at most {general.budget:g} nats a {unit}")
    if said:
        yield f"  general samples: {'; '.join(said)}"
    if RunDirectory(Path(config.run_dir)).config.is_file() and (note := load_run(config.run_dir).guard_note()):
        yield f"  so far: {note}"


def _row(name: str, samples: str, probe: str, epochs: str, steps: str, questions: str) -> str:
    return f"{name:25s}{samples:>10s}{probe:>16s}{epochs:>8s}{steps:>8s}{questions:>11s}"


def _time_lines(plan: Plan) -> Iterator[str]:
    if plan.rates is None:
        yield from _card_lines(plan)
        return
    rates, total = plan.rates, plan.seconds(plan.rates)
    probe = f" {rates.probe:.3g} s a probe sample," if rates.probe else ""
    step, question = f"{rates.step:.3g} s a step,", f" {rates.question:.3g} s a {_asked(plan)}"
    yield f"time         {step}{probe}{question} ({rates.source})"
    if total is None:
        yield f"             {_NO_TOTAL}"
    else:
        yield f"             about {total / 60:.0f} minutes; weight bases and checking the data come on top"


def _card_lines(plan: Plan) -> Iterator[str]:
    """Nothing is measured yet: what data sheets say of cards, with what is assumed of them."""
    yield "time         nothing measured with these settings (--measure does that here); by arithmetic:"
    yield "  " + _card_row("card", "step, s", "probe, s", f"{_asked(plan)}, s", "stage, s", "bases, min", "run, h")
    for card in CARDS:
        rates = TimeModel(plan.memory).rates(card)
        total = plan.seconds(rates)
        cells = (f"{value:.3g}" for value in (rates.step, rates.probe, rates.question, rates.stage))
        hours = "?" if total is None else f"{total / 3600:.2g}"
        yield "  " + _card_row(card.name, *cells, f"{rates.weight_bases / 60:.1f}", hours)
    yield (
        f"  assumed: {PRODUCTS:.0%} of the peak in products, {DECOMPOSITIONS:.0%} in decompositions, "
        f"{TRAFFIC:.0%} of the bandwidth, {LAUNCH_SECONDS * 1e6:g} us a launch;"
    )
    yield "           samples and answers as long as the longest; reading and checking the data come on top"
    if plan.seconds(rates) is None:
        yield f"           {_NO_TOTAL}"


_NO_TOTAL = "no total: the data are not there, or a stock benchmark's size is not known"


def _card_row(name: str, *cells: str) -> str:
    return f"{name:12s}" + "".join(f"{cell:>13s}" for cell in cells)


def _known(number: int | None) -> str:
    return "?" if number is None else str(number)
