"""A real shared library with NVML's ABI whose GPUs a test writes, and rewrites while a program runs.

The C source lies in ``fake_nvml/``; ``build`` compiles it with ``cc``. A ``FakeNvml`` is a copy of the
library with its state file beside it (the format is described in ``fake_nvml/state.h``), loaded in place
of the driver's through the environment (``FakeNvml.environment``), in this process or a child.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import llama_gpu as lg

GIB = 1 << 30
MIB = 1 << 20
SOURCES = Path(__file__).parent / "fake_nvml"

NOT_SUPPORTED = 3
NO_PERMISSION = 4
NOT_FOUND = 6
DRIVER_NOT_LOADED = 9
FUNCTION_NOT_FOUND = 13
GPU_IS_LOST = 15
RESET_REQUIRED = 16
LIB_RM_VERSION_MISMATCH = 18
GPU_NOT_FOUND = 28
UNKNOWN = 999


def build(folder: Path, *flags: str) -> Path:
    """Compiles ``folder/libnvidia-ml.so.1``.

    ``-DOLD_DRIVER`` leaves out what drivers before 510 lack, ``-DWITHOUT_TEMPERATURE`` the deprecated
    temperature call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libnvidia-ml.so.1"
    sources = [SOURCES / "nvml.c", SOURCES / "state.c"]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = ["cc", *warnings, "-O1", "-shared", "-fPIC", *flags, "-o", library, *sources]
    subprocess.run(command, check=True)
    return library


@dataclass(frozen=True, kw_only=True)
class FakeProcess:
    """A process on a fake GPU; ``used_bytes=None`` is "not available"."""

    pid: int
    used_bytes: int | None = None
    kind: str = "compute"

    def lines(self) -> Iterable[str]:
        used = "unknown" if self.used_bytes is None else str(self.used_bytes)
        yield f"process {self.kind} {self.pid} {used}"


@dataclass(frozen=True, kw_only=True)
class FakeGpu:
    """What NVML tells about one GPU or MIG device. None: NVML answers "not supported".

    ``free_bytes`` and ``used_bytes`` default to an idle device. ``errors`` maps a call (an NVML symbol,
    or ``"*"``) to a return code, ``slow`` to milliseconds; a call in ``hangs`` returns only when it is
    taken out of there.
    """

    uuid: str | None = None
    name: str = "NVIDIA Fake 4090"
    pci_bus_id: str | None = None
    total_bytes: int | None = 24 * GIB
    reserved_bytes: int = 0
    free_bytes: int | None = None
    used_bytes: int | None = None
    utilization: int | None = 0
    temperature: int | None = 40
    power_watts: float | None = 30.0
    compute_capability: tuple[int, int] | None = (8, 9)
    throttle: int = 0
    numa_node: int | None = None
    nvlinks: Sequence[str] = ()
    processes: Sequence[FakeProcess] = ()
    errors: Mapping[str, int] = field(default_factory=dict)
    hangs: Sequence[str] = ()
    slow: Mapping[str, int] = field(default_factory=dict)
    null_handle: bool = False
    growth: tuple[int, int] | None = None
    mig_slots: int = 0
    migs: Mapping[int, FakeGpu] = field(default_factory=dict)

    def lines(self, index: int) -> Iterable[str]:
        yield f"uuid {self.uuid or default_uuid(index)}"
        yield f"name {self.name}"
        yield f"pci {self.pci_bus_id or f'00000000:{index + 1:02X}:00.0'}"
        yield from self._measured()
        if self.compute_capability is not None:
            yield f"capability {self.compute_capability[0]} {self.compute_capability[1]}"
        if self.numa_node is not None:
            yield f"numa {self.numa_node}"
        yield from (f"nvlink {address}" for address in self.nvlinks)
        for process in self.processes:
            yield from process.lines()
        if self.growth is not None:
            yield f"growth {self.growth[0]} {self.growth[1]}"
        if self.null_handle:
            yield "null_handle"
        if self.mig_slots:
            yield f"mig_slots {self.mig_slots}"
        yield from rules(self.errors, self.hangs, self.slow)
        for slot, mig in self.migs.items():
            yield "[mig]"
            yield f"slot {slot}"
            yield from replace(mig, uuid=mig.uuid or f"MIG-{index}-{slot}").lines(index)

    def _measured(self) -> Iterable[str]:
        if self.total_bytes is not None:
            free, used = self.free_bytes, self.used_bytes
            if free is None:
                free = self.total_bytes - self.reserved_bytes - (used or 0)
            if used is None:
                used = self.total_bytes - self.reserved_bytes - free
            yield f"memory {self.total_bytes} {self.reserved_bytes} {free} {used}"
        if self.utilization is not None:
            yield f"utilization {self.utilization} 0"
        if self.temperature is not None:
            yield f"temperature {self.temperature}"
        if self.power_watts is not None:
            yield f"milliwatts {round(self.power_watts * 1000)}"
        if self.throttle:
            yield f"throttle {self.throttle}"


def default_uuid(index: int) -> str:
    return f"GPU-{index:08x}-0000-4000-8000-000000000000"


def rules(errors: Mapping[str, int], hangs: Iterable[str], slow: Mapping[str, int]) -> Iterable[str]:
    for call, code in errors.items():
        yield f"error {call} {code}"
    for call in hangs:
        yield f"hang {call}"
    for call, milliseconds in slow.items():
        yield f"slow {call} {milliseconds}"


class FakeNvml:
    """The fake driver of one test. Starts with no GPU; every change is seen by the next call."""

    def __init__(self, library: Path, folder: Path) -> None:
        self.library_path = folder / library.name
        shutil.copy(library, self.library_path)
        self.state_path = folder / "nvml.state"
        self.journal_path = folder / "nvml.journal"
        self.gpus: list[FakeGpu] = []
        self.driver_version = "580.95.05"
        self.errors: dict[str, int] = {}
        self.hangs: list[str] = []
        self.slow: dict[str, int] = {}
        self.write()

    @property
    def environment(self) -> dict[str, str]:
        """What a child needs to see these GPUs: ours by its variable, any other by the linker's path."""
        known = os.environ.get("LD_LIBRARY_PATH")
        folders = [str(self.library_path.parent), *([known] if known else [])]
        return {
            "LLAMA_GPU_NVML_LIBRARY": str(self.library_path),
            "LD_LIBRARY_PATH": ":".join(folders),
        }

    def set_gpus(self, gpus: Iterable[FakeGpu]) -> None:
        self.gpus = list(gpus)
        self.write()

    def update(self, index: int, **changes: Any) -> None:
        """Changes fields of one GPU; its used bytes follow its free bytes unless both are given."""
        if "free_bytes" in changes:
            changes.setdefault("used_bytes", None)
        elif "used_bytes" in changes:
            changes.setdefault("free_bytes", None)
        self.gpus[index] = replace(self.gpus[index], **changes)
        self.write()

    def lose(self, index: int) -> None:
        """The GPU falls off the bus: every call on it fails as NVML's do then."""
        self.update(index, errors={"*": GPU_IS_LOST})

    def bring_back(self, index: int) -> None:
        self.update(index, errors={}, hangs=())

    def hang(self, index: int) -> None:
        """No call on the GPU returns until ``bring_back``."""
        self.update(index, hangs=("*",))

    def write(self) -> None:
        """Replaces the state file in one step, so that no call reads half of one."""
        lines = [
            f"driver {self.driver_version}",
            f"nvml 13.{self.driver_version}",
            f"journal {self.journal_path}",
            *rules(self.errors, self.hangs, self.slow),
        ]
        for index, gpu in enumerate(self.gpus):
            lines += ["[gpu]", *gpu.lines(index)]
        fresh = self.state_path.with_suffix(".new")
        fresh.write_text("\n".join(lines) + "\n", errors="surrogateescape")
        fresh.replace(self.state_path)

    def journal(self) -> list[tuple[int, int, str, int]]:
        """Every call so far: process id, thread id, NVML symbol, index of the GPU or -1."""
        if not self.journal_path.exists():
            return []
        calls = [line.split() for line in self.journal_path.read_text().splitlines()]
        return [(int(pid), int(thread), call, int(gpu)) for pid, thread, call, gpu in calls]

    def calls(self) -> list[str]:
        return [call for _, _, call, _ in self.journal()]


def only_gpu(fake: FakeNvml, gpu: FakeGpu) -> lg.Gpu:
    """What a snapshot says of a machine with this GPU alone."""
    fake.set_gpus([gpu])
    (read,) = lg.snapshot_gpus()
    return read
