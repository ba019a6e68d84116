"""``llama-gpu estimate``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import llama_gpu as lg
from llama_gpu.cli.context_limit import largest_context
from llama_gpu.cli.options import EstimateFlags
from llama_gpu.cli.plan import imagined
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
    gpu: str | None = None,
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
    gpu
        The memory of one of the devices, such as 24GiB: says where the context stops fitting.
    json
        Print one JSON document, sizes in bytes.
    """
    flags = options or EstimateFlags()
    header = lg.read_header(file)
    try:
        chosen = {**flags.keywords(), "backend": backend}
        estimated = lg.estimate(header, tier=tier, **chosen)
        limit = None if gpu is None else _limit(header, chosen, gpu, estimated)
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
                **({} if limit is None else {"gpu": asdict(limit)}),
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
        f"for {flags.parallel} slot{'s' * (flags.parallel != 1)}; basis: {estimated.basis}.",
        *([] if limit is None else [limit.sentence]),
    )


@dataclass(frozen=True)
class Limit:
    """Where the context stops fitting devices of a given size."""

    device_bytes: int
    largest_context_length: int
    trained_context_length: int
    """Over all slots."""

    @property
    def sentence(self) -> str:
        """The same for a person."""
        most, trained = self.largest_context_length, self.trained_context_length
        if most == 0:
            return f"On {size(self.device_bytes)} it does not fit with any context."
        if most == trained:
            return f"On {size(self.device_bytes)} it fits with the whole trained context, {trained} tokens."
        return f"On {size(self.device_bytes)} it fits up to {most} tokens of context, trained for {trained}."


def _limit(header: lg.Header, options: dict[str, Any], gpu: str, best: lg.MemoryEstimate) -> Limit:
    (device,) = imagined([gpu])
    analytic = lg.estimate(header, **options)
    excess = max(
        (
            known.total_bytes - said.total_bytes
            for known, said in zip(best.devices, analytic.devices, strict=True)
        ),
        default=0,
    )
    room = device.free_bytes or 0
    return Limit(room, *largest_context(header, options, room, excess))


def _fields(memory: lg.DeviceMemory) -> dict[str, Any]:
    return {"layers": memory.layers, **{f"{part}_bytes": getattr(memory, f"{part}_bytes") for part in PARTS}}
