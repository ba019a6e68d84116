"""What ``estimate`` says, held against llama.cpp's own dry run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support import accuracy, ground_truth

if TYPE_CHECKING:
    from support.accuracy import Row

# Graphs that a plain transformer stands in for.
NOT_DESCRIBED = {
    "qwen4exp",
}


@pytest.fixture
def rows(ground_truth_rows: list[Row]) -> list[Row]:
    """Every device of every case that the project carries."""
    return ground_truth_rows


def test_weights_equal_llama_cpp_to_the_byte(rows: list[Row]) -> None:
    assert [str(row) for row in rows if row.said.weights_bytes != row.taken.weights] == []


def test_contexts_equal_llama_cpp_to_the_byte(rows: list[Row]) -> None:
    assert [str(row) for row in rows if row.said.context_bytes != row.taken.context] == []


def test_a_basis_of_exact_means_llama_cpp_s_own_compute_buffer(rows: list[Row]) -> None:
    claimed = [row for row in rows if row.basis == "exact"]
    wrong = [str(row) for row in claimed if row.compute_error != 0]
    assert len(wrong) <= len(claimed) // 100, wrong


def test_most_compute_buffers_equal_llama_cpp_to_the_byte(rows: list[Row]) -> None:
    _, total = accuracy.tallies(rows)
    assert total.exact_cases / len(total.cases) >= 0.85
    assert total.close / total.rows >= 0.92


def test_sums_are_close_and_hardly_ever_too_low(rows: list[Row]) -> None:
    _, total = accuracy.tallies(rows)
    devices = sum(row.place != "host" for row in rows)
    assert total.sums_close / devices >= 0.92
    assert total.sums_under / devices <= 0.06


def test_prints_the_table_of_all_cases(rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    table = accuracy.table(rows)
    with capsys.disabled():
        print(f"\n{table}")
    _, total = accuracy.tallies(rows)
    assert len(total.cases) == sum(len(ground_truth.cases(model)) for model in ground_truth.model_names())


def test_compute_buffers_equal_llama_cpp_to_the_byte_where_the_graph_is_described(rows: list[Row]) -> None:
    described = [row for row in rows if row.architecture not in NOT_DESCRIBED]
    assert [str(row) for row in described if row.compute_error != 0] == []


def test_no_compute_buffer_is_far_off_where_the_graph_is_described(rows: list[Row]) -> None:
    assert [str(row) for row in rows if row.compute_far and row.architecture not in NOT_DESCRIBED] == []
