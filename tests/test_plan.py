"""``plan``: which of many models can be resident together."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llama_gpu as lg
from llama_gpu.errors import DoesNotFitError
from support import ground_truth

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30
SMALL, MEDIUM, LARGE = "qwen2.5-0.5b-q8", "llama-3.1-8b-q4k", "glm-4.5-air-q4k"


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, lg.Header]:
    """Real models, their weights holes: some 1.5, 6.5 and 75 GiB with a short context."""
    folder = tmp_path_factory.mktemp("models")
    return {name: lg.read_header(ground_truth.write_model(name, folder)) for name in (SMALL, MEDIUM, LARGE)}


def gpu(index: int, gib: float) -> lg.Gpu:
    return lg.Gpu(index=index, total_bytes=int(gib * GIB), free_bytes=int(gib * GIB))


def wanted(headers: dict[str, lg.Header], name: str, model: str, **fields: Any) -> lg.Wanted:
    return lg.Wanted(headers[model], id=name, context_length=4096, **fields)


def test_all_models_are_resident_when_there_is_room(headers: dict[str, lg.Header]) -> None:
    models = [wanted(headers, name, MEDIUM) for name in ("a", "b", "c")]
    plan = lg.plan(models, [gpu(0, 24), gpu(1, 8)])
    assert set(plan.placements) == {"a", "b", "c"}
    assert plan.left_out == {}
    assert sum(plan.free_bytes_by_gpu.values()) == 32 * GIB - sum(
        device.total_bytes for placement in plan.placements.values() for device in placement.devices
    )


def test_the_most_valuable_stay_and_the_others_say_why_not(headers: dict[str, lg.Header]) -> None:
    models = [wanted(headers, str(value), MEDIUM, value=value) for value in (1.0, 3.0, 2.0)]
    plan = lg.plan(models, [gpu(0, 8), gpu(1, 8)])
    assert set(plan.placements) == {"3.0", "2.0"}
    assert set(plan.left_out) == {"1.0"}
    assert "are needed, and the others leave" in plan.left_out["1.0"]


def test_a_pinned_model_is_in_whatever_it_is_worth(headers: dict[str, lg.Header]) -> None:
    models = [
        wanted(headers, "dear", MEDIUM, value=100),
        wanted(headers, "pinned", MEDIUM, value=0, pinned=True),
    ]
    plan = lg.plan(models, [gpu(0, 8)])
    assert set(plan.placements) == {"pinned"}


def test_priority_outweighs_value(headers: dict[str, lg.Header]) -> None:
    models = [wanted(headers, "dear", MEDIUM, value=3), wanted(headers, "first", MEDIUM, priority=1)]
    assert set(lg.plan(models, [gpu(0, 8)]).placements) == {"first"}


def test_pinned_models_that_cannot_stand_together_are_named(headers: dict[str, lg.Header]) -> None:
    models = [wanted(headers, name, MEDIUM, pinned=True) for name in ("a", "b")]
    with pytest.raises(DoesNotFitError, match="these pinned models cannot stand together: a and b") as caught:
        lg.plan(models, [gpu(0, 8)])
    assert "short on GPU 0" in str(caught.value)
    assert caught.value.required_bytes > 10 * GIB
    assert caught.value.free_bytes_by_gpu == {"GPU-0": 8 * GIB}


def test_a_large_model_is_split_when_it_is_worth_what_it_displaces(headers: dict[str, lg.Header]) -> None:
    box = [gpu(index, 48) for index in range(2)]
    others = [wanted(headers, f"small-{index}", MEDIUM) for index in range(8)]
    for value, inside in ((100.0, True), (1.0, False)):
        plan = lg.plan([wanted(headers, "large", LARGE, value=value), *others], box)
        assert ("large" in plan.placements) is inside
    assert plan.placements.keys() == {f"small-{index}" for index in range(8)}


def test_allowed_gpus_count_for_each_model(headers: dict[str, lg.Header]) -> None:
    models = [wanted(headers, "a", SMALL, allowed=[1]), wanted(headers, "b", SMALL, allowed=["GPU-0"])]
    plan = lg.plan(models, [gpu(0, 8), gpu(1, 8)])
    assert [plan.placements[name].devices[0].index for name in ("a", "b")] == [1, 0]


def test_ids_are_the_names_of_the_files_and_must_differ(headers: dict[str, lg.Header]) -> None:
    model = lg.Wanted(headers[SMALL])
    assert model.id == SMALL
    with pytest.raises(ValueError, match=f'two models have the id "{SMALL}"'):
        lg.plan([model, model], [gpu(0, 24)])


def test_wrong_arguments_are_named(headers: dict[str, lg.Header]) -> None:
    with pytest.raises(TypeError, match="Wanted\\(\\) got an unexpected keyword argument 'devices'"):
        lg.Wanted(headers[SMALL], devices=2)
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="value must be 0 or more"):
            lg.Wanted(headers[SMALL], value=value)
    with pytest.raises(TypeError, match="sequence of Wanted, not of Header"):
        lg.plan([headers[SMALL]], [gpu(0, 24)])  # type: ignore[list-item]


def test_a_wanted_model_survives_pickling(tmp_path: Path) -> None:
    path = ground_truth.write_model(SMALL, tmp_path)
    model = lg.Wanted(str(path), value=2.5, pinned=True, allowed=[0], context_length=4096)
    other = pickle.loads(pickle.dumps(model))
    assert repr(other) == repr(model)
    assert lg.plan([other], [gpu(0, 8)]) == lg.plan([model], [gpu(0, 8)])


@settings(max_examples=60, deadline=None)
@given(
    box=st.lists(st.integers(2, 80), max_size=6),
    models=st.lists(
        st.tuples(st.sampled_from([SMALL, MEDIUM, LARGE]), st.integers(0, 100), st.integers(-2, 2)),
        max_size=20,
    ),
    headroom=st.sampled_from([0, GIB]),
)
def test_no_gpu_is_planned_over_what_it_has(
    headers: dict[str, lg.Header], box: list[int], models: list[tuple[str, int, int]], headroom: int
) -> None:
    gpus = [gpu(index, gib) for index, gib in enumerate(box)]
    asked = [
        wanted(headers, str(place), model, value=value, priority=priority)
        for place, (model, value, priority) in enumerate(models)
    ]
    plan = lg.plan(asked, gpus, policy=lg.Policy(headroom_bytes=headroom))
    assert plan.placements.keys() | plan.left_out.keys() == {model.id for model in asked}
    assert plan.placements.keys().isdisjoint(plan.left_out)
    held = dict.fromkeys(plan.free_bytes_by_gpu, 0)
    for placement in plan.placements.values():
        for device in placement.devices:
            held[device.uuid] += device.total_bytes
    for one in gpus:
        assert one.free_bytes is not None
        assert held[one.uuid] == 0 or held[one.uuid] <= one.free_bytes - headroom
        assert plan.free_bytes_by_gpu[one.uuid] == one.free_bytes - held[one.uuid]
