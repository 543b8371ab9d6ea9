"""KeepLoRA++ on quantised multimodal LLMs: continual fine-tuning that keeps what the model could do."""

from mllm_keeplora.platform_guards import allow_torchvision_without_cuda, silence_missing_cpu_kernels

# Has to run before anything imports transformers, peft or lmms-eval, hence here.
allow_torchvision_without_cuda()
silence_missing_cpu_kernels()
