"""Decompositions shared out over processes: every item once, in order, its owner's result everywhere."""

from typing import Any

import pytest
from accelerate.state import PartialState

from mllm_keeplora.distributed import processes


@pytest.mark.parametrize("count, items", [(1, 5), (2, 5), (3, 3), (4, 2), (8, 0)])
def test_each_item_is_computed_by_one_process(count: int, items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two gloo processes: `test_processes.py`. Here each of several in turn, beside what the others have to say."""
    PartialState()
    shares = [[(rank, item * item) for item in range(items)[rank::count]] for rank in range(count)]
    monkeypatch.setattr(processes, "num_processes", lambda: count)
    for rank in range(count):
        computed = as_process(rank, count, items, shares, monkeypatch)
        assert computed == list(range(items)[rank::count])


def as_process(rank: int, count: int, items: int, shares: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The items that a process computes, beside what the others say."""
    computed: list[int] = []

    def compute(item: int) -> tuple[int, int]:
        computed.append(item)
        return (rank, item * item)

    def broadcast(given: list[Any], from_process: int) -> list[Any]:
        assert from_process != rank or given == [shares[rank]]
        return [shares[from_process]]

    monkeypatch.setattr(processes, "own_share", lambda every: list(every[rank::count]))
    monkeypatch.setattr(processes, "broadcast_object_list", broadcast)
    found = processes.shared_out(range(items), compute, "test")
    assert found == [(item % count, item * item) for item in range(items)]
    return computed
