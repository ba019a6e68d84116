"""``explain``: what ``place`` answers, with what became of the alternatives."""

from __future__ import annotations

import pytest

import llama_gpu as lg
from llama_gpu.errors import DoesNotFitError
from support import ground_truth

GIB = 1 << 30
OPTIONS = {"context_length": 4096}


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> lg.Header:
    """Some 6.5 GiB with a short context."""
    return lg.read_header(ground_truth.write_model("llama-3.1-8b-q4k", tmp_path_factory.mktemp("models")))


def gpu(index: int, total: float, free: float | None = None, **fields) -> lg.Gpu:
    free = total if free is None else free
    return lg.Gpu(index=index, total_bytes=int(total * GIB), free_bytes=int(free * GIB), **fields)


def outcomes(found: lg.Explanation) -> list[tuple[str, str]]:
    return [(one.step, one.outcome) for one in found.alternatives]


def test_the_answer_is_that_of_place_and_the_place_is_among_the_alternatives(header: lg.Header) -> None:
    box = [gpu(0, 24), gpu(1, 8), gpu(2, 4)]
    found = lg.explain(header, box, **OPTIONS)
    assert found.placement == lg.place(header, box, **OPTIONS)
    assert found.refusal is None
    assert outcomes(found) == [("one", "short"), ("one", "taken"), ("one", "fits")]
    short, taken, fits = found.alternatives
    assert taken.devices == found.placement.devices
    assert taken.free_bytes_by_gpu == {"GPU-1": 8 * GIB}
    assert [device.index for device in fits.devices] == [0]
    assert short.short_bytes == short.devices[0].total_bytes - 4 * GIB
    assert "GPU 2 alone: " in short.reason
    assert "<Explanation(placement=" in repr(found)


def test_a_refusal_is_a_value_and_says_what_place_would_raise(header: lg.Header) -> None:
    box = [gpu(0, 4), gpu(1, 2)]
    with pytest.raises(DoesNotFitError) as caught:
        lg.place(header, box, **OPTIONS)
    found = lg.explain(header, box, **OPTIONS)
    assert found.placement is None
    assert isinstance(found.refusal, DoesNotFitError)
    assert str(found.refusal) == str(caught.value)
    assert found.refusal.smallest_change == caught.value.smallest_change
    assert outcomes(found)[-3:] == [("one-evicting", "refused"), ("partial", "refused"), ("cpu", "refused")]


def test_who_would_leave_and_who_may_not_are_told_apart(header: lg.Header) -> None:
    idle = lg.Running("idle", {"GPU-0": 7 * GIB})
    busy = lg.Running("busy", {"GPU-1": 7 * GIB}, busy=True)
    found = lg.explain(header, [gpu(0, 8, 1), gpu(1, 8, 1)], running=[idle, busy], **OPTIONS)
    (taken,) = [one for one in found.alternatives if one.outcome == "taken"]
    assert (taken.step, taken.evict, taken.eviction_cost) == ("one-evicting", ("idle",), idle.eviction_cost)
    assert found.staying == {"busy": "it is busy"}


def test_nothing_is_asked_of_a_question_that_makes_no_sense(header: lg.Header) -> None:
    with pytest.raises(TypeError, match="explain\\(\\) got an unexpected keyword argument 'devices'"):
        lg.explain(header, [], devices=2)
    with pytest.raises(TypeError, match="sequence of Running, not of str"):
        lg.explain(header, [], running=["idle"])  # type: ignore[list-item]


def test_headroom_may_differ_from_gpu_to_gpu(header: lg.Header) -> None:
    policy = lg.Policy(headroom_bytes=GIB, headroom_by_gpu={0: 20 * GIB, "GPU-1": 0})
    assert policy.headroom_by_gpu == {0: 20 * GIB, "GPU-1": 0}
    found = lg.explain(header, [gpu(0, 24), gpu(1, 24)], policy=policy, **OPTIONS)
    assert outcomes(found) == [("one", "short"), ("one", "taken")]
    with pytest.raises(TypeError, match="headroom_by_gpu: a GPU is named"):
        lg.Policy(headroom_by_gpu={True: 1})
