"""Several servers of one model: when they come, which of them answers, and that nobody leaves for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_gpu.affinity import Affinity, conversation_in
from llama_gpu.budget import Claim
from llama_gpu.errors import DoesNotFitError, ServerExitedError
from llama_gpu.residents import Assignment, ResidentView
from llama_gpu.scheduler import Admit, Effect, Limits, Refuse, Rules, Scheduler, Start, Stop


class Gpus:
    """As many GPUs as there are, each with room for one server; the first free one is taken."""

    def __init__(self, count: int) -> None:
        self.uuids = [f"GPU-{number}" for number in range(count)]

    def __call__(self, model: str, residents: Sequence[ResidentView], claims: Sequence[Claim]) -> Assignment:
        taken = {uuid for claim in claims for uuid in claim.bytes_by_gpu}
        leavers = sorted(
            (view.as_running().eviction_cost, view.server, uuid)
            for view in residents
            if not view.busy and view.model != model
            for uuid in view.bytes_by_gpu
        )
        for number, uuid in enumerate(self.uuids):
            if uuid not in taken:
                return Assignment("single", (uuid,), (number,), {uuid: 1})
        if not leavers:
            raise DoesNotFitError(f"{model} does not fit")
        _, server, uuid = leavers[0]
        return Assignment("single", (uuid,), (self.uuids.index(uuid),), {uuid: 1}, evict=(server,))


def scheduler_of(gpus: int, rules: Mapping[str, Rules], **limits: Any) -> Scheduler:
    return Scheduler(Gpus(gpus), Limits(**limits), rules=rules.__getitem__)


def started(effects: Sequence[Effect]) -> list[str]:
    return [effect.server for effect in effects if isinstance(effect, Start)]


def stopped(effects: Sequence[Effect]) -> list[str]:
    return [effect.server for effect in effects if isinstance(effect, Stop)]


def admitted(effects: Sequence[Effect]) -> dict[int, str]:
    return {effect.ticket: effect.server for effect in effects if isinstance(effect, Admit)}


def two_servers(scheduler: Scheduler, model: str = "a") -> None:
    """``model`` and ``model#2`` are ready and idle."""
    scheduler.request_arrived(1001, model, 0.0)
    assert started(scheduler.memory_changed(0.1)) == [f"{model}#2"]
    scheduler.server_ready(model, 1.0)
    scheduler.server_ready(f"{model}#2", 1.0)
    scheduler.request_ended(1001, 1.0)


def test_a_model_that_asks_for_two_servers_gets_the_second_once_it_is_wanted_and_room_is_free() -> None:
    scheduler = scheduler_of(3, {"a": Rules(replicas=2)})
    assert scheduler.memory_changed(0.0) == [], "nobody has asked for it"
    assert started(scheduler.request_arrived(1, "a", 1.0)) == ["a"]
    assert started(scheduler.memory_changed(2.0)) == ["a#2"]
    assert scheduler.memory_changed(3.0) == []
    assert scheduler.residents["a"].bytes_by_gpu.keys() != scheduler.residents["a#2"].bytes_by_gpu.keys()


def test_a_long_queue_brings_one_more_server_when_it_would_be_filled() -> None:
    scheduler = scheduler_of(3, {"a": Rules(slots=2, max_replicas=2)})
    for ticket in range(3):
        scheduler.request_arrived(ticket, "a", 0.0)
    assert scheduler.memory_changed(1.0) == []
    scheduler.request_arrived(3, "a", 1.0)
    assert started(scheduler.memory_changed(2.0)) == ["a#2"]
    assert scheduler.memory_changed(3.0) == [], "two at most"


def test_nobody_leaves_for_a_second_server() -> None:
    scheduler = scheduler_of(2, {"a": Rules(replicas=2), "idle": Rules(min_resident_seconds=0.0)})
    scheduler.request_arrived(1, "idle", 0.0)
    scheduler.server_ready("idle", 0.0)
    scheduler.request_ended(1, 0.0)
    scheduler.request_arrived(2, "a", 1.0)
    assert scheduler.memory_changed(100.0) == []


def test_free_room_goes_to_a_model_that_has_no_server_before_another_s_second() -> None:
    rules = {"a": Rules(max_replicas=2), "x": Rules(), "b": Rules()}
    scheduler = scheduler_of(2, rules, pool_size=2)
    scheduler.request_arrived(1, "x", 0.0)
    scheduler.server_ready("x", 0.0)
    for ticket in range(2, 6):
        scheduler.request_arrived(ticket, "a", 1.0)
    scheduler.server_ready("a", 2.0)
    scheduler.request_arrived(6, "b", 3.0)
    assert stopped(scheduler.request_ended(1, 4.0)) == ["x"]
    assert started(scheduler.memory_changed(5.0)) == []
    assert started(scheduler.server_stopped("x", 6.0)) == ["b"]


def test_an_extra_server_is_the_first_to_leave_and_a_busy_one_ends_what_it_does_before() -> None:
    rules = {"a": Rules(max_replicas=2, min_resident_seconds=0.0), "b": Rules(priority=-1)}
    scheduler = scheduler_of(2, rules)
    for ticket in range(4):
        scheduler.request_arrived(ticket, "a", 0.0)
    scheduler.memory_changed(0.1)
    scheduler.server_ready("a", 1.0)
    scheduler.server_ready("a#2", 1.0)
    served = {ticket: r.server for r in scheduler.residents.values() for ticket in r.active}
    assert sorted(served.values()) == ["a", "a", "a#2", "a#2"]
    assert scheduler.request_arrived(9, "b", 2.0) == []
    assert admitted(scheduler.request_arrived(10, "a", 3.0)) == {10: "a"}, "the other one takes no more"
    effects = [e for t, server in served.items() if server == "a#2" for e in scheduler.request_ended(t, 4.0)]
    assert stopped(effects) == ["a#2"]
    assert started(scheduler.server_stopped("a#2", 5.0)) == ["b"]


def test_an_idle_extra_server_leaves_before_an_idle_model_that_is_cheap_to_load() -> None:
    rules = {
        "a": Rules(max_replicas=2, min_resident_seconds=0.0),
        "cheap": Rules(load_seconds=0.1, min_resident_seconds=0.0),
        "b": Rules(),
    }
    scheduler = scheduler_of(3, rules)
    scheduler.request_arrived(1, "cheap", 0.0)
    scheduler.server_ready("cheap", 0.1)
    scheduler.request_ended(1, 0.1)
    for ticket in (2, 3):
        scheduler.request_arrived(ticket, "a", 500.0)
    assert started(scheduler.memory_changed(501.0)) == ["a#2"]
    scheduler.server_ready("a", 510.0)
    scheduler.server_ready("a#2", 510.0)
    for ticket in (2, 3):
        scheduler.request_ended(ticket, 511.0)
    assert stopped(scheduler.request_arrived(4, "b", 512.0)) == ["a#2"]


def test_the_next_request_goes_to_the_least_loaded_server_when_all_slots_are_in_use_too() -> None:
    scheduler = scheduler_of(2, {"a": Rules(replicas=2, max_replicas=2, slots=1)})
    two_servers(scheduler)
    chosen = [admitted(scheduler.request_arrived(ticket, "a", 2.0))[ticket] for ticket in range(4)]
    assert chosen == ["a", "a#2", "a", "a#2"]
    scheduler.request_ended(1, 3.0)
    assert admitted(scheduler.request_arrived(9, "a", 4.0)) == {9: "a#2"}


def test_a_conversation_goes_back_to_the_server_that_knows_it() -> None:
    scheduler = scheduler_of(2, {"a": Rules(replicas=2, max_replicas=2, slots=2)})
    two_servers(scheduler)
    assert admitted(scheduler.request_arrived(1, "a", 2.0)) == {1: "a"}
    assert admitted(scheduler.request_arrived(2, "a", 2.0, conversation="mine")) == {2: "a#2"}
    scheduler.request_ended(1, 3.0)
    assert admitted(scheduler.request_arrived(3, "a", 4.0, conversation="mine")) == {3: "a#2"}


def test_requests_beyond_the_slots_are_kept_for_a_server_that_is_about_to_be_ready() -> None:
    scheduler = scheduler_of(2, {"a": Rules(replicas=2, max_replicas=2, slots=2)})
    for ticket in range(6):
        scheduler.request_arrived(ticket, "a", 0.0)
    scheduler.memory_changed(0.1)
    assert list(admitted(scheduler.server_ready("a", 5.0))) == [0, 1]
    assert list(admitted(scheduler.request_ended(0, 6.0))) == [2]
    assert admitted(scheduler.server_ready("a#2", 7.0)) == {3: "a#2", 4: "a#2", 5: "a"}


def test_a_second_server_that_does_not_start_costs_no_request_and_is_not_tried_again_at_once() -> None:
    scheduler = scheduler_of(2, {"a": Rules(replicas=2)})
    scheduler.request_arrived(1, "a", 0.0)
    assert started(scheduler.memory_changed(1.0)) == ["a#2"]
    failure = ServerExitedError("no", model="a", exit_code=1)
    assert not any(isinstance(e, Refuse) for e in scheduler.server_failed("a#2", failure, 2.0))
    assert scheduler.memory_changed(30.0) == []
    assert started(scheduler.memory_changed(62.0)) == ["a#2"]


def test_when_the_first_server_ends_the_second_goes_on_and_a_new_one_gets_the_free_name() -> None:
    scheduler = scheduler_of(2, {"a": Rules(replicas=2, max_replicas=2)})
    two_servers(scheduler)
    scheduler.server_exited("a", 2.0)
    assert admitted(scheduler.request_arrived(1, "a", 3.0)) == {1: "a#2"}
    assert started(scheduler.memory_changed(4.0)) == [], "its place is not free yet"
    scheduler.server_stopped("a", 5.0)
    assert started(scheduler.memory_changed(6.0)) == ["a"]


def test_a_model_whose_id_looks_like_a_second_server_is_not_taken_for_one() -> None:
    scheduler = scheduler_of(3, {"a": Rules(replicas=2, max_replicas=2), "a#2": Rules()})
    two_servers(scheduler)
    assert started(scheduler.request_arrived(1, "a#2", 2.0)) == ["a#2#2"]
    assert admitted(scheduler.server_ready("a#2#2", 3.0)) == {1: "a#2#2"}


def test_unloading_a_model_stops_all_its_servers() -> None:
    scheduler = scheduler_of(2, {"a": Rules(replicas=2, max_replicas=2)})
    two_servers(scheduler)
    assert stopped(scheduler.unload("a", 2.0)) == ["a", "a#2"]


# --- which one answers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loads", "chosen"),
    [
        ({"one": 1, "two": 0}, "one"),  # a slot is free where the cache is
        ({"one": 2, "two": 1}, "two"),  # none there, one here
        ({"one": 2, "two": 2}, "one"),
        ({"one": 3, "two": 2}, "one"),  # both queue: the cache is worth one place
        ({"one": 4, "two": 2}, "two"),
        ({"two": 5}, "two"),  # it has left
    ],
)
def test_the_cache_wins_unless_its_server_is_clearly_more_loaded(
    loads: Mapping[str, int], chosen: str
) -> None:
    affinity = Affinity()
    assert affinity.choose("a", "mine", {"one": 0, "two": 0}, slots=2) == "one"
    assert affinity.choose("a", "mine", loads, slots=2) == chosen
    assert affinity.choose("b", "mine", {"one": 1, "two": 0}, slots=2) == "two", "another model's"


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 9), min_size=1), st.integers(1, 8))
def test_a_request_of_no_conversation_goes_to_the_least_loaded(loads: dict[str, int], slots: int) -> None:
    assert loads[Affinity().choose("a", None, loads, slots)] == min(loads.values())


def name_of(**body: Any) -> str | None:
    return conversation_in(json.dumps({"model": "a", **body}).encode())


def test_a_conversation_keeps_its_name_as_it_grows_and_others_have_others() -> None:
    system = {"role": "system", "content": "You are brief."}
    first, other = ({"role": "user", "content": text} for text in ("Hello", "Good morning"))
    grown = [system, first, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "And?"}]
    assert name_of(messages=[system, first]) == name_of(messages=grown)
    assert name_of(messages=[system, first]) != name_of(messages=[system, other])
    assert name_of(messages=[first], system="Be brief") != name_of(messages=[first], system="Be long")
    assert name_of(prompt="Once upon a time") != name_of(prompt="It was a dark night")
    long = "word " * 1000
    assert name_of(prompt=long) == name_of(prompt=f"{long} and more")
    assert name_of(input=[first]) == name_of(input=[first, other])
    assert name_of(messages=[first], prompt_cache_key="k") == name_of(messages=[other], prompt_cache_key="k")


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b"no json", b'{"messages": 7}', b'{"prompt": ""}'])
def test_what_holds_no_conversation_has_no_name(body: bytes) -> None:
    assert conversation_in(body) is None


@given(
    st.recursive(
        st.none() | st.text() | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
@settings(max_examples=50)
def test_no_body_is_too_odd(messages: Any) -> None:
    assert name_of(messages=messages) == name_of(messages=messages)
