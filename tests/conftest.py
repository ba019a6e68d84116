"""Fixtures that several rooms' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.fake_nvml import FakeNvml, build


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
