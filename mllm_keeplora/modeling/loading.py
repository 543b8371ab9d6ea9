"""Loading the base model: 4-bit in both towers, guarded, frozen; and saving what is learnt on it."""

import importlib.util
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoProcessor,
    BitsAndBytesConfig,
    Gemma3Processor,
    PreTrainedModel,
    Qwen3VLVideoProcessor,
)
from transformers.dependency_versions_table import deps
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_kernels_available

from mllm_keeplora.config import ConfigError, ModelConfig
from mllm_keeplora.distributed.sharding import sharding_asked
from mllm_keeplora.errors import KeepLoRAError, without_network
from mllm_keeplora.modeling.adapters import ACCUMULATED
from mllm_keeplora.modeling.clip import model_class
from mllm_keeplora.modeling.families import family_of
from mllm_keeplora.modeling.linear4bit import free_4bit_weights, guard_linear4bit
from mllm_keeplora.modeling.patch_embedding import embed_patches_by_one_product
from mllm_keeplora.modeling.saved_adapters import load_adapter
from mllm_keeplora.resources import find
from mllm_keeplora.runs.files import (
    ArtifactError,
    check_regular,
    read_sealed,
    replaced_directory,
    sha256_file,
    sha256_json,
    write_hashes,
    write_json,
    write_sealed,
)
from mllm_keeplora.runs.run_directory import ADAPTER_HASHES, CARD, CARD_FILES

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What of a repository is read: safetensors weights only, so that no pickle is ever opened.
MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]
# What a template writes that asks for today's date; Llama 3's write this one where they cannot know it.
DATE = date(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\(\s*(["'])([^"']*)\1\s*\)""")
_TODAY_SOMEHOW = re.compile(r"strftime_now\s*\(")
# Of files with other contents than they should have; StrictDataclassError is of a config's kinds of values.
_OF_A_LAYER = re.compile(r"\.(layers|blocks)\.\d+\..*\.weight$")
_LOADING_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError),
    *(RuntimeError, ImportError, SafetensorError, StrictDataclassError),
)
# Implementations of attention that take any mask.
MASKED = ("sdpa", "eager")
# Of GPUs: Ampere, Hopper.
CAPABILITIES = {"flash_attention_2": (8, 0), "flash_attention_3": (9, 0)}
REMOTE_CODE = "*.py"  # fetched beside them only where model.trust_remote_code is on


def resolve_device(config: ModelConfig) -> torch.device:
    """The device this process of a run uses: of several, each has its own CUDA device.

    `auto` says it where the machine has an NVIDIA driver and torch cannot use it.

    Raises:
        ConfigError: device cuda without a CUDA device.
    """
    if config.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        reason = _why_no_cuda()
        if config.device == "cuda":
            raise ConfigError(
                "model.device is cuda, but torch sees no CUDA device"
                + (f": {reason}" if reason else "; use model.device: cpu or auto")
            )
        if reason:
            _say_on_cpu(reason)
        return torch.device("cpu")
    # Counted as accelerate does: a launcher may show each process its own device alone.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@lru_cache
def _say_on_cpu(reason: str) -> None:
    """Once a process."""
    logger.warning(f"this run takes the CPU, though there is an NVIDIA driver: {reason}")


def _why_no_cuda() -> str | None:
    """Why torch cannot use the machine's NVIDIA driver, both versions, and what to do; None without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1", "NoDevFiles"):
        return f"CUDA_VISIBLE_DEVICES is {hidden!r}, which hides every GPU; unset it, or name one, such as 0"
    try:
        asked = subprocess.run([tool], capture_output=True, text=True, timeout=30, check=False)
        said = asked.stdout + asked.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    driver = re.search(r"Driver Version\s*:\s*([\d.]+)", said)
    newest = re.search(r"CUDA[A-Z ]* Version\s*:\s*([\d.]+)", said)
    if driver is None:
        first = (said.strip().splitlines() or ["nothing"])[0]
        return f"nvidia-smi says {first[:200]!r}; load or install the driver, then try `nvidia-smi` again"
    serves = f"driver {driver[1]} serves CUDA {newest[1] if newest else '(not said)'}"
    if torch.version.cuda is None:
        return (
            f"{serves}, and torch {torch.__version__} is a build without CUDA; install the same version built for that "
            "CUDA or an older one (https://pytorch.org/get-started/previous-versions)"
        )
    return (
        f"{serves}, and torch {torch.__version__} is built for CUDA {torch.version.cuda}; update the driver, or "
        "install the same torch built for a CUDA that it serves (https://pytorch.org/get-started/previous-versions)"
    )


def check_revision(config: ModelConfig) -> None:
    """Raises ConfigError for a revision of a local directory, which has none."""
    if config.revision is not None and find(config.base_model).is_dir():
        raise ConfigError(
            f"model.revision is {config.revision!r}, but model.base_model {config.base_model} is a directory "
            "here: remove model.revision, or name the hub model"
        )


def resolve_model_directory(config: ModelConfig) -> Path:
    """The local directory of a base model, fetched from the hub where it is a hub id.

    Config, weights and processor are one commit's; remote code is fetched only where it may run.

    Raises:
        ConfigError: neither a directory nor a reachable hub id; a revision for a directory; a directory
            without config, weights or processor.
    """
    check_revision(config)
    directory = find(config.base_model)
    if not directory.is_dir():
        patterns = [*MODEL_FILES, *([REMOTE_CODE] if config.trust_remote_code else [])]
        try:
            allowed = [*patterns, CARD]  # which says the licence
            directory = Path(snapshot_download(config.base_model, revision=config.revision, allow_patterns=allowed))
        except (
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            ValueError,
            OSError,
        ) as error:
            raise ConfigError(
                f"model.base_model {config.base_model!r} is neither a directory here nor a hub "
                f"model that can be fetched: {error}; {without_network(config.base_model)}"
            ) from error
        if config.revision is None:
            _say_commit(config.base_model, directory.name)
    for what, names in (
        ("config", ["config.json"]),
        ("processor", ["processor_config.json", "preprocessor_config.json"]),
        ("tokenizer", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]),
    ):
        if not any((directory / name).is_file() for name in names):
            raise ConfigError(f"base model {directory} has no {what}: expected {' or '.join(names)} in that directory")
    if not any(directory.glob("*.safetensors")):
        raise ConfigError(
            f"base model {directory} has no *.safetensors weights; convert it first, pickled weights are not read"
        )
    return directory


@lru_cache
def _say_commit(base_model: str, commit: str) -> None:
    """Once a process: a run that goes on after the repository has moved is refused by its base's hash."""
    logger.warning(f"{base_model} is taken at its newest commit; 'revision: {commit}' beside base_model keeps it there")


def quantization_config(config: ModelConfig, not_quantised: tuple[str, ...]) -> BitsAndBytesConfig | None:
    """NF4 with double quantisation, or None."""
    return None if config.quantization == "none" else nf4_config(config.compute_dtype, not_quantised)


def nf4_config(compute_dtype: str, not_quantised: Sequence[str] | None = None) -> BitsAndBytesConfig:
    """NF4 with double quantisation.

    Args:
        compute_dtype: a name in `DTYPES`.
        not_quantised: modules that stay as they are; None leaves the choice to transformers.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[compute_dtype],
        llm_int8_skip_modules=None if not_quantised is None else list(not_quantised),
    )


def read_model_config(config: ModelConfig) -> Any:
    """The base model's own config; no weights are loaded.

    Raises:
        ConfigError: an unusable model directory.
    """
    directory = resolve_model_directory(config)
    with _explained(f"base model {directory}"):
        return model_config_of(config, str(directory), trust_remote_code=config.trust_remote_code)


def model_config_of(config: ModelConfig, directory: str, **options: Any) -> Any:
    """A base model's own config.

    Args:
        config: how the base is to be loaded.
        directory: of the base model, or its hub id.
        options: of transformers' `from_pretrained`.

    Raises:
        ConfigError: its weights are stored in another quantisation than the settings ask for, or its attention is not
            one that `attn_implementation` computes.
        TargetError: an unknown model family.
    """
    found = AutoConfig.from_pretrained(directory, **options)
    # transformers hands flash-attention the padding alone: pictures would be read as text is, without a word.
    if family_of(found).sees_ahead and config.attn_implementation not in MASKED:
        raise ConfigError(
            f"attn_implementation is {config.attn_implementation}, which leaves out that tokens of a picture see each "
            f"other in both directions in {found.model_type}; use {' or '.join(MASKED)}"
        )
    _check_stored(found, config, directory)
    return found


def _check_stored(model_config: Any, config: ModelConfig, directory: str) -> None:
    """Refuses weights in another quantisation than the settings': transformers would take the weights' own instead."""
    stored = stored_quantization(model_config)
    if stored is None or (config.quantization == "nf4" and _is_nf4(stored)):
        return
    kind = "NF4" if _is_nf4(stored) else str(stored.get("quant_method", "an unknown form"))
    remedy = "set model.quantization: nf4, or take" if _is_nf4(stored) else "take"
    raise ConfigError(
        f"base model {directory} is stored quantised ({kind}, quantization_config in its config.json), but "
        f"model.quantization is {config.quantization}; {remedy} the model that it was made from, with weights in 16 or "
        "32 bit. If its weights are that already, remove quantization_config from config.json"
    )


def stored_quantization(model_config: Any) -> dict[str, Any] | None:
    """The quantisation that the weights of a base model are stored in; None where they are plain."""
    for part in (model_config, model_config.get_text_config()):  # some tools write it to the language model alone
        stored = getattr(part, "quantization_config", None)
        if stored:
            return dict(stored if isinstance(stored, Mapping) else stored.to_dict())
    return None


def _is_nf4(stored: Mapping[str, Any]) -> bool:
    return bool(stored.get("load_in_4bit")) and stored.get("bnb_4bit_quant_type") == "nf4"


def check_media_tokens(model_config: Any, processor: Any, directory: str) -> None:
    """Compares the tokens of images and clips that the processor writes with those that the model replaces.

    Raises:
        ConfigError: they are not the same, are no single tokens, or lie outside of the model's embeddings.
    """
    size = model_config.get_text_config().vocab_size
    for kind in family_of(model_config).vision_layers:
        # Gemma 3's processor takes its tokens for images from one that stands in a prompt for all of them.
        written = processor.tokenizer if isinstance(processor, Gemma3Processor) else processor
        token = getattr(written, f"{kind}_token", None)
        # Without one it is said where such a medium is to be shown; InternVL shows clips by the token of images.
        if token is None or not hasattr(model_config, f"{kind}_token_id"):
            continue
        expected = getattr(model_config, f"{kind}_token_id", None)
        found = processor.tokenizer(token, add_special_tokens=False)["input_ids"]
        if found != [expected] or found[0] >= size:
            named = model_config.attribute_map.get(f"{kind}_token_id", f"{kind}_token_id")
            raise ConfigError(
                f"base model {directory}: its processor writes {token!r} for {kind}s, which its tokenizer "
                f"makes {found}; expected one token, the {named} {expected} of its config.json, below the "
                f"vocab_size of {size}. Take the tokenizer and the config of one model, or correct {named}"
            )


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Whatever transformers and safetensors say of files that they cannot use, as an error that names these.

    Raises:
        ConfigError: in place of theirs. Errors of our own and a lack of memory stay what they are.
    """
    try:
        yield
    except _LOADING_ERRORS as error:
        if isinstance(error, KeepLoRAError) or "memory" in str(error):
            raise
        raise ConfigError(f"{what} cannot be loaded: {type(error).__name__}: {error}") from error


def check_weights(model: Any, info: Mapping[str, Any], what: str) -> None:
    """Looks for what loading passes over: parameters without a tensor, which it fills with random numbers, and layers
    without a place.

    Args:
        model: as it was loaded.
        info: what `from_pretrained` says with `output_loading_info=True`.
        what: it is and where it lies, for messages.

    Raises:
        ConfigError: names the first such parameter, or the first of another shape or with NaN or infinite values.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(
            f"{what}: {len(missing)} parameters have no tensor in *.safetensors, {missing[0]!r} first; "
            "a file of weights is missing, or belongs to another model: fetch the model again"
        )
    # Of the others some are known to be no part of the model; a layer of its own is.
    beyond = sorted(key for key in info["unexpected_keys"] if _OF_A_LAYER.search(key))
    if beyond:
        raise ConfigError(
            f"{what}: config.json has no place for {len(beyond)} weights of *.safetensors, {beyond[0]!r} first; the "
            "two belong to different models: fetch the model again"
        )
    for name, module in model.named_modules():  # of weights that it quantises transformers compares none
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and tuple(state.shape) != (module.out_features, module.in_features):
            raise ConfigError(
                f"{what}: {name}.weight is {list(state.shape)} in *.safetensors, expected "
                f"{[module.out_features, module.in_features]} by config.json: fetch the model again"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "quant_state"):  # packed bits, kept as floats where the base is to be sharded
            continue
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ConfigError(
                f"{what}: {name} holds NaN or infinite values; its file is damaged or its training "
                "diverged: fetch it again, or take another"
            )


def check_attention(config: ModelConfig, device: torch.device) -> None:
    """Looks for what an implementation of attention needs, before anything is loaded.

    Raises:
        ConfigError: its package is not installed, or the device cannot run it.
    """
    wanted = config.attn_implementation
    if wanted in MASKED:
        return
    kernels = f"pip install '{deps['kernels']}'"
    if "/" in wanted and not is_kernels_available():
        raise ConfigError(f"attn_implementation is {wanted}, a kernel of the hub: {kernels}, or use sdpa")
    if wanted == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            "attn_implementation is flash_attention_2, but flash-attn is not installed: pip install "
            f"--no-build-isolation '.[flash-attn]'; or {kernels} and use kernels-community/flash-attn2; or use sdpa"
        )
    if wanted == "flash_attention_3" and importlib.util.find_spec("flash_attn_interface") is None:
        raise ConfigError(
            "attn_implementation is flash_attention_3, but flash_attn_interface is not installed: build it from hopper/"
            f" in github.com/Dao-AILab/flash-attention; or {kernels} and use kernels-community/vllm-flash-attn3; or "
            "use sdpa"
        )
    if device.type == "cpu":
        raise ConfigError(f"attn_implementation is {wanted}, which needs a GPU, and this run takes the CPU; use sdpa")
    least, found = CAPABILITIES.get(wanted, (0, 0)), torch.cuda.get_device_capability(device)
    if found < least:
        raise ConfigError(
            f"attn_implementation is {wanted}, which needs a GPU of compute capability {least[0]}.{least[1]}; "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}: use sdpa"
        )


def load_base(config: ModelConfig) -> tuple[PreTrainedModel, Any]:
    """Loads the base model and its processor; the model is frozen and in eval mode.

    Side effect: sets torch's number of CPU threads where the config names one.

    Raises:
        ConfigError: an unusable model directory, device or attention implementation.
        TargetError: a model family that is not in the table.
    """
    device = resolve_device(config)
    check_attention(config, device)
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    directory = resolve_model_directory(config)
    trust = config.trust_remote_code
    with _explained(f"base model {directory}"):
        model_config = model_config_of(config, str(directory), trust_remote_code=trust)
        quantization = quantization_config(config, family_of(model_config).not_quantised)
        if stored_quantization(model_config) is not None:
            _keep_stored(model_config, config, directory)
            quantization = None
        elif quantization is not None and sharding_asked():  # integers cannot be spread; the bits are the same
            quantization.bnb_4bit_quant_storage = DTYPES[config.compute_dtype]
        loaded: Any = model_class(model_config).from_pretrained(
            directory,
            config=model_config,
            dtype=DTYPES[config.compute_dtype],
            quantization_config=quantization,
            attn_implementation=config.attn_implementation,
            allow_all_kernels=trust,
            trust_remote_code=trust,
            use_safetensors=True,
            device_map={"": device},
            output_loading_info=True,
        )
        model, info = loaded
        check_weights(model, info, f"base model {directory}")
        processor = load_processor(config, str(directory), trust_remote_code=trust)
    guard_linear4bit(model)
    embed_patches_by_one_product(model)
    model.requires_grad_(False)
    model.eval()
    return model, processor


def _keep_stored(model_config: Any, config: ModelConfig, directory: Path) -> None:
    """Has a base that is stored in NF4 compute as the settings say; its own quantisation is taken by transformers.

    Raises:
        ConfigError: the run spreads the base over processes, which takes another form of the 4 bits.
    """
    if sharding_asked():
        raise ConfigError(
            f"base model {directory} is stored in NF4, which cannot be spread over processes (FSDP); take the model "
            "that it was made from, with weights in 16 or 32 bit, or one process a GPU (DDP)"
        )
    for part in (model_config, model_config.get_text_config()):
        if getattr(part, "quantization_config", None):
            part.quantization_config = {**part.quantization_config, "bnb_4bit_compute_dtype": config.compute_dtype}


def load_dense(config: ModelConfig, adapter: Path | None) -> tuple[Any, Any]:
    """The model with plain linear layers, and its processor.

    A 4-bit base is dequantised to its compute dtype: the weights that it computes with, no longer in 4 bits.

    Args:
        config: how the base is loaded.
        adapter: directory of a PEFT adapter that is added to those weights; None leaves the base as it is.

    Raises:
        ConfigError: the base model cannot be loaded.
        AdapterError: the adapter does not fit it.
    """
    model: Any
    model, processor = load_base(config)
    if config.quantization == "nf4":
        with _without_warnings():  # transformers says that it does as asked
            model.dequantize(DTYPES[config.compute_dtype])
        free_4bit_weights()
    if adapter is not None:
        adapted: Any = load_adapter(model, adapter, config.base_model, may_be_untrained=True)
        model = adapted.merge_and_unload()
    return model, processor


@contextmanager
def _without_warnings() -> Iterator[None]:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def load_base_processor(config: ModelConfig) -> Any:
    """The base model's processor alone.

    Raises:
        ConfigError: it cannot be had.
    """
    directory = resolve_model_directory(config)
    with _explained(f"the processor of {directory}"):
        return load_processor(config, str(directory), trust_remote_code=config.trust_remote_code)


def load_processor(config: ModelConfig, directory: str, **options: Any) -> Any:
    """A base model's processor, with the chat template and the bound on pixels that the settings name.

    Args:
        config: of the base model.
        directory: of the base model, or its hub id.
        options: of transformers' `from_pretrained`.

    Raises:
        ConfigError: a chat template that cannot be read; tokens of images or clips that are not the model's; a
            `max_pixels` that the processor has no use for.
        TargetError: an unknown model family.
    """
    model_config = model_config_of(config, directory, **options)
    processor = AutoProcessor.from_pretrained(directory, **options)
    check_media_tokens(model_config, processor, directory)
    template = read_chat_template(config)
    if template is not None:
        processor.chat_template = template
    if isinstance(processor.chat_template, str):
        processor.chat_template = _undated(processor.chat_template)
    if config.max_pixels is not None:
        _limit_pixels(processor, config.max_pixels)
    return processor


def _limit_pixels(processor: Any, most: int) -> None:
    """Has a processor leave pictures and frames at most so many pixels.

    Raises:
        ConfigError: a processor that gives all pictures one size, or fewer pixels than one token stands for.
    """
    images = processor.image_processor
    if "image_grid_thw" not in images.model_input_names:
        raise ConfigError(
            f"model.max_pixels is for models that take pictures in their own size; {type(images).__name__} gives them "
            "the size in the base's preprocessor_config.json: leave max_pixels out"
        )
    videos, side = processor.video_processor, images.patch_size * images.merge_size
    if most < side**2:
        raise ConfigError(
            f"model.max_pixels is {most}, expected at least {side**2}: one token is {side} x {side} pixels"
        )
    for part in (images, videos):
        least = min(part.size["shortest_edge"], int(most / 1.05))  # the processors keep so far above their least
        part.size = {"shortest_edge": least, "longest_edge": part.size["longest_edge"]}
    images.size["longest_edge"] = most
    if isinstance(videos, Qwen3VLVideoProcessor):  # its own bound is of all frames together
        videos.cap_pixels_per_frame = True  # type: ignore[assignment]
        videos.max_video_tokens = most // side**2
    else:
        videos.size["longest_edge"] = most


def _undated(template: str) -> str:
    """A chat template with one date for all days, where it asks for today's: what is learnt is asked again later.

    Raises:
        ConfigError: it asks in a way that is not known.
    """
    fixed = _TODAY.sub(lambda found: f'"{DATE.strftime(found[2])}"', template)
    if _TODAY_SOMEHOW.search(fixed):
        raise ConfigError(
            "the base model's chat template writes today's date (strftime_now), so that a run would ask otherwise "
            "tomorrow; name a template with a date that stays (model.chat_template)"
        )
    if fixed != template:
        _say_date()
    return fixed


@lru_cache
def _say_date() -> None:
    """Once a process."""
    logger.warning(f"the base model's chat template writes today's date; in this run it is always {DATE:%d %b %Y}")


def read_chat_template(config: ModelConfig) -> str | None:
    """The chat template that the settings name in place of the processor's own; None where they name none.

    Raises:
        ConfigError: it cannot be read.
    """
    if config.chat_template is None:
        return None
    try:
        return check_regular(find(config.chat_template)).read_text(encoding="utf-8")
    except (OSError, ValueError, ArtifactError) as error:
        raise ConfigError(
            f"model.chat_template {config.chat_template} cannot be read ({error}); name a Jinja file in UTF-8, or "
            "null for the processor's own template"
        ) from error


def base_model_hash(directory: Path, cache: Path) -> str:
    """Content hash of a base model (weights, config, processor), remembered under `cache` by path, size and
    time.

    A 7B model takes half a minute to hash, hence the memory; a rewritten file has another time and is hashed
    again.
    """
    known = known_base_hash(directory, cache)
    if known is not None:
        return known
    files = _hashed_files(directory)
    found = sha256_json({f.name: sha256_file(f) for f in files})
    write_sealed(_hash_memory(files, cache), {"hash": found})
    return found


def known_base_hash(directory: Path, cache: Path) -> str | None:
    """The remembered content hash of a base model; None where no run with this cache has hashed it yet."""
    memory = _hash_memory(_hashed_files(directory), cache)
    try:
        return str(read_sealed(memory, "")["hash"]) if memory.exists() else None
    except ArtifactError:  # damaged, or another version's: the model is hashed again
        return None


def _hashed_files(directory: Path) -> list[Path]:
    """Remote code counts where it is there: it is fetched, and run, only where it was asked for."""
    return sorted({file for pattern in (*MODEL_FILES, REMOTE_CODE) for file in directory.glob(pattern)})


def _hash_memory(files: Sequence[Path], cache: Path) -> Path:
    # The time of the last change cannot be set: that of the last write can, and archives and copies set it.
    state = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns, f.stat().st_ctime_ns] for f in files]
    return cache / "model_hashes" / f"{sha256_json(state)}.json"


def save_adapter(
    directory: Path, model: PeftModel, config: ModelConfig, processor: Any, generation: Mapping[str, Any] | None
) -> None:
    """Writes the accumulated adapter as a plain PEFT adapter, with what its user has to do as training did.

    Stock `PeftModel.from_pretrained` loads the directory, `AutoProcessor.from_pretrained` the processor with the
    chat template of the run. It appears whole or not at all.

    Args:
        directory: where to.
        model: with the accumulated adapter.
        config: how its base was loaded; the quantisation is written beside the adapter.
        processor: the run's.
        generation: content of generation_config.json; None for a model that generates nothing.
    """
    peft_config = model.peft_config[ACCUMULATED]
    peft_config.base_model_name_or_path = config.base_model
    peft_config.revision = config.revision
    peft_config.inference_mode = True
    quantization = quantization_config(config, family_of(model.get_base_model().config).not_quantised)
    with replaced_directory(directory) as temporary:
        model.save_pretrained(str(temporary), selected_adapters=[ACCUMULATED])
        (temporary / CARD).unlink(missing_ok=True)  # PEFT's form, not filled in
        write_json(temporary / "quantization_config.json", quantization.to_dict() if quantization else None)
        if generation is not None:
            write_json(temporary / GENERATION_CONFIG_NAME, dict(generation))
        processor.save_pretrained(str(temporary))
        write_hashes(temporary / ADAPTER_HASHES, CARD_FILES)
