"""``llama-gpu accuracy``: loads of this machine and the table that ships."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import llama_gpu as lg
from llama_gpu.memory.case import Case
from llama_gpu.memory.record import DeviceTaken, Record, Taken
from llama_gpu.memory.shipped import ShippedCase, shipped_cases, tally
from llama_gpu.memory.store import MemoryStore
from support import accuracy, ground_truth

MIB = 1 << 20
SCRIPT = Path(__file__).parent.parent / "scripts" / "accuracy_table.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("accuracy_table", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def memory(mib: int) -> lg.DeviceMemory:
    return lg.DeviceMemory(weights_bytes=mib * MIB, layers=1)


@pytest.fixture
def load(memory_file: Path) -> Record:
    """A load on two GPUs that took more on the first and less on the second than was said."""
    said = lg.MemoryEstimate(
        devices=[memory(100), memory(200)], host=memory(10), basis="exact", context_length=4096
    )
    projected = lg.MemoryEstimate(
        devices=[memory(104), memory(190)], host=memory(10), basis="projected", context_length=4096
    )
    taken = Taken(
        (DeviceTaken({"model": 104 * MIB}, 104 * MIB), DeviceTaken({"model": 160 * MIB}, 160 * MIB)),
        DeviceTaken({"model": 10 * MIB}),
    )
    case = Case("model", "options", ("NVIDIA L4 8.9", "NVIDIA L4 8.9"), (1, 1), "llama-server 1")
    record = Record(case, "small", "/models/small.gguf", said, projected, taken, at=1.0, loads=2)
    MemoryStore(memory_file).put(record)
    return record


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llama_gpu", "accuracy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def answer(*arguments: str | Path) -> Any:
    done = run("--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_table_that_ships_promises_nothing_that_the_estimates_do_not_keep(
    script: ModuleType, ground_truth_rows: list[accuracy.Row]
) -> None:
    _, shipped = shipped_cases()
    fresh = [ShippedCase(*case) for case in script.table(ground_truth_rows)["cases"]]
    worse = []
    for now, then in zip(sorted(map(_by_case, fresh)), sorted(map(_by_case, shipped)), strict=True):
        assert now[:4] == then[:4], "run scripts/accuracy_table.py after a change of the ground truth"
        if now[4:] > then[4:]:
            worse.append((now, then))
    assert worse == [], "run scripts/accuracy_table.py after a change of the estimates"


def _by_case(case: ShippedCase) -> tuple[object, ...]:
    """What tells cases apart, then by how much the estimate is off: more is worse."""
    off = abs(case.said_bytes - case.taken_bytes)
    inexact = not case.weights_and_context_exact
    return case.architecture, case.backend, case.devices, case.taken_bytes, inexact, off


def test_it_has_every_case_that_the_project_carries() -> None:
    _, cases = shipped_cases()
    assert len(cases) == sum(len(ground_truth.cases(model)) for model in ground_truth.model_names())
    assert {case.backend for case in cases} == {"cuda", "generic"}


def test_a_tally_counts_cases_and_keeps_the_worst() -> None:
    exact = ShippedCase("llama", "cuda", 1, 1000, 1000, True, 0)
    low = replace(exact, said_bytes=900, worst_compute_error_bytes=-2 * MIB)
    other = replace(exact, architecture="gemma", said_bytes=1010, worst_compute_error_bytes=5)
    gemma, llama, every = tally([exact, low, other])
    assert [item.name for item in (gemma, llama, every)] == ["cuda gemma", "cuda llama", "all"]
    assert (every.cases, every.exact, every.close) == (3, 1, 2)
    assert every.worst_compute_error_bytes == -2 * MIB
    assert (every.lowest_error_fraction, every.highest_error_fraction) == pytest.approx((-0.1, 0.01))
    assert (llama.cases, gemma.worst_compute_error_bytes) == (2, 5)


def test_loads_are_shown_with_every_tier_and_its_error(load: Record) -> None:
    document = answer()
    (shown,) = document["loads"]
    first, second, host = shown["places"]
    assert (shown["model"], shown["loads"], shown["build"]) == ("small", 2, load.case.build)
    assert (first["analytic_bytes"], first["projected_bytes"], first["measured_bytes"]) == (
        100 * MIB,
        104 * MIB,
        104 * MIB,
    )
    assert first["analytic_error_fraction"] == pytest.approx(-4 / 104)
    assert first["projected_error_fraction"] == 0
    assert second["analytic_error_fraction"] == pytest.approx(40 / 160)
    assert host["place"] == "host"
    text = run().stdout
    assert "1: NVIDIA L4 8.9" in text
    assert "+25.00%" in text
    assert "cuda llama" in text


def test_where_nothing_was_loaded_it_says_so() -> None:
    assert "Nothing was loaded here yet" in run().stdout
    assert answer()["loads"] == []


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_a_chart_is_drawn_of_both(load: Record, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"accuracy.{ending}"
    assert len(answer("--plot", file)["loads"]) == load.loads - 1
    content = file.read_bytes()
    assert content.startswith({"svg": b"<?xml", "png": b"\x89PNG"}[ending])
    assert len(content) > 10_000


def test_a_chart_of_no_known_format_is_refused(tmp_path: Path) -> None:
    done = run("--plot", tmp_path / "accuracy.cake")
    assert done.returncode == 1
    assert "cake" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_matplotlib_it_says_how_to_get_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib.figure'] = None; from llama_gpu.cli import run; "
        "sys.exit(run(['accuracy', '--plot', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.svg")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "pip install 'llama-gpu[plot]'" in done.stderr
