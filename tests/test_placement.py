"""``place`` and its values."""

from __future__ import annotations

import pickle
import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llama_gpu as lg
from llama_gpu.errors import DoesNotFitError
from support import ground_truth
from support.gguf_builder import write_sparse

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30
MODELS = ("llama-3.1-8b-q4k", "qwen3-30b-a3b-q4k", "gemma-2-9b-q4k", "jamba-mini-q4k", "glm-4.5-air-q4k")


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, lg.Header]:
    """Real models of several kinds, their weights holes."""
    folder = tmp_path_factory.mktemp("models")
    return {name: lg.read_header(ground_truth.write_model(name, folder)) for name in MODELS}


@pytest.fixture(scope="module")
def small(headers: dict[str, lg.Header]) -> lg.Header:
    """Llama 3.1 8B at Q4_K: some 5 GiB."""
    return headers["llama-3.1-8b-q4k"]


@pytest.fixture(scope="module")
def large_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 70B at Q4_K: some 38 GiB over 81 layers."""
    path = tmp_path_factory.mktemp("large") / "large.gguf"
    return write_sparse(path, layers=80, embedding=8192, feed_forward=28672, heads=64, vocabulary=128256)


@pytest.fixture(scope="module")
def large(large_path: Path) -> lg.Header:
    return lg.read_header(large_path)


def gpu(index: int, total_gib: float, free_gib: float | None = None, **fields: Any) -> lg.Gpu:
    free_gib = total_gib if free_gib is None else free_gib
    return lg.Gpu(index=index, total_bytes=int(total_gib * GIB), free_bytes=int(free_gib * GIB), **fields)


def idle(name: str, gib: float, on: int = 0, **fields: Any) -> lg.Running:
    return lg.Running(name, {f"GPU-{on}": int(gib * GIB)}, **({"idle_seconds": 60.0} | fields))


def test_takes_a_path_or_a_header_and_a_snapshot_or_a_list(large_path: Path, large: lg.Header) -> None:
    gpus = [gpu(0, 80), gpu(1, 24)]
    placements = [
        lg.place(large_path, gpus, context_length=8192),
        lg.place(str(large_path), tuple(gpus), context_length=8192),
        lg.place(large, lg.GpuSnapshot(gpus), context_length=8192),
        lg.place(large, iter(gpus), context_length=8192),
    ]
    assert all(placement == placements[0] for placement in placements)


def test_one_gpu_that_fits_best_is_enough(small: lg.Header) -> None:
    placement = lg.place(small, [gpu(0, 80), gpu(1, 12), gpu(2, 24)], context_length=8192)
    assert placement.mode == "single"
    assert [device.index for device in placement.devices] == [1]
    assert placement.devices[0].uuid == "GPU-1"
    assert placement.gpu_layers == placement.devices[0].layers == 33
    assert placement.tensor_split == (33.0,)
    assert placement.evict == ()
    assert placement.reason.startswith("GPU 1 has room (")


def test_strategies_choose_differently_among_those_with_room(small: lg.Header) -> None:
    gpus = [gpu(0, 12), gpu(1, 24, 14), gpu(2, 80)]
    chosen = {
        strategy: lg.place(small, gpus, policy=lg.Policy(strategy=strategy), context_length=8192)
        .devices[0]
        .index
        for strategy in ("single-gpu-preferred", "distribute", "pack")
    }
    assert chosen == {"single-gpu-preferred": 0, "distribute": 2, "pack": 1}


def test_a_larger_model_is_split_over_the_fewest_gpus(large: lg.Header) -> None:
    gpus = [gpu(0, 8), gpu(1, 24), gpu(2, 10), gpu(3, 28)]
    placement = lg.place(large, gpus, context_length=8192)
    assert placement.mode == "multi"
    assert [device.index for device in placement.devices] == [1, 3]
    assert sum(device.layers for device in placement.devices) == placement.gpu_layers == 81
    assert placement.devices[1].layers > placement.devices[0].layers
    assert "2 GPUs are the fewest" in placement.reason


def test_the_estimate_is_that_of_the_split_that_is_handed_out(large: lg.Header) -> None:
    placement = lg.place(large, [gpu(0, 24), gpu(1, 32)], context_length=8192)
    estimate = lg.estimate(
        large,
        devices=2,
        tensor_split=placement.tensor_split,
        gpu_layers=placement.gpu_layers,
        context_length=8192,
    )
    assert placement.estimate == estimate
    assert [device.layers for device in placement.devices] == [device.layers for device in estimate.devices]
    assert [device.total_bytes for device in placement.devices] == [
        device.total_bytes for device in estimate.devices
    ]


def test_an_idle_model_leaves_and_the_reason_says_so(small: lg.Header) -> None:
    running = [idle("old", 8, on=0, idle_seconds=600.0), idle("fresh", 8, on=1, idle_seconds=1.0)]
    placement = lg.place(small, [gpu(0, 12, 2), gpu(1, 12, 2)], running=running, context_length=8192)
    assert placement.evict == ("old",)
    assert [device.index for device in placement.devices] == [0]
    assert "old (idle for 600 s, 8.0 GiB) has left" in placement.reason


def test_busy_pinned_and_more_important_models_stay(small: lg.Header) -> None:
    gpus = [gpu(0, 12, 2)]
    for stays in ({"busy": True}, {"pinned": True}, {"priority": 1}):
        with pytest.raises(DoesNotFitError):
            lg.place(small, gpus, running=[idle("other", 10, **stays)], context_length=8192)
    placement = lg.place(
        small,
        gpus,
        policy=lg.Policy(priority=1),
        running=[idle("other", 10, priority=1)],
        context_length=8192,
    )
    assert placement.evict == ("other",)


def test_a_refusal_says_what_is_needed_what_there_is_and_what_would_help(small: lg.Header) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        lg.place(small, [gpu(0, 8, 7), gpu(1, 24, 2)], policy=lg.Policy(max_gpus=1))
    error = caught.value
    assert error.required_bytes == lg.estimate(small).devices[0].total_bytes
    assert error.free_bytes_by_gpu == {"GPU-0": 7 * GIB, "GPU-1": 2 * GIB}
    assert "there is room for 7.0 GiB on GPU 0 and 2.0 GiB on GPU 1" in str(error)
    assert error.smallest_change is not None
    freed = re.search(r"free ([\d.]+) GiB more on GPU 1", error.smallest_change)
    context = re.search(r"a context of (\d+)", error.smallest_change)
    assert freed is not None
    assert context is not None
    assert lg.place(small, [gpu(0, 8, 7)], context_length=int(context[1])).mode == "single"
    assert lg.place(small, [gpu(1, 24, 2 + float(freed[1]))]).mode == "single"


def test_without_a_gpu_the_policy_decides_about_the_cpu(small: lg.Header) -> None:
    with pytest.raises(DoesNotFitError, match="there is no GPU") as caught:
        lg.place(small, [])
    assert caught.value.free_bytes_by_gpu == {}
    assert caught.value.smallest_change == "the CPU (cpu: allow)"
    placement = lg.place(small, lg.GpuSnapshot(error="no driver"), policy=lg.Policy(cpu="allow"))
    assert (placement.mode, placement.devices, placement.gpu_layers) == ("cpu", (), 0)
    assert placement.estimate.devices == ()
    assert placement.estimate.host.total_bytes > 4 * GIB


def test_some_layers_go_to_the_cpu_where_the_policy_lets_them(large: lg.Header) -> None:
    placement = lg.place(large, [gpu(0, 24)], policy=lg.Policy(cpu="partial"), context_length=4096)
    assert placement.mode == "partial"
    assert 30 < placement.gpu_layers < 81
    assert placement.devices[0].total_bytes <= 24 * GIB
    assert placement.estimate.host.layers == 81 - placement.gpu_layers


def test_a_projector_and_a_draft_model_are_counted(headers: dict[str, lg.Header], small: lg.Header) -> None:
    draft = headers["gemma-2-9b-q4k"]
    alone = lg.place(small, [gpu(0, 80)], context_length=4096)
    both = lg.place(small, [gpu(0, 80)], context_length=4096, draft=draft)
    assert both.devices[0].total_bytes > alone.devices[0].total_bytes + 5 * GIB


def test_what_place_finds_out_cannot_be_told_to_it(small: lg.Header) -> None:
    for keyword in ({"devices": 2}, {"tensor_split": [1, 1]}, {"context": 1}):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            lg.place(small, [gpu(0, 80)], **keyword)  # type: ignore[call-overload, arg-type, unused-ignore]


def test_wrong_arguments_are_named(small: lg.Header) -> None:
    with pytest.raises(TypeError, match="sequence of Gpu, not of str"):
        lg.place(small, ["GPU-0"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="sequence of Running, not of str"):
        lg.place(small, [gpu(0, 80)], running=["model"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="context_length"):
        lg.place(small, [gpu(0, 80)], context_length=-1)
    with pytest.raises(ValueError, match=r'strategy: "best" is none of "single-gpu-preferred"'):
        lg.Policy(strategy="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'cpu: "yes" is none of "never", "partial", "allow"'):
        lg.Policy(cpu="yes")  # type: ignore[arg-type]
    for allowed in ("GPU-0", [True], [1.5], [-1]):
        with pytest.raises((TypeError, OverflowError)):
            lg.Policy(allowed=allowed)  # type: ignore[arg-type]


def test_allowed_gpus_are_named_by_index_or_uuid(small: lg.Header) -> None:
    gpus = [gpu(0, 12), gpu(1, 24)]
    for allowed in ([1], ["GPU-1"], (1, "GPU-7")):
        placement = lg.place(small, gpus, policy=lg.Policy(allowed=allowed), context_length=8192)
        assert [device.index for device in placement.devices] == [1]
    with pytest.raises(DoesNotFitError, match="GPU 0 is not among those allowed"):
        lg.place(small, gpus, policy=lg.Policy(allowed=[7]))


def test_values_survive_pickling_and_show_how_to_make_them(large: lg.Header) -> None:
    running = lg.Running("a", {"GPU-0": 5}, busy=True, priority=-2, reload_seconds=1.5)
    policy = lg.Policy(strategy="pack", headroom_bytes=1, max_gpus=2, allowed=[0, "GPU-1"], cpu="allow")
    placement = lg.place(large, [gpu(0, 24), gpu(1, 32)], context_length=8192)
    for value in (running, policy, placement, placement.devices[0]):
        assert pickle.loads(pickle.dumps(value)) == value
        names = {name: getattr(lg, name) for name in lg.__all__}
        assert eval(repr(value), names) == value
    assert policy.allowed == (0, "GPU-1")
    assert running.bytes_by_gpu == {"GPU-0": 5}


def test_losing_a_model_costs_less_the_longer_it_is_idle_and_more_the_dearer_it_is() -> None:
    def cost(**fields: Any) -> int:
        return lg.Running("a", {"GPU-0": 10 * GIB}, **fields).eviction_cost

    assert cost(idle_seconds=60.0) == cost() // 2
    assert cost(recent_requests=3.0) == pytest.approx(3 * cost(), rel=1e-6)
    assert (
        cost(recent_requests=float("nan"))
        == cost(recent_requests=-1.0)
        == cost(recent_requests=1.0)
        == cost()
    )
    assert cost(recent_requests=0.0) == 1
    assert cost(reload_seconds=10.0) == 10_000_000
    assert cost(reload_seconds=10.0, priority=1) == 40_000_000
    assert cost(reload_seconds=float("nan")) == cost()
    assert cost(idle_seconds=float("inf")) == cost(idle_seconds=-1.0) == cost()
    assert lg.Running("a", {}).eviction_cost == 1


questions = st.fixed_dictionaries(
    {
        "model": st.sampled_from(MODELS),
        "box": st.lists(st.tuples(st.integers(4, 96), st.integers(0, 96)), max_size=8),
        "tenants": st.lists(
            st.tuples(st.integers(0, 7), st.integers(1, 40), st.booleans(), st.integers(0, 1000)), max_size=12
        ),
        "strategy": st.sampled_from(["single-gpu-preferred", "distribute", "pack"]),
        "cpu": st.sampled_from(["never", "partial", "allow"]),
        "context": st.sampled_from([2048, 16384, 65536]),
    }
)


@settings(max_examples=200, deadline=None)
@given(questions)
def test_no_gpu_is_promised_more_than_it_has_whatever_is_asked(
    headers: dict[str, lg.Header], question: dict[str, Any]
) -> None:
    header, context = headers[question["model"]], question["context"]
    gpus = [gpu(index, total, min(total, free)) for index, (total, free) in enumerate(question["box"])]
    running = [
        idle(f"model-{place}", gib, on, busy=busy, idle_seconds=float(seconds))
        for place, (on, gib, busy, seconds) in enumerate(question["tenants"])
    ]
    policy = lg.Policy(strategy=question["strategy"], cpu=question["cpu"], headroom_bytes=GIB)
    try:
        placement = lg.place(header, gpus, policy=policy, running=running, context_length=context)
    except DoesNotFitError:
        placement = None
    if placement is None:
        assert question["cpu"] != "allow"
        return
    leaving = [model for model in running if model.id in placement.evict]
    assert len(leaving) == len(placement.evict)
    assert not any(model.busy for model in leaving)
    for device in placement.devices:
        there = gpus[device.index]
        assert there.free_bytes is not None
        assert there.total_bytes is not None
        back = sum(model.bytes_by_gpu.get(device.uuid, 0) for model in leaving)
        assert device.total_bytes <= min(there.free_bytes + back, there.total_bytes) - GIB
    assert sum(device.layers for device in placement.devices) == placement.gpu_layers
    if placement.devices:
        estimate = lg.estimate(
            header,
            devices=len(placement.devices),
            tensor_split=placement.tensor_split,
            gpu_layers=placement.gpu_layers,
            context_length=context,
        )
        assert [device.layers for device in estimate.devices] == [
            device.layers for device in placement.devices
        ]
        assert estimate == placement.estimate
