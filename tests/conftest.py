"""The package comes first: its guards must run before transformers and lmms-eval are imported."""

from collections.abc import Iterator
from functools import cache

import pytest

import mllm_keeplora  # noqa: F401


@pytest.fixture(scope="session")
def one_meteor() -> Iterator[None]:
    """METEOR started once: a Java program that takes seconds to start, and then scores any number of corpora."""
    from pycocoevalcap.meteor import meteor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meteor, "Meteor", cache(meteor.Meteor))
        yield
