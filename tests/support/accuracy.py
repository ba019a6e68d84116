"""Said against taken, as a table."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import llama_gpu as lg

from . import ground_truth

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """One device, or the host, of one case: said against taken."""

    case: ground_truth.Case
    architecture: str
    basis: str
    place: str
    said: lg.DeviceMemory
    taken: ground_truth.Sizes

    @property
    def compute_error(self) -> int:
        """Bytes by which the compute buffer is too high."""
        return self.said.compute_bytes - self.taken.compute

    @property
    def compute_close(self) -> bool:
        """Within 1 % or 1 MiB, whichever is more."""
        return abs(self.compute_error) <= max(MIB, self.taken.compute // 100)

    @property
    def compute_far(self) -> bool:
        """Off by more than 5 % or 8 MiB, whichever is more."""
        return abs(self.compute_error) > max(8 * MIB, self.taken.compute // 20)

    @property
    def taken_bytes(self) -> int:
        """Everything that llama.cpp counts here."""
        return self.taken.weights + self.taken.context + self.taken.compute

    @property
    def sum_error_fraction(self) -> float:
        """By how much the sum is too high, as a fraction of what was taken."""
        said = self.said.weights_bytes + self.said.context_bytes + self.said.compute_bytes
        return (said - self.taken_bytes) / self.taken_bytes if self.taken_bytes else float(said > 0)

    def __str__(self) -> str:
        return (
            f"{self.case.model} {self.case.backend} {self.case.name} {self.place}: "
            f"said {self.said.compute_bytes} took {self.taken.compute} ({self.compute_error:+d})"
        )


def rows_of(path: Path, cases: Iterable[ground_truth.Case]) -> list[Row]:
    """Every device of every case of the model at ``path``."""
    header = lg.read_header(path)
    rows = []
    for case in cases:
        estimate = lg.estimate(header, **case.options)
        places = [*(f"device {number}" for number in range(case.devices)), "host"]
        said = [*estimate.devices, estimate.host]
        architecture = header.architecture or "?"
        rows += [
            Row(case, architecture, estimate.basis, place, device, sizes)
            for place, device, sizes in zip(places, said, case.sizes, strict=True)
        ]
    return rows


@dataclass
class Tally:
    """Counts over some rows; a case counts as exact where all its rows are."""

    rows: int = 0
    weights: int = 0
    context: int = 0
    exact: int = 0
    close: int = 0
    far: int = 0
    worst: Row | None = None
    cases: set[ground_truth.Case] = field(default_factory=set)
    inexact: set[ground_truth.Case] = field(default_factory=set)
    sums_close: int = 0
    sums_under: int = 0

    def add(self, row: Row) -> None:
        """Count one row."""
        self.rows += 1
        self.weights += row.said.weights_bytes == row.taken.weights
        self.context += row.said.context_bytes == row.taken.context
        self.exact += row.compute_error == 0
        self.close += row.compute_close
        self.far += row.compute_far
        self.cases.add(row.case)
        if row.compute_error != 0:
            self.inexact.add(row.case)
        if self.worst is None or abs(row.compute_error) > abs(self.worst.compute_error):
            self.worst = row
        if row.place != "host":
            # a device that is offered and not used has nothing to be a fraction of
            self.sums_close += abs(row.sum_error_fraction) <= 0.005 or abs(row.compute_error) <= MIB
            self.sums_under += row.sum_error_fraction < -0.005 and row.compute_error < -MIB

    @property
    def exact_cases(self) -> int:
        """Cases whose compute buffers are all right to the byte."""
        return len(self.cases) - len(self.inexact)


def tallies(rows: Iterable[Row]) -> tuple[dict[str, Tally], Tally]:
    """One tally per backend and architecture, and one for all."""
    each: dict[str, Tally] = defaultdict(Tally)
    total = Tally()
    for row in rows:
        each[f"{row.case.backend:8}{row.architecture}"].add(row)
        total.add(row)
    return dict(sorted(each.items())), total


def table(rows: Iterable[Row]) -> str:
    """Cases, how many are exact, and the worst, per backend and architecture."""
    each, total = tallies(rows)
    columns = f"{'cases':>6}{'weights':>9}{'context':>9}{'compute':>9}{'close':>8}{'far':>5}  worst"
    head = f"{'backend and architecture':32}{columns}"
    lines = [head, "-" * len(head)]
    for name, tally in [*each.items(), ("all", total)]:
        lines.append(
            f"{name:32}{len(tally.cases):6}{tally.weights / tally.rows:9.1%}{tally.context / tally.rows:9.1%}"
            f"{tally.exact_cases / len(tally.cases):9.1%}{tally.close / tally.rows:8.1%}{tally.far:5}"
            f"  {tally.worst.compute_error if tally.worst else 0:+d}"
        )
    return "\n".join(lines)
