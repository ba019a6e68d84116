"""Random questions to ``plan``, and what the best answer to each is worth, by CP-SAT.

With ``max_gpus`` 1 every model takes one GPU or none, and the solver's optimum is that of the
question. Where models may be split, the solver may deal their bytes out over the GPUs as it likes, as if
splitting cost nothing: what it finds is never below the optimum.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ortools.sat.python import cp_model

import llama_gpu as lg
from support.gguf_builder import write_sparse

MIB, GIB = 1 << 20, 1 << 30
LAYERS = (4, 10, 20, 32, 48, 64, 80)
KINDS = ([24], [80], [8, 12, 16, 24], [24, 48, 80], [8, 80])


@dataclass(frozen=True)
class Question:
    """GPUs and the models that should be resident on them; each is worth ``value * 4**priority``."""

    gpus: list[lg.Gpu]
    models: list[lg.Wanted]
    needs: list[int]
    """Bytes of each model on one GPU."""
    allowed: list[list[int]]
    """The GPUs that each model may use."""
    policy: lg.Policy

    @property
    def worths(self) -> list[int]:
        return [round(model.value) * 4**model.priority for model in self.models]

    @property
    def may_split(self) -> bool:
        return self.policy.max_gpus != 1

    def plan(self) -> lg.Plan:
        return lg.plan(self.models, self.gpus, policy=self.policy)

    def worth_of(self, plan: lg.Plan) -> int:
        return sum(
            worth
            for model, worth in zip(self.models, self.worths, strict=True)
            if model.id in plan.placements
        )


def headers(folder: Path) -> list[lg.Header]:
    """Models from a hundredth of a GPU to a few GPUs, their weights holes."""
    return [
        lg.read_header(
            write_sparse(
                folder / f"{layers}.gguf", layers=layers, embedding=8192, feed_forward=28672, vocabulary=1000
            )
        )
        for layers in LAYERS
    ]


def _need(header: lg.Header, context_length: int) -> int:
    return lg.estimate(header, context_length=context_length).devices[0].total_bytes


def question(seed: int, models: Sequence[lg.Header], *, may_split: bool) -> Question:
    """Up to 8 GPUs and 40 models, of which some find room; the same for the same seed."""
    random_ = random.Random(seed)
    kind = random_.choice(KINDS)
    gpus = []
    for index in range(random_.randint(1, 8)):
        total = random_.choice(kind) * GIB
        gpus.append(lg.Gpu(index=index, total_bytes=total, free_bytes=int(total * random_.uniform(0.5, 1))))
    largest = max(gpu.free_bytes or 0 for gpu in gpus)
    like_size, few_priorities = random_.random() < 0.4, random_.random() < 0.6
    asked: list[lg.Wanted] = []
    needs: list[int] = []
    allowed: list[list[int]] = []
    number = random_.randint(2, 40)
    while len(asked) < number:
        header, context = random_.choice(models), random_.randint(2, 120) * 512
        need = _need(header, context)
        if need > largest * (3 if may_split else 1) or (need > largest and random_.random() < 0.7):
            continue
        value = max(1, need // (GIB // 4)) if like_size else random_.randint(1, 100)
        usable = (
            range(len(gpus))
            if random_.random() < 0.8
            else random_.sample(range(len(gpus)), (len(gpus) + 1) // 2)
        )
        allowed.append(sorted(usable))
        asked.append(
            lg.Wanted(
                header,
                id=str(len(asked)),
                value=value,
                priority=0 if few_priorities else random_.choice([0, 0, 0, 1, 2]),
                allowed=allowed[-1],
                context_length=context,
            )
        )
        needs.append(need)
    return Question(gpus, asked, needs, allowed, lg.Policy(max_gpus=None if may_split else 1))


def best_worth(asked: Question, *, effort: float) -> int:
    """What the best plan is worth at the most: the optimum, or, out of ``effort``, the bound on it.

    In whole MiB, models rounded down and GPUs rounded up, which the solver is much faster with.
    """
    solver_model: Any = cp_model.CpModel()
    free = [-(-(gpu.free_bytes or 0) // MIB) for gpu in asked.gpus]
    held: list[list[Any]] = [[] for _ in free]
    taken = []
    for need_bytes, allowed in zip(asked.needs, asked.allowed, strict=True):
        need = need_bytes // MIB
        resident = solver_model.new_bool_var("")
        taken.append(resident)
        on = {}
        for gpu in allowed:
            if need <= free[gpu]:
                on[gpu] = solver_model.new_bool_var("")
                held[gpu].append(on[gpu] * need)
        if not asked.may_split:
            solver_model.add(sum(on.values()) == resident)
            continue
        split = solver_model.new_bool_var("")
        parts = []
        for gpu in allowed:
            parts.append(solver_model.new_int_var(0, free[gpu], ""))
            held[gpu].append(parts[-1])
        solver_model.add(sum(on.values()) + split == resident)
        solver_model.add(sum(parts) == need * split)
    for gpu, most in enumerate(free):
        solver_model.add(sum(held[gpu]) <= most)
    solver_model.maximize(sum(one * worth for one, worth in zip(taken, asked.worths, strict=True)))
    solver = cp_model.CpSolver()
    # The solver's own measure of work, some seconds' worth: a busy machine changes no answer.
    solver.parameters.max_deterministic_time = effort
    solver.parameters.num_workers = 1
    status = solver.solve(solver_model)
    return round(solver.objective_value if status == cp_model.OPTIMAL else solver.best_objective_bound)
