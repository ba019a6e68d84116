"""How often models were asked for lately."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_gpu.popularity import HALF_LIFE_SECONDS, Popularity


def test_a_request_counts_for_half_after_the_half_life() -> None:
    popularity = Popularity()
    assert popularity.recent("a", 5.0) == 0.0
    popularity.asked_for("a", 10.0)
    assert popularity.recent("a", 10.0) == 1.0
    assert popularity.recent("a", 10.0 + HALF_LIFE_SECONDS) == 0.5
    assert popularity.recent("b", 10.0) == 0.0


@given(st.lists(st.floats(0, 1e5), max_size=20))
def test_the_count_is_the_sum_over_all_requests(pauses: list[float]) -> None:
    popularity, times = Popularity(), [0.0]
    for pause in pauses:
        times.append(times[-1] + pause)
    for time in times:
        popularity.asked_for("a", time)
    now = times[-1] + 100.0
    expected = sum(0.5 ** ((now - time) / HALF_LIFE_SECONDS) for time in times)
    assert popularity.recent("a", now) == pytest.approx(expected)
