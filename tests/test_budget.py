"""What a GPU has left, and what a ready server is taken to hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_gpu import Gpu, GpuProcess
from llama_gpu.budget import Claim, available_gpus, is_back, overdrawn_bytes
from llama_gpu.buffer_lines import LoadedBuffers
from llama_gpu.measured import measured_by_gpu

GIB = 1 << 30
UUID = "GPU-0"


def gpu(free: int, *, processes: list[GpuProcess] | None = None, reserved: int = 0) -> Gpu:
    return Gpu(
        index=0,
        uuid=UUID,
        total_bytes=24 * GIB,
        free_bytes=free,
        reserved_bytes=reserved,
        processes=processes,
    )


def left(of: Gpu, *claims: Claim) -> int | None:
    return available_gpus([of], claims)[0].free_bytes


def test_a_claim_counts_before_its_server_has_taken_a_byte() -> None:
    assert left(gpu(20 * GIB, processes=[]), Claim({UUID: 5 * GIB})) == 15 * GIB


def test_what_our_own_process_holds_already_is_not_counted_twice() -> None:
    shown = gpu(16 * GIB, processes=[GpuProcess(pid=7, used_bytes=4 * GIB)])
    assert left(shown, Claim({UUID: 5 * GIB}, pid=7)) == 15 * GIB


def test_what_others_hold_stays_taken() -> None:
    shown = gpu(
        12 * GIB, processes=[GpuProcess(pid=7, used_bytes=4 * GIB), GpuProcess(pid=8, used_bytes=4 * GIB)]
    )
    assert left(shown, Claim({UUID: 5 * GIB}, pid=7)) == 11 * GIB


def test_where_the_driver_tells_no_processes_a_settled_server_holds_its_claim() -> None:
    shown = gpu(19 * GIB, processes=None)
    assert left(shown, Claim({UUID: 5 * GIB}, pid=7, settled=True)) == 19 * GIB


def test_where_the_driver_tells_no_processes_a_loading_server_is_counted_on_the_safe_side() -> None:
    shown = gpu(22 * GIB, processes=None)
    assert left(shown, Claim({UUID: 5 * GIB}, pid=7)) == 17 * GIB


def test_a_process_whose_memory_is_not_told_makes_the_claim_count() -> None:
    shown = gpu(19 * GIB, processes=[GpuProcess(pid=7, used_bytes=None)])
    assert left(shown, Claim({UUID: 5 * GIB}, pid=7, settled=True)) == 19 * GIB


def test_a_driver_that_knows_our_server_by_another_process_id_does_not_make_it_count_twice() -> None:
    shown = gpu(19 * GIB, processes=[GpuProcess(pid=4711, used_bytes=5 * GIB)])
    assert left(shown, Claim({UUID: 5 * GIB}, pid=7, settled=True)) == 19 * GIB


def test_unknown_free_memory_stays_unknown() -> None:
    unknown = Gpu(index=0, uuid=UUID)
    assert left(unknown, Claim({UUID: GIB})) is None


@given(
    total=st.integers(0, 100),
    others=st.integers(0, 100),
    ours=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=4),
)
def test_promises_and_others_never_exceed_the_gpu(
    total: int, others: int, ours: list[tuple[int, int]]
) -> None:
    """Each of ours has claimed some and holds up to that by now: the model is the plain sum."""
    held = [min(claimed, now) for claimed, now in ours]
    if others + sum(held) > total:
        return
    processes = [GpuProcess(pid=n + 1, used_bytes=now) for n, now in enumerate(held)]
    shown = Gpu(
        index=0, uuid=UUID, total_bytes=total, free_bytes=total - others - sum(held), processes=processes
    )
    claims = [Claim({UUID: claimed}, pid=n + 1) for n, (claimed, _) in enumerate(ours)]
    expected = max(0, total - others - sum(claimed for claimed, _ in ours))
    assert available_gpus([shown], claims)[0].free_bytes == expected


@given(
    total=st.integers(1, 100),
    others=st.integers(0, 100),
    claimed=st.lists(st.integers(0, 60), max_size=4),
)
def test_what_is_owed_is_what_was_promised_beyond_what_is_left(
    total: int, others: int, claimed: list[int]
) -> None:
    """Nobody of ours holds anything yet, and others may take what was promised."""
    others = min(others, total)
    shown = Gpu(index=0, uuid=UUID, total_bytes=total, free_bytes=total - others, processes=[])
    claims = [Claim({UUID: size}, awaited=place % 2 == 1) for place, size in enumerate(claimed)]
    kept = sum(claim.bytes_by_gpu[UUID] for claim in claims if not claim.awaited)
    assert overdrawn_bytes([shown], claims).get(UUID, 0) == max(0, kept + others - total)


OURS = [GpuProcess(pid=7, used_bytes=5 * GIB)]
STRANGER = [GpuProcess(pid=4711, used_bytes=5 * GIB)]


@pytest.mark.parametrize(
    ("before", "now", "back"),
    [
        (gpu(19 * GIB, processes=OURS), gpu(19 * GIB, processes=OURS), False),
        (gpu(19 * GIB, processes=OURS), gpu(19 * GIB, processes=[]), True),
        (gpu(19 * GIB, processes=OURS), gpu(10 * GIB, processes=STRANGER), True),
        # The driver tells no processes, or knows ours by other numbers: the sum must have fallen.
        (gpu(19 * GIB), gpu(19 * GIB), False),
        (gpu(19 * GIB), gpu(21 * GIB), False),
        (gpu(19 * GIB), gpu(23 * GIB), True),
        (gpu(19 * GIB, processes=STRANGER), gpu(19 * GIB, processes=STRANGER), False),
        (gpu(19 * GIB, processes=STRANGER), gpu(24 * GIB, processes=[]), True),
        # It never showed what the server held, or shows nothing now.
        (gpu(22 * GIB, processes=[]), gpu(22 * GIB, processes=[]), True),
        (gpu(19 * GIB), Gpu(index=0, uuid=UUID, health="lost"), True),
    ],
)
def test_memory_is_back_once_the_driver_shows_it(before: Gpu, now: Gpu, back: bool) -> None:
    claim = Claim({UUID: 5 * GIB}, pid=7, settled=True)
    assert is_back(claim, [before], [now]) is back
    assert is_back(claim, [], [now]) is not any(p.pid == 7 for p in now.processes or ())
    assert is_back(claim, [before], []) is True
    assert is_back(Claim({"GPU-1": 5 * GIB}, pid=7, settled=True), [before], [now]) is True


def test_the_drivers_word_about_a_process_is_what_it_holds() -> None:
    shown = gpu(19 * GIB, processes=[GpuProcess(pid=7, used_bytes=4 * GIB)])
    assert measured_by_gpu([shown], 7, {UUID: 5 * GIB}, LoadedBuffers()) == {UUID: 4 * GIB}


def test_buffer_lines_may_raise_an_estimate_and_never_lower_it() -> None:
    logged = LoadedBuffers({"CUDA0": {"model": 6 * GIB}})
    assert measured_by_gpu([gpu(GIB)], 7, {UUID: 5 * GIB}, logged) == {UUID: 6 * GIB}
    assert measured_by_gpu([gpu(GIB)], 7, {UUID: 7 * GIB}, logged) == {UUID: 7 * GIB}


def test_nothing_is_measured_where_nobody_tells() -> None:
    assert measured_by_gpu([gpu(GIB)], 7, {UUID: 5 * GIB}, LoadedBuffers()) is None
