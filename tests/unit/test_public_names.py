"""The names that the package offers at its top are found where they live."""

import pytest

import mllm_keeplora


@pytest.mark.parametrize("name", mllm_keeplora.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(mllm_keeplora, name).__name__ == name
