"""``llama-gpu estimate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import llama_gpu as lg
from llama_gpu.cli.options import EstimateFlags
from llama_gpu.cli.show import print_json, print_lines, print_table, size
from llama_gpu.errors import ConfigError

PARTS = ("weights", "context", "compute", "overhead", "total")


def estimate(
    file: Path,
    /,
    *,
    options: EstimateFlags | None = None,
    backend: Literal["cuda", "generic"] = "cuda",
    tier: Literal["analytic", "best"] = "analytic",
    json: bool = False,
) -> None:
    """Show how much memory a model takes, per device. Only its header is read.

    Parameters
    ----------
    file
        The model; of a split one any of its files.
    backend
        Whose buffers: cuda, or generic for llama.cpp alone (default: cuda).
    tier
        analytic, or best for what was projected or measured where that is known.
    json
        Print one JSON document, sizes in bytes.
    """
    flags = options or EstimateFlags()
    header = lg.read_header(file)
    try:
        estimated = lg.estimate(header, backend=backend, tier=tier, **flags.keywords())
    except ValueError as error:
        raise ConfigError(str(error), source="the command line") from error
    if json:
        print_json(
            {
                "model": str(file),
                "basis": estimated.basis,
                "context_length": estimated.context_length,
                "devices": [_fields(device) for device in estimated.devices],
                "host": _fields(estimated.host),
                "total_device_bytes": estimated.total_device_bytes,
            }
        )
        return
    places = [(f"device {number}", device) for number, device in enumerate(estimated.devices)]
    print_table(
        ("Where", ">Layers", *(f">{part.capitalize()}" for part in PARTS)),
        (
            (name, memory.layers, *(size(getattr(memory, f"{part}_bytes")) for part in PARTS))
            for name, memory in (*places, ("host", estimated.host))
        ),
    )
    print_lines(
        f"{header.architecture} {header.quantization or ''}, {estimated.context_length} tokens of context "
        f"for {flags.parallel} slot{'s' * (flags.parallel != 1)}; basis: {estimated.basis}."
    )


def _fields(memory: lg.DeviceMemory) -> dict[str, Any]:
    return {"layers": memory.layers, **{f"{part}_bytes": getattr(memory, f"{part}_bytes") for part in PARTS}}
