"""The judge of saved replies: a tiny random Llama really loaded and asked, and its texts replaced where a
test is about what is made of them."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# First of the third-party imports: the package lets torchvision import beside a CPU-only torch.
import mllm_keeplora  # noqa: F401

# isort: split
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mllm_keeplora.commands import judge as command
from mllm_keeplora.commands.main import main
from mllm_keeplora.config import ConfigError, JudgeConfig, RunConfig
from mllm_keeplora.evaluation import judge as judging
from mllm_keeplora.evaluation.judge import (
    Judge,
    JudgeError,
    Reply,
    judge_run,
    load_judge,
    parse_verdict,
)
from mllm_keeplora.evaluation.metrics import summarize
from mllm_keeplora.evaluation.settled import CUT_MARK
from mllm_keeplora.evaluation.task_files import SCORED_BY
from mllm_keeplora.runs.files import ArtifactError
from mllm_keeplora.runs.run_directory import RunDirectory

TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
WORDS = [
    "<pad>",
    "<unk>",
    "</s>",
    "system",
    "user",
    "assistant",
    ":",
    "Question",
    "cat",
    "dog",
    "red",
    "blue",
]
TASKS = ["birds", "tools"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random Llama with a chat template; what it says depends on the prompt."""
    vocabulary = [*WORDS, *(f"w{number}" for number in range(40))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        eos_token_id=2,
        pad_token_id=0,
    )
    directory = tmp_path_factory.mktemp("judge")
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def settings(judge: Path | str, **changes: Any) -> JudgeConfig:
    return JudgeConfig(str(judge), **{"max_new_tokens": 6, "batch_size": 3, **changes})


def write_replies(path: Path, replies: Sequence[Reply]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {"doc_id": n, "doc": {"text": f"<video>\n{r.question}"}, "target": r.truth, "reply": r.reply}
        for n, r in enumerate(replies)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def reply_of(stage: int, task: str, number: int) -> Reply:
    return Reply(f"which {task} {number} ?", f"truth {number}", f"{task} {number} after {stage}")


def write_run(directory: Path, questions: int = 3) -> Path:
    """A finished run over two tasks, as far as judging reads it."""
    rows = []
    for stage, task in enumerate([None, *TASKS]):
        for name in TASKS:
            replies = [reply_of(stage, name, number) for number in range(questions)]
            folder = directory / "stages" / f"{stage:02d}-{task or 'base'}" / "evaluation"
            write_replies(folder / f"{name}.jsonl", replies)
        rows.append({"stage": stage, "task": task, "scores": {}})
    retention = {"method": "keeplora", "tasks": TASKS, "general": ["pope"], "rows": rows}
    (directory / "retention.json").write_text(json.dumps(retention))
    (directory / "config.json").write_text(json.dumps(asdict(RunConfig(cache_dir=str(directory / "cache")))))
    return directory


class Asked:
    """Stands in for the judge's texts, and remembers what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
        self.replies: list[Reply] = []
        self.answer = answer

        def verdicts(judge: Judge, replies: Sequence[Reply]) -> list[str]:
            texts = [self.answer(reply) for reply in replies]
            self.replies += replies
            return texts

        monkeypatch.setattr(Judge, "verdicts", verdicts)


def grade(reply: Reply) -> str:
    """Stage 0: 1, stage 1: 3, stage 2: 5 for tools and 2 for birds; every reply of a cell alike."""
    stage = int(reply.reply.split()[-1])
    return json.dumps({"same": "no", "score": [1, 3, 5 if "tools" in reply.reply else 2][stage]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"same": "yes", "score": 5}', 5),
        ("{'pred': 'no', 'score': 0}", 0),
        ('```json\n{"score": 3}\n```', 3),
        ('{"score": "4"}', 4),
        ('{"score": 4.0}', 4),
        ('Sure. {"score": 2} {"score": 5}', 2),
        # everything else is a failure, and not guessed
        ('{"score": 4.8}', None),
        ('{"score": 6}', None),
        ('{"score": -1}', None),
        ('{"score": true}', None),
        ('{"score": "five"}', None),
        ('{"score": NaN}', None),
        ('{"score": Infinity}', None),
        ('{"score": [5]}', None),
        ('{"grade": 5}', None),
        ('{"score": 5', None),
        ("Score: 5", None),
        ("5", None),
        ("{5}", None),
        ("", None),
    ],
)
def test_grades_are_read_and_never_guessed(text: str, expected: int | None) -> None:
    assert parse_verdict(text) == expected


def test_judged_file_has_the_form_of_retention_json(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(monkeypatch, grade)
    run = write_run(tmp_path / "run")
    judged = judge_run(run, settings(tiny))
    assert judged == json.loads((run / "judged.json").read_text())
    matrix = [[row["scores"][task]["value"] for task in TASKS] for row in judged["rows"]]
    assert matrix == [pytest.approx([0.2, 0.2]), pytest.approx([0.6, 0.6]), pytest.approx([0.4, 1.0])]
    assert judged["metrics"] == {**summarize(matrix), "retention": {}}
    assert judged["metrics"]["bwt"] == pytest.approx(-0.2)
    assert judged["rows"][2]["scores"]["birds"] == {
        "value": pytest.approx(0.4),
        "native": pytest.approx(40),
        "native_max": 100.0,
        "stderr": 0.0,
        "n": 3,
    }
    assert {key: judged[key] for key in ("method", "tasks", "general")} == {
        "method": "keeplora",
        "tasks": TASKS,
        "general": [],
    }
    assert judged["parse_failures"] == {task: {"failed": 0, "of": 9} for task in TASKS}
    # The question as the model was asked it, without the placeholder.
    assert set(asked.replies) == {reply_of(s, t, n) for s in range(3) for t in TASKS for n in range(3)}


def test_standard_error_is_on_the_scale_of_value(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Asked(monkeypatch, lambda reply: json.dumps({"score": 5 if " 0 " in reply.reply else 0}))
    score = judge_run(write_run(tmp_path / "run", 2), settings(tiny))["rows"][0]["scores"]["birds"]
    assert (score["value"], score["stderr"]) == (pytest.approx(0.5), pytest.approx(0.5))


def test_unreadable_verdicts_score_0_and_are_counted(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Asked(monkeypatch, lambda reply: "no idea" if "birds 1" in reply.reply else '{"score": 5}')
    run = write_run(tmp_path / "run")
    command.main([str(run), "--judge", str(tiny)])
    judged = json.loads((run / "judged.json").read_text())
    assert judged["parse_failures"] == {"birds": {"failed": 3, "of": 9}, "tools": {"failed": 0, "of": 9}}
    assert judged["rows"][0]["scores"]["birds"]["value"] == pytest.approx(2 / 3)
    shown = capsys.readouterr().out
    assert "Accuracy after each stage" in shown and "66.7" in shown
    assert "unreadable verdicts, scored 0: birds 3 of 9" in shown and "tools 0 of 9" in shown


def test_a_real_judge_is_asked_in_its_own_chat_template(tiny: Path, tmp_path: Path) -> None:
    """A random model writes no grades: all scores are 0, and said to be unreadable."""
    run = write_run(tmp_path / "run")
    judged = judge_run(run, settings(tiny))
    assert judged["parse_failures"] == {task: {"failed": 9, "of": 9} for task in TASKS}
    assert judged["metrics"]["last"] == 0.0
    (kept,) = (run / "judge").iterdir()
    texts = [json.loads(line)["text"] for line in kept.read_text().splitlines()]
    assert len(texts) == 18 and all(texts)

    loaded = load_judge(settings(tiny), tmp_path / "cache")
    replies = [
        Reply("cat ?", "red", "blue {0} {braces}"),
        Reply("dog dog dog dog ?", "blue", ""),
        *[reply_of(0, "birds", 1)],
    ]
    together = loaded.verdicts(replies)
    assert together == [loaded.verdicts([reply])[0] for reply in replies], "padding must not count"
    prompt = judging.render_request(loaded.tokenizer, replies[0])
    assert prompt.startswith("system : You grade") and "Model's answer: blue {0} {braces}\n" in prompt
    assert '{"same": "no", "score": 1}' in prompt


SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}HERE{% endif %}{% endfor %}"
TEMPLATES = {
    "takes a system message": ("", "system : You grade"),
    "refuses one (Gemma 2)": (SYSTEM.replace("HERE", "{{ raise_exception('no system') }}"), "user : You grade"),
    "leaves it out": (
        "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}",
        "user : You grade",
    ),
}


@pytest.mark.parametrize(("begins", "expected"), TEMPLATES.values(), ids=TEMPLATES)
def test_the_judge_is_given_the_instruction_whatever_its_template_does_with_system_messages(
    begins: str, expected: str, tiny: Path, tmp_path: Path
) -> None:
    loaded = load_judge(settings(with_template(tiny, tmp_path, begins + TEMPLATE)), tmp_path / "cache")
    prompt = judging.render_request(loaded.tokenizer, Reply("cat ?", "red", "blue"))
    assert prompt.startswith(expected) and prompt.count("You grade") == 1 and "Model's answer: blue\n" in prompt
    assert loaded.verdicts([Reply("cat ?", "red", "blue")]) != [""]


def with_template(judge: Path, tmp_path: Path, template: str) -> Path:
    other = tmp_path / "judge"
    other.mkdir()
    for file in judge.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "chat_template.jinja").write_text(template)
    return other


def test_a_judge_that_may_think_is_asked_for_no_thoughts(tiny: Path, tmp_path: Path) -> None:
    empty = "{% if enable_thinking is false %}<think> </think>{% endif %}"  # as Qwen3's has it
    loaded = load_judge(settings(with_template(tiny, tmp_path, TEMPLATE + empty)), tmp_path / "cache")
    assert judging.render_request(loaded.tokenizer, Reply("cat ?", "red", "blue")).endswith("<think> </think>")
    assert loaded.identity["prompt"] != load_judge(settings(tiny), tmp_path / "cache").identity["prompt"]


@pytest.mark.parametrize(
    ("template", "message"),
    [("{{ raise_exception('never') }}", "refuses the request .never."), ("{{ messages[0].role }}", "leaves out what")],
)
def test_a_template_that_takes_no_request_is_refused(template: str, message: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=message):
        load_judge(settings(with_template(tiny, tmp_path, template)), tmp_path / "cache")


def test_generate_is_greedy_and_its_new_tokens_are_the_verdict(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_judge(settings(tiny), tmp_path / "cache")
    given: dict[str, Any] = {}

    def generate(**inputs: Any) -> torch.Tensor:
        given.update(inputs)
        rows = len(inputs["input_ids"])
        return torch.cat([inputs["input_ids"], torch.tensor([[8, 10, 2, 0]] * rows)], dim=1)

    monkeypatch.setattr(loaded.model, "generate", generate)
    assert loaded.verdicts([reply_of(0, "birds", 1), reply_of(0, "tools", 2)]) == ["cat red"] * 2
    settings_given = given["generation_config"]
    assert settings_given.do_sample is False and settings_given.num_beams == 1 and settings_given.max_new_tokens == 6
    assert settings_given.repetition_penalty is settings_given.temperature is None


def test_interrupted_judging_continues(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    calls = 0

    def interrupted(reply: Reply) -> str:
        nonlocal calls
        calls += 1
        if calls > 7:  # in the third batch of three
            raise KeyboardInterrupt
        return grade(reply)

    first = Asked(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        judge_run(run, settings(tiny))
    assert len(first.replies) == 6 and not (run / "judged.json").exists()
    second = Asked(monkeypatch, grade)
    judged = judge_run(run, settings(tiny))
    assert len(second.replies) == 12 and not set(first.replies) & set(second.replies)

    third = Asked(monkeypatch, grade)
    assert judge_run(run, settings(tiny)) == judged and not third.replies
    # Other verdicts: another judge, here one that may write more.
    judge_run(run, settings(tiny, max_new_tokens=7))
    assert len(third.replies) == 18


def test_a_changed_reply_is_judged_again_and_an_equal_one_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run")
    Asked(monkeypatch, grade)
    judge_run(run, settings(tiny))
    new, known = Reply("which birds 0 ?", "truth 0", "new 9 after 2"), reply_of(0, "birds", 1)
    # Cells of a backfill take the place of those of the stage.
    write_replies(run / "stages" / "02-tools" / "backfill" / "birds.jsonl", [new, new, known])
    asked = Asked(monkeypatch, grade)
    judged = judge_run(run, settings(tiny))
    assert asked.replies == [new]
    assert judged["rows"][2]["scores"]["birds"]["native"] == pytest.approx(20 * (2 + 2 + 1) / 3)


def test_tasks_can_be_judged_one_after_the_other(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    Asked(monkeypatch, grade)
    judged = judge_run(run, settings(tiny), ["tools"])
    assert [row["scores"]["birds"] for row in judged["rows"]] == [None] * 3
    assert judged["metrics"]["last"] is None and judged["parse_failures"]["birds"]["of"] == 0
    assert "birds" not in command.format_judged(judged).split("unreadable")[1]
    judged = judge_run(run, settings(tiny), ["birds"])
    assert judged["metrics"]["last"] == pytest.approx(0.7)


def test_a_cell_without_replies_has_no_score(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    (run / "stages" / "01-birds" / "evaluation" / "tools.jsonl").unlink()
    Asked(monkeypatch, grade)
    judged = judge_run(run, settings(tiny))
    assert judged["rows"][1]["scores"]["tools"] is None
    assert judged["metrics"]["last"] == pytest.approx(0.7) and judged["metrics"]["average"] is None


def test_nf4_judge_loads_and_answers(tiny: Path, tmp_path: Path) -> None:
    loaded = load_judge(settings(tiny, quantization="nf4"), tmp_path / "cache")
    projections = [p for name, p in loaded.model.named_parameters() if "q_proj" in name]
    assert {p.dtype for p in projections} == {torch.uint8}
    assert loaded.verdicts([reply_of(0, "birds", 1)])[0]


@pytest.mark.parametrize("tasks", [None, ["birds"]])
def test_runs_without_replies_are_refused_before_the_judge_is_loaded(tmp_path: Path, tasks: list[str] | None) -> None:
    run = write_run(tmp_path / "run")
    for path in (run / "stages").rglob("birds.jsonl"):
        path.unlink()
    with pytest.raises(JudgeError, match="no replies of birds in .*stages.*evaluation"):
        judge_run(run, settings(tmp_path / "no judge"), tasks)


@pytest.mark.parametrize(
    ("metric", "ending", "refused"),
    [("exact", CUT_MARK, True), ("exact", "[...", False), ("vista_match", CUT_MARK, False), (None, CUT_MARK, False)],
)
def test_replies_that_ended_where_their_score_was_settled_are_not_judged(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str | None, ending: str, refused: bool
) -> None:
    run = write_run(tmp_path)
    file = run / "stages" / "01-birds" / "evaluation" / "tools.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1] |= {"reply": f"a cat {ending}", "doc": {**lines[1]["doc"], SCORED_BY: metric}}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    Asked(monkeypatch, lambda reply: '{"score": 3}')
    judge_run(run, settings(tiny), ["birds"])
    if refused:
        with pytest.raises(JudgeError, match=r"^tools: replies end by ' \[\.\.\.\]'.*vista_match"):
            judge_run(run, settings(tiny))
    else:
        judge_run(run, settings(tiny))


def test_what_is_no_stage_of_a_run_is_not_graded_as_one(tmp_path: Path) -> None:
    made = write_run(tmp_path / "made")
    RunDirectory(made).edit.write_text("{}")
    with pytest.raises(JudgeError, match="keeplora edit"):
        judge_run(made, settings("no-judge"))


def test_unknown_tasks_and_unfinished_runs_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(JudgeError, match="no task bird; its tasks are birds, tools"):
        judge_run(run, settings("x"), ["bird"])
    (run / "retention.json").unlink()
    with pytest.raises(ArtifactError, match="retention.json is missing"):
        judge_run(run, settings("x"))


def test_damaged_replies_and_verdicts_are_named(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Asked(monkeypatch, grade)
    run = write_run(tmp_path / "run")
    path = run / "stages" / "00-base" / "evaluation" / "birds.jsonl"
    complete = path.read_text()
    path.write_text('{"doc": {"question": "?"}, "target": "a", "reply": "b"}\n')
    with pytest.raises(ArtifactError, match="birds.jsonl: expected lines with doc.text, target and reply"):
        judge_run(run, settings(tiny))
    path.write_text(complete[:-9])
    with pytest.raises(ArtifactError, match="birds.jsonl, line 3 is not valid JSON"):
        judge_run(run, settings(tiny))


def test_judges_that_cannot_be_loaded_are_named(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cache = tmp_path / "cache"
    with pytest.raises(JudgeError, match="'no such/judge/here' is neither a directory here nor a hub model"):
        load_judge(settings("no such/judge/here"), cache)

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((tiny / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(JudgeError, match="no \\*.safetensors weights; pickled weights are not read"):
        load_judge(settings(pickled), cache)

    for name, content, message in (
        ("config.json", '{"model_type": "nonsense"}', "cannot be loaded: .*nonsense"),
        ("model.safetensors", "x", "cannot be loaded: SafetensorError"),
        ("chat_template.jinja", None, "no chat template; use an instruction-tuned model"),
    ):
        broken = tmp_path / name
        broken.mkdir()
        for file in tiny.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        if content is None:
            (broken / name).unlink()
        else:
            (broken / name).write_text(content)
        with pytest.raises(JudgeError, match=message):
            load_judge(settings(broken), cache)

    with pytest.raises(SystemExit) as stopped:
        main(["judge", str(write_run(tmp_path / "run")), "--judge", str(pickled)])
    assert stopped.value.code == 2 and "error: judge" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--batch-size", "--max-new-tokens"])
def test_sizes_have_to_be_positive(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag[2:].replace('-', '_')}: expected a whole number in .*, found 0"):
        command.main(["run", "--judge", "x", flag, "0"])
    with pytest.raises(ConfigError, match="many"):
        command.main(["run", "--judge", "x", flag, "many"])
