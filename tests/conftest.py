"""The package comes first: its guards must run before transformers and lmms-eval are imported."""

import gc

import pytest

import mllm_keeplora  # noqa: F401

# One of two workers begins with the run that other files wait for, the other with a file that needs no run; and no
# worker is left alone with the longest file of the unit tests.
FIRST = ("test_adapters_made.py", "test_wheel.py", "test_video.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files come in their order but for these."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(scope="module", autouse=True)
def _libraries_stay() -> None:
    """Full collections, as at every loading of a 4-bit model, pass over what was there before: half a second each."""
    gc.collect()
    gc.freeze()
