"""The model that lmms-eval talks to: batched greedy answers of a live or a saved model, errors never
swallowed.

Differs from lmms-eval's own wrappers in four ways that matter for measuring retention: it takes a 4-bit base
and a PEFT adapter, it answers in batches, a reply may end where its score is settled, and a failed generation stops
the evaluation. The stock wrappers log the error and return an empty answer, so that an out-of-memory reads as
forgetting.
"""

import copy
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from PIL import Image

from mllm_keeplora.config import VideoConfig
from mllm_keeplora.data.chat_template import chat_form, render
from mllm_keeplora.data.classification import process_pictures
from mllm_keeplora.data.collator import prepare_questions
from mllm_keeplora.data.conversation import Classes, Message, Part, Role
from mllm_keeplora.data.images import FORMATS, load_image
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.distributed.progress import progress
from mllm_keeplora.distributed.sharding import gathered
from mllm_keeplora.evaluation.answer import class_features, generate_replies, inference_state, name_classes
from mllm_keeplora.evaluation.errors import EvaluationError
from mllm_keeplora.evaluation.settled import settled
from mllm_keeplora.evaluation.task_files import ASKED, CLASSES, COPY_COLUMN, Document, read_classes
from mllm_keeplora.modeling.clip import classifies
from mllm_keeplora.runs.run_directory import ADAPTER_HASHES

logger = logging.getLogger(__name__)

# lmms-eval's own LLaVA wrapper generates this many tokens where a task names no limit.
DEFAULT_MAX_NEW_TOKENS = 1024
_VIDEO_PREFIX = "video_"
# Sampling settings that stock tasks carry; a greedy decoder allows only the values that mean greedy.
GREEDY_SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "do_sample": (False, None),
    "temperature": (0, None),
    "num_beams": (1, None),
}
# Without meaning for greedy decoding (top_p), or for other wrappers' own image code.
IGNORED_SETTINGS = frozenset({"top_p", "top_k", "image_aspect_ratio"})


class _Decoding(NamedTuple):
    """What one request asks of the decoder; requests that agree share batches."""

    max_new_tokens: int
    until: tuple[str, ...]
    classes: str | None = None  # file of the names that the reply is one of


class _Question(NamedTuple):
    """What is generated once: one request, or several of a task that show and ask the same.

    Attributes:
        asking: the requests' places among all.
        first: one of them.
        documents: of those that a run's copies of test files ask; others are left alone until they are shown, since
            media of theirs would be decoded.
    """

    asking: list[int]
    first: Instance
    documents: list[Document]


class _Batch(NamedTuple):
    """Questions that are answered together, ready to be.

    Attributes:
        inputs: of `prepare_questions`, on the CPU.
    """

    questions: list[_Question]
    conversations: list[list[Message]]
    inputs: dict[str, Any]


@contextmanager
def _named(task: str, doc_ids: Sequence[int]) -> Iterator[None]:
    """Re-raises whatever goes wrong inside as an EvaluationError that names the task and its documents."""
    try:
        yield
    except EvaluationError:
        raise
    # Any failure, out of memory included, has to stop the evaluation and say where.
    except Exception as error:
        documents = ", ".join(str(doc_id) for doc_id in doc_ids)
        raise EvaluationError(
            f"task {task!r}, document {documents}: answering failed with {type(error).__name__}: {error}"
        ) from error


class KeepLoRAModel(lmms):
    """Answers lmms-eval's `generate_until` requests with a model and its processor.

    lmms-eval calls `clean()` at the end of every evaluation, which empties the wrapper; the model itself is
    untouched. Use a new wrapper for every evaluation.
    """

    is_simple = False  # requests carry chat messages, see `doc_to_messages` in eval/tasks/utils.py

    def __init__(
        self, model: Any, processor: Any, batch_size: int | str = 1, reader: VideoReader | None = None
    ) -> None:
        """Wraps a live model.

        Args:
            model: a transformers image-text-to-text model, or a PeftModel around one; left as found.
            processor: its processor, with a chat template.
            batch_size: questions answered together; they are padded on the left.
            reader: decodes the clips of video tasks.

        Raises:
            ValueError: if batch_size is not a positive whole number.
            ProcessorError: for a chat template that renders no question and answer.
        """
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a positive whole number, found {batch_size!r}")
        self.model = model
        self.processor = processor
        self.form = None if classifies(processor) else chat_form(processor)
        self.batch_size = int(batch_size)
        self.reader = reader

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "KeepLoRAModel":
        """Loads the model that lmms-eval's command line describes.

        Args:
            arg_string: `--model_args`,
                "base_model=...,adapter=...,quantization=nf4,compute_dtype=float32,video_frames=8,...":
                `adapter` (a PEFT adapter directory, optional), the settings of `ModelConfig`, and those of
                `VideoConfig` with `video_` before their names.
            additional_config: batch_size, max_batch_size and device from the command line, None where not
                given.

        Raises:
            EvaluationError: for a model argument that is missing or unknown, or a value that it cannot have.
            ConfigError: for a base model that cannot be loaded.
        """
        settings = dict(simple_parse_args_string(arg_string))
        settings.update({key: value for key, value in (additional_config or {}).items() if value is not None})
        settings.pop("max_batch_size", None)  # of automatic batch sizes, which lmms-eval's parser always sends
        batch_size = settings.pop("batch_size", 1)
        video = {key: settings.pop(key) for key in list(settings) if key.startswith(_VIDEO_PREFIX)}
        reader = VideoReader(_read_video_settings(video), cache_dir=None)
        model, processor = load_for_evaluation(settings)
        return cls(model, processor, batch_size, reader)

    @property
    def device(self) -> torch.device:
        """Where inputs go; lmms-eval asks for it in distributed evaluations."""
        return next(self.model.parameters()).device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers every request, in the order given.

        Batches hold questions of one task and one decoding setting, those that show and ask most first: so a task's
        answers do not depend on which other tasks are evaluated with it, and running out of memory shows at once.
        Then batches are halved.

        Raises:
            EvaluationError: naming the task and documents whose answer could not be generated.
        """
        answers: dict[int, str] = {}
        self._beyond_context: Counter[str] = Counter()
        self._fitting = self.batch_size
        self._classes: dict[str, tuple[Classes, torch.Tensor]] = {}
        what = ("naming classes", "pictures") if self.form is None else ("answering", "questions")
        bar = progress(*what, total=len(requests))
        with gathered(self.model), inference_state(self.model), bar:
            for batch in self._prepared(requests):
                for question, reply in zip(batch.questions, self._answer(batch), strict=True):
                    answers.update(dict.fromkeys(question.asking, reply))
                # Once a batch: after its first question alone the time left would look a batch's size too long.
                bar.update(sum(len(question.asking) for question in batch.questions))
        for task, count in self._beyond_context.items():
            logger.warning(
                f"task {task!r}: {count} questions are longer than the {self._context} tokens that the base model was "
                "made for, images and clips included; read its score with that in mind"
            )
        return [answers[index] for index in range(len(requests))]

    @property
    def _context(self) -> int:
        return int(self.model.config.get_text_config().max_position_embeddings)

    def clean(self) -> None:
        """Lets go of the model; lmms-eval asks for it at the end of every evaluation.

        lmms-eval's own method searches all of the process for garbage too, a tenth of a row's time on a small model.
        On a GPU it stays: training needs the memory that garbage may hold there.
        """
        if torch.cuda.is_initialized():
            super().clean()
        else:
            del self.model

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        """Refused: log-likelihood tasks compare given answers, this model generates them."""
        raise EvaluationError("model 'keeplora' answers generate_until tasks only, not loglikelihood tasks")

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        """Refused: a prompt that depends on earlier answers."""
        raise EvaluationError("model 'keeplora' answers generate_until tasks only, not multi-round tasks")

    def _batches(self, requests: list[Instance]) -> Iterator[list[_Question]]:
        groups: dict[tuple[str, _Decoding], dict[str, _Question]] = defaultdict(dict)
        for index, request in enumerate(requests):
            with _named(request.task_name, [request.doc_id]):
                questions = groups[request.task_name, _read_decoding(request.args[2])]
                document = self._own_document(request)
                key = str(index) if document is None else json.dumps(document[ASKED])
                question = questions.setdefault(key, _Question([], request, []))
                question.asking.append(index)
                question.documents.extend([] if document is None else [document])
        for group in groups.values():
            ordered = sorted(group.values(), key=_extent, reverse=True)
            for start in range(0, len(ordered), self.batch_size):
                yield ordered[start : start + self.batch_size]

    def _prepared(self, requests: list[Instance]) -> Iterator[_Batch]:
        """The batches, each read from disk and scaled while the one before is answered."""
        processor = copy.deepcopy(self.processor)  # a fast tokenizer is not for two threads ("Already borrowed")
        with ThreadPoolExecutor(1) as pool:
            ahead: Future[_Batch] | None = None
            for questions in self._batches(requests):
                following = pool.submit(self._prepare, questions, processor)
                if ahead is not None:
                    yield ahead.result()
                ahead = following
            if ahead is not None:
                yield ahead.result()

    def _prepare(self, batch: list[_Question], processor: Any) -> _Batch:
        conversations = []
        for question in batch:
            request = question.first
            with _named(request.task_name, [request.doc_id]):
                document = question.documents[0] if question.documents else self._documents(request)[request.doc_id]
                conversations.append(_read_messages(request.args[1](document), self.reader))
                if self.form is not None:
                    render(processor, conversations[-1], self.form)  # what cannot be asked is named by itself
        with _named(batch[0].first.task_name, [question.first.doc_id for question in batch]):
            return _Batch(batch, conversations, self._inputs(conversations, processor))

    def _inputs(self, conversations: list[list[Message]], processor: Any) -> dict[str, Any]:
        """Model inputs on the CPU; of a model that chooses among classes, pictures alone."""
        if self.form is not None:
            return prepare_questions(processor, conversations, torch.device("cpu"), self.form)
        shown = [[part for part in messages[-1].parts if isinstance(part, Image.Image)] for messages in conversations]
        if any(len(pictures) != 1 for pictures in shown):
            raise ValueError("the model compares one picture with classes; this task shows another number")
        return {"pixel_values": process_pictures(processor, [pictures[0] for pictures in shown])}

    def _documents(self, request: Instance) -> Any:
        _, _, _, _, task, split = request.args
        return self.task_dict[task][split]

    def _own_document(self, request: Instance) -> Document | None:
        documents = self._documents(request)
        if COPY_COLUMN not in (getattr(documents, "column_names", None) or ()):
            return None
        document: Document = documents[request.doc_id]
        return document

    def _answer(self, batch: _Batch) -> list[str]:
        with _named(batch.questions[0].first.task_name, [question.first.doc_id for question in batch.questions]):
            return self._generate(batch)

    def _generate(self, batch: _Batch) -> list[str]:
        """The replies to a batch; where the device has too little memory for it, in parts."""
        questions, conversations, inputs = batch
        if len(questions) <= self._fitting:
            try:
                return self._generate_together(questions, inputs)
            except torch.cuda.OutOfMemoryError:
                if len(questions) == 1:
                    raise
            # Not in the handler: its traceback holds the tensors.
            torch.cuda.empty_cache()
            self._fitting = len(questions) // 2
            logger.warning(
                f"task {questions[0].first.task_name!r}: the device has too little memory for {len(questions)} "
                f"questions together; from here on they are {self._fitting}. Set evaluation.batch_size to that"
            )
        replies, most = [], self._fitting  # which may shrink meanwhile
        for at in range(0, len(questions), most):
            part = slice(at, at + most)
            inputs = self._inputs(conversations[part], self.processor)
            replies += self._generate(_Batch(questions[part], conversations[part], inputs))
        return replies

    def _generate_together(self, batch: list[_Question], inputs: dict[str, Any]) -> list[str]:
        decoding = _read_decoding(batch[0].first.args[2])
        if self.form is None:
            return self._choose(decoding.classes, inputs["pixel_values"])
        if decoding.classes is not None:
            raise ValueError("the task asks for the name of a class, and the model answers in words")
        inputs = {key: value.to(self.device) if torch.is_tensor(value) else value for key, value in inputs.items()}
        too_long = (inputs["attention_mask"].sum(dim=1) > self._context).tolist()
        rules = [None if decoding.until else settled(question.documents) for question in batch]
        replies = generate_replies(
            self.model, self.processor, self.form, inputs, decoding.max_new_tokens, settled=rules
        )
        for question, long in zip(batch, too_long, strict=True):
            if long:
                self._beyond_context[question.first.task_name] += len(question.asking)
        return [_cut(reply, decoding.until) for reply in replies]

    def _choose(self, file: str | None, pixels: torch.Tensor) -> list[str]:
        """The name of the nearest class of a file of classes, of each picture."""
        if file is None:
            raise ValueError("the model chooses among the classes of a task, and this one names none")
        if file not in self._classes:
            classes = read_classes(Path(file))
            self._classes[file] = classes, class_features(self.model, self.processor, classes)
        return name_classes(self.model, *self._classes[file], pixels)


def load_for_evaluation(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """Loads base model, processor and, where one is named, a PEFT adapter.

    Args:
        settings: the fields of `ModelConfig`, and `adapter`.

    Raises:
        EvaluationError: for a setting that is missing or unknown, or a value that it cannot have.
        ConfigError: for a base model that cannot be loaded.
        AdapterError: for an adapter that does not fit the base model, or was never trained.
    """
    from mllm_keeplora.config import ModelConfig
    from mllm_keeplora.modeling.loading import load_base
    from mllm_keeplora.modeling.saved_adapters import load_adapter

    known = get_type_hints(ModelConfig)
    # lmms-eval turns anything that looks like a number into one; names and revisions are strings.
    values: dict[str, Any] = {
        key: value if isinstance(value, bool) or int in get_args(known.get(key)) else str(value)
        for key, value in settings.items()
    }
    adapter = values.pop("adapter", None)
    _check_settings(values, known)
    if "base_model" not in values:
        raise EvaluationError(f"--model_args: base_model is missing; known are adapter, {', '.join(known)}")
    config = ModelConfig(**values)
    model, processor = load_base(config)
    if adapter is None:
        return model, processor
    of_a_run = (Path(adapter) / ADAPTER_HASHES).exists()  # whose method may have learnt nothing, such as zero_shot
    return load_adapter(model, Path(adapter), config.base_model, may_be_untrained=of_a_run), processor


def _read_video_settings(settings: Mapping[str, Any]) -> VideoConfig:
    values = {key.removeprefix(_VIDEO_PREFIX): value for key, value in settings.items()}
    _check_settings(values, get_type_hints(VideoConfig))
    return VideoConfig(**values)


def _check_settings(values: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise EvaluationError(
            f"--model_args: unknown argument {', '.join(unknown)}; known are adapter, {', '.join(known)}"
        )
    for key, value in values.items():
        choices = get_args(known[key]) if get_origin(known[key]) is Literal else (value,)
        if value not in choices:
            raise EvaluationError(f"--model_args: {key} is {value!r}, expected {' or '.join(choices)}")


def _read_decoding(settings: Mapping[str, Any]) -> _Decoding:
    """Checks a task's generation_kwargs.

    Raises:
        ValueError: for sampling, beams, or a setting that would be ignored.
    """
    for name, value in settings.items():
        if name in GREEDY_SETTINGS and value not in GREEDY_SETTINGS[name]:
            raise ValueError(f"generation_kwargs: {name}={value!r}, but model 'keeplora' decodes greedily")
    unknown = set(settings) - set(GREEDY_SETTINGS) - IGNORED_SETTINGS - {"max_new_tokens", "until", CLASSES}
    if unknown:
        raise ValueError(f"generation_kwargs: {', '.join(sorted(unknown))} not supported by model 'keeplora'")
    until = settings.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    return _Decoding(int(settings.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS), until, settings.get(CLASSES))


def _read_messages(messages: Sequence[Mapping[str, Any]], reader: VideoReader | None) -> list[Message]:
    """Reads lmms-eval's chat messages: texts, images and clips in any order and number, and earlier turns.

    A list of images stays one, also where they are frames of a clip (SEED-Bench's): they come without the times
    that a clip has, and lmms-eval's own models are shown them as images as well. A clip is what comes as a file.

    Raises:
        ValueError: for messages that end with no question, or other media than images and clips.
        ImageError, VideoError: for an image or clip that does not decode.
    """
    roles: list[Role] = [message["role"] for message in messages]
    unknown = sorted(set(roles) - set(get_args(Role)))
    if unknown or roles[-1:] != ["user"]:
        raise ValueError(f"expected messages of {', '.join(get_args(Role))}, a user's at the end, found roles {roles}")
    conversation = []
    for role, message in zip(roles, messages, strict=True):
        content = message["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = tuple(part for item in content if (part := _read_part(item, reader)) != "")
        if role != "user" and not all(isinstance(part, str) for part in parts):
            raise ValueError(f"expected images and clips in a user's messages alone, found one in the {role}'s")
        conversation.append(Message(role, parts))
    return conversation


def _read_part(item: Mapping[str, Any], reader: VideoReader | None) -> Part:
    """A text, image or clip that is told as lmms-eval's `ChatContent`."""
    if item["type"] == "text":
        return str(item["text"])
    kind, source = item["type"], item.get("url")
    # lmms-eval tells files by their suffix, and takes .webm for sound alone.
    if kind == "audio" and str(source).lower().endswith(".webm"):
        kind = "video"
    if kind == "image" and isinstance(source, Image.Image | str):
        return load_image(Path(source) if isinstance(source, str) else source)
    if kind == "video" and isinstance(source, str) and item.get("start_time") is item.get("end_time") is None:
        if reader is None:
            raise ValueError(f"{source}: a video, but this evaluation was given no reader for clips")
        return reader.read(Path(source))
    raise ValueError(
        f"expected a text, an image or a whole clip, found {kind} {source!r} ({', '.join(map(str, item))})"
    )


def _extent(question: _Question) -> tuple[int, int]:
    """Pixels shown, where that is known before they are decoded, and characters asked."""
    asked = question.documents[0][ASKED] if question.documents else []
    files = [part["path"] for message in asked for part in message["content"] if part["type"] == "image"]
    return sum(map(_pixels, files)), len(question.first.args[0])


def _pixels(path: str) -> int:
    """Of a picture, by the file's head; 0 for one that cannot be read, which is said when it is shown."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.width * image.height
    except (OSError, ValueError, Image.DecompressionBombError):
        return 0


def _cut(reply: str, until: tuple[str, ...]) -> str:
    """The reply up to the first stop string."""
    ends = [reply.find(stop) for stop in until if stop and stop in reply]
    return reply[: min(ends)].strip() if ends else reply.strip()
