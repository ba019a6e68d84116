"""``plan`` against an exact solver; ``make bench`` asks 200 questions and tells the times."""

from __future__ import annotations

import os

import pytest

import llama_gpu as lg
from support.plan_optimum import best_worth, headers, question

QUESTIONS = int(os.environ.get("LLAMA_GPU_TEST_EXAMPLES", "16"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[lg.Header]:
    return headers(tmp_path_factory.mktemp("models"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("may_split", [False, True], ids=["whole", "split"])
def test_a_plan_is_worth_nearly_what_the_best_is(models: list[lg.Header], may_split: bool) -> None:
    reached = []
    for seed in range(QUESTIONS):
        asked = question(seed, models, may_split=may_split)
        best = best_worth(asked, effort=0.5)
        worth = asked.worth_of(asked.plan())
        assert worth <= best, "the solver knows no better than this"
        reached.append(worth / best if best else 1.0)
    assert min(reached) >= (0.80 if may_split else 0.95)
    assert sum(reached) / len(reached) >= (0.95 if may_split else 0.99)
