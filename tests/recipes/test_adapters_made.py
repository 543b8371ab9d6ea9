"""What is made of a run's adapter: its card, other sums of its stages, compact copies, and what goes to the hub."""

import contextlib
import io
import json
import re
import shutil
import stat
import threading
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mllm_keeplora import edit, evaluate, load_run, push
from mllm_keeplora.commands.main import main
from mllm_keeplora.continual.edits import EditError, edit_label, with_one_rank
from mllm_keeplora.continual.export import export
from mllm_keeplora.continual.learning import as_factors
from mllm_keeplora.continual.saved_run import SavedRun
from mllm_keeplora.errors import ConfigError
from mllm_keeplora.modeling.loading import load_dense
from mllm_keeplora.reports.card import build_card, write_card
from mllm_keeplora.reports.publishing import PushError
from mllm_keeplora.runs.files import ArtifactError
from tests.recipes.conftest import ROOT, Recipe, run_example

PREFIX = "base_model.model."


@pytest.fixture
def run(finished: Recipe) -> SavedRun:
    return load_run(finished.run_dir)


def update(run: SavedRun, name: str) -> torch.Tensor:
    """s B A of a module, as PEFT computes it."""
    config = json.loads(run.directory.adapter_config.read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    tensors = stored(run.directory.adapter_weights)
    a, b = (tensors[f"{PREFIX}{name}.lora_{letter}.weight"].float() for letter in "AB")
    assert len(a) == config["r"]
    return config["lora_alpha"] / config["r"] * b @ a


stored = cache(load_file)  # no test changes a file that it has read by this


def stage_update(run: SavedRun, number: int, name: str) -> torch.Tensor:
    manifest = run.manifests[number]
    factors = as_factors(stored(run.directory.stage(number, manifest["task"]).tensors("train")))
    a, b = factors[name]
    [scale] = [m["scale"] for m in manifest["modules"] if m["name"] == name]
    return scale * b @ a


def modules(run: SavedRun) -> list[str]:
    return [m["name"] for m in run.manifests[1]["modules"]]


def snippet_of(card: str) -> str:
    [code] = re.findall(r"^```python\n(.*?)^```", card, flags=re.S | re.M)
    return str(code)


# The card


def test_the_card_says_what_the_run_has_measured(run: SavedRun) -> None:
    text = run.directory.card.read_text()
    card = ModelCard(text)
    rows = {row["task"]: row["scores"] for row in run.retention["rows"]}
    results = {result.dataset_name: result for result in card.data.eval_results or []}
    assert {name: result.metric_value for name, result in results.items()} == {
        name: round(score["value"], 4) for name, score in rows["charts"].items()
    }
    assert card.data.library_name == "peft" and card.data.base_model is None  # a folder is nothing to the hub
    for task, scores in rows.items():
        cells = [f"{100 * score['value']:.1f}" for score in scores.values()]
        [line] = [
            line for line in text.splitlines() if re.match(rf"\| \d? ?{task or 'base'} \| ", line) and "`" not in line
        ]
        assert re.findall(r"[\d.]+", line.partition("|")[2].partition("|")[2]) == cells
    assert run.manifests[-1]["base_model"]["hash"] in text and "`method`: keeplora" in text
    assert "![Accuracy after each stage](accuracy_matrix.png)" in text
    assert (run.adapter / "accuracy_matrix.png").read_bytes()[:4] == b"\x89PNG"
    assert "{{" not in text and "None" not in text


def test_the_cards_example_runs_as_written_and_gives_the_runs_answer(
    run: SavedRun, finished: Recipe, tmp_path: Path
) -> None:
    card = run.directory.card.read_text()
    first = json.loads((finished.data_root / "charts/test.json").read_text())[0]
    shutil.copytree(ROOT / "recipes/small/vqa_base", tmp_path / "recipes/small/vqa_base")
    printed, said = run_example(card, finished.data_root / "charts" / first["image"], tmp_path)
    replies = run.directory.stage(2, "charts").replies / "charts.jsonl"
    assert printed == said == json.loads(replies.read_text().splitlines()[0])["reply"]
    assert first["text"].splitlines()[0] in card


def test_a_card_that_was_edited_changes_nothing_about_the_run(copied: Recipe) -> None:
    run = load_run(copied.run_dir)
    run.directory.card.write_text("my own words\n")
    (run.adapter / "accuracy_matrix.png").unlink()
    assert edit(run, copied.directory / "copy").directory.adapter_weights.exists()
    run.directory.adapter_config.write_text("{}")
    with pytest.raises(ArtifactError, match="adapter_config.json: hash"):
        edit(run, copied.directory / "second")


@pytest.mark.parametrize("licence", ["license: llama2", "license: other\nlicense_name: own", "tags: [x]", None])
def test_a_base_of_the_hub_is_named_with_its_commit_and_licence(
    licence: str | None, copied: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The licence is what the base's own card says; where it says none, neither does ours."""
    snapshot = copied.directory / "snapshots/0123abcd"
    snapshot.mkdir(parents=True)
    if licence:
        (snapshot / "README.md").write_text(f"---\n{licence}\n---\n# A base\n")
    monkeypatch.setattr(
        "mllm_keeplora.reports.card.try_to_load_from_cache", lambda *_, **__: str(snapshot / "config.json")
    )
    config = json.loads((copied.run_dir / "config.json").read_text())
    config["model"]["base_model"] = "someone/a-base"
    (copied.run_dir / "config.json").write_text(json.dumps(config))
    card, _ = build_card(load_run(copied.run_dir), "me/mine")
    expected = yaml.safe_load(licence) if licence else {}
    assert card.data.base_model == "someone/a-base" and "revision `0123abcd`" in card.text
    assert (card.data.license, card.data.license_name) == (expected.get("license"), expected.get("license_name"))
    assert ("not known here; the base's" in card.text) == ("license" not in expected)


def test_the_card_says_what_the_budget_for_general_ability_did(run: SavedRun) -> None:
    changed = load_run(run.directory.path)
    manifests = [dict(manifest) for manifest in changed.manifests]
    manifests[1]["guard"] = {"factors": {"language": 1.0, "vision": 1.0}}
    manifests[2]["guard"] = {"factors": {"language": 0.9, "vision": 1.0}}
    changed.__dict__["manifests"] = manifests
    text = build_card(changed)[0].text
    assert re.findall(r"scaled what stage (.*)\.$", text, flags=re.M) == [
        "2 charts learnt: language by 0.90, vision by 1.00"
    ]
    assert "budget" not in build_card(run)[0].text.replace("general.budget", "")


HOSTILE = ["a|b", "x\ny", "<script>alert(1)</script>", "`code`", "{{ 7 * 7 }}", "--- end"]


def test_text_from_data_breaks_no_card(copied: Recipe) -> None:
    """Settings hold texts of the user's: none of them opens a tag, ends a table's cell or the header."""
    run = load_run(copied.run_dir)
    config = json.loads(run.directory.config.read_text())
    config["language"]["targets"] = HOSTILE
    run.directory.config.write_text(json.dumps(config))
    card, _ = build_card(load_run(copied.run_dir))
    text = str(card)
    assert ModelCard(text).data.library_name == "peft"
    assert "<script" not in text and "49" not in text.partition("language.targets")[2].partition("\n")[0]


def test_files_of_an_adapter_have_the_mode_that_the_umask_leaves(run: SavedRun) -> None:
    plain = run.directory.config.stat().st_mode
    for path in [*run.adapter.iterdir(), *run.directory.stages.rglob("*.safetensors")]:
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain), path


# Sums of stages


def test_the_last_stage_is_the_runs_own_adapter(run: SavedRun, tmp_path: Path) -> None:
    made = edit(run, tmp_path / "last", stage="charts")
    assert made.directory.adapter_weights.read_bytes() == run.directory.adapter_weights.read_bytes()
    assert made.retention == run.retention


SUMS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "digits": ({"stage": 1}, (1, 0)),
    "charts": ({"only": [2]}, (0, 1)),
    "digits again": ({"drop": ["charts"]}, (1, 0)),
    "0.5 digits + -2 charts": ({"scale": {"digits": 0.5, 2: -2}}, (0.5, -2)),
    "3 charts": ({"scale": {1: 0.0, "charts": 3}}, (0, 3)),
}


@pytest.mark.parametrize("label", SUMS)
def test_an_edit_is_the_sum_that_was_asked_for(label: str, run: SavedRun, tmp_path: Path) -> None:
    asked, factors = SUMS[label]
    made = edit(run, tmp_path / "made", **asked)
    assert edit_label(made.edit or {}) == label.removesuffix(" again")
    for name in modules(run):
        expected = sum(c * stage_update(run, n, name) for n, c in enumerate(factors, start=1))
        assert torch.allclose(update(made, name), expected, atol=1e-6 * float(expected.norm() + 1)), name
    is_state = asked == {"stage": 1} or "drop" in asked
    assert [row["task"] for row in made.retention["rows"]] == ([None, "digits"] if is_state else [None])
    assert made.retention["tasks"] == (["digits"] if is_state else ["digits", "charts"])


REFUSED: dict[str, dict[str, Any]] = {
    "is no stage of .* expected one of digits, charts, 1, 2": {"stage": 3},
    "did you mean 'charts'": {"drop": ["chart"]},
    "no stage is left": {"drop": [1, "charts"]},
    "is left out and scaled at once": {"only": ["digits"], "scale": {"charts": 2}},
    "expected a finite number": {"scale": {1: float("nan")}},
    "keeps nothing": {"rank": 0},
    "is none of float32, bfloat16": {"dtype": "int4"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_sum_is_refused(message: str, run: SavedRun, tmp_path: Path) -> None:
    with pytest.raises(EditError, match=message):
        edit(run, tmp_path / "made", **REFUSED[message])
    assert not (tmp_path / "made").exists()


def test_stages_that_were_changed_are_not_added_up(copied: Recipe) -> None:
    factors = copied.run_dir / "stages/01-digits/factors.safetensors"
    content = bytearray(factors.read_bytes())
    content[-1] ^= 1
    factors.write_bytes(content)
    with pytest.raises(ArtifactError, match="factors.safetensors: hash"):
        edit(load_run(copied.run_dir), copied.directory / "made")


@pytest.mark.parametrize(("rank", "dtype"), [(2, "float32"), (None, "bfloat16"), (3, "bfloat16")])
def test_a_compact_copy_is_off_by_what_it_says(rank: int | None, dtype: str, run: SavedRun, tmp_path: Path) -> None:
    made = edit(run, tmp_path / "made", rank=rank, dtype=dtype)
    said = (made.edit or {})["error"]
    differences, norms = {}, {}
    for name in modules(run):
        whole = stage_update(run, 1, name) + stage_update(run, 2, name)
        differences[name], norms[name] = float((update(made, name) - whole).norm()), float(whole.norm())
        assert said["modules"][name] == pytest.approx(differences[name] / norms[name], rel=1e-2, abs=1e-6)
    total = sum(d**2 for d in differences.values()) ** 0.5 / sum(n**2 for n in norms.values()) ** 0.5
    assert 0 < said["total"] == pytest.approx(total, rel=1e-2)
    assert {t.dtype for t in load_file(made.directory.adapter_weights).values()} == {getattr(torch, dtype)}
    assert json.loads(made.directory.adapter_config.read_text())["r"] == (rank or 8)


def test_modules_of_several_ranks_get_one() -> None:
    """llama.cpp divides one alpha by each tensor's own rank, vLLM reads one rank: with padding both are right."""
    several = {f"layer{r}": (torch.randn(r, 6), torch.randn(5, r)) for r in (1, 4, 3)}
    rank, made = with_one_rank(several)
    assert rank == 4 and {a.shape for a, _ in made.values()} == {(4, 6)}
    for name, (a, b) in several.items():
        assert torch.allclose(made[name][1] @ made[name][0], b @ a)


def test_an_edit_is_measured_and_reported_like_a_stage(
    run: SavedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the commands: the sum of all updates with factor 1 scores as the run's last stage did."""
    out = tmp_path / "made"
    main(["edit", str(run.directory.path), "--scale", "digits=1.0000001", "--out", str(out)])
    assert "has not been measured itself" in (out / "adapter/README.md").read_text()
    main(["evaluate", str(out)])
    assert "digits + charts" in capsys.readouterr().out
    made = load_run(out)
    last = run.retention["rows"][-1]["scores"]
    assert made.retention["rows"][-1]["scores"] == last
    assert made.retention["metrics"]["last"] == run.retention["metrics"]["last"]
    assert made.retention["metrics"]["bwt"] is None
    assert made.ask("Which digit is written here?") == run.ask("Which digit is written here?")
    card = (out / "adapter/README.md").read_text()
    assert "has not been measured itself" not in card
    with pytest.raises(SystemExit):
        main(["compare", str(run.directory.path), str(out)])
    assert "which has no stages: name a run" in capsys.readouterr().err
    assert "| 1 digits + charts |" in card  # the factor that is all but 1; a sum is no stage and has no number


def test_a_saved_run_is_asked_tasks_of_lmms_eval(run: SavedRun, tmp_path: Path) -> None:
    """An lmms-eval task of the user's own: here the run's file under lmms-eval's names."""
    names = [entry["lmms_task"] for entry in json.loads((run.directory.task_files / "tasks.json").read_text())["tasks"]]
    made = edit(run, tmp_path / "made", stage=1)
    found = evaluate(made, [names[0]], limit=5, include_path=run.directory.task_files)
    assert 0 <= found[names[0]]["exact"] <= 1
    lines = (made.directory.other_tasks / f"{names[0]}.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc_id"] for line in lines] == [0, 1, 2, 3, 4]
    assert json.loads((made.directory.other_tasks / "results.json").read_text()) == {"limit": 5, "tasks": found}


def test_a_run_that_is_measured_is_not_measured_again(run: SavedRun) -> None:
    with pytest.raises(ConfigError, match="name other tasks"):
        evaluate(run)


def test_no_run_is_started_in_an_edits_folder(run: SavedRun, finished: Recipe, tmp_path: Path) -> None:
    edit(run, tmp_path / "made")
    with pytest.raises(SystemExit):
        main(["run", *finished.command()[2:], "--run_dir", str(tmp_path / "made")])


# The merged model


def test_every_adapted_module_differs_by_its_update_in_what_is_exported(run: SavedRun, tmp_path: Path) -> None:
    """W_merged - W_base = s B A within the rounding to bfloat16, in the files; both towers are in them."""
    export(run.directory.path, tmp_path / "exported", questions=1)
    dense, _ = load_dense(run.config.model, None)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "exported")
    assert merged.dtype == torch.bfloat16
    towers = {m["name"]: m["tower"] for m in run.manifests[1]["modules"]}
    for name in towers:
        before, after = (model.get_submodule(name).weight.detach().float() for model in (dense, merged))
        expected = before + update(run, name)
        assert ((after - expected).abs() <= 2**-8 * expected.abs() + 1e-8).all(), name
        assert not torch.equal(after, before.bfloat16().float()), f"{name} is the base's"
    assert {*towers.values()} == {"vision", "language"}


# The documents


def test_the_examples_of_the_python_page_run_in_their_order(
    copied: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a run that is complete, as the page's own second call of `run_stream` would find it."""
    settings = json.loads((copied.run_dir / "config.json").read_text())
    (tmp_path / "my_run.yaml").write_text(yaml.safe_dump({**settings, "run_dir": str(copied.run_dir)}))
    run = load_run(copied.run_dir)
    shutil.copytree(run.directory.task_files, tmp_path / "my_tasks")
    [task] = [path for path in (tmp_path / "my_tasks").glob("*digits.yaml")]
    task.write_text(task.read_text().replace(f"task: {task.stem}", "task: my_task"))
    shutil.copy(next((copied.data_root / "digits/images/test").glob("*.png")), tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/python.md").read_text()
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for code in re.findall(r"^```python\n(.*?)^```", page, flags=re.S | re.M):
            exec(compile(code, "docs/python.md", "exec"), names)
    assert list(names["run"].matrix.index) == ["base", "digits", "charts"]
    assert {*names["run"].matrix.columns} == {"digits", "charts", "scenes"}
    assert names["scores"]["my_task"]["exact"] >= 0 and "README.md" in printed.getvalue()


# The hub


class Hub:
    """The part of the hub's interface that a push uses, on this machine."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.status = 200
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                hub.asked.append(self.path)
                self.answer(hub.post(self.path.partition("?")[0], body))

            def do_PUT(self) -> None:
                hub.files[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
                self.answer({})

            def do_GET(self) -> None:
                self.answer({"id": "me/small", "sha": "0" * 40})

            def answer(self, content: dict[str, Any]) -> None:
                text = json.dumps(content).encode()
                self.send_response(hub.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def post(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return {"url": f"{self.url}/me/small"}
        if path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            kinds = ["lfs" if name.endswith((".safetensors", ".png")) else "regular" for name in files]
            return {
                "files": [
                    {"path": n, "uploadMode": k, "shouldIgnore": False} for n, k in zip(files, kinds, strict=True)
                ]
            }
        if path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{self.url}/upload/{o['oid']}"}}} for o in objects]
            return {"objects": upload, "transfer": "basic"}
        if path.endswith("/commit/main"):
            self.commit = [json.loads(line) for line in body.splitlines() if line]
            return {"commitUrl": f"{self.url}/me/small/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
        return {"errors": [], "warnings": []}  # validate-yaml


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False)
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    hub.server.shutdown()
    thread.join()
    hub.server.server_close()


def test_a_push_sends_the_adapter_and_a_card_that_loads_it_from_there(run: SavedRun, hub: Hub) -> None:
    import base64

    pushed = push(run, "me/small", stage=1, private=True)
    assert hub.created["name"] == "small" and hub.created.get("private", hub.created.get("visibility"))
    assert pushed.url == f"{hub.url}/me/small/commit/{'0' * 40}"
    sent = {e["value"]["path"]: e["value"] for e in hub.commit if e["key"] in ("file", "lfsFile")}
    assert {*sent} == {*pushed.files} >= {"README.md", "adapter_config.json", "chat_template.jinja", "tokenizer.json"}
    card = base64.b64decode(sent["README.md"]["content"]).decode()
    assert 'snapshot_download("me/small")' in snippet_of(card) and str(run.directory.path) not in card
    weights = hub.files[sent["adapter_model.safetensors"]["oid"]]
    assert len(weights) == pushed.files["adapter_model.safetensors"]
    assert "not on the hub" in (pushed.warning or "")


def test_a_dry_push_sends_nothing(run: SavedRun, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    before = run.directory.card.read_bytes()
    main(["push", str(run.directory.path), "me/small", "--dry_run"])
    assert not hub.asked and not hub.files and run.directory.card.read_bytes() == before
    assert re.search(r"adapter_model\.safetensors +[\d.]+ [kMG]?B", capsys.readouterr().out)


def test_what_the_hub_refuses_is_said(run: SavedRun, hub: Hub) -> None:
    hub.status = 401
    with pytest.raises(PushError, match="me/small cannot be written.*hf auth login"):
        push(run, "me/small")
    for name in ("small", "me/with space", "a/b/c"):
        with pytest.raises(ConfigError, match="name"):
            push(run, name)


def test_the_card_is_the_same_when_it_is_written_again(copied: Recipe) -> None:
    run = load_run(copied.run_dir)
    write_card(run)
    before = run.directory.card.read_bytes()
    write_card(load_run(copied.run_dir))
    assert run.directory.card.read_bytes() == before
