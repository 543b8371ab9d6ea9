"""What the base can do, kept: its own replies (G1), the directions of its inputs (G2), distillation (G3), a guard (G4).

||dW x|| <= ||dW|| ||(I - M M^T) x||, and U_w bounds the energy of W, not of the inputs x that carry general
ability. So those inputs are protected as well, before the first stage.

For a CLIP a general sample is a picture with texts that it is compared with: the base's reply is one word, the nearest
text, and what it says there is its distribution over them.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.logging import get_logger
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy

from mllm_keeplora.config import ConfigError, GeneralConfig, Tower
from mllm_keeplora.continual.trainer import Joined
from mllm_keeplora.data.classification import read_reference
from mllm_keeplora.data.collator import classes_in, collator_of, decoded, join_batches
from mllm_keeplora.data.conversation import Classes, MediaFile, Message, Sample
from mllm_keeplora.data.preflight import Preflight
from mllm_keeplora.data.records import load_records, read_records, select_evenly
from mllm_keeplora.data.stream import Stream, named_paths
from mllm_keeplora.distributed.processes import (
    from_main,
    gather,
    num_processes,
    own_share,
    process_index,
    shared_out,
    sum_of_all,
)
from mllm_keeplora.distributed.progress import progress
from mllm_keeplora.distributed.sharding import fillers, gathered
from mllm_keeplora.evaluation.answer import greedy_replies, inference_state, nearest_classes
from mllm_keeplora.linalg.sketch import extend_basis_from_sketch
from mllm_keeplora.methods.base import Method
from mllm_keeplora.methods.context import General, Lesson, RunContext, StageContext
from mllm_keeplora.modeling.adapters import Factors, Model, adapters_off
from mllm_keeplora.modeling.clip import classifies
from mllm_keeplora.modeling.loss import (
    IGNORED_LABEL,
    TEACHER_WORDS,
    Teacher,
    answers_alone,
    as_teacher,
    divergence,
    reply_logits,
    supervised_positions,
    teacher_divergence,
)
from mllm_keeplora.modeling.targets import Target
from mllm_keeplora.probes.activations import sketch_inputs
from mllm_keeplora.probes.protected_bases import ProtectedBases
from mllm_keeplora.resources import find, is_there, shipped
from mllm_keeplora.runs.files import (
    file_state,
    found_hash,
    load_tensors,
    read_json,
    save_tensors,
    sha256_file,
    sha256_json,
    write_json,
)
from mllm_keeplora.runs.record import Outcome, Phase

logger = get_logger(__name__)

HELD_OUT = 4  # every fourth sample
GUARD_STEPS = 5  # bisections per factor: c is found to 1/32


class Batches:
    """General samples as model inputs with labels; of several processes each takes its share.

    Pictures of one batch are compared with the same texts, so that these are the columns of its logits.

    Attributes:
        rows: the samples' numbers, batch by batch.
    """

    def __init__(self, run: RunContext, samples: Sequence[Sample]) -> None:
        self.run, self.samples = run, samples
        self.collator = collator_of(run.processor, run.reader)
        size, self.rows = run.config.probe.batch_size, list[list[int]]()
        for _, group in groupby(range(len(samples)), key=lambda number: samples[number].classes):
            numbers = list(group)
            self.rows += [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def __call__(self) -> Iterator[dict[str, Tensor]]:
        """All of them once, in order."""
        own = own_share(self.rows)
        own_and_fillers = [*own, *fillers(self.run.model, own, self.rows[0])]
        for number, row in enumerate(progress("general samples", "batches", own_and_fillers)):
            batch = self.collator([self.samples[index] for index in row])
            if number >= len(own):
                batch["labels"].fill_(IGNORED_LABEL)
            yield self.run.to_device(batch)


# --- G1 ---


def prompts(config: GeneralConfig, checker: Preflight | None = None) -> list[Sample]:
    """The general prompts: conversations up to their last question, or pictures with texts, evenly spaced.

    Args:
        config: which.
        checker: decodes what they show; None where that has been done before.

    Raises:
        ConfigError: fewer than four, a folder, or a YAML that cannot be used.
        RecordError: a file that cannot be used.
    """
    path = shipped("recipes/general/builtin.jsonl") if config.samples == "builtin" else find(Path(config.samples))
    root = path.parent if config.media_root is None else Path(config.media_root)
    if path.is_dir():
        raise ConfigError(f"general.samples {path} is a folder; name a file of prompts, for a CLIP a YAML of pictures")
    source, classes = read_reference(path, root) if path.suffix in (".yaml", ".yml") else (path, None)
    read, _ = load_records(source, root, allow_text_only=True, answered=False, checker=checker, classes=classes)
    chosen = [read[i] for i in select_evenly(len(read), 1.0, config.max_samples)]
    if len(chosen) < HELD_OUT:
        what = "prompts" if classes is None else "pictures"
        raise ConfigError(f"general.samples {config.samples} has {len(chosen)} {what}; expected at least {HELD_OUT}")
    return [_without_last_answers(sample) for sample in chosen]


def _without_last_answers(sample: Sample) -> Sample:
    last = max(number for number, message in enumerate(sample.messages) if message.role == "user")
    return replace(sample, messages=sample.messages[: last + 1])


def check_form(asked: Sequence[Sample], processor: Any) -> None:
    """Compares what the prompts ask for with what a model can do: choose among texts, or answer in words.

    Raises:
        ConfigError: names what to give instead.
    """
    chooses = classifies(processor)
    if any((prompt.classes is not None) != chooses for prompt in asked):
        wrong = "ask for words, and the base model is a CLIP: name a YAML of pictures and classes"
        other = "are pictures with classes, and the base model answers in words: name a file of prompts"
        raise ConfigError(f"general.samples: they {wrong if chooses else other}, or set it to none")


def check_unwatched(asked: Sequence[Sample], stream: Stream) -> None:
    """Refuses prompts that a test file of the stream asks about the same picture: what is kept is not to be measured.

    A CLIP is asked about nothing else, so there the picture alone counts.

    Stock benchmarks and files that are not there are not looked at: their data may yet have to come.

    Raises:
        ConfigError: names the first such prompt and where it is asked.
        RecordError: a test file that cannot be read.
    """
    alike: dict[Hashable, list[Sample]] = {}
    for prompt in asked:
        alike.setdefault(_at_sight(prompt.messages, prompt.classes), []).append(prompt)
    for spec in stream.specs:
        test = stream.test_file(spec)
        if test is None or not all(map(is_there, named_paths(stream, spec))):
            continue
        root, answers, classes = stream.test_media_root(spec), stream.answers_file(spec), stream.classes(spec)
        read, _ = read_records(
            test, root, answers=answers, allow_text_only=True, extracted=stream.extracted, classes=classes
        )
        for messages in (before for sample in read.values() for before, _ in sample.questions):
            for prompt in alike.get(_at_sight(messages, classes), ()):
                if _shown(messages) == _shown(prompt.messages):
                    said = f"prompt {prompt.id!r} ({prompt.messages[-1].text[:80]!r}) is a question", "prompts", "asks"
                    if classes is not None:
                        said = f"{prompt.id!r} is a picture", "pictures", "shows"
                    raise ConfigError(
                        f"general.samples: {said[0]} of {spec.name}, which measures what is kept; take {said[1]} that "
                        f"no test {said[2]}"
                    )


def _at_sight(messages: Sequence[Message], classes: Classes | None) -> Hashable:
    """What equal questions have in common before their pictures are read: the words; of a picture alone, its bytes."""
    if classes is not None:
        state = file_state(messages[-1].media[0].path)
        return None if state is None else state[0]
    return " ".join(messages[-1].text.casefold().split())


def _shown(messages: Sequence[Message]) -> list[str | None]:
    return [found_hash(file.path) for message in messages for file in message.media]


def prompts_hash(asked: Sequence[Sample]) -> str:
    """SHA-256 (hex) of prompts: texts, roles and the content of what they show, and what pictures are compared with."""
    parts = [
        [message.role, [sha256_file(p.path) if isinstance(p, MediaFile) else str(p) for p in message.parts]]
        for prompt in asked
        for message in prompt.messages
    ]
    lists = dict.fromkeys(prompt.classes for prompt in asked if prompt.classes is not None)
    return sha256_json([*parts, *(classes.prompts(classes.templates[0]) for classes in lists)])


def general_samples(run: RunContext, asked: Sequence[Sample], key: str) -> General:
    """The prompts with the base's own greedy replies, which it gives once.

    Args:
        run: with the bare base.
        asked: the prompts.
        key: of base and prompts, under which the replies are kept.

    Raises:
        ConfigError: a base that answers most of them with nothing.
    """
    replies = _replies(run, asked, key)
    answered = _answered(asked, replies)
    if len(answered) < HELD_OUT or len(answered) * 2 < len(asked):
        raise ConfigError(
            f"general.samples: the base answers {len(asked) - len(answered)} of {len(asked)} prompts with nothing; it "
            "has nothing to keep there. Give prompts that it can answer, or set general.samples to none"
        )
    if len(answered) < len(asked):
        logger.warning(f"the base answers {len(asked) - len(answered)} of {len(asked)} general prompts with nothing")
    learnt = [sample for number, sample in enumerate(answered, start=1) if number % HELD_OUT]
    lessons = _lessons(run, learnt, _teachers(run, learnt, key), run.config.general.max_new_tokens)
    return General(lessons, answered[HELD_OUT - 1 :: HELD_OUT])


def _answered(asked: Sequence[Sample], replies: Sequence[str]) -> list[Sample]:
    """The prompts that were answered, with the replies. Earlier answers in them are no model's own: none is learnt."""
    return [
        replace(
            prompt,
            messages=(*(replace(said, supervised=False) for said in prompt.messages), Message("assistant", (reply,))),
        )
        for prompt, reply in zip(asked, replies, strict=True)
        if reply
    ]


def _replies(run: RunContext, asked: Sequence[Sample], key: str) -> list[str]:
    """The base's reply to every prompt, cached for all runs; the run directory gets a copy that can be read."""
    path = _cached(run, key, "replies.json")
    if not from_main(path.exists):
        chooses = classifies(run.processor)
        says = "names the nearest texts of {} general pictures" if chooses else "answers {} general prompts"
        logger.info(f"the base {says.format(len(asked))}")
        said = _ask(run, run.model, asked, run.config.general.max_new_tokens)
        from_main(lambda: write_json(path, said))
    replies: list[str] = from_main(lambda: read_json(path))
    table = [{"id": s.id, "prompt": s.messages[-1].text, "reply": r} for s, r in zip(asked, replies, strict=True)]
    from_main(lambda: write_json(run.directory.general_replies, table))
    return replies


def _ask(run: RunContext, model: Model, asked: Sequence[Sample], new_tokens: int) -> list[str]:
    """A model's own replies, each process its share; the same on all."""
    own = _chosen(run, model, asked) if classifies(run.processor) else _generated(run, model, asked, new_tokens)
    every = {i: reply for part in gather(own) for i, reply in part.items()}
    return [every[i] for i in range(len(asked))]


def _chosen(run: RunContext, model: Model, asked: Sequence[Sample]) -> dict[int, str]:
    """The names of the nearest texts to this process's share of pictures."""
    batches, own = Batches(run, asked), dict[int, str]()
    with inference_state(model):
        for row, batch in zip(own_share(batches.rows), batches(), strict=True):
            names = cast(Classes, asked[row[0]].classes).names
            inputs = {key: value for key, value in batch.items() if key not in ("labels", "shift_labels")}
            nearest = nearest_classes(model(**inputs).logits[:, 0])
            own |= {i: names[number] for i, number in zip(row, nearest, strict=True)}
    return own


def _generated(run: RunContext, model: Model, asked: Sequence[Sample], new_tokens: int) -> dict[int, str]:
    """Greedy replies to this process's share of prompts."""
    size = run.config.evaluation.batch_size
    order = sorted(range(len(asked)), key=lambda i: sum(len(message.text) for message in asked[i].messages))
    rows = [order[start : start + size] for start in range(0, len(order), size)]
    own: dict[int, str] = {}
    with gathered(model):
        for row in progress("own replies", "batches", own_share(rows)):
            conversations = [decoded(asked[i].messages, run.reader) for i in row]
            said = greedy_replies(model, run.processor, conversations, new_tokens)
            own |= dict(zip(row, said, strict=True))
    return own


def _cached(run: RunContext, key: str, name: str, **more: Any) -> Path:
    """A file of the cache whose name holds everything that its content depends on."""
    model, general = run.config.model, run.config.general
    everything = {
        "key": key,
        "base": [model.quantization, model.compute_dtype, run.processor.chat_template, *_if_set(model.max_pixels)],
        "prompts": [general.max_new_tokens, run.config.video.frames, run.config.video.fps],
        **more,
    }
    return Path(run.config.cache_dir) / "general" / f"{sha256_json(everything)[:24]}-{name}"


def _if_set(value: int | None) -> list[int]:
    return [] if value is None else [value]


# --- G2 ---


def general_bases(run: RunContext, samples: Sequence[Sample], key: str) -> Path:
    """Directions that bring U_w to hold eps_g of the energy of every module's inputs over prompts and replies.

    Returns:
        File with [in, k_g] fp32 per module that the samples reach, cached for all runs. How much of the energy is
        held stands in the run directory.
    """
    config = run.config
    more: dict[str, Any] = {
        "general": [config.general.eps_g, config.general.columns, config.seed, [s.id for s in samples]]
    }
    more |= {"weights": {name: path.name for name, path in run.weight_files.items()}}
    more |= {"modules": [target.name for target in run.targets]}
    path = _cached(run, key, "basis.safetensors", **more)
    facts = path.with_suffix(".json")
    if not from_main(facts.exists):  # written last
        media = {kind for sample in samples for kind in sample.kinds}
        targets = [target for target in run.targets if target.is_reached_by(media)]
        columns = {t.name: min(config.general.columns, 2 * t.in_features) for t in targets}
        logger.info(f"protecting the inputs of {len(samples)} general samples")
        batches = Batches(run, samples)
        sketches = sketch_inputs(run.model, targets, columns, batches, config.seed)
        _write_bases(run, targets, sketches, path, facts)
    from_main(lambda: write_json(run.directory.general_energy, read_json(facts)))
    return path


def _write_bases(
    run: RunContext, targets: Sequence[Target], sketches: Mapping[str, Tensor], path: Path, facts_path: Path
) -> None:
    bases, eps_g = ProtectedBases(run.weight_files, None, [], run.device), cast(float, run.config.general.eps_g)

    def extend(t: Target) -> tuple[Tensor, dict[str, Any]]:
        weight = bases.weight_basis(t)
        extended = extend_basis_from_sketch(weight, sketches[t.name].to(run.device), eps_g)
        added = extended.basis[:, weight.shape[1] :].to("cpu", copy=True)
        return added, {"k_g": added.shape[1], "held": extended.captured, "saturated": extended.saturated}

    found = shared_out(targets, extend, "general directions")
    directions = {t.name: added for t, (added, _) in zip(targets, found, strict=True)}
    facts = {t.name: fact for t, (_, fact) in zip(targets, found, strict=True)}
    saturated = [name for name, fact in facts.items() if fact["saturated"]]
    if saturated:
        logger.warning(
            f"{len(saturated)} of {len(facts)} modules need more directions than their sketch has to hold eps_g of "
            f"the general inputs, {saturated[0]} first ({facts[saturated[0]]['held']:.3f} held); raise general.columns"
        )
    from_main(lambda: save_tensors(path, directions))
    from_main(lambda: write_json(facts_path, facts))


# --- G3 ---


def _teachers(run: RunContext, samples: Sequence[Sample], key: str) -> dict[str, Tensor]:
    """What the base says at the reply tokens of general samples, cached for all runs; nothing where that is unasked."""
    if not run.config.general.share or run.config.general.distil != "kl":
        return {}
    learnt = [[said.supervised for said in sample.messages] for sample in samples]
    path = _cached(run, key, "teacher.safetensors", teacher=[TEACHER_WORDS, [sample.id for sample in samples], learnt])
    if not from_main(path.exists):
        said = _said(run, run.model, samples)
        from_main(lambda: save_tensors(path, said))
    return load_tensors(path)


def _said(run: RunContext, model: Model, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """What a model says at the reply tokens of each sample: `<number>/<field of Teacher>` -> tensor on the CPU."""
    batches = Batches(run, samples)
    own: dict[str, Tensor] = {}
    with inference_state(model):
        for rows, batch in zip_longest(own_share(batches.rows), batches()):
            said = as_teacher(reply_logits(model, batch))
            if rows is not None:  # else it runs beside other processes
                sizes = supervised_positions(batch["labels"]).sum(1).tolist()
                for field, values in said._asdict().items():
                    parts = values.cpu().split(sizes)
                    own |= {f"{number}/{field}": part.clone() for number, part in zip(rows, parts, strict=True)}
    return {name: tensor for part in gather(own) for name, tensor in part.items()}


def _lessons(run: RunContext, samples: Sequence[Sample], said: Mapping[str, Tensor], new_tokens: int) -> list[Lesson]:
    """Samples with what was said of each, without where `said` is empty; replies have `new_tokens` at most."""

    def teacher(number: int) -> Teacher | None:
        return Teacher(*(said[f"{number}/{field}"] for field in Teacher._fields)) if said else None

    return [Lesson(sample, teacher(n), _is_cut(run, sample, new_tokens)) for n, sample in enumerate(samples)]


def _is_cut(run: RunContext, sample: Sample, new_tokens: int) -> bool:
    """As far as the text says: without the white space around it, it may have a token less than was generated."""
    if classifies(run.processor):
        return False
    tokens = run.processor.tokenizer(sample.messages[-1].text, add_special_tokens=False)["input_ids"]
    return len(tokens) >= new_tokens - 1


def past_prompts(stage: StageContext, method: Method) -> list[Sample]:
    """Prompts of past tasks: `general.rehearsed` training samples of each, evenly spaced, of each one question.

    What the method holds out of a task is not asked here either.
    """
    run, prompts = stage.run, []
    for task in run.stream.tasks[: stage.number - 1]:
        samples = method.task_samples(run, task.name)
        for place, index in enumerate(select_evenly(len(samples), 1.0, run.config.general.rehearsed)):
            questions = samples[index].questions
            before, _ = questions[place % len(questions)]
            prompts.append(replace(samples[index], id=f"{task.name}/{samples[index].id}", messages=before))
    return prompts


def recall(stage: StageContext, method: Method, model: Model) -> Outcome:
    """What the model says to prompts of past tasks before the stage changes it.

    Returns:
        As facts "replies", in the order of `past_prompts`; as tensors what `_said` gives of those with a reply.
    """
    run, asked = stage.run, past_prompts(stage, method)
    chooses = classifies(run.processor)
    says = "names the classes of {} pictures" if chooses else "answers {} prompts"
    logger.info(f"{stage.name}: the model {says.format(len(asked))} of past tasks")
    replies = _ask(run, model, asked, _longest_recalled(stage))
    answered = _answered(asked, replies)
    learns_said = answered and run.config.general.distil == "kl"
    return Outcome(_said(run, model, answered) if learns_said else None, {"replies": replies})


def recalled(stage: StageContext, method: Method, phase: Phase) -> list[Lesson]:
    """The lessons of `recall`."""
    answered = _answered(past_prompts(stage, method), phase.facts["replies"])
    said = phase.tensors if answered and stage.run.config.general.distil == "kl" else {}
    return _lessons(stage.run, answered, said, _longest_recalled(stage))


def _longest_recalled(stage: StageContext) -> int:
    """Tokens of a reply to a prompt of a past task, at most."""
    return max(task.max_new_tokens for task in stage.run.stream.tasks[: stage.number - 1])


class Distillation:
    """General and rehearsed samples that pass beside a task's own in each step of a stage, and their loss (G3).

    Which samples a step sees depends on the seed and the step alone, so that a training which was interrupted goes
    on as it would have.
    """

    def __init__(self, stage: StageContext, lessons: Sequence[Lesson]) -> None:
        self._stage, self._config = stage, stage.run.config.general
        self._lessons = lessons
        self._collator = collator_of(stage.run.processor, stage.run.reader)
        self._step, self._forwards = -1, 0

    def __call__(self, batch: Mapping[str, Tensor], step: int, forwards: int) -> Joined | None:
        """The batch with general samples behind it, so that one forward pass serves both.

        Args:
            batch: model inputs of the task's own samples, with labels and the positions of `answers_alone`.
            step: optimizer steps so far.
            forwards: of this step, whose general samples are spread over them.

        Returns:
            The joint batch, whose labels leave the general samples out; and a function that gives weight * the mean
            over the reply tokens of all processes from its logits, [batch, kept positions, vocabulary]; of a CLIP,
            over its pictures. Where forwards have different numbers of general samples, it is weighted by these. None
            for a forward without any.
        """
        self._forwards = self._forwards + 1 if step == self._step else 0
        self._step = step
        drawn, own, words = self._drawn(step, forwards), len(batch["labels"]), classes_in(batch)
        if not drawn:
            return None
        weight = self._config.weight * len(drawn) * forwards / sum(self._beside(forwards))
        samples = answers_alone(self._collator([self._lessons[index].sample for index in drawn]))
        if self._config.distil == "replies":
            cut = torch.tensor([self._lessons[index].cut for index in drawn])
            samples["shift_labels"] = without_ends(samples["shift_labels"], cut)
        pad_token_id = self._stage.run.processor.tokenizer.pad_token_id
        joined = join_batches(batch, self._stage.run.to_device(samples), pad_token_id)
        for labels in ("labels", "shift_labels"):
            joined[labels][own:] = IGNORED_LABEL
        return joined, lambda logits: weight * self._loss(logits[own:, :, words:], samples, drawn)

    def _beside(self, forwards: int) -> list[int]:
        return self._config.beside(self._stage.train.per_device_train_batch_size, forwards)

    def _loss(self, logits: Tensor, batch: Mapping[str, Tensor], drawn: Sequence[int]) -> Tensor:
        """`batch` is on the CPU, so that nothing waits for the device to say where its labels are."""
        labels = batch["shift_labels"]
        device, (rows, places) = logits.device, torch.nonzero(labels != IGNORED_LABEL, as_tuple=True)
        found = logits[rows.to(device, non_blocking=True), places.to(device, non_blocking=True)].float()
        if self._config.distil == "replies":
            loss = cross_entropy(found, labels[rows, places].to(device, non_blocking=True), reduction="sum")
        else:
            loss = self._divergence(found, batch, drawn)
        # DDP averages the processes' gradients: their number times the own share of the sum gives the mean over all.
        share = num_processes() / sum_of_all(torch.tensor(len(rows), device=device))
        return share * loss

    def _divergence(self, found: Tensor, batch: Mapping[str, Tensor], drawn: Sequence[int]) -> Tensor:
        """Sum over [tokens, vocabulary] logits; of pictures, those that are compared with the same texts together."""
        lists = [self._lessons[index].sample.classes for index in drawn]
        total = found.new_zeros(())
        for classes in dict.fromkeys(lists):
            among = [row for row, own in enumerate(lists) if own == classes]
            parts = zip(*(cast(Teacher, self._lessons[drawn[row]].teacher) for row in among), strict=True)
            teacher = Teacher(*(torch.cat(part).to(found.device, non_blocking=True) for part in parts))
            logits = found
            if classes is not None:
                words = batch["candidates"][among[0]].nonzero().squeeze(1).to(found.device, non_blocking=True)
                logits = found[among][:, words]
            total = total + teacher_divergence(teacher, logits)
        return total

    def _drawn(self, step: int, forwards: int) -> list[int]:
        """Numbers of the samples that the next of a step's forwards sees."""
        counts, own = self._beside(forwards), self._beside(forwards)[self._forwards]
        before = step * sum(self._beside(self._stage.train.gradient_accumulation_steps)) + sum(counts[: self._forwards])
        first = before * num_processes() + process_index() * own
        return [self._sample(place) for place in range(first, first + own)]

    def _sample(self, place: int) -> int:
        """The sample at a place of an endless sequence: one random order of all after another."""
        epoch, index = divmod(place, len(self._lessons))
        generator = torch.Generator().manual_seed(self._stage.seed * 1_000_003 + epoch)
        return int(torch.randperm(len(self._lessons), generator=generator)[index])


def without_ends(labels: Tensor, rows: Tensor) -> Tensor:
    """Labels [rows, k]; of some rows, [rows] bool, the last one is left out: that a reply ends there is not learnt."""
    last = (labels != IGNORED_LABEL).sum(1) - 1  # those that count come first
    ends = torch.arange(labels.shape[1]) == last[:, None]
    return labels.masked_fill(ends & rows[:, None], IGNORED_LABEL)


# --- G4 ---


def held_out_divergence(model: Model, batches: Batches) -> float:
    """Mean KL(base || model) over the reply tokens of held-out general samples, nats a token; the same everywhere."""
    if not isinstance(model, PeftModel):
        return 0.0
    total = torch.zeros(2, dtype=torch.float64)
    with inference_state(model):
        for batch in batches():
            with adapters_off(model):
                base = reply_logits(model, batch)
            total += torch.tensor([float(divergence(base, reply_logits(model, batch))), len(base)], dtype=torch.float64)
    summed = sum_of_all(total.float().to(batches.run.device)).double()
    return float(summed[0] / summed[1])


def guard(
    stage: StageContext, method: Method, model_of: Callable[[Factors], Model], factors: Factors
) -> dict[str, Any]:
    """The largest factor of the stage's update per tower that keeps the divergence from the base in the budget (G4).

    First one factor for all towers, then each tower's own as far up as the budget lets it.

    Args:
        stage: that has learnt.
        method: how.
        model_of: the base with these factors on it.
        factors: the stage's.

    Returns:
        {"factors": tower -> c, "before", "unscaled", "after": divergences in nats a token}.
    """
    run, budget = stage.run, stage.run.config.general.budget or 0.0
    general = cast(General, run.general)
    batches = Batches(run, general.held_out)
    towers: list[Tower] = list(dict.fromkeys(target.tower for target in stage.targets))

    @cache
    def measure(*c: float) -> float:
        scales = stage.scaled(dict(zip(towers, c, strict=True))).folded_scales
        return held_out_divergence(model_of(method.fold(stage.accumulated, factors, scales)), batches)

    before = held_out_divergence(model_of(stage.accumulated), batches)
    c = [1.0] * len(towers)
    unscaled = measure(*c)
    if unscaled > before + budget:
        c = [_largest(0.0, lambda value: measure(*[value] * len(towers)) <= before + budget)] * len(towers)
        for place in range(len(towers)) if len(towers) > 1 else ():

            def fits(value: float, place: int = place) -> bool:
                return measure(*c[:place], value, *c[place + 1 :]) <= before + budget

            c[place] = _largest(c[place], fits)
        _say(stage, dict(zip(towers, c, strict=True)), budget)
    after = measure(*c) if any(c) else before
    return {"factors": dict(zip(towers, c, strict=True)), "before": before, "unscaled": unscaled, "after": after}


def _say(stage: StageContext, c: Mapping[Tower, float], budget: float) -> None:
    if any(c.values()):
        said = ", ".join(f"{tower} {value:.2f}" for tower, value in c.items())
        logger.info(f"{stage.name}: its update is scaled to {said} to keep within general.budget {budget}")
    else:
        logger.warning(
            f"{stage.name}: nothing of its update keeps within general.budget {budget}: it learns nothing. Raise the "
            "budget or general.share, or lower train.learning_rate"
        )


def _largest(least: float, fits: Callable[[float], bool]) -> float:
    """The largest value in [least, 1] that fits, by bisection; `least` is taken to fit."""
    if fits(1.0):
        return 1.0
    low, high = least, 1.0
    for _ in range(GUARD_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
