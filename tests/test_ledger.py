"""``Ledger``: nothing is promised twice, and nothing is lost."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

import llama_gpu as lg
from llama_gpu.errors import DoesNotFitError


def ledger(**budgets: int) -> lg.Ledger:
    return lg.Ledger(
        [
            lg.Gpu(index=place, uuid=uuid, free_bytes=free)
            for place, (uuid, free) in enumerate(budgets.items())
        ]
    )


def test_budgets_are_what_is_free_and_unknown_is_nothing() -> None:
    gpus = [lg.Gpu(index=0, free_bytes=10), lg.Gpu(index=1)]
    for given in (gpus, lg.GpuSnapshot(gpus)):
        assert lg.Ledger(given).available_by_gpu == {"GPU-0": 10, "GPU-1": 0}
    assert lg.Ledger(gpus, host_bytes=5).available_by_gpu == {"GPU-0": 10, "GPU-1": 0, "host": 5}


def test_the_second_of_two_loads_is_told_that_the_memory_is_gone() -> None:
    book = ledger(a=10, b=10)
    lease = book.reserve("first", {"a": 7, "b": 2})
    with pytest.raises(DoesNotFitError) as caught:
        book.reserve("second", {"a": 4})
    assert caught.value.required_bytes == 4
    assert caught.value.free_bytes_by_gpu == {"a": 3, "b": 8}
    assert (lease.owner, lease.state, lease.bytes_by_gpu) == ("first", "reserved", {"a": 7, "b": 2})


def test_a_load_is_reserved_then_committed_as_measured_then_released() -> None:
    book = ledger(a=10)
    lease = book.reserve("model", {"a": 7})
    lease.commit({"a": 5})
    assert (lease.state, book.available_by_gpu) == ("committed", {"a": 5})
    assert [(claim.owner, claim.bytes_by_gpu, claim.state) for claim in book.claims] == [
        ("model", {"a": 5}, "committed")
    ]
    assert lease.release() is True
    assert lease.release() is False
    assert (lease.state, lease.bytes_by_gpu, book.available_by_gpu) == ("released", {}, {"a": 10})
    with pytest.raises(RuntimeError, match="released"):
        lease.commit({"a": 1})


def test_the_end_of_a_block_of_an_owner_or_of_the_object_ends_a_claim() -> None:
    book = ledger(a=10)
    with pytest.raises(ZeroDivisionError), book.reserve("model", {"a": 7}):
        _ = 1 / 0
    assert book.available_by_gpu == {"a": 10}
    kept = book.reserve("model", {"a": 1})
    assert book.release_owner("model") == 1
    assert kept.state == "released"
    del kept
    lost = book.reserve("model", {"a": 7})
    assert book.available_by_gpu == {"a": 3}
    del lost
    gc.collect()
    assert book.available_by_gpu == {"a": 10}


def test_a_gpu_that_the_ledger_does_not_know_is_a_key_error() -> None:
    book = ledger(a=10)
    with pytest.raises(KeyError, match="no b"):
        book.reserve("model", {"a": 1, "b": 1})
    assert book.available_by_gpu == {"a": 10}
    book.set_budget("b", 4)
    assert book.reserve("model", {"b": 4}).state == "reserved"


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(OverflowError):
        ledger(a=10).reserve("model", {"a": -1})


def test_threads_never_hold_more_than_there_is() -> None:
    book = ledger(a=20, b=20)
    threads, rounds = 16, 500
    start = Barrier(threads)

    def work(number: int) -> int:
        start.wait()
        taken = 0
        for round_ in range(rounds):
            try:
                with book.reserve(f"thread-{number}", {"a": 1 + (number + round_) % 7, "b": 1}):
                    held = sum(claim.bytes_by_gpu["a"] for claim in book.claims)
                    assert held <= 20
                    taken += 1
            except DoesNotFitError:
                continue
        return taken

    with ThreadPoolExecutor(threads) as pool:
        assert sum(pool.map(work, range(threads))) >= rounds
    assert book.available_by_gpu == {"a": 20, "b": 20}
    assert book.claims == ()
