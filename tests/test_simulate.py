"""``llama-gpu simulate`` as a person runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from llama_gpu.cli.made_up_models import write_made_up_models

if TYPE_CHECKING:
    from pathlib import Path

SMALL = ("--requests", 60, "--made-up", 8, "--gpu", "24GiB")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llama_gpu", "simulate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def answer(*arguments: object) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def refusal(*arguments: object) -> str:
    done = run(*arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def trace(folder: Path, *models: str) -> Path:
    file = folder / "trace.jsonl"
    lines = [
        {"time_seconds": 100 + number, "model": model, "duration_seconds": 0.5}
        for number, model in enumerate(models)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_the_same_seed_gives_the_same_numbers_for_every_strategy() -> None:
    said = answer(*SMALL)
    assert said == answer(*SMALL)
    names = [outcome["strategy"] for outcome in said["strategies"]]
    assert names[:3] + names[4:] == ["single-gpu-preferred", "distribute", "pack", "one-at-a-time"]
    assert names[3].startswith("by-count (")
    assert {outcome["answered"] for outcome in said["strategies"]} == {60}
    assert said != answer(*SMALL, "--seed", 2)


def test_a_table_and_a_chart_are_made_of_the_chosen_strategies(tmp_path: Path) -> None:
    chart = tmp_path / "simulation.svg"
    done = run(*SMALL, "--strategy", "pack", "--strategy", "by-count", "--plot", chart)
    assert (done.returncode, done.stderr) == (0, "")
    assert "60 requests in" in done.stdout
    assert "pack" in done.stdout
    assert "distribute" not in done.stdout
    assert chart.read_bytes().startswith(b"<?xml")


def test_a_trace_is_played_with_the_models_of_a_folder(tmp_path: Path) -> None:
    write_made_up_models(tmp_path, 2, seed=1)
    first, second = sorted(path.stem for path in tmp_path.glob("*.gguf"))
    file = trace(tmp_path, first, first.upper(), second)
    said = answer(file, "--models", tmp_path, "--gpu", "80GiB", "--strategy", "distribute")
    (outcome,) = said["strategies"]
    assert (outcome["requests"], outcome["answered"], outcome["loads"]) == (3, 3, 2)
    assert [model["id"] for model in said["models"]] == [first, second]


def test_the_models_of_a_trace_are_made_up_where_there_is_no_folder(tmp_path: Path) -> None:
    said = answer(trace(tmp_path, "a/b", "c", "a/b"), "--gpu", "80GiB", "--strategy", "pack")
    assert len(said["models"]) == 2
    assert said["strategies"][0]["loads"] == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--rate", 0), "--rate should be more than 0"),
        (("--requests", -1), "--requests should be more than 0"),
        (("--zipf", -1), "--zipf should be 0 or more"),
        (("--gpu", "big"), "--gpu big: should be sizes such as 24GiB"),
        (("nowhere.jsonl",), "nowhere.jsonl: No such file or directory"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(flags: tuple[object, ...], said: str) -> None:
    assert said in refusal(*flags)


def test_a_trace_that_asks_for_an_unknown_model_or_for_nothing_is_refused(tmp_path: Path) -> None:
    write_made_up_models(tmp_path, 1, seed=1)
    assert "no model is called 'nobody'" in refusal(trace(tmp_path, "nobody"), "--models", tmp_path)
    assert "there is no request in it" in refusal(trace(tmp_path), "--models", tmp_path)
