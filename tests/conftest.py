"""The package comes first: its guards must run before transformers and lmms-eval are imported."""

import gc
from collections.abc import Iterator
from functools import cache

import pytest

import mllm_keeplora  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def _libraries_stay() -> None:
    """Full collections, as at every loading of a 4-bit model, pass over what was imported: half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def one_meteor() -> Iterator[None]:
    """METEOR started once: a Java program that takes seconds to start, and then scores any number of corpora."""
    from pycocoevalcap.meteor import meteor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meteor, "Meteor", cache(meteor.Meteor))
        yield
