"""How near ``plan`` comes to the best there is, and how long it takes: ``make bench``."""

from __future__ import annotations

import time

import pytest

import llama_gpu as lg
from support.plan_optimum import best_worth, headers, question

QUESTIONS = 200


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[lg.Header]:
    return headers(tmp_path_factory.mktemp("models"))


@pytest.mark.timeout(3600)
@pytest.mark.benchmark(group="plan, up to 8 GPUs and 40 models")
@pytest.mark.parametrize("may_split", [False, True], ids=["whole", "split"])
def test_plan(
    benchmark, capsys: pytest.CaptureFixture[str], models: list[lg.Header], may_split: bool
) -> None:
    reached: list[float] = []
    seconds: list[float] = []
    for seed in range(QUESTIONS):
        asked = question(seed, models, may_split=may_split)
        began = time.perf_counter()
        plan = asked.plan()
        seconds.append(time.perf_counter() - began)
        best = best_worth(asked, effort=5)
        reached.append(asked.worth_of(plan) / best if best else 1.0)
    largest = question(max(range(QUESTIONS), key=seconds.__getitem__), models, may_split=may_split)
    benchmark.pedantic(largest.plan, rounds=20, warmup_rounds=2)
    seconds.sort()
    with capsys.disabled():
        bound = "of a bound on the best" if may_split else "of the best"
        print(
            f"\nplan: {sum(reached) / QUESTIONS:.2%} {bound} in the mean, {min(reached):.2%} in the worst; "
            f"p50 {seconds[QUESTIONS // 2] * 1e3:.1f}  p99 {seconds[QUESTIONS * 99 // 100] * 1e3:.1f}  "
            f"max {seconds[-1] * 1e3:.1f} ms   aim 10 ms"
        )
    assert len(reached) == QUESTIONS
