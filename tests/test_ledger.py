"""``Ledger``: nothing is promised twice, and nothing is lost."""

from __future__ import annotations

import gc
import os
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

import llama_gpu as lg
from llama_gpu.errors import DoesNotFitError

SECONDS = float(os.environ.get("LLAMA_GPU_TEST_SECONDS", "0.5"))
"""How long threads fight for the ledger."""


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


@pytest.mark.timeout(120 + SECONDS)
def test_sixty_four_threads_never_hold_more_than_there_is() -> None:
    book = ledger(a=20, b=20)
    threads = 64
    start = Barrier(threads)

    def work(number: int) -> tuple[int, int]:
        start.wait()
        end = time.monotonic() + SECONDS
        asked = taken = 0
        while time.monotonic() < end:
            asked += 1
            try:
                with book.reserve(f"thread-{number}", {"a": 1 + (number + asked) % 7, "b": 1}) as lease:
                    held = sum(claim.bytes_by_gpu["a"] for claim in book.claims)
                    assert held <= 20
                    lease.commit(lease.bytes_by_gpu)
                    taken += 1
            except DoesNotFitError:
                continue
        return asked, taken

    with ThreadPoolExecutor(threads) as pool:
        asked, taken = (sum(counts) for counts in zip(*pool.map(work, range(threads)), strict=True))
    print(f"{asked} reservations by {threads} threads in {SECONDS} s, {taken} granted")
    assert 0 < taken <= asked
    assert book.available_by_gpu == {"a": 20, "b": 20}
    assert book.claims == ()
