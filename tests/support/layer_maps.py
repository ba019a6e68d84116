"""Where llama.cpp put the layers of models that were placed on unequal GPUs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import llama_gpu as lg

FILE = Path(__file__).parent.parent / "data" / "layer_maps" / "layer_maps.json"

# A small batch, so that layers weigh more than buffers also in small models.
OPTIONS = {"context_length": 4096, "batch": 64, "micro_batch": 16}


@dataclass(frozen=True)
class LayerMap:
    """A model that ``place`` laid on GPUs of so many bytes, and llama.cpp's log of the same split.

    ``layers`` has the layers in order, the output layer last: how many in a row are on the CPU (-1) or
    on a device, as ``(device, count)``.
    """

    model: str
    gpu_bytes: tuple[int, ...]
    gpu_layers: int
    tensor_split: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]

    @property
    def device_layers(self) -> list[int]:
        """How many layers each device was given."""
        return [sum(count for on, count in self.layers if on == n) for n in range(len(self.tensor_split))]


def place(header: lg.Header, gpu_bytes: tuple[int, ...]) -> lg.Placement:
    """The placement that was asked for when the map was made; some layers may stay on the CPU."""
    gpus = [lg.Gpu(index=index, total_bytes=size, free_bytes=size) for index, size in enumerate(gpu_bytes)]
    return lg.place(header, gpus, policy=lg.Policy(partial=True), backend="generic", **OPTIONS)


def load() -> list[LayerMap]:
    """The carried maps."""
    return [
        LayerMap(
            row["model"],
            tuple(row["gpu_bytes"]),
            row["gpu_layers"],
            tuple(row["tensor_split"]),
            tuple((on, count) for on, count in row["layers"]),
        )
        for row in json.loads(FILE.read_text())["maps"]
    ]


def write(commit: str, maps: list[LayerMap]) -> None:
    """Put these in their place, one to a line."""
    rows = ",\n".join(json.dumps(asdict(item)) for item in maps)
    FILE.write_text(f'{{"llama_cpp": "{commit}", "maps": [\n{rows}\n]}}\n')
