"""``llama-gpu gpus``."""

from __future__ import annotations

from typing import Any

from llama_gpu import Gpu, snapshot_gpus
from llama_gpu.cli.show import print_json, print_lines, print_table, size


def gpus(*, json: bool = False) -> None:
    """Show the GPUs and what is free on them.

    Parameters
    ----------
    json
        Print one JSON document.
    """
    snapshot = snapshot_gpus()
    if json:
        print_json(
            {
                "gpus": [_fields(gpu) for gpu in snapshot],
                "driver_version": snapshot.driver_version,
                "error": snapshot.error,
            }
        )
        return
    if not len(snapshot):
        print_lines(f"No GPU: {snapshot.error or 'the driver lists none'}", "Models run on the CPU.")
        return
    print_table(
        ("GPU", "Name", ">Free", ">Used", ">Total", ">Load", ">°C", ">W", "Compute", "Health", "UUID"),
        (
            (
                f"{gpu.index}{' (MIG)' if gpu.mig else ''}",
                gpu.name,
                size(gpu.free_bytes),
                size(gpu.used_bytes),
                size(gpu.total_bytes),
                None if gpu.utilization is None else f"{gpu.utilization} %",
                gpu.temperature,
                None if gpu.power_watts is None else f"{gpu.power_watts:.0f}",
                None if gpu.compute_capability is None else "{}.{}".format(*gpu.compute_capability),
                gpu.health_reason or gpu.health,
                gpu.uuid,
            )
            for gpu in snapshot
        ),
    )
    print_lines(*([f"Driver {snapshot.driver_version}"] if snapshot.driver_version else []))
    if snapshot.error:
        print_lines(f"Not all could be read: {snapshot.error}")


def _fields(gpu: Gpu) -> dict[str, Any]:
    fields = gpu.fields()
    processes = gpu.processes
    fields["processes"] = processes and [
        {"pid": process.pid, "used_bytes": process.used_bytes} for process in processes
    ]
    return fields
