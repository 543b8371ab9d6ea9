"""A tiny random model of every family in the table, with its real config class and its real processor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPProcessor,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5Tokenizer,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    VideoLlavaConfig,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
    VideoLlavaVideoProcessor,
)

from mllm_keeplora.modeling.families import FAMILIES
from mllm_keeplora.recipes.small.base_training import word_tokenizer

SIZE, PATCH = 64, 16
PINPOINTS = [[64, 128], [128, 64], [128, 128]]
LLAVA_TOKENS = {"image": "<image>", "video": "<video>"}
QWEN_TOKENS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
QWEN_FRAME = ("<|vision_start|>", "<|vision_end|>")
INTERNVL_TOKENS = {"image": "<IMG_CONTEXT>", "video": "<video>"}
INTERNVL_FRAME = ("<img>", "</img>")
GEMMA_TOKENS = {"image": "<image_soft_token>"}
GEMMA_FRAME = ("<start_of_image>", "<end_of_image>")
GEMMA_NAMES = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}
# What InternVL's processor asks its tokenizer for.
INTERNVL_NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
# Qwen3-VL writes the time of each pair of frames into the prompt.
WORDS = [
    "USER:",
    "ASSISTANT:",
    "what",
    "is",
    "this",
    "?",
    "yes",
    "no",
    "red",
    "blue",
    "left",
    "right",
    "seconds",
    *(f"Frame{number}:" for number in range(1, 17)),  # InternVL3 numbers those of a clip
]


def _tokenizer(
    media_tokens: dict[str, str], extra: tuple[str, ...] = (), named: dict[str, str] | None = None
) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", "<unk>", *media_tokens.values(), *extra]
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=vocabulary,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[*media_tokens.values(), *extra],
        **({"extra_special_tokens": named} if named else {}),
    )


def _template(image: str, video: str) -> str:
    return (
        "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
        "{% for c in m['content'] %}"
        f"{{% if c['type'] == 'image' %}}{image}\n{{% elif c['type'] == 'video' %}}{video}\n"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
        "{% if m['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )


LLAVA_TEMPLATE = _template("<image>", "<video>")
QWEN_TEMPLATE = _template("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")


def _clip() -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": PATCH,
    }


def _siglip() -> dict[str, Any]:
    return {**_clip(), "model_type": "siglip_vision_model"}


def _text(model_type: str, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _crop() -> dict[str, Any]:
    return {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}


def _llava_settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer,
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": LLAVA_TEMPLATE,
    }


def _llava() -> tuple[Any, Any]:
    tokenizer = _tokenizer({"image": "<image>"})
    processor = LlavaProcessor(image_processor=CLIPImageProcessor(**_crop()), **_llava_settings(tokenizer))
    text = _text("llama", len(tokenizer))
    return LlavaConfig(vision_config=_clip(), text_config=text, image_token_index=4), processor


def _llava_next() -> tuple[Any, Any]:
    tokenizer = _tokenizer({"image": "<image>"})
    images = LlavaNextImageProcessor(**_crop(), image_grid_pinpoints=PINPOINTS)
    processor = LlavaNextProcessor(image_processor=images, **_llava_settings(tokenizer))
    config = LlavaNextConfig(
        vision_config=_clip(),
        text_config=_text("llama", len(tokenizer)),
        image_token_index=4,
        image_grid_pinpoints=PINPOINTS,
    )
    return config, processor


def _llava_onevision() -> tuple[Any, Any]:
    tokenizer = _tokenizer(LLAVA_TOKENS)
    side = {"height": SIZE, "width": SIZE}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=PINPOINTS),
        video_processor=LlavaOnevisionVideoProcessor(size=side),
        tokenizer=tokenizer,
        num_image_tokens=(SIZE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_TEMPLATE,
    )
    config = LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=_text("qwen2", len(tokenizer)),
        image_token_index=4,
        video_token_index=5,
        image_grid_pinpoints=PINPOINTS,
    )
    return config, processor


def _video_llava() -> tuple[Any, Any]:
    tokenizer = _tokenizer(LLAVA_TOKENS)
    processor = VideoLlavaProcessor(
        image_processor=VideoLlavaImageProcessor(**_crop()),
        video_processor=VideoLlavaVideoProcessor(**_crop()),
        **_llava_settings(tokenizer),
    )
    config = VideoLlavaConfig(
        vision_config=_clip(),
        text_config=_text("llama", len(tokenizer)),
        image_token_index=4,
        video_token_index=5,
    )
    return config, processor


def _llava_next_video() -> tuple[Any, Any]:
    tokenizer = _tokenizer(LLAVA_TOKENS)
    processor = LlavaNextVideoProcessor(
        image_processor=LlavaNextImageProcessor(**_crop(), image_grid_pinpoints=PINPOINTS),
        video_processor=LlavaNextVideoVideoProcessor(**_crop()),
        **_llava_settings(tokenizer),
    )
    config = LlavaNextVideoConfig(
        vision_config=_clip(),
        text_config=_text("llama", len(tokenizer)),
        image_token_index=4,
        video_token_index=5,
        image_grid_pinpoints=PINPOINTS,
    )
    return config, processor


def _qwen_text(vocabulary: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    return {**_text("", vocabulary), "rope_parameters": rope}


def _qwen(
    config_class: Callable[..., Any],
    processor_class: Callable[..., Any],
    videos: Any,
    model_type: str,
    video_area: int,
    **vision: Any,
) -> tuple[Any, Any]:
    tokenizer = _tokenizer(QWEN_TOKENS, QWEN_FRAME)
    pixels = {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE}  # areas, whatever their names say
    processor = processor_class(
        image_processor=Qwen2VLImageProcessor(patch_size=PATCH, size=pixels),
        tokenizer=tokenizer,
        video_processor=videos(patch_size=PATCH, size={"shortest_edge": video_area, "longest_edge": video_area}),
        chat_template=QWEN_TEMPLATE,
    )
    text = _qwen_text(len(tokenizer))
    text["model_type"] = f"{model_type}_text"
    config = config_class(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "depth": 3,
            "num_heads": 4,
            "patch_size": PATCH,
            "out_hidden_size": 128,
            **vision,
        },
        text_config=text,
        image_token_id=4,
        video_token_id=5,
        vision_start_token_id=6,
        vision_end_token_id=7,
    )
    return config, processor


def _qwen2_5_vl() -> tuple[Any, Any]:
    return _qwen(
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
        "qwen2_5_vl",
        SIZE**2,
        fullatt_block_indexes=[2],
        window_size=SIZE // 2,
    )


def _qwen3_vl() -> tuple[Any, Any]:
    return _qwen(
        Qwen3VLConfig,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
        "qwen3_vl",
        8 * SIZE**2,
        deepstack_visual_indexes=[0, 1],
        num_position_embeddings=(SIZE // PATCH) ** 2,
    )


def _words_among_pieces() -> Qwen3_5Tokenizer:
    """One token a word, with the spaces around it, as its class allows: it would cut any other's words into bytes."""
    special = ["<pad>", "<s>", "</s>", "<unk>", *QWEN_TOKENS.values(), *QWEN_FRAME]
    tokenizer = Qwen3_5Tokenizer(
        vocab={token: number for number, token in enumerate(special)},
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=special[4:],
    )
    tokenizer.add_tokens([AddedToken(word, single_word=True, lstrip=True, rstrip=True) for word in WORDS])
    return tokenizer


def _qwen3_5() -> tuple[Any, Any]:
    config, processor = _qwen(
        Qwen3_5Config,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
        "qwen3_5",
        8 * SIZE**2,
        num_position_embeddings=(SIZE // PATCH) ** 2,
    )
    processor.tokenizer = _words_among_pieces()
    # A layer of either kind; twice as many heads of values as of keys, and wider than the model, as in larger ones.
    text = {
        **_qwen_text(len(processor.tokenizer)),
        "model_type": "qwen3_5_text",
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 32,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 32,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
    }
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}
    config = Qwen3_5Config(**{**config.to_dict(), "text_config": text})
    return config, processor


def _internvl() -> tuple[Any, Any]:
    tokenizer = _tokenizer(INTERNVL_TOKENS, INTERNVL_FRAME, INTERNVL_NAMES)
    side = {"height": SIZE, "width": SIZE}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=side, max_patches=4),
        video_processor=InternVLVideoProcessor(size=side),
        tokenizer=tokenizer,
        image_seq_length=(SIZE // PATCH // 2) ** 2,
        chat_template=_template("<IMG_CONTEXT>", "<video>"),
    )
    vision = {**_clip(), "model_type": "internvl_vision", "attention_bias": True}
    text = _text("qwen2", len(tokenizer))
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=4, tie_word_embeddings=False)
    return config, processor


def _gemma3() -> tuple[Any, Any]:
    tokenizer = _tokenizer(GEMMA_TOKENS, GEMMA_FRAME, GEMMA_NAMES)
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": SIZE, "width": SIZE}),
        tokenizer=tokenizer,
        image_seq_length=(SIZE // PATCH // 2) ** 2,
        chat_template=_template("<start_of_image>", ""),
    )
    # One layer with a window, shorter than a prompt, and one without.
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 32}
    config = Gemma3Config(
        vision_config={**_siglip(), "vision_use_head": False},
        text_config={**_text("gemma3_text", len(tokenizer)), **layers},
        image_token_index=4,
        boi_token_index=5,
        eoi_token_index=6,
        mm_tokens_per_image=(SIZE // PATCH // 2) ** 2,
    )
    return config, processor


def _two_towers() -> tuple[Any, Any]:
    """2 layers of 64 a tower, 4 x 4 patches; a tokenizer of words that marks both ends."""
    tokenizer = word_tokenizer((), ["a", "picture", "of", "this", "is", "or", "so", "red", "green", "blue", "pink"])
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.model_max_length = 24
    side = {"height": SIZE, "width": SIZE}
    size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 24, **size, **special}
    config = CLIPConfig(text_config=text, vision_config={"image_size": SIZE, "patch_size": PATCH, **size})
    return config, CLIPProcessor(CLIPImageProcessor(size=side, crop_size=side), tokenizer)


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "video_llava": _video_llava,
    "llava_next_video": _llava_next_video,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_5": _qwen3_5,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "clip": _two_towers,
}


# The families of the table that answer in words; a CLIP has further tests of its own (test_classification.py).
WRITING = [name for name, family in FAMILIES.items() if not family.classifies]


def save_tiny(family: str, directory: Path) -> None:
    """Writes a random model of the family and its processor, as a hub repository has them."""
    config, processor = BUILDERS[family]()
    torch.manual_seed(0)
    model = (AutoModel if FAMILIES[family].classifies else AutoModelForImageTextToText).from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:  # the default init is so small that gradients drown in rounding
            torch.nn.init.xavier_normal_(parameter)
        elif name.endswith("A_log"):  # and forgets a picture within a few words
            torch.nn.init.constant_(parameter, -3.0)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
