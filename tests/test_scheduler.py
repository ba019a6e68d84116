"""The scheduler alone: events in, effects out, time as a number."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama_gpu.budget import Claim
from llama_gpu.errors import DoesNotFitError, QueueFullError, ServerExitedError
from llama_gpu.openai import error_reply
from llama_gpu.residents import Assignment, ResidentView
from llama_gpu.scheduler import Admit, Effect, Limits, Refuse, Rules, Scheduler, Start, Stop

GPU = "GPU-0"


class OneGpu:
    """Places models of given sizes on one GPU, evicting the longest idle first, by plain sums."""

    def __init__(self, capacity: int, sizes: Mapping[str, int]) -> None:
        self.capacity = capacity
        self.sizes = sizes

    def __call__(self, model: str, residents: Sequence[ResidentView], claims: Sequence[Claim]) -> Assignment:
        free = self.capacity - sum(claim.bytes_by_gpu.get(GPU, 0) for claim in claims)
        evict: list[str] = []
        for view in sorted(residents, key=lambda view: (view.priority, -view.idle_seconds)):
            if free >= self.sizes[model]:
                break
            if not view.busy and view.bytes_by_gpu:
                free += view.bytes_by_gpu[GPU]
                evict.append(view.server)
        if free < self.sizes[model]:
            raise DoesNotFitError(f"{model} does not fit", required_bytes=self.sizes[model])
        return Assignment("single", (GPU,), (0,), {GPU: self.sizes[model]}, evict=tuple(evict))


def on_cpu(_model: str, _residents: Sequence[ResidentView], _claims: Sequence[Claim]) -> Assignment:
    return Assignment("cpu")


def started(effects: Sequence[Effect]) -> list[str]:
    return [effect.model for effect in effects if isinstance(effect, Start)]


def stopped(effects: Sequence[Effect]) -> list[str]:
    return [effect.model for effect in effects if isinstance(effect, Stop)]


def admitted(effects: Sequence[Effect]) -> list[int]:
    return [effect.ticket for effect in effects if isinstance(effect, Admit)]


def refused(effects: Sequence[Effect]) -> dict[int, Exception]:
    return {effect.ticket: effect.error for effect in effects if isinstance(effect, Refuse)}


def loaded(scheduler: Scheduler, model: str, ticket: int, now: float) -> None:
    """One request loads ``model`` and ends: an idle resident remains."""
    assert started(scheduler.request_arrived(ticket, model, now)) == [model]
    assert admitted(scheduler.server_ready(model, now)) == [ticket]
    assert scheduler.request_ended(ticket, now) == []


def test_many_first_requests_start_one_server_and_all_are_admitted_when_it_is_ready() -> None:
    scheduler = Scheduler(on_cpu)
    effects = [effect for n in range(50) for effect in scheduler.request_arrived(n, "a", 0.0)]
    assert effects == [Start("a", Assignment("cpu"), "a")]
    assert admitted(scheduler.server_ready("a", 2.0)) == list(range(50))
    assert admitted(scheduler.request_arrived(50, "a", 3.0)) == [50]


def test_pool_limit_makes_the_longest_idle_leave_and_never_the_busy_one() -> None:
    scheduler = Scheduler(on_cpu, Limits(pool_size=2))
    loaded(scheduler, "idle", 1, 0.0)
    scheduler.request_arrived(2, "busy", 1.0)
    scheduler.server_ready("busy", 1.0)
    effects = scheduler.request_arrived(3, "new", 2.0)
    assert stopped(effects) == ["idle"]
    assert started(effects) == []
    assert started(scheduler.server_stopped("idle", 3.0)) == ["new"]


def test_a_newcomer_waits_while_all_are_busy_and_goes_in_when_one_is_idle() -> None:
    scheduler = Scheduler(OneGpu(10, {"a": 10, "b": 10}))
    scheduler.request_arrived(1, "a", 0.0)
    scheduler.server_ready("a", 0.0)
    assert scheduler.request_arrived(2, "b", 1.0) == []
    assert stopped(scheduler.request_ended(1, 2.0)) == ["a"]
    assert started(scheduler.server_stopped("a", 3.0)) == ["b"]
    assert admitted(scheduler.server_ready("b", 4.0)) == [2]


def test_a_newcomer_waits_for_a_model_that_is_still_loading_in_its_place() -> None:
    scheduler = Scheduler(OneGpu(10, {"a": 10, "b": 10}))
    scheduler.request_arrived(1, "a", 0.0)
    assert scheduler.request_arrived(2, "b", 0.0) == []
    assert admitted(scheduler.server_ready("a", 1.0)) == [1]
    assert stopped(scheduler.request_ended(1, 2.0)) == ["a"]


def test_two_newcomers_never_share_the_room_that_one_eviction_makes() -> None:
    scheduler = Scheduler(OneGpu(10, {"old": 10, "b": 6, "c": 6}))
    loaded(scheduler, "old", 1, 0.0)
    assert stopped(scheduler.request_arrived(2, "b", 1.0)) == ["old"]
    assert scheduler.request_arrived(3, "c", 1.0) == []
    assert started(scheduler.server_stopped("old", 2.0)) == ["b"]


def test_nothing_is_stopped_when_stopping_it_would_not_help() -> None:
    scheduler = Scheduler(OneGpu(10, {"small": 4, "huge": 11}))
    loaded(scheduler, "small", 1, 0.0)
    effects = scheduler.request_arrived(2, "huge", 1.0)
    assert isinstance(refused(effects)[2], DoesNotFitError)
    assert stopped(effects) == []


def test_a_starved_request_drains_the_busy_model_but_cuts_nobody_off() -> None:
    scheduler = Scheduler(OneGpu(10, {"a": 10, "b": 10}), Limits(starvation_seconds=30.0))
    scheduler.request_arrived(1, "a", 0.0)
    scheduler.server_ready("a", 0.0)
    scheduler.request_arrived(2, "b", 1.0)
    assert admitted(scheduler.request_arrived(3, "a", 2.0)) == [3]
    assert scheduler.memory_changed(40.0) == []
    assert scheduler.request_arrived(4, "a", 41.0) == []  # the newcomer's turn comes first
    assert scheduler.request_ended(1, 42.0) == []
    assert stopped(scheduler.request_ended(3, 43.0)) == ["a"]
    assert started(scheduler.server_stopped("a", 44.0)) == ["b"]


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    scheduler = Scheduler(on_cpu, Limits(queue_size=2))
    scheduler.request_arrived(1, "a", 0.0)
    scheduler.request_arrived(2, "a", 0.0)
    error = refused(scheduler.request_arrived(3, "a", 0.0))[3]
    assert isinstance(error, QueueFullError)
    assert error.retry_after_seconds == scheduler.expected_load_seconds("a")


def test_a_failed_start_ends_its_requests_and_the_next_one_tries_again() -> None:
    scheduler = Scheduler(on_cpu)
    scheduler.request_arrived(1, "a", 0.0)
    failure = ServerExitedError("no", model="a", exit_code=1)
    assert refused(scheduler.server_failed("a", failure, 1.0)) == {1: failure}
    assert started(scheduler.request_arrived(2, "a", 2.0)) == ["a"]


def test_a_crashed_server_is_started_afresh_by_the_next_request() -> None:
    scheduler = Scheduler(on_cpu)
    loaded(scheduler, "a", 1, 0.0)
    assert scheduler.server_exited("a", 1.0) == []
    assert scheduler.server_stopped("a", 1.5) == []
    assert started(scheduler.request_arrived(2, "a", 2.0)) == ["a"]


def test_nobody_is_sent_to_a_crashed_server_before_its_memory_is_back() -> None:
    scheduler = Scheduler(OneGpu(10, {"a": 8, "b": 8}))
    loaded(scheduler, "a", 1, 0.0)
    assert scheduler.server_exited("a", 1.0) == []
    assert scheduler.request_arrived(2, "a", 1.1) == []
    assert scheduler.residents["a"].bytes_by_gpu == {GPU: 8}, "its claim counts until then"
    assert started(scheduler.server_stopped("a", 1.5)) == ["a"]


def test_requests_that_wait_for_a_model_on_a_lost_gpu_are_placed_anew() -> None:
    scheduler = Scheduler(OneGpu(10, {"a": 5}))
    scheduler.request_arrived(1, "a", 0.0)
    assert stopped(scheduler.gpu_lost([GPU], 1.0, reason="lost")) == ["a"]
    assert started(scheduler.server_stopped("a", 2.0)) == ["a"]


def test_an_idle_model_leaves_after_its_time_and_a_pinned_one_stays() -> None:
    limits = Limits(idle_seconds_before_unload=60.0)
    scheduler = Scheduler(on_cpu, limits, rules=lambda model: Rules(pinned=model == "pinned"))
    loaded(scheduler, "pinned", 1, 0.0)
    loaded(scheduler, "plain", 2, 0.0)
    assert scheduler.memory_changed(59.0) == []
    assert stopped(scheduler.memory_changed(60.0)) == ["plain"]


def test_a_client_that_leaves_while_room_is_made_frees_the_promise() -> None:
    scheduler = Scheduler(OneGpu(10, {"old": 10, "new": 10}))
    loaded(scheduler, "old", 1, 0.0)
    scheduler.request_arrived(2, "new", 1.0)
    scheduler.request_ended(2, 2.0)
    assert scheduler.server_stopped("old", 3.0) == []
    assert scheduler.residents == {}


def test_a_request_that_waits_too_long_is_refused() -> None:
    scheduler = Scheduler(OneGpu(10, {"a": 10, "b": 10}), Limits(wait_seconds=100.0))
    scheduler.request_arrived(1, "a", 0.0)
    scheduler.server_ready("a", 0.0)
    scheduler.request_arrived(2, "b", 1.0)
    (error,) = refused(scheduler.memory_changed(102.0)).values()
    assert error_reply(error).headers == {"retry-after": "10"}, "a load that nobody has measured"


def alike(**fields: Any) -> Callable[[str], Rules]:
    """The same rules for every model."""
    return lambda _model: Rules(**fields)


def busy(scheduler: Scheduler, model: str, ticket: int, now: float) -> None:
    """``model`` is resident and answers a request."""
    assert started(scheduler.request_arrived(ticket, model, now)) == [model]
    assert admitted(scheduler.server_ready(model, now)) == [ticket]


# --- minimum residency -----------------------------------------------------------------------


def test_an_idle_model_stays_for_its_minimum_residency_and_then_leaves_for_who_waits() -> None:
    scheduler = Scheduler(OneGpu(10, {"a": 10, "b": 10}), rules=alike(min_resident_seconds=8.0))
    loaded(scheduler, "a", 1, 0.0)
    assert scheduler.request_arrived(2, "b", 1.0) == []
    assert scheduler.memory_changed(7.9) == []
    assert stopped(scheduler.memory_changed(8.0)) == ["a"]


def test_without_a_setting_a_model_stays_as_long_as_its_load_took_but_no_longer_than_ten_seconds() -> None:
    for took, stays in ((3.0, 3.0), (100.0, 10.0)):
        scheduler = Scheduler(OneGpu(10, {"a": 10, "b": 10}))
        scheduler.request_arrived(1, "a", 0.0)
        scheduler.server_ready("a", took)
        scheduler.request_ended(1, took)
        assert scheduler.request_arrived(2, "b", took) == []
        assert scheduler.memory_changed(took + stays - 0.1) == []
        assert stopped(scheduler.memory_changed(took + stays)) == ["a"]


def test_a_starved_newcomer_waits_for_the_minimum_residency_of_a_busy_model_too() -> None:
    limits = Limits(starvation_seconds=30.0)
    scheduler = Scheduler(OneGpu(10, {"a": 10, "b": 10}), limits, rules=alike(min_resident_seconds=60.0))
    busy(scheduler, "a", 1, 0.0)
    scheduler.request_arrived(2, "b", 1.0)
    assert scheduler.memory_changed(40.0) == []
    assert admitted(scheduler.request_arrived(3, "a", 41.0)) == [3], "it is not drained yet"
    assert scheduler.memory_changed(60.0) == []
    assert scheduler.request_arrived(4, "a", 61.0) == []
    scheduler.request_ended(1, 62.0)
    assert stopped(scheduler.request_ended(3, 62.0)) == ["a"]


# --- priorities ------------------------------------------------------------------------------


def test_a_newcomer_of_lower_priority_waits_instead_of_evicting_and_gets_its_turn_in_the_end() -> None:
    rules = {"high": Rules(priority=1), "low": Rules()}
    scheduler = Scheduler(OneGpu(10, {"high": 10, "low": 10}), rules=rules.__getitem__)
    loaded(scheduler, "high", 1, 0.0)
    assert scheduler.request_arrived(2, "low", 1.0) == []
    assert scheduler.memory_changed(31.0) == []
    assert stopped(scheduler.memory_changed(31.1)) == ["high"]


def test_the_higher_priority_is_brought_in_first_but_not_before_one_that_starves() -> None:
    rules = {"a": Rules(), "low": Rules(priority=-1), "high": Rules(priority=1)}
    for waits_since, first in ((1.0, "high"), (-40.0, "low")):
        scheduler = Scheduler(OneGpu(10, dict.fromkeys(rules, 10)), rules=rules.__getitem__)
        busy(scheduler, "a", 1, -50.0)
        scheduler.request_arrived(2, "low", waits_since)
        scheduler.request_arrived(3, "high", 2.0)
        scheduler.request_ended(1, 3.0)
        assert started(scheduler.server_stopped("a", 4.0)) == [first]


def test_a_promise_that_nobody_waits_for_any_more_drains_nobody() -> None:
    scheduler = Scheduler(OneGpu(10, {"a": 10, "b": 10}))
    busy(scheduler, "a", 1, 0.0)
    scheduler.request_arrived(2, "b", 1.0)
    scheduler.memory_changed(40.0)
    assert scheduler.request_arrived(3, "a", 41.0) == [], "it is drained"
    assert admitted(scheduler.request_ended(2, 42.0)) == [3]


# --- queues ----------------------------------------------------------------------------------


def test_requests_that_alternate_between_models_are_served_model_by_model() -> None:
    scheduler = Scheduler(OneGpu(10, {"x": 10, "a": 10, "b": 10, "c": 10}))
    busy(scheduler, "x", 0, 0.0)
    for ticket in range(1, 7):
        scheduler.request_arrived(ticket, "abc"[(ticket - 1) % 3], float(ticket))
    order: list[int] = []
    (model, ended), now = ("x", [0]), 10.0
    while True:
        effects = [effect for ticket in ended for effect in scheduler.request_ended(ticket, now)]
        effects += scheduler.server_stopped(model, now + 1)
        if not (begun := started(effects)):
            break
        (model,), now = begun, now + 100
        ended = admitted(scheduler.server_ready(model, now))
        order += ended
        now += 100
    assert order == [1, 4, 2, 5, 3, 6]


def test_retry_after_is_the_rest_of_a_load_or_all_loads_that_come_before_and_the_own() -> None:
    known = {"a": Rules(load_seconds=20.0), "b": Rules(load_seconds=5.0), "c": Rules(load_seconds=7.0)}
    scheduler = Scheduler(OneGpu(10, dict.fromkeys("abc", 10)), Limits(queue_size=1), rules=known.__getitem__)
    scheduler.request_arrived(1, "a", 0.0)
    scheduler.request_arrived(2, "b", 1.0)
    scheduler.request_arrived(3, "c", 2.0)
    seconds = {}
    for ticket, model in enumerate("abc", 4):
        error = refused(scheduler.request_arrived(ticket, model, 8.0))[ticket]
        assert isinstance(error, QueueFullError)
        seconds[model] = error.retry_after_seconds
    assert seconds == {"a": 12.0, "b": 12.0 + 5.0, "c": 12.0 + 5.0 + 7.0}


# --- the limit on the number of servers ----------------------------------------------------------


def test_where_only_the_number_is_limited_the_cheapest_to_load_again_leaves() -> None:
    scheduler = Scheduler(on_cpu, Limits(pool_size=2), rules=alike(min_resident_seconds=0.0))
    for ticket, (model, took) in enumerate({"slow": 60.0, "quick": 2.0}.items()):
        now = 100.0 * ticket
        scheduler.request_arrived(ticket, model, now)
        scheduler.server_ready(model, now + took)
        scheduler.request_ended(ticket, now + took)
    assert stopped(scheduler.request_arrived(9, "new", 200.0)) == ["quick"], "not the longest idle"


def test_a_pool_that_pinned_models_fill_refuses_at_once() -> None:
    rules = {"pinned": Rules(pinned=True), "new": Rules()}
    scheduler = Scheduler(on_cpu, Limits(pool_size=1), rules=rules.__getitem__)
    loaded(scheduler, "pinned", 1, 0.0)
    (error,) = refused(scheduler.request_arrived(2, "new", 1.0)).values()
    assert "server_pool.size is 1" in str(error)


def test_nobody_leaves_a_full_pool_for_a_model_that_fits_nowhere() -> None:
    scheduler = Scheduler(OneGpu(10, {"small": 4, "huge": 11}), Limits(pool_size=1))
    loaded(scheduler, "small", 1, 0.0)
    effects = scheduler.request_arrived(2, "huge", 1.0)
    assert stopped(effects) == []
    assert list(refused(effects)) == [2]
