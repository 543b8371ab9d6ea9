"""KeepLoRA++ on quantised multimodal LLMs: continual fine-tuning that keeps what the model could do.

    from mllm_keeplora import RunConfig, load_run, run_stream

    run_stream(RunConfig(run_dir="runs/mine", stream="my_stream.yaml"))
    run = load_run("runs/mine")
    print(run.matrix, run.ask("What is shown?", image="photo.png"))

Importing the package imports neither torch nor transformers: each name below is imported when it is used.
"""

from importlib import import_module
from typing import Any

from mllm_keeplora.modeling import compat

# Has to run before anything imports transformers, peft or lmms-eval, hence here; it imports none of them.
compat.install()

_HOME = {
    "Method": "methods.base",
    "Run": "continual.run",
    "edit": "continual.edits",
    "evaluate": "continual.evaluating",
    "push": "reports.publishing",
    "write_report": "reports.page",
    "RunConfig": "config",
    "load_run": "continual.saved_run",
    "run_stream": "continual.run_stream",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
