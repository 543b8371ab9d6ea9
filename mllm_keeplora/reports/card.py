"""The model card of an adapter, from what its run has measured: README.md in the adapter's folder."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.repocard import metadata_load

from mllm_keeplora.continual.edits import edit_label, is_state, stage_facts
from mllm_keeplora.continual.saved_run import SavedRun
from mllm_keeplora.data.conversation import Classes
from mllm_keeplora.data.stream import StreamError, load_stream
from mllm_keeplora.evaluation.task_files import ASKED, CLASSES, COPY_COLUMN, ScoredTask, read_classes, read_index
from mllm_keeplora.modeling.saved_adapters import AdapterFacts, adapter_facts
from mllm_keeplora.reports.figures import matrix_picture
from mllm_keeplora.reports.page import write_atomically
from mllm_keeplora.reports.results import names_of, score_of, written
from mllm_keeplora.reports.tables import metric_frame, percent, stage_label, subset_note
from mllm_keeplora.resources import find
from mllm_keeplora.runs.run_directory import CARD, CARD_PICTURE, RunDirectory
from mllm_keeplora.yaml_files import read_yaml

Json = dict[str, Any]

# What of the settings shapes the result; the whole is in the run's config.json.
_SETTINGS = ("method", "method_options", "alpha", "language", "vision", "train", "train_overrides", "general", "seed")
_SHOWN_AS = {"image": "picture.png", "video": "clip.mp4"}


def write_card(run: SavedRun, repo: str | None = None) -> None:
    """Writes the model card and its picture into the adapter's folder.

    Args:
        run: a run at its end, or what `edit` has made of one.
        repo: name on the hub from which the card's example loads the adapter; None loads it from its folder.

    Raises:
        ArtifactError: no adapter or no scores yet, or one of the run's files was changed.
        WriteError: the card cannot be written.
    """
    card, picture = build_card(run, repo)
    write_atomically(run.directory.card_picture, picture)
    write_atomically(run.directory.card, str(card).encode())


def build_card(run: SavedRun, repo: str | None = None) -> tuple[ModelCard, bytes]:
    """The card, and its picture as PNG; see `write_card`."""
    name = run.directory.path.resolve().name if repo is None else repo.rpartition("/")[2]
    retention = run.retention
    entries = read_index(run.directory.task_files)[1]
    base = _base(run)
    kinds = {part["type"] for document in _first_questions(run, entries).values() for part in _parts(document)}
    data = ModelCardData(
        model_name=name,
        base_model=base["id"],
        library_name="peft",
        pipeline_tag=_pipeline(run, entries, kinds),
        tags=["lora", "continual-learning", "keeplora", "mllm-keeplora"],
        datasets=_datasets(run),
        eval_results=_eval_results(run, entries),
        **base["licence"],
    )
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = _cell
    template = environment.from_string((Path(__file__).parent / "card.md.j2").read_text(encoding="utf-8"))
    text = template.render(card_data=data.to_yaml(), name=name, **_facts(run, entries, base, repo))
    return ModelCard(text), matrix_picture(retention, name)


def _facts(run: SavedRun, entries: Sequence[ScoredTask], base: Json, repo: str | None) -> Json:
    retention, edit = run.retention, run.edit
    adapter = adapter_facts(run.directory.adapter_weights)
    config = run.config
    last = retention["rows"][-1]
    towers = [name for name, tower in config.towers().items() if tower.adapt]
    learnt = learnt_stages(run)
    lowest = min(adapter.ranks.values())
    return {
        "retention": retention,
        "rank": adapter.rank,
        "ranks": f"rank {adapter.rank}" if adapter.is_uniform else f"ranks {lowest} to {adapter.rank}",
        "dtype": adapter.dtype,
        "modules": len(adapter.ranks),
        "vision_modules": adapter.vision_modules,
        "towers": " and ".join(f"{name} tower" for name in towers),
        "learnt": learnt,
        "edit": edit_label(edit) if edit and not is_state(edit) else None,
        "error": edit["error"]["total"] if edit else None,
        "measured": last["task"] is not None,
        "subset": subset_note(retention),
        "matrix": _matrix(retention),
        "picture": CARD_PICTURE,
        "metrics": _metrics(retention),
        "general": [_kept(retention, name) for name in retention["general"]],
        "guards": _guards(run),
        "base_link": base["link"],
        "revision": base["revision"],
        "base_hash": base["hash"],
        "quantization": config.model.quantization,
        "compute_dtype": config.model.compute_dtype,
        "licence": base["licence"].get("license"),
        "settings": _settings(run),
        "packages": _packages(run),
        **_example(run, entries, repo),
    }


def learnt_stages(run: SavedRun) -> list[Json]:
    """What the stages behind an adapter learnt from: stage, task, samples, steps, and the hash of the data."""
    if run.edit is not None:
        return [dict(stage) for stage in run.edit["stages"]]
    return [stage_facts(manifest) for manifest in run.manifests if manifest["task"] is not None]


def _base(run: SavedRun) -> Json:
    """The base by its id and commit where it is on the hub, by its folder's name elsewhere, and its licence."""
    model = run.config.model
    folder = find(model.base_model)
    if folder.is_dir():
        return {
            "id": None,
            "link": f"`{folder.name}` (a folder, not on the hub)",
            "revision": None,
            "hash": base_hash(run),
            "licence": _licence(folder / CARD),
        }
    config = try_to_load_from_cache(model.base_model, "config.json", revision=model.revision)
    snapshot = Path(config).parent if isinstance(config, str) else None
    return {
        "id": model.base_model,
        "link": f"[{model.base_model}](https://huggingface.co/{model.base_model})",
        "revision": snapshot.name if snapshot else model.revision,
        "hash": base_hash(run),
        "licence": _licence(snapshot / CARD) if snapshot else {},
    }


def _licence(card: Path) -> Json:
    """What the base's own card says; nothing where it says nothing."""
    found = metadata_load(card) if card.is_file() else None
    keys = ("license", "license_name", "license_link")
    return {key: found[key] for key in keys if found.get(key)} if isinstance(found, dict) else {}


def _datasets(run: SavedRun) -> list[str] | None:
    """Ids on the hub, where the stream names one and can still be read."""
    config = run.config
    root = Path(config.data_root) if config.data_root else None
    try:
        stream = load_stream(Path(config.stream), root, check_files=False, cache_dir=config.cache_dir)
    except StreamError:
        return None
    return [stream.hub.repo_id] if stream.hub else None


def _pipeline(run: SavedRun, entries: Sequence[ScoredTask], kinds: Collection[str]) -> str:
    """The hub's word for what the model is for."""
    if any(_classes(run, entry) for entry in entries):
        return "zero-shot-image-classification"
    return "video-text-to-text" if "video" in kinds else "image-text-to-text"


def _eval_results(run: SavedRun, entries: Sequence[ScoredTask]) -> list[EvalResult]:
    """The last row, in the form that the hub shows."""
    last = run.retention["rows"][-1]["scores"]
    return [
        EvalResult(
            task_type="image-classification" if _classes(run, entry) else "visual-question-answering",
            dataset_type=entry.lmms_task,
            dataset_name=entry.name,
            metric_type=entry.score or "accuracy",
            metric_value=round(last[entry.name]["value"], 4),
            metric_args={"samples": last[entry.name]["n"]},
        )
        for entry in entries
        if last.get(entry.name)
    ]


def _cell(text: object) -> str:
    """Text that neither ends a table's cell nor begins markup."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _matrix(retention: Json) -> str:
    names = names_of(retention)
    general = set(retention["general"])
    rows = []
    for row in retention["rows"]:
        cells = [percent(score_of(row, name).value) for name in names]
        marked = [f"**{c}**" if row["task"] == n else c for n, c in zip(names, cells, strict=True)]
        rows.append([_cell(stage_label(row)), *marked])
    return _table(["after", *(f"*{_cell(n)}*" if n in general else _cell(n) for n in names)], rows)


def _metrics(retention: Json) -> str:
    frame = metric_frame(retention)
    rows = [
        [name, f"{row['value']} {row['unit']}", row["meaning"]] for name, row in frame.iterrows() if row["value"] != "-"
    ]
    return _table(["metric", "value", "meaning"], [[_cell(cell) for cell in row] for row in rows])


def _kept(retention: Json, name: str) -> tuple[str, str, str, str]:
    first, last = (percent(score_of(row, name).value) for row in (retention["rows"][0], retention["rows"][-1]))
    return _cell(name), first, last, percent(retention["metrics"]["retention"].get(name))


def _guards(run: SavedRun) -> list[tuple[str, str]]:
    """The stages that `general.budget` scaled, with each tower's factor."""
    return [
        (_cell(stage_label(row)), ", ".join(f"{tower} by {c:.2f}" for tower, c in row["guard"].items()))
        for row in learnt_stages(run)
        if any(c < 1 for c in row["guard"].values())
    ]


def _settings(run: SavedRun) -> dict[str, str]:
    """By their dotted names; places on one machine say nothing elsewhere."""
    values = asdict(run.config)
    values["general"] |= {"samples": Path(values["general"]["samples"]).name, "media_root": None}
    return written({name: values[name] for name in _SETTINGS if values[name] not in ({}, None)})


def _packages(run: SavedRun) -> str:
    found = run.edit["packages"] if run.edit else run.manifests[-1]["packages"]
    return "Made with " + ", ".join(f"{name} {version}" for name, version in found.items()) + "."


def base_hash(run: SavedRun) -> str:
    """Content hash of the base that the adapter was made on."""
    facts = run.edit if run.edit else run.manifests[-1]
    return str(facts["base_model"]["hash"])


# The example: how to load the adapter, with one question of its last task.


def _first_questions(run: SavedRun, entries: Sequence[ScoredTask]) -> dict[str, Json]:
    """Task of the stream -> its first test question, of the run's own copy; tasks alone, no general benchmarks."""
    found = {}
    for entry in entries:
        settings = _task_file(run, entry)
        if settings is not None and entry.kind == "task" and entry.name in run.retention["tasks"]:
            copy = Path(settings["dataset_kwargs"]["data_files"]["test"]).name  # beside the task file, wherever that is
            found[entry.name] = json.loads(pd.read_parquet(run.directory.task_files / copy)[COPY_COLUMN].iloc[0])
    return found


def _task_file(run: SavedRun, entry: ScoredTask) -> Any:
    """The settings of an lmms-eval task file that the run wrote; None for a stock task."""
    file = run.directory.task_files / f"{entry.lmms_task}.yaml"
    return read_yaml(file) if file.is_file() else None


def _classes(run: SavedRun, entry: ScoredTask) -> Classes | None:
    """Names and prompts of the classes that a task's replies are chosen from; None where replies are words."""
    settings = _task_file(run, entry)
    named = (settings or {}).get("generation_kwargs", {}).get(CLASSES)
    return None if named is None else read_classes(run.directory.task_files / Path(named).name)


def _parts(document: Json) -> list[Json]:
    return [part for message in document[ASKED] for part in message["content"]]


def _example(run: SavedRun, entries: Sequence[ScoredTask], repo: str | None) -> Json:
    questions = _first_questions(run, entries)
    task = learnt_stages(run)[-1]["task"]
    asked = questions.get(task)
    simple = (
        asked is not None and len(asked[ASKED]) == 1 and len([p for p in _parts(asked) if p["type"] != "text"]) <= 1
    )
    parts = (
        _parts(asked)
        if asked is not None and simple
        else [{"type": "image"}, {"type": "text", "text": "What is shown?"}]
    )
    kind = next((part["type"] for part in parts if part["type"] != "text"), None)
    words = "".join(part["text"] for part in parts if part["type"] == "text")
    entry = next((entry for entry in entries if entry.name == task), None)
    classes = _classes(run, entry) if entry else None
    template = (Path(__file__).parent / "snippet.py.j2").read_text(encoding="utf-8")
    model = run.config.model
    snippet = jinja2.Template(template, trim_blocks=True, lstrip_blocks=True).render(
        folder=json.dumps(str(run.directory.adapter)),
        repo=json.dumps(repo) if repo else None,
        base=json.dumps(find(model.base_model).name if repo and find(model.base_model).is_dir() else model.base_model),
        revision=json.dumps(model.revision) if model.revision else None,
        quantized=model.quantization == "nf4",
        dtype=model.compute_dtype,
        kind=kind,
        shown=_SHOWN_AS.get(str(kind)),
        question=json.dumps(words, ensure_ascii=False),
        frames=run.config.video.frames,
        fps=run.config.video.fps,
        tokens=_longest(run, entry),
        classes=classes,
    )
    reply = _first_reply(run, task) if simple and kind else None
    return {
        "snippet": snippet.strip(),
        "classes": classes is not None,
        "serving": _serving(adapter_facts(run.directory.adapter_weights)) if classes is None else _PEFT_ALONE,
        "kind": kind,
        "shown": _SHOWN_AS.get(str(kind)),
        "article": "a clip" if kind == "video" else "a picture",
        "asked_of": task,
        "reply": None if reply is None else " ".join(reply.replace("`", "'").split()),
    }


def _longest(run: SavedRun, entry: ScoredTask | None) -> int:
    """Of the task's replies, in tokens, as its questions were asked."""
    settings = _task_file(run, entry) if entry else None
    return 128 if settings is None else int(settings["generation_kwargs"]["max_new_tokens"])


def _first_reply(run: SavedRun, task: str) -> str | None:
    """What the model replied to the first question of the task it learnt last; None where that was not asked."""
    row = run.retention["rows"][-1]
    of_run = run.directory if run.edit is None else RunDirectory(Path(run.edit["run"]))
    measured_there = run.edit is None or is_state(run.edit)
    folder = of_run.stage(row["stage"], row["task"]).replies if measured_there else run.directory.edit_replies
    file = folder / f"{task}.jsonl"
    if not file.is_file():
        return None
    with file.open(encoding="utf-8") as lines:
        return str(json.loads(lines.readline())["reply"])


# vLLM's max_lora_rank is one of these (vllm/config/lora.py, MaxLoRARanks).
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


_PEFT_ALONE = "Stock PEFT takes it as it is; engines that write text have no use for it."


def _serving(adapter: AdapterFacts) -> str:
    """What engines take of this adapter; docs/serving.md has the rules and where they stand."""
    fits = next((rank for rank in _VLLM_RANKS if rank >= adapter.rank), None)
    vllm = (
        f"`--enable-lora --max-lora-rank {fits}`"
        if fits
        else f"no: rank {adapter.rank} is above its 512; `keeplora edit --rank 512` makes a smaller copy"
    )
    vision = adapter.vision_modules > 0
    if fits and vision:
        vllm += (
            ", and `--enable-tower-connector-lora` where it supports that for this model; else the vision part is lost"
        )
    merged = "export it merged (`keeplora export`): LoRA on a vision tower is not taken"
    ranks = (
        ""
        if adapter.is_uniform
        else " Make a copy of one rank first (`keeplora edit RUN --out DIR`): it reads one alpha."
    )
    rows = [
        ["PEFT", "as it is"],
        ["vLLM", vllm],
        ["SGLang", merged if vision else f"`--enable-lora --max-lora-rank {adapter.rank}`.{ranks}"],
        ["llama.cpp, Ollama", merged if vision else f"`convert_lora_to_gguf.py`.{ranks}"],
    ]
    return _table(["engine", "what it takes"], rows)
