"""KeepLoRA++ on quantised multimodal LLMs: continual fine-tuning that keeps what the model could do."""

from mllm_keeplora.modeling import compat

# Has to run before anything imports transformers, peft or lmms-eval, hence here; it imports none of them.
compat.install()
