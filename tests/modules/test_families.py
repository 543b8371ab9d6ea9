"""Every family of the table on NF4, both towers, images and clips: the table's facts, and a whole stage."""

import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoProcessor, GenerationConfig

from mllm_keeplora.config import ConfigError, ModelConfig, ProbeConfig, RunConfig, TowerConfig, TrainConfig, VideoConfig
from mllm_keeplora.continual.run_stream import run_stream
from mllm_keeplora.continual.saved_run import load_run
from mllm_keeplora.continual.trainer import train_stage
from mllm_keeplora.data.collator import (
    ChatCollator,
    ProcessorError,
    SampleDataset,
    join_batches,
    prepare_questions,
    ready_batch,
)
from mllm_keeplora.data.conversation import MediaFile, Message, Sample
from mllm_keeplora.data.images import load_image
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.methods.hooks import Hooks
from mllm_keeplora.modeling.adapters import STAGE, activate, attach, factor_parameters, without_dropout
from mllm_keeplora.modeling.families import FAMILIES, Media, TargetError, family_of
from mllm_keeplora.modeling.loading import load_base, load_base_processor, load_dense, read_model_config
from mllm_keeplora.modeling.loss import summed_token_loss, supervised_positions
from mllm_keeplora.modeling.targets import find_targets
from mllm_keeplora.planning.skeleton import build_skeleton
from mllm_keeplora.probes.gradients import gaussian_probe, sketch_gradients
from tests.conversations import Turn, ask, sample, turns_of
from tests.modules.conftest import BOTH_TOWERS, model_config, read_adapter
from tests.modules.tiny_families import BUILDERS, WRITING

COLUMNS = 8
CASES = [(family, media) for family in WRITING for media in FAMILIES[family].vision_layers]
MAIN_MEDIA: dict[str, Media] = {
    name: "video" if "video" in family.vision_layers else "image"
    for name, family in FAMILIES.items()
    if name in WRITING
}
IN_BF16 = ("qwen2_5_vl",)  # what the default suite runs; --slow runs them all


def samples(root: Path, media: Media) -> list[Sample]:
    turns = (Turn("what is this ?", "red"), Turn("is this red ?", "yes no yes"))
    return [
        sample(str(n), root / f"{n}.png", turns[: 1 + n % 2])
        if media == "image"
        else sample(str(n), None, turns[: 1 + n % 2], video=root / f"{n}.mp4")
        for n in range(4)
    ]


@cache
def reader() -> VideoReader:
    """One decoder for all: each is a process of its own."""
    return VideoReader(VideoConfig(frames=8), None)


def linears_with_gradient(dense: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of every linear layer that has one, by name."""
    return {
        name: module.weight.grad
        for name, module in dense.named_modules()
        if isinstance(module, nn.Linear) and module.weight.grad is not None and module.weight.grad.any()
    }


@pytest.mark.parametrize("family, media", CASES)
def test_two_batches_join_to_the_one_of_all_their_samples(
    family: str, media: Media, tiny: Any, media_root: Path
) -> None:
    """Equal in every input, for batches of unequal lengths and tiles, and beside text alone."""
    processor = AutoProcessor.from_pretrained(tiny(family))
    collator = ChatCollator(processor, None, reader())
    shown, text = samples(media_root, media), [sample("text", None, (Turn("is it ?", "no"),))]
    wide = media_root / "wide.png"
    Image.new("RGB", (160, 40), "red").save(wide)
    others = [*shown[1:2], *([sample("wide", wide, (Turn("what ?", "red"),))] if media == "image" else [])]
    for first, second in ((shown[:1], others), (others, shown[:1]), (text, shown[:2]), (shown[:2], text)):
        joined = join_batches(collator(first), collator(second), processor.tokenizer.pad_token_id)
        expected = collator([*first, *second])
        assert joined.keys() == expected.keys()
        assert all(torch.equal(joined[key], expected[key]) for key in expected), family


def test_the_table_and_the_tiny_models_are_the_same_families() -> None:
    assert set(FAMILIES) == set(BUILDERS)
    assert {media for family in FAMILIES.values() for media in family.vision_layers} == set(get_args(Media))


@pytest.mark.parametrize("family, media", CASES)
def test_targets_are_what_gets_a_gradient_and_probes_measure_it(
    family: str, media: Media, tiny: Any, media_root: Path
) -> None:
    """The table names exactly the layers that the data reach; on each the probe is autograd's gradient."""
    model, processor = load_base(model_config(tiny(family), "nf4"))
    collator = ChatCollator(processor, None, reader())
    batches = [collator(samples(media_root, media)[:3]), collator(samples(media_root, media)[3:])]
    targets = find_targets(model, BOTH_TOWERS, media=[media])

    sketches = sketch_gradients(model, targets, {t.name: COLUMNS for t in targets}, lambda: batches, seed=3)
    dense = copy.deepcopy(model)
    dense.dequantize()
    dense.requires_grad_(True)
    tokens = sum(int((b["labels"] != -100).sum()) for b in batches)
    for inputs in batches:
        (dense(**inputs, num_items_in_batch=1).loss / tokens).backward()
    exact = linears_with_gradient(dense)

    apart = (*family_of(model.config).projectors, "lm_head")
    assert {t.name for t in targets} == {name for name in exact if not name.startswith(apart)}
    for target in targets:
        expected = gaussian_probe(target, COLUMNS, 3).T @ exact[target.name]
        error = (sketches[target.name] - expected).norm() / expected.norm()
        assert error < 1e-5, (target.name, float(error))


@pytest.mark.parametrize("family, media", CASES)
def test_training_and_evaluation_give_the_model_the_same(
    family: str, media: Media, tiny: Any, media_root: Path
) -> None:
    processor = load_base_processor(model_config(tiny(family), "nf4"))
    one = samples(media_root, media)[0]
    collator = ChatCollator(processor, None, reader())
    batch, again = collator([one]), collator([one])
    assert batch.keys() == again.keys()
    assert all(torch.equal(batch[key], again[key]) for key in batch)

    path = one.media[0].path
    shown = load_image(path) if media == "image" else reader().read(path)
    asked = prepare_questions(processor, [ask(turns_of(one)[0].question, shown)], torch.device("cpu"))
    length = asked["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], asked["input_ids"])
    for key in asked.keys() - {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}:
        assert torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(asked[key])), key
    supervised = batch["input_ids"][0][batch["labels"][0] != -100]
    assert processor.tokenizer.convert_ids_to_tokens(supervised.tolist()) == ["red", "</s>"]


def several(root: Path, media: Media, number: int, later: str = "red") -> Sample:
    """Text alone, then two images or clips with texts between, then one of the other kind where there is one."""
    suffix = "png" if media == "image" else "mp4"
    one, two = (MediaFile(media, root / f"{(number + n) % 4}.{suffix}") for n in range(2))
    return Sample(
        f"{media} {number} {later}",
        (
            Message("user", ("is this red ?",)),
            Message("assistant", ("no",)),
            Message("user", (one, "left", two, "right ?")),
            Message("assistant", ("yes",), supervised=False),
            Message("user", (MediaFile("image", root / "1.png"), "what is this ?")),
            Message("assistant", (later,)),
        ),
    )


@pytest.mark.parametrize("family, media", CASES)
def test_media_in_later_turns(family: str, media: Media, tiny: Any, media_root: Path) -> None:
    """The model sees them where they are asked about, in batches as alone, and not before."""
    model, processor = load_base(model_config(tiny(family), "none"))
    collator = ChatCollator(processor, None, reader())
    samples_ = [several(media_root, media, 0), several(media_root, media, 2)]
    samples_.append(Sample("text", samples_[0].messages[:2]))
    batch, again = collator(samples_), collator(samples_)  # the second from the tokens that are kept
    assert batch.keys() == again.keys() and all(torch.equal(batch[key], again[key]) for key in batch)
    alone = [collator([one]) for one in samples_]
    with torch.no_grad():
        together = model(**batch).logits
        apart = [model(**one).logits[0] for one in alone]
    for row, logits in enumerate(apart):
        torch.testing.assert_close(together[row, : len(logits)], logits, rtol=1e-4, atol=1e-4)
        supervised = alone[row]["input_ids"][0][alone[row]["labels"][0] != -100]
        expected = ["no", "</s>", "red", "</s>"][: len(supervised)]
        assert processor.tokenizer.convert_ids_to_tokens(supervised.tolist()) == expected
    text = len(apart[2])  # what comes before the first image
    torch.testing.assert_close(apart[0][:text], apart[2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(apart[0][-4:], apart[1][-4:], atol=1e-3), "other images, other answers"


@pytest.mark.parametrize("family, media", CASES)
def test_a_question_in_a_later_turn_is_asked_as_it_was_learnt(
    family: str, media: Media, tiny: Any, media_root: Path
) -> None:
    processor = load_base_processor(model_config(tiny(family), "none"))
    shown = several(media_root, media, 0)
    learnt = ChatCollator(processor, None, reader())([shown])
    asked = prepare_questions(processor, [[opened(message) for message in shown.messages[:5]]], torch.device("cpu"))
    length = asked["input_ids"].shape[1]
    assert torch.equal(learnt["input_ids"][:, :length], asked["input_ids"])
    assert processor.tokenizer.convert_ids_to_tokens(learnt["input_ids"][0, length:].tolist()) == ["red", "</s>"]
    for key in asked.keys() - {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}:
        assert torch.equal(torch.as_tensor(learnt[key]), torch.as_tensor(asked[key])), key


@pytest.mark.parametrize("family, media", CASES)
def test_what_a_model_keeps_between_tokens_changes_no_answer(
    family: str, media: Media, tiny: Any, media_root: Path
) -> None:
    """Keys and values, or states: as without, for questions padded on the left to one length, and for each alone."""
    model, processor = load_base(model_config(tiny(family), "none"))
    conversations = [[opened(m) for m in several(media_root, media, 0).messages[:5]]]
    conversations += [[opened(m) for m in one.messages[:1]] for one in samples(media_root, media)[1:2]]

    def logits(questions: list[list[Message]], use_cache: bool) -> torch.Tensor:
        """Of six tokens, [questions, 6, words]."""
        inputs = prepare_questions(processor, questions, torch.device("cpu"))
        settings = {"do_sample": False, "pad_token_id": 0, "use_cache": use_cache, "return_dict_in_generate": True}
        words = processor.tokenizer.all_special_ids  # an end, or a token of images without one, is no reply
        asked = GenerationConfig(max_new_tokens=6, suppress_tokens=words, output_logits=True, **settings)
        with torch.no_grad():
            return torch.stack(model.generate(**inputs, generation_config=asked).logits, dim=1)

    kept = logits(conversations, True)
    torch.testing.assert_close(kept, logits(conversations, False), rtol=1e-4, atol=1e-4)
    for row, conversation in enumerate(conversations):
        torch.testing.assert_close(kept[row], logits([conversation], True)[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(kept[0], kept[1], atol=1e-3)


def opened(message: Message) -> Message:
    parts = [
        part
        if not isinstance(part, MediaFile)
        else reader().read(part.path)
        if part.kind == "video"
        else Image.open(part.path).convert("RGB")
        for part in message.parts
    ]
    return Message(message.role, tuple(parts))


def test_a_projector_without_linear_layers_cannot_be_protected(tiny: Any) -> None:
    """Gemma 3's is one bare weight: left out in silence, it would be no protected projector."""
    model, _ = load_base(model_config(tiny("gemma3"), "none"))
    with pytest.raises(TargetError, match="gemma3 has no linear layer in its projector model.multi_modal_projector"):
        find_targets(model, BOTH_TOWERS, media=["image"], protect_projector=True)


def test_gemma_3_is_told_which_tokens_see_each_other_both_ways(tiny: Any, media_root: Path) -> None:
    """Those of images, in what is learnt and in what is asked, padded on either side."""
    processor = load_base_processor(model_config(tiny("gemma3"), "none"))
    shown = samples(media_root, "image")[:2]
    learnt = ChatCollator(processor)(shown)
    questions = [ask(turns_of(one)[0].question, load_image(one.media[0].path)) for one in shown]
    for inputs in (learnt, prepare_questions(processor, questions, torch.device("cpu"))):
        soft = processor.tokenizer.convert_tokens_to_ids("<image_soft_token>")
        assert torch.equal(inputs["token_type_ids"] == 1, inputs["input_ids"] == soft)


FLASH = ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"]


@pytest.mark.parametrize("attention", FLASH)
def test_gemma_3_takes_no_attention_without_its_mask(tiny: Any, attention: str) -> None:
    """transformers hands flash-attention the padding alone, and pictures are read from left to right."""
    config = replace(model_config(tiny("gemma3"), "none"), compute_dtype="bfloat16", device="auto")
    config = replace(config, attn_implementation=attention)
    for look in (read_model_config, build_skeleton):
        with pytest.raises(ConfigError, match=f"{attention}.*both directions in gemma3; use sdpa or eager"):
            look(config)


@pytest.mark.parametrize("family", sorted(WRITING))
def test_pictures_see_ahead_in_the_families_that_say_so(family: str, tiny: Any, media_root: Path) -> None:
    """A token of a medium, and what comes behind it: where it sees none of that, flash-attention needs no mask."""
    model, processor = load_base(model_config(tiny(family), "none"))
    media = MAIN_MEDIA[family]
    inputs = ChatCollator(processor, reader=reader())(samples(media_root, media)[:1])
    token = getattr(model.config, f"{media}_token_id", model.config.image_token_id)
    first = int((inputs["input_ids"][0] == token).nonzero()[0])

    def answer(noise: float) -> torch.Tensor:
        def change(_: nn.Module, args: Any, given: dict[str, Any]) -> Any:
            behind = torch.arange(given["inputs_embeds"].shape[1])[:, None] > first
            return args, {**given, "inputs_embeds": given["inputs_embeds"] + noise * behind}

        hook = model.get_decoder().register_forward_pre_hook(change, with_kwargs=True)
        with torch.no_grad():
            logits: torch.Tensor = model(**inputs).logits[0, first]
        hook.remove()
        return logits

    assert torch.allclose(answer(0.0), answer(0.1), atol=1e-6) != FAMILIES[family].sees_ahead


def test_the_layer_that_foretells_further_tokens_is_left_out(tiny: Any, tmp_path: Path) -> None:
    """Qwen3.5's checkpoints have one beside the model; it is no sign of another model's weights."""
    shutil.copytree(tiny("qwen3_5"), tmp_path / "base")
    weights = load_file(tmp_path / "base/model.safetensors")
    for name in ("mtp.layers.0.mlp.up_proj.weight", "mtp.fc.weight"):
        weights[name] = torch.zeros(4, 4)
    save_file(weights, tmp_path / "base/model.safetensors", {"format": "pt"})
    model, _ = load_base(model_config(tmp_path / "base", "nf4"))
    assert not any("mtp" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("family", [f for f in WRITING if "video" not in FAMILIES[f].vision_layers])
def test_an_image_family_refuses_clips(family: str, tiny: Any, media_root: Path) -> None:
    processor = load_base_processor(model_config(tiny(family), "nf4"))
    with pytest.raises(ProcessorError, match="takes no video"):
        ChatCollator(processor, None, reader())(samples(media_root, "video"))


def write_stream(root: Path, data: Path, media: Media, tasks: Sequence[str] = ("colours",)) -> Path:
    """A stream of these tasks, all with the same samples, as files."""
    suffix = "png" if media == "image" else "mp4"
    train = [
        {
            "id": n,
            media: f"{n}.{suffix}",
            "conversations": [
                {"from": "human", "value": f"<{media}>\nwhat is this ?"},
                {"from": "gpt", "value": ("red", "blue")[n % 2]},
            ],
        }
        for n in range(4)
    ]
    (root / "train.json").write_text(json.dumps(train))
    if media == "image":
        test = [{"question_id": n, "image": f"{n}.png", "text": "what is this ?", "answer": "red"} for n in (0, 1)]
        entry = {"test": "test.json"}
    else:
        test = [{"question_id": n, "video_name": str(n), "question": "what is this ?"} for n in (0, 1)]
        (root / "answers.json").write_text(json.dumps([{"answer": "red"}, {"answer": "blue"}]))
        entry = {"test": "test.json", "test_answers": "answers.json"}
    (root / "test.json").write_text(json.dumps(test))
    (root / "media").symlink_to(data)
    task = {
        "train": "train.json",
        "media_root": "media",
        "metric": "exact",
        "max_new_tokens": 2,
    }
    stream = {"name": "tiny", "data_root": str(root), "tasks": [{"name": name, **task, **entry} for name in tasks]}
    (root / "stream.yaml").write_text(yaml.safe_dump(stream))
    return root / "stream.yaml"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Loading a model may set torch's threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", WRITING)
@pytest.mark.parametrize(("batch", "passes"), [(4, 1), (2, 2), (1, 4)])
def test_a_step_is_the_mean_over_its_tokens_however_it_accumulates(
    batch: int, passes: int, family: str, tiny: Any, media_root: Path, tmp_path: Path, one_thread: None
) -> None:
    """Beside the gradient of the summed loss over the number of tokens, and of a penalty that counts once a step.

    Answers have different lengths. Some of transformers' models say of themselves that their loss does not take the
    number of tokens, Qwen's among them.
    """
    model, processor = load_base(model_config(tiny(family), "nf4"))
    collator = ChatCollator(processor, None, reader())
    shown = samples(media_root, MAIN_MEDIA[family])
    targets = find_targets(model, {"language": ["all-linear"]})
    generator = torch.Generator().manual_seed(0)
    factors = {
        t.name: (torch.randn(4, t.in_features, generator=generator), torch.zeros(t.out_features, 4)) for t in targets
    }
    adapted = attach(model, STAGE, factors, dict.fromkeys(factors, 1.0))
    activate(adapted, [STAGE], STAGE, "B")
    trained = {t.name: factor_parameters(adapted, STAGE, t.name)[1] for t in targets}
    with without_dropout(adapted):
        tokens = 0
        for single in shown:
            inputs = ready_batch(collator([single]), model.dtype)
            summed_token_loss(adapted, inputs).backward()
            tokens += int(supervised_positions(inputs["labels"]).sum())
    expected = {name: -(b.grad / tokens + 0.01) for name, b in trained.items()}
    adapted.zero_grad()
    train_stage(
        adapted,
        SampleDataset(shown),
        collator,
        TrainConfig(
            learning_rate=1.0,
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=passes,
            optim="sgd",
            lr_scheduler_type="constant",
            warmup_ratio=0.0,
            max_grad_norm=1e9,
        ),
        seed=0,
        directory=tmp_path / "train",
        log_dir=tmp_path / "log",
        mixed=False,
        report_to=[],
        device=torch.device("cpu"),
        hooks=Hooks(penalty=lambda _: 0.01 * torch.stack([b.sum() for b in trained.values()]).sum()),
    )
    for name, b in trained.items():
        assert (b.detach() - expected[name]).norm() < 1e-3 * expected[name].norm(), name


@pytest.mark.parametrize("family", WRITING)
def test_a_whole_stage(family: str, tiny: Any, media_root: Path, tmp_path: Path, one_thread: None) -> None:
    media = MAIN_MEDIA[family]
    tower = TowerConfig(rank=2)
    config = RunConfig(
        run_dir=str(tmp_path / "run"),
        stream=str(write_stream(tmp_path, media_root, media)),
        model=ModelConfig(base_model=str(tiny(family)), device="cpu"),
        language=tower,
        vision=tower,
        probe=ProbeConfig(fraction=1.0, columns_per_rank=4, batch_size=3),
        train=TrainConfig(max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2),
        cache_dir=str(tmp_path / "cache"),
        report_to=[],
    )
    retention = run_stream(config)  # refuses a function changed at the start, and leakage, itself
    assert [row["scores"]["colours"]["n"] for row in retention["rows"]] == [2, 2]

    manifest = json.loads((tmp_path / "run/stages/01-colours/manifest.json").read_text())
    modules = {m["name"]: m for m in manifest["modules"]}
    base, processor = load_base(config.model)
    assert set(modules) == {t.name for t in find_targets(base, BOTH_TOWERS, media=[media])}
    assert max(m["leakage"] for m in modules.values()) <= 1e-6
    assert max(m["orthonormality_error"] for m in modules.values()) <= 1e-5
    factors = read_adapter(tmp_path / "run/adapter")
    assert any(b.abs().max() > 0 for _, b in factors.values())

    batch = ChatCollator(processor, None, reader())(samples(media_root, media)[:2])
    with torch.no_grad():
        untouched = base(**batch).logits
        expected = load_run(tmp_path / "run").load_model()[0](**batch).logits
        found = PeftModel.from_pretrained(base, str(tmp_path / "run/adapter")).eval()(**batch).logits
    assert torch.equal(found, expected)
    assert not torch.equal(found, untouched)
    dense, _ = load_dense(config.model, tmp_path / "run/adapter")  # as an export writes it
    torch.testing.assert_close(dense(**batch).logits.detach(), expected, rtol=1e-3, atol=1e-4)
    stored = AutoProcessor.from_pretrained(tmp_path / "run/adapter")
    again = ChatCollator(stored, None, reader())(samples(media_root, media)[:2])
    assert torch.equal(again["input_ids"], batch["input_ids"])
    assert GenerationConfig.from_pretrained(tmp_path / "run/adapter").eos_token_id == [2]


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in IN_BF16 else pytest.mark.slow) for f in WRITING])
def test_two_stages_in_bf16(family: str, tiny: Any, media_root: Path, tmp_path: Path, one_thread: None) -> None:
    """As a GPU computes; activations computed again in the backward pass are the same ones."""
    stream = write_stream(tmp_path, media_root, MAIN_MEDIA[family], ("colours", "again"))
    tower = TowerConfig(rank=2)
    found = {}
    for checkpointing in (False, True):
        config = RunConfig(
            run_dir=str(tmp_path / f"run_{checkpointing}"),
            stream=str(stream),
            model=ModelConfig(base_model=str(tiny(family)), device="cpu", compute_dtype="bfloat16"),
            language=tower,
            vision=tower,
            probe=ProbeConfig(fraction=1.0, columns_per_rank=4, batch_size=3, refine=True),
            train=TrainConfig(
                max_steps=3,
                per_device_train_batch_size=2,
                learning_rate=1e-2,
                activation_checkpointing=checkpointing,
            ),
            cache_dir=str(tmp_path / "cache"),
            report_to=[],
        )
        run_stream(config)
        run = load_run(config.run_dir)
        assert [manifest["task"] for manifest in run.manifests] == [None, "colours", "again"]
        assert max(module["leakage"] for manifest in run.manifests for module in manifest["modules"]) <= 1e-6
        found[checkpointing] = read_adapter(run.adapter)
    assert {len(a) for a, _ in found[True].values()} == {4}
    for name, (a, b) in found[True].items():
        again_a, again_b = found[False][name]
        assert torch.equal(a, again_a) and torch.equal(b, again_b), name
        assert b[:, :2].any() and b[:, 2:].any(), name
