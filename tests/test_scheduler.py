"""The scheduler alone: events in, effects out, time as a number."""

from collections.abc import Mapping, Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llama_gpu.budget import Claim
from llama_gpu.errors import DoesNotFitError, QueueFullError, ServerExitedError
from llama_gpu.residents import Assignment, ResidentState, ResidentView
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
        for view in sorted(residents, key=lambda view: -view.idle_seconds):
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
    assert list(refused(scheduler.memory_changed(102.0))) == [2]


MODELS = {"a": 3, "b": 4, "c": 6, "d": 10, "e": 11}
CAPACITY = 10
POOL_SIZE = 3


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of events: no overcommit, nothing busy leaves, every ticket ends once."""

    def __init__(self) -> None:
        super().__init__()
        limits = Limits(pool_size=POOL_SIZE, starvation_seconds=20, queue_size=4)
        self.scheduler = Scheduler(OneGpu(CAPACITY, MODELS), limits)
        self.now = 0.0
        self.tickets = 0
        self.open: dict[int, str] = {}
        self.active: dict[int, str] = {}
        self.loading: set[str] = set()
        self.leaving: set[str] = set()

    def apply(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Start(model, _, _):
                    assert model not in self.loading | self.leaving
                    self.loading.add(model)
                case Stop(model, _, _, _):
                    assert model not in self.active.values(), "a busy model was stopped"
                    assert model not in self.leaving
                    self.loading.discard(model)
                    self.leaving.add(model)
                case Admit(ticket, model, _):
                    assert self.open.pop(ticket) == model
                    self.active[ticket] = model
                case Refuse(ticket, _):
                    del self.open[ticket]

    @rule(model=st.sampled_from(sorted(MODELS)), seconds=st.floats(0, 10))
    def request(self, model: str, seconds: float) -> None:
        self.now += seconds
        self.tickets += 1
        self.open[self.tickets] = model
        self.apply(self.scheduler.request_arrived(self.tickets, model, self.now))

    @precondition(lambda self: self.open or self.active)
    @rule(data=st.data())
    def request_ends(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.open.keys() | self.active.keys())))
        self.open.pop(ticket, None)
        self.active.pop(ticket, None)
        self.apply(self.scheduler.request_ended(ticket, self.now))

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), works=st.booleans())
    def load_ends(self, data: st.DataObject, works: bool) -> None:
        model = data.draw(st.sampled_from(sorted(self.loading)))
        self.loading.discard(model)
        if works:
            self.apply(self.scheduler.server_ready(model, self.now))
        else:
            self.apply(self.scheduler.server_failed(model, ServerExitedError("no"), self.now))

    @precondition(lambda self: self.leaving)
    @rule(data=st.data())
    def stop_ends(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(sorted(self.leaving)))
        self.leaving.discard(model)
        self.apply(self.scheduler.server_stopped(model, self.now))

    @rule(seconds=st.floats(0, 60))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.apply(self.scheduler.memory_changed(self.now))

    @invariant()
    def no_gpu_and_no_pool_holds_more_than_it_can(self) -> None:
        residents = self.scheduler.residents.values()
        holding = [r for r in residents if r.state is not ResidentState.MAKING_ROOM]
        assert sum(r.bytes_by_gpu.get(GPU, 0) for r in holding) <= CAPACITY
        assert len(holding) <= POOL_SIZE

    @invariant()
    def the_scheduler_agrees_about_who_waits_and_who_is_served(self) -> None:
        assert self.scheduler.waiting_count() == len(self.open)
        served = {t: r.model for r in self.scheduler.residents.values() for t in r.active}
        assert served == self.active

    def teardown(self) -> None:
        """Let everything end: nobody may be left waiting."""
        for _ in range(200):
            if not (self.open or self.active or self.loading or self.leaving):
                break
            self.now += 1.0
            for model in sorted(self.loading):
                self.loading.discard(model)
                self.apply(self.scheduler.server_ready(model, self.now))
            for model in sorted(self.leaving):
                self.leaving.discard(model)
                self.apply(self.scheduler.server_stopped(model, self.now))
            for ticket in sorted(self.active):
                del self.active[ticket]
                self.apply(self.scheduler.request_ended(ticket, self.now))
            self.apply(self.scheduler.memory_changed(self.now))
        assert not self.open, "requests were left waiting for ever"


TestAnyOrderOfEvents = SchedulerMachine.TestCase
TestAnyOrderOfEvents.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
