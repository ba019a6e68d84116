"""How far the estimates are from llama.cpp's own dry run, as it was when this version was made.

The table is package data, written by the project's ``scripts/accuracy_table.py``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

__all__ = ["ShippedCase", "Tally", "shipped_cases", "tally"]

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ShippedCase:
    """One model with certain options: what was estimated and what llama.cpp took, over all devices."""

    architecture: str
    backend: str
    devices: int
    said_bytes: int
    taken_bytes: int
    weights_and_context_exact: bool
    worst_compute_error_bytes: int

    @property
    def error_fraction(self) -> float:
        """By how much the sum is too high, as a fraction of what was taken."""
        return (self.said_bytes - self.taken_bytes) / self.taken_bytes if self.taken_bytes else 0.0


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts over some cases. ``close`` is a compute buffer within 1 MiB."""

    name: str
    cases: int
    weights_and_context_exact: int
    exact: int
    close: int
    worst_compute_error_bytes: int
    lowest_error_fraction: float
    highest_error_fraction: float


def shipped_cases() -> tuple[str, list[ShippedCase]]:
    """The llama.cpp commit that was asked, and every case."""
    document: dict[str, Any] = json.loads((files("llama_gpu") / "data" / "accuracy.json").read_text("utf-8"))
    return document["llama_cpp"], [ShippedCase(*case) for case in document["cases"]]


def tally(cases: Iterable[ShippedCase]) -> list[Tally]:
    """One per backend and architecture, and one for all, the last."""
    groups: defaultdict[str, list[ShippedCase]] = defaultdict(list)
    for case in cases:
        groups[f"{case.backend} {case.architecture}"].append(case)
        groups["~all"].append(case)  # sorts after every name
    return [_count(name.lstrip("~"), groups[name]) for name in sorted(groups)]


def _count(name: str, cases: list[ShippedCase]) -> Tally:
    errors = [case.error_fraction for case in cases]
    return Tally(
        name,
        cases=len(cases),
        weights_and_context_exact=sum(case.weights_and_context_exact for case in cases),
        exact=sum(case.weights_and_context_exact and case.worst_compute_error_bytes == 0 for case in cases),
        close=sum(abs(case.worst_compute_error_bytes) <= MIB for case in cases),
        worst_compute_error_bytes=max((case.worst_compute_error_bytes for case in cases), key=abs),
        lowest_error_fraction=min(errors),
        highest_error_fraction=max(errors),
    )
