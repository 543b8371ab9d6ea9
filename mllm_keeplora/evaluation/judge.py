"""Grades the replies that a run saved by a judge model, as CL-VISTA's published scores are given.

The judge, any chat model of transformers, reads question, reference answer and reply (it sees no video) and
grades the reply from 0 to 5; a task's score is the mean grade times 20. Where the judge's text holds no such
grade, the reply scores 0 and is counted.

As in CL-VISTA: what the judge is shown, the scale, and 0 for a grade that cannot be read. Different: decoding
is greedy, not sampled at temperature 0.1, and the instruction is in our words.
"""

import ast
import functools
import json
import logging
import math
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from mllm_keeplora.config import JudgeConfig
from mllm_keeplora.data.records import clean_question
from mllm_keeplora.distributed.progress import progress
from mllm_keeplora.errors import KeepLoRAError, without_network
from mllm_keeplora.evaluation.answer import greedy, own_stop_tokens
from mllm_keeplora.evaluation.metrics import summarize
from mllm_keeplora.evaluation.score import Score
from mllm_keeplora.evaluation.settled import CUT_MARK, RULES
from mllm_keeplora.evaluation.task_files import SCORED_BY, has_classes
from mllm_keeplora.modeling.linear4bit import guard_linear4bit
from mllm_keeplora.modeling.loading import DTYPES, MODEL_FILES, base_model_hash, check_weights, nf4_config
from mllm_keeplora.runs.files import ArtifactError, atomic_path, read_json, read_json_lines, sha256_json, write_json
from mllm_keeplora.runs.manifests import SCHEMA_VERSION
from mllm_keeplora.runs.run_directory import RunDirectory

logger = logging.getLogger(__name__)

TOP_GRADE = 5
NATIVE_MAX = 100.0
SAVE_SECONDS = 30.0  # a judge that is killed loses that much
INSTRUCTION = (
    "You grade answers to questions about videos. You are given a question, its reference answer and the "
    "answer of a model; you cannot see the video. Grade how far the model's answer means what the reference "
    "answer means. Other words for the same thing are fine; content that is wrong or missing is not."
)
REQUEST = (
    "Question: {question}\n"
    "Reference answer: {truth}\n"
    "Model's answer: {reply}\n\n"
    "Say whether the two answers mean the same (yes or no) and grade the model's answer with a whole number "
    "from 0 (nothing in common) to 5 (the same meaning). Write one line of JSON and nothing else, for "
    'example {{"same": "no", "score": 1}}'
)


class JudgeError(KeepLoRAError, RuntimeError):
    """Replies that cannot be judged, or a judge that cannot be used; the message names the remedy."""


class Reply(NamedTuple):
    """What the judge reads."""

    question: str
    truth: str
    reply: str
    cut: bool = False  # ended where the task's own score was settled

    @property
    def key(self) -> str:
        """Hash of the content: equal replies to a question, in any stage, are judged once."""
        return sha256_json([self.question, self.truth, self.reply])


Cells = dict[tuple[int, str], list[Reply]]


@dataclass(frozen=True)
class Judge:
    """A loaded judge; `identity` is everything that its verdicts depend on."""

    model: Any
    tokenizer: Any
    identity: dict[str, Any]

    @torch.no_grad()
    def verdicts(self, replies: Sequence[Reply]) -> list[str]:
        """The judge's text on each reply, decoded greedily."""
        prompts = [render_request(self.tokenizer, reply) for reply in replies]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        stops = own_stop_tokens(self.model, self.tokenizer)
        with greedy(self.model, stops, self.tokenizer.pad_token_id, self.identity["max_new_tokens"]) as settings:
            output = self.model.generate(
                input_ids=inputs["input_ids"].to(self.model.device),
                attention_mask=inputs["attention_mask"].to(self.model.device),
                generation_config=settings,
            )
        texts = self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [str(text).strip() for text in texts]


def judge_run(run_dir: Path, settings: JudgeConfig, tasks: Sequence[str] | None = None) -> dict[str, Any]:
    """Judges the replies of a run that is at its end, and writes `judged.json`; returns its content.

    Verdicts that an earlier call with the same judge left are used again, of other tasks too.

    Args:
        run_dir: directory of a run.
        settings: the judge.
        tasks: tasks of the stream; None judges all.

    Raises:
        ArtifactError: no run there, one that is not at its end, or one of its files is damaged.
        JudgeError: no replies, or names of classes; an edited adapter, an unknown task, or a judge that cannot be
            loaded.
    """
    run = RunDirectory(run_dir)
    if run.edit.exists():
        raise JudgeError(
            f"{run.path} holds what `keeplora edit` made, and a judge grades the stages of a run: name a run"
        )
    if has_classes(run.task_files):
        raise JudgeError(
            f"{run.path}: its replies are names of classes, each right or wrong; a judge has nothing to grade in them"
        )
    retention = read_json(run.retention)
    cells = read_replies(run, retention)
    wanted = _wanted_replies(run, retention, cells, tasks)
    judge = load_judge(settings, Path(read_json(run.config)["cache_dir"]))
    # Where the judge lies does not matter, what it is does.
    name = sha256_json({k: v for k, v in judge.identity.items() if k not in ("judge", "revision")})[:16]
    verdicts = _Verdicts(run.verdicts / f"{name}.jsonl")
    _judge_missing(judge, verdicts, wanted, settings.batch_size)
    judged = build_judged(retention, cells, verdicts.texts, judge.identity)
    write_json(run.judged, judged)
    return judged


def read_replies(run: RunDirectory, retention: Mapping[str, Any]) -> Cells:
    """(stage, task) -> the replies of that stage, where the run saved any.

    Raises:
        ArtifactError: for a file that is damaged.
    """
    cells: Cells = {}
    for row in retention["rows"]:
        stage = run.stage(row["stage"], row["task"])
        for task in retention["tasks"]:
            # Cells that were measured later (backfill) lie beside those of the stage itself.
            files = (folder / f"{task}.jsonl" for folder in (stage.backfilled_replies, stage.replies))
            path = next((file for file in files if file.is_file()), None)
            if path is not None:
                cells[row["stage"], task] = [_read_reply(line, path) for line in read_json_lines(path)]
    return cells


def _wanted_replies(
    run: RunDirectory, retention: Mapping[str, Any], cells: Cells, tasks: Sequence[str] | None
) -> list[Reply]:
    known = retention["tasks"]
    unknown = [task for task in tasks or () if task not in known]
    if unknown:
        raise JudgeError(f"{run.path} has no task {', '.join(unknown)}; its tasks are {', '.join(known)}")
    names = list(tasks or known)
    silent = [task for task in names if not any(task == name for _, name in cells)]
    if silent:
        raise JudgeError(
            f"no replies of {', '.join(silent)} in {run.stages}: expected */evaluation/<task>.jsonl, "
            "which a run writes as it evaluates; copy them with the run, or evaluate again"
        )
    cut = {task for (_, task), replies in cells.items() if task in names and any(reply.cut for reply in replies)}
    if cut:
        raise JudgeError(
            f"{', '.join(sorted(cut))}: replies end by {CUT_MARK!r} where their own score was settled, so a judge "
            "would read less than the model would have said. Leave the tasks out by --tasks, or give them the metric "
            "'vista_match', whose replies are whole, and run again"
        )
    return [reply for (_, task), replies in cells.items() if task in names for reply in replies]


def load_judge(settings: JudgeConfig, cache: Path) -> Judge:
    """Loads a judge: safetensors weights and no code of the repository.

    Args:
        settings: the judge.
        cache: folder that remembers the hashes of models' files.

    Raises:
        JudgeError: no such model, no chat template, or transformers cannot load it.
    """
    directory = _judge_directory(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = settings.dtype if settings.dtype != "auto" else ("bfloat16" if device.type == "cuda" else "float32")
    logger.info(f"loading the judge {settings.judge} ({settings.quantization}, {dtype})")
    try:
        # Padding on the left, so that every verdict begins right behind its prompt.
        tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left", trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=DTYPES[dtype],
            quantization_config=nf4_config(dtype) if settings.quantization == "nf4" else None,
            use_safetensors=True,
            trust_remote_code=False,
            device_map={"": device},
            output_loading_info=True,
        )
        model, info = loaded
        check_weights(model, info, f"judge {directory}")
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise JudgeError(
            f"judge {settings.judge} cannot be loaded: {type(error).__name__}: {_first_line(error)}"
        ) from error
    if tokenizer.chat_template is None:
        raise JudgeError(f"judge {settings.judge} has no chat template; use an instruction-tuned model")
    _check_template(tokenizer, settings.judge)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    guard_linear4bit(model)
    _report_size(model, settings)
    identity = {
        "judge": settings.judge,
        "revision": settings.revision,
        "hash": base_model_hash(directory, cache),
        "quantization": settings.quantization,
        "dtype": dtype,
        "max_new_tokens": settings.max_new_tokens,
        "decoding": "greedy",
        "prompt": sha256_json([INSTRUCTION, REQUEST, *_thoughts(tokenizer)]),
    }
    return Judge(model.eval(), tokenizer, identity)


def _first_line(error: Exception) -> str:
    """transformers lists all classes that it knows."""
    return str(error).partition("\n")[0]


def _judge_directory(settings: JudgeConfig) -> Path:
    directory = Path(settings.judge)
    if not directory.is_dir():
        try:
            directory = Path(snapshot_download(settings.judge, revision=settings.revision, allow_patterns=MODEL_FILES))
        except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
            raise JudgeError(
                f"judge {settings.judge!r} is neither a directory here nor a hub model that can be fetched: {error}; "
                f"{without_network(settings.judge)}"
            ) from error
    if not (directory / "config.json").is_file() or not any(directory.glob("*.safetensors")):
        raise JudgeError(
            f"judge {directory} has no config.json or no *.safetensors weights; pickled weights are not read"
        )
    return directory


def _report_size(model: Any, settings: JudgeConfig) -> None:
    """The experts of a mixture, Qwen3-30B-A3B among them, are no linear layers and stay as they are."""
    sizes = [(parameter.dtype, parameter.nbytes) for parameter in model.parameters()]
    total, packed = sum(size for _, size in sizes), sum(size for kind, size in sizes if kind == torch.uint8)
    logger.info(f"the judge's weights take {total / 2**30:.1f} GiB")
    if settings.quantization == "nf4" and packed < total / 2:
        logger.warning(
            f"only {100 * packed / total:.0f} % of them are in 4 bits: NF4 covers linear layers, not the "
            "experts of a mixture"
        )


def _judge_missing(judge: Judge, verdicts: "_Verdicts", replies: Sequence[Reply], batch_size: int) -> None:
    unique = {reply.key: reply for reply in replies}
    missing = [reply for key, reply in unique.items() if key not in verdicts.texts]
    logger.info(f"{len(replies)} replies, {len(unique)} different, {len(missing)} to judge")
    # Longest first: running out of memory shows at once.
    missing.sort(key=lambda reply: len(reply.question + reply.truth + reply.reply), reverse=True)
    try:
        with progress("judging", "replies", total=len(missing)) as bar:
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                verdicts.add(batch, judge.verdicts(batch))
                bar.update(len(batch))
    except torch.cuda.OutOfMemoryError as error:
        raise JudgeError(
            f"the judge ran out of GPU memory on {batch_size} replies together; give a smaller --batch_size "
            f"(verdicts so far are kept): {error}"
        ) from error
    finally:
        verdicts.save()


class _Verdicts:
    """The judge's texts by the key of what was judged, in a file that is replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = read_json_lines(path) if path.is_file() else []
        self.texts = {str(line["key"]): str(line["text"]) for line in lines}
        self._saved, self._saved_at = len(self.texts), time.monotonic()

    def add(self, replies: Sequence[Reply], texts: Sequence[str]) -> None:
        """Takes new texts, and writes the file every `SAVE_SECONDS`."""
        self.texts |= {reply.key: text for reply, text in zip(replies, texts, strict=True)}
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Writes the file, where there is anything new."""
        if len(self.texts) > self._saved:
            with atomic_path(self.path) as temporary, temporary.open("w", encoding="utf-8") as handle:
                for key, text in self.texts.items():
                    handle.write(json.dumps({"key": key, "text": text}) + "\n")
        self._saved, self._saved_at = len(self.texts), time.monotonic()


def parse_verdict(text: str) -> int | None:
    """The grade in a judge's text: of its first {...}, as JSON or Python, the whole number 0..5 at "score".

    None for everything else: no braces, no score, a fraction, a number outside the scale. Nothing is guessed
    from the words around.
    """
    found = re.search(r"\{[^{}]*\}", text)
    values = _parse_object(found.group()) if found else None
    score = values.get("score") if isinstance(values, dict) else None
    if isinstance(score, str) and score.strip().isdecimal():
        score = int(score)
    if isinstance(score, bool) or not isinstance(score, int | float) or score != score // 1:
        return None
    return int(score) if 0 <= score <= TOP_GRADE else None


def _parse_object(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass  # the form that the published judge is asked for is a Python dictionary
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def build_judged(
    retention: Mapping[str, Any], cells: Cells, verdicts: Mapping[str, str], identity: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of judged.json: retention.json's form, with the judge and its unreadable verdicts.

    A cell that is not judged whole has no score, and metrics that need it are null.
    """
    tasks = retention["tasks"]
    rows, failures = [], {task: {"failed": 0, "of": 0} for task in tasks}
    for row in retention["rows"]:
        scores: dict[str, Score | None] = dict.fromkeys(tasks)
        for task in tasks:
            replies = cells.get((row["stage"], task), [])
            if not replies or any(reply.key not in verdicts for reply in replies):
                continue
            grades = [parse_verdict(verdicts[reply.key]) for reply in replies]
            scores[task] = _score([grade or 0 for grade in grades])
            failures[task]["failed"] += grades.count(None)
            failures[task]["of"] += len(grades)
        rows.append({"stage": row["stage"], "task": row["task"], "scores": scores})
    matrix = [[score and score["value"] for score in row["scores"].values()] for row in rows]
    return {
        "schema_version": SCHEMA_VERSION,
        "method": retention["method"],
        "tasks": tasks,
        "general": [],
        "rows": rows,
        "metrics": {**summarize(matrix), "retention": {}},
        "judge": dict(identity),
        "parse_failures": failures,
    }


def _score(grades: Sequence[int]) -> Score:
    scale = NATIVE_MAX / TOP_GRADE
    n = len(grades)
    native = scale * statistics.fmean(grades)
    stderr = scale * statistics.stdev(grades) / math.sqrt(n) / NATIVE_MAX if n > 1 else None
    return Score(value=native / NATIVE_MAX, native=native, native_max=NATIVE_MAX, stderr=stderr, n=n)


def render_request(tokenizer: Any, reply: Reply) -> str:
    """What the judge is given, in the form of its chat template.

    The instruction is a system message, or begins the request where the template has none: Gemma 2's refuses it,
    others leave it out. Models that can think first are asked for no thoughts, which would take up the verdict's
    tokens.

    Raises:
        TemplateError: the template refuses both.
    """
    write = functools.partial(
        tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    request = REQUEST.format(**reply._asdict())
    try:
        text = str(write([{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": request}]))
    except TemplateError:
        text = ""
    return text if INSTRUCTION in text else str(write([{"role": "user", "content": f"{INSTRUCTION}\n\n{request}"}]))


def _thoughts(tokenizer: Any) -> list[str]:
    """Tells verdicts of models that were asked for no thoughts from earlier ones, which hold thoughts."""
    return ["no thoughts"] if "enable_thinking" in str(tokenizer.chat_template) else []


def _check_template(tokenizer: Any, judge: str) -> None:
    try:
        text = render_request(tokenizer, Reply("a question", "a reference", "a reply"))
    except TemplateError as error:
        raise JudgeError(
            f"judge {judge}: its chat template refuses the request ({error}); use another model"
        ) from error
    if INSTRUCTION not in text:
        raise JudgeError(f"judge {judge}: its chat template leaves out what it is asked; use another model")


def _read_reply(line: Mapping[str, Any], path: Path) -> Reply:
    try:
        question, truth, reply = line["doc"]["text"], line["target"], line["reply"]
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: expected lines with doc.text, target and reply, no {error}") from error
    cut = str(reply).endswith(CUT_MARK) and line["doc"].get(SCORED_BY) in RULES
    return Reply(clean_question(str(question)), str(truth), str(reply), cut)
