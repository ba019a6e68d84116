"""What ``estimate`` says, held against llama.cpp's own dry run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

import llama_gpu as lg
from support import ground_truth

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One device (or the host) of one case: said against taken."""

    case: ground_truth.Case
    place: str
    said: lg.DeviceMemory
    taken: ground_truth.Sizes


@pytest.fixture(scope="module", params=ground_truth.model_names())
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Every device of every case of one model."""
    path: Path = ground_truth.write_model(request.param, tmp_path_factory.mktemp("model"))
    header = lg.read_header(path)
    found = []
    for case in ground_truth.cases(request.param):
        estimate = lg.estimate(header, **case.options)
        places = [f"device {number}" for number in range(case.devices)] + ["host"]
        said = [*estimate.devices, estimate.host]
        found += [Row(case, *row) for row in zip(places, said, case.sizes, strict=True)]
    return found


def test_weights_equal_llama_cpp_to_the_byte(rows: list[Row]) -> None:
    wrong = [
        (row.case.name, row.place, row.said.weights_bytes, row.taken.weights)
        for row in rows
        if row.said.weights_bytes != row.taken.weights
    ]
    assert wrong == []


def test_contexts_equal_llama_cpp_to_the_byte(rows: list[Row]) -> None:
    wrong = [
        (row.case.name, row.place, row.said.context_bytes, row.taken.context)
        for row in rows
        if row.said.context_bytes != row.taken.context
    ]
    assert wrong == []
