"""``llama-gpu accuracy``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_gpu import MemoryEstimate
from llama_gpu.cli.show import print_json, print_lines, print_table, size
from llama_gpu.config import load_config
from llama_gpu.memory.record import Record
from llama_gpu.memory.shipped import shipped_cases, tally
from llama_gpu.memory.store import store_at


@dataclass(frozen=True)
class Said:
    """One device, or the host, of one load: what was said and what was taken, in bytes."""

    place: str
    analytic_bytes: int
    projected_bytes: int | None
    measured_bytes: int | None

    def error_fraction(self, said_bytes: int | None) -> float | None:
        """By how much a tier was too high, as a fraction of what was taken."""
        if said_bytes is None or not self.measured_bytes:
            return None
        return (said_bytes - self.measured_bytes) / self.measured_bytes


def accuracy(*, config: Path | None = None, plot: Path | None = None, json: bool = False) -> None:
    """Show what was said against what was taken: loads of this machine, and the cases the project carries.

    Parameters
    ----------
    config
        The configuration that llama-gpu serve is given, for the file that remembers the loads.
    plot
        Draw both into this file, such as accuracy.svg (needs matplotlib).
    json
        Print one JSON document, sizes in bytes.
    """
    records = store_at(load_config(config).memory.path).records()
    commit, cases = shipped_cases()
    tallies = tally(cases)
    if plot is not None:
        from llama_gpu.cli.chart import draw  # noqa: PLC0415 - matplotlib is an extra

        draw(plot, cases, [_whole(record) for record in records if record.taken])
    if json:
        print_json(
            {
                "loads": [_fields(record) for record in records],
                "shipped": {"llama_cpp": commit, "tallies": [asdict(item) for item in tallies]},
            }
        )
        return
    if records:
        print_table(
            (
                "Loaded here",
                "Where",
                ">Loads",
                ">Estimated",
                ">Projected",
                ">Taken",
                ">Off",
                ">Projected off",
            ),
            (row for record in records for row in _rows(record)),
        )
    else:
        print_lines("Nothing was loaded here yet: llama-gpu serve remembers what its loads take.")
    print_table(
        (
            "Against llama.cpp",
            ">Cases",
            ">Weights, context",
            ">All exact",
            ">Compute within 1 MiB",
            ">Worst",
            ">Sum off",
        ),
        (
            (
                item.name,
                item.cases,
                f"{item.weights_and_context_exact / item.cases:.1%}",
                f"{item.exact / item.cases:.1%}",
                f"{item.close / item.cases:.1%}",
                size(item.worst_compute_error_bytes),
                f"{item.lowest_error_fraction:+.2%} to {item.highest_error_fraction:+.2%}",
            )
            for item in tallies
        ),
        title=f"What the project carries: llama.cpp {commit}'s own dry run",
    )


def _places(record: Record) -> Iterator[Said]:
    tiers = (record.analytic, record.projected, record.measured)

    def said(place: str, *sizes: int | None) -> Said:
        analytic, projected, measured = sizes
        return Said(place, analytic or 0, projected, measured)

    for number, kind in enumerate(record.case.kinds):
        yield said(f"{number}: {kind}", *(tier and tier.devices[number].total_bytes for tier in tiers))
    yield said("host", *(tier and tier.host.total_bytes for tier in tiers))


def _rows(record: Record) -> Iterator[tuple[object, ...]]:
    for first, item in enumerate(_places(record)):
        yield (
            None if first else record.name,
            item.place,
            None if first else record.loads,
            size(item.analytic_bytes),
            size(item.projected_bytes),
            size(item.measured_bytes),
            _percent(item.error_fraction(item.analytic_bytes)),
            _percent(item.error_fraction(item.projected_bytes)),
        )


def _percent(fraction: float | None) -> str | None:
    return None if fraction is None else f"{fraction:+.2%}"


def _fields(record: Record) -> dict[str, Any]:
    return {
        "model": record.name,
        "path": record.path,
        "build": record.case.build,
        "context_length": record.analytic.context_length,
        "loads": record.loads,
        "last_seconds": record.at,
        "places": [
            {
                **asdict(item),
                "analytic_error_fraction": item.error_fraction(item.analytic_bytes),
                "projected_error_fraction": item.error_fraction(item.projected_bytes),
            }
            for item in _places(record)
        ],
    }


def _whole(record: Record) -> tuple[str, int, int]:
    """Name, bytes said and taken: over the devices, or of the host where there is none."""

    def total(estimate: MemoryEstimate | None) -> int:
        return 0 if estimate is None else estimate.total_device_bytes or estimate.host.total_bytes

    return record.name, total(record.analytic), total(record.measured)
