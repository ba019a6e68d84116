"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_gpu.memory.store import FILE_VARIABLE
from support import accuracy, ground_truth
from support.fake_nvml import FakeNvml, build

_numbers = itertools.count()

# A shell that starts a job in the background has it ignore Ctrl-C, and so would every program that
# the tests start: the ones that end by it would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def memory_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing is remembered in the user's own folder, not by a proxy of a whole module either."""
    folder = tmp_path_factory.mktemp("memory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FILE_VARIABLE, str(folder / "shared.sqlite3"))
        yield folder


@pytest.fixture(autouse=True)
def memory_file(memory_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test, and what it starts, remembers what loads took."""
    file = memory_folder / f"{os.getpid()}-{next(_numbers)}.sqlite3"
    monkeypatch.setenv(FILE_VARIABLE, str(file))
    return file


@pytest.fixture(scope="session")
def fake_nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake driver library, compiled once."""
    return build(tmp_path_factory.mktemp("fake_nvml"))


@pytest.fixture
def fake_nvml(fake_nvml_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A fake driver in place of the real one, here and in every child process. It has no GPU yet."""
    fake = FakeNvml(fake_nvml_library, tmp_path)
    for name, value in fake.environment.items():
        monkeypatch.setenv(name, value)
    return fake


@pytest.fixture(scope="session")
def ground_truth_rows(tmp_path_factory: pytest.TempPathFactory) -> list[accuracy.Row]:
    """Every device of every case that the project carries, estimated once for all tests."""
    rows = []
    for model in ground_truth.model_names():
        path = ground_truth.write_model(model, tmp_path_factory.mktemp("model"))
        rows += accuracy.rows_of(path, ground_truth.cases(model))
        path.unlink()
    return rows
