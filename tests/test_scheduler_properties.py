"""Any order of events, on machines of any shape, with the real placing: the scheduler keeps its promises."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import llama_gpu as lg
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
