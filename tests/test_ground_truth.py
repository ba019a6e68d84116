"""What ``estimate`` says, held against llama.cpp's own dry run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support import accuracy, ground_truth

if TYPE_CHECKING:
    from support.accuracy import Row


@pytest.fixture
def rows(ground_truth_rows: list[Row]) -> list[Row]:
    """Every device of every case that the project carries."""
    return ground_truth_rows


def test_weights_equal_llama_cpp_to_the_byte(rows: list[Row]) -> None:
    assert [str(row) for row in rows if row.said.weights_bytes != row.taken.weights] == []


def test_contexts_equal_llama_cpp_to_the_byte(rows: list[Row]) -> None:
    assert [str(row) for row in rows if row.said.context_bytes != row.taken.context] == []


def test_compute_buffers_equal_llama_cpp_to_the_byte(rows: list[Row]) -> None:
    assert [str(row) for row in rows if row.compute_error != 0] == []


def test_every_carried_architecture_has_its_own_graph(rows: list[Row]) -> None:
    assert {row.architecture for row in rows if row.basis != "exact"} == set()


def test_prints_the_table_of_all_cases(rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    table = accuracy.table(rows)
    with capsys.disabled():
        print(f"\n{table}")
    _, total = accuracy.tallies(rows)
    assert len(total.cases) == sum(len(ground_truth.cases(model)) for model in ground_truth.model_names())
