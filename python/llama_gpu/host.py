"""Reads the host's memory: the machine's, or the container's where that has less.

The operating system is asked here and nowhere else; what it says is a value of ``budget``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from llama_gpu.budget import HostMemory, HostUse

__all__ = ["host_memory"]

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")

UNLIMITED_BYTES = 1 << 60
"""cgroup v1 writes "no limit" as a number near 2^63."""


def host_memory(processes: Mapping[str, int] | None = None) -> HostMemory | None:
    """What there is, what can be had without swapping, and what the ``processes`` of our servers hold.

    None where it cannot be read. ``processes`` has process ids by the ids of servers.
    """
    try:
        machine = psutil.virtual_memory()
    except (psutil.Error, OSError):
        return None
    groups = list(_limited_groups())
    return HostMemory(
        total_bytes=min([machine.total, *(limit for limit, _ in groups)]),
        available_bytes=min([machine.available, *(max(0, left) for _, left in groups)]),
        used_by={server: _use(pid) for server, pid in (processes or {}).items()},
    )


def _use(pid: int) -> HostUse:
    """What a process holds; nothing once it has ended."""
    try:
        memory = psutil.Process(pid).memory_info()
    except (psutil.Error, OSError):
        return HostUse()
    # Linux alone tells them apart; elsewhere mapped weights count as the process's own.
    shared: int = getattr(memory, "shared", 0)
    return HostUse(memory.rss, max(0, memory.rss - shared))


def _limited_groups() -> Iterator[tuple[int, int]]:
    """Limit and what is left of it, for every control group around this process that has a limit."""
    for group in _groups(OWN_CGROUPS, CGROUPS):
        limit, used = _number(group.limit), _number(group.used)
        if limit is not None and used is not None and limit < UNLIMITED_BYTES:
            yield limit, limit - max(0, used - _reclaimable(group.statistics))


@dataclass(frozen=True)
class _Group:
    """The files of a memory group."""

    limit: Path
    used: Path
    statistics: Path


@cache  # looking for them takes longer than reading them, and a process stays in its group
def _groups(own: Path, root: Path) -> tuple[_Group, ...]:
    """The memory groups of this process and all around them, of both versions of the interface."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    found = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, limit, used = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's, of which only the container's own part is mounted.
        inner = top / path.lstrip("/")
        folders = [folder for folder in (inner, *inner.parents) if folder.is_relative_to(top)]
        found += [
            _Group(folder / limit, folder / used, folder / "memory.stat")
            for folder in folders
            if (folder / limit).is_file()
        ]
    return tuple(found)


def _number(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text(encoding="ascii"))
    return None


def _reclaimable(file: Path) -> int:
    """The file pages of a group: the kernel drops them before anything has to end."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    sizes = {name: int(size) for name, _, size in (line.partition(" ") for line in lines) if size.isdecimal()}
    names = ("inactive_file", "active_file")
    return sum(sizes.get(f"total_{name}", sizes.get(name, 0)) for name in names)
