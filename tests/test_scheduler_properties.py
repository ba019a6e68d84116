"""Any order of events, on machines of any shape, with the real placing: the scheduler keeps its promises."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import llama_gpu as lg
from llama_gpu.budget import Claim
from llama_gpu.effects import Admit, Effect, Start, Stop
from llama_gpu.errors import DoesNotFitError
from llama_gpu.residents import Assignment, ResidentView
from llama_gpu.scheduler import Limits, Rules, Scheduler
from support.scheduler_world import World, headers

PICKS = st.integers(0, 10_000)


def test_the_scheduler_keeps_its_promises_in_any_order_of_events(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    models = headers(tmp_path_factory.mktemp("models"))
    run_state_machine_as_test(
        lambda: Machine(models),
        settings=settings(max_examples=100, stateful_step_count=40, deadline=None),
    )


class Machine(RuleBasedStateMachine):
    """Hypothesis picks the machine and what happens; ``World`` checks."""

    def __init__(self, models: Mapping[str, lg.Header]) -> None:
        super().__init__()
        self.models = models
        self.world: World

    @initialize(shape=st.integers(0, 1 << 200))
    def begin(self, shape: int) -> None:
        self.world = World(self.models, shape)

    @rule(pick=PICKS)
    def request(self, pick: int) -> None:
        self.world.request(pick)

    @rule(pick=PICKS)
    def request_ends(self, pick: int) -> None:
        self.world.request_ends(pick)

    @rule(pick=PICKS)
    def load_goes_on(self, pick: int) -> None:
        self.world.load_goes_on(pick)

    @rule(pick=PICKS)
    def stop_ends(self, pick: int) -> None:
        self.world.stop_ends(pick)

    @rule(pick=PICKS)
    def crash(self, pick: int) -> None:
        self.world.crash(pick)

    @rule(seconds=st.floats(0, 30))
    def time_passes(self, seconds: float) -> None:
        self.world.time_passes(seconds)

    @rule(pick=PICKS)
    def others_change(self, pick: int) -> None:
        self.world.others_change(pick)

    @rule(pick=PICKS)
    def gpu_fails(self, pick: int) -> None:
        self.world.gpu_fails(pick)

    @rule(pick=PICKS)
    def unload(self, pick: int) -> None:
        self.world.unload(pick)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()


SECONDS = st.floats(0.5, 5.0)


@settings(max_examples=40, deadline=None)
@given(
    greedy=st.integers(1, 3), load=SECONDS, answer=SECONDS, clients=st.integers(1, 4), least=st.floats(0, 10)
)
def test_a_model_that_greedy_ones_keep_out_is_loaded_within_the_bound(
    greedy: int, load: float, answer: float, clients: int, least: float
) -> None:
    """One GPU for one model at a time; the clients of the others ask again as soon as they are answered."""
    models = [f"greedy-{number}" for number in range(greedy)]
    scheduler = Scheduler(
        one_at_a_time,
        Limits(starvation_seconds=30.0, wait_seconds=1e9),
        rules=lambda model: Rules(min_resident_seconds=least, priority=int(model != "meek")),
    )
    asked: dict[int, str] = {}

    def ask(model: str, now: float) -> list[Effect]:
        asked[len(asked)] = model
        return scheduler.request_arrived(len(asked) - 1, model, now)

    def answered(ticket: int, now: float) -> list[Effect]:
        return [*scheduler.request_ended(ticket, now), *ask(asked[ticket], now)]

    order = itertools.count()
    events: list[tuple[float, int, Callable[[float], list[Effect]]]] = [
        *((float(second), next(order), scheduler.memory_changed) for second in range(400)),
        *((n / 8, next(order), partial(ask, model)) for n, model in enumerate(models * clients)),
        (20.0, next(order), partial(ask, "meek")),
    ]
    heapq.heapify(events)
    while events:
        now, _, event = heapq.heappop(events)
        for effect in event(now):
            match effect:
                case Start("meek"):
                    # A turn of each greedy one may come first: it is loaded, stays, and answers.
                    turn = load + least + 2 * answer + 1.0
                    assert now - 20.0 <= 30.0 + 1.0 + (greedy + 1) * turn
                    return
                case Start(_, _, server):
                    heapq.heappush(events, (now + load, next(order), partial(scheduler.server_ready, server)))
                case Stop(_, _, _, server):
                    heapq.heappush(
                        events, (now + 0.5, next(order), partial(scheduler.server_stopped, server))
                    )
                case Admit(ticket, _, _):
                    heapq.heappush(events, (now + answer, next(order), partial(answered, ticket)))
    pytest.fail("it never got its turn")


def one_at_a_time(model: str, residents: Sequence[ResidentView], _claims: Sequence[Claim]) -> Assignment:
    if any(view.busy for view in residents):
        raise DoesNotFitError(f"{model} does not fit")
    return Assignment(
        "single", ("GPU-0",), (0,), {"GPU-0": 1}, evict=tuple(view.server for view in residents)
    )
