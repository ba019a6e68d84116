"""``llama-gpu gpus``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from llama_gpu import Gpu, GpuSnapshot, Monitor, snapshot_gpus
from llama_gpu.cli.show import console, print_json, print_json_line, size, table

BAR_WIDTH = 20
HOT_CELSIUS = 85


def gpus(*, watch: bool = False, interval: float = 1.0, json: bool = False) -> None:
    """Show the GPUs and what is free on them.

    Parameters
    ----------
    watch
        Keep showing them until Ctrl-C.
    interval
        Seconds between two looks.
    json
        Print one JSON document; with --watch, one per look and line.
    """
    if watch:
        _watch(interval, as_json=json)
        return
    snapshot = snapshot_gpus()
    if json:
        print_json(_document(snapshot))
    else:
        console().print(_shown(snapshot))


def _watch(interval: float, *, as_json: bool) -> None:
    with Monitor(interval_seconds=interval) as monitor, suppress(KeyboardInterrupt):
        snapshot = monitor.refresh()
        if as_json:
            while True:
                print_json_line(_document(snapshot))
                time.sleep(interval)
                snapshot = monitor.snapshot()
        with Live(_shown(snapshot), console=console(), auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                live.update(_shown(monitor.snapshot(), monitor.ages), refresh=True)


def _shown(snapshot: GpuSnapshot, ages: Mapping[str, float] | None = None) -> RenderableType:
    if not len(snapshot):
        reason = snapshot.error or "the driver lists none"
        return Text(f"No GPU: {reason}\nModels run on the CPU.")
    columns = ("GPU", "Name", "Memory", ">Free", ">Used", ">Total", "Load", ">°C", ">W", "Compute", "Health")
    rows = [_row(gpu, (ages or {}).get(gpu.uuid)) for gpu in snapshot]
    below = [f"Driver {snapshot.driver_version}"] if snapshot.driver_version else []
    below += [f"Not all could be read: {snapshot.error}"] if snapshot.error else []
    return Group(table((*columns, "UUID"), rows), Text("\n".join(below)))


def _row(gpu: Gpu, age: float | None) -> tuple[object, ...]:
    health = gpu.health_reason or gpu.health
    if gpu.health == "lost" and age is not None:
        health = f"{health} (read {age:.0f} s ago)"
    temperature = gpu.temperature
    hot = temperature is not None and temperature > HOT_CELSIUS
    return (
        f"{gpu.index}{' (MIG)' if gpu.mig else ''}",
        gpu.name,
        None if gpu.used_bytes is None or not gpu.total_bytes else _bar(gpu.used_bytes / gpu.total_bytes),
        size(gpu.free_bytes),
        size(gpu.used_bytes),
        size(gpu.total_bytes),
        None if gpu.utilization is None else _bar(gpu.utilization / 100) + Text(f" {gpu.utilization} %"),
        Text(str(temperature), style="red") if hot else temperature,
        None if gpu.power_watts is None else f"{gpu.power_watts:.0f}",
        None if gpu.compute_capability is None else "{}.{}".format(*gpu.compute_capability),
        Text(health, style={"ok": "green", "degraded": "yellow"}.get(gpu.health, "red")),
        gpu.uuid,
    )


def _bar(fraction: float) -> Text:
    filled = round(min(max(fraction, 0.0), 1.0) * BAR_WIDTH)
    return Text("━" * filled, style="cyan") + Text("─" * (BAR_WIDTH - filled), style="dim")


def _document(snapshot: GpuSnapshot) -> dict[str, Any]:
    return {
        "gpus": [_fields(gpu) for gpu in snapshot],
        "driver_version": snapshot.driver_version,
        "error": snapshot.error,
    }


def _fields(gpu: Gpu) -> dict[str, Any]:
    fields = gpu.fields()
    processes = gpu.processes
    fields["processes"] = processes and [
        {"pid": process.pid, "used_bytes": process.used_bytes} for process in processes
    ]
    return fields
