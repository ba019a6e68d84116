"""What llama.cpp says that models need, and the models as files."""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent / "data" / "ground_truth"

FLAGS = {
    "-c": ("context_length", int),
    "-np": ("parallel", int),
    "-b": ("batch", int),
    "-ub": ("micro_batch", int),
    "--max-outputs": ("max_outputs", int),
    "-ngl": ("gpu_layers", int),
    "-fa": ("flash_attention", str),
    "-ctk": ("cache_type_k", str),
    "-ctv": ("cache_type_v", str),
    "-ts": ("tensor_split", lambda text: [float(share) for share in text.split(",")]),
    "-ncmoe": ("cpu_moe_layers", int),
}
SWITCHES = {
    "-kvu": ("kv_unified", True),
    "-cmoe": ("cpu_moe_layers", "all"),
    "-nkvo": ("kv_offload", False),
    "--swa-full": ("swa_full", True),
}


@dataclass(frozen=True)
class Sizes:
    """Bytes of one device, or of the host."""

    weights: int
    context: int
    compute: int


@dataclass(frozen=True)
class Case:
    """A model with certain options, and what llama.cpp says of it."""

    model: str
    name: str
    backend: str
    devices: int
    args: str
    sizes: tuple[Sizes, ...]

    @property
    def options(self) -> dict[str, Any]:
        """The same as ``estimate`` takes it."""
        words = iter(self.args.split())
        options: dict[str, Any] = {"devices": self.devices, "backend": self.backend}
        for word in words:
            if word in SWITCHES:
                key, value = SWITCHES[word]
                options[key] = value
            else:
                key, convert = FLAGS[word]
                options[key] = convert(next(words))
        return options


def load() -> dict[str, Any]:
    """The carried table as it lies in the file."""
    table: dict[str, Any] = json.loads(lzma.decompress((HERE / "cases.json.xz").read_bytes()))
    return table


_table = cache(load)


def as_json(case: Case) -> dict[str, Any]:
    """A case as it lies in the file."""
    return {
        "name": case.name,
        "backend": case.backend,
        "devices": case.devices,
        "args": case.args,
        "bytes": [[sizes.weights, sizes.context, sizes.compute] for sizes in case.sizes],
    }


def model_names() -> list[str]:
    """Every model there is."""
    return sorted(_table())


def cases(model: str) -> list[Case]:
    """Every case of a model."""
    return [
        Case(
            model,
            case["name"],
            case["backend"],
            case["devices"],
            case["args"],
            tuple(Sizes(*row) for row in case["bytes"]),
        )
        for case in _table()[model]["cases"]
    ]


def write_model(model: str, folder: Path) -> Path:
    """The model as a file of full length whose weights are a hole: it takes no disk."""
    path = folder / f"{model}.gguf"
    path.write_bytes(lzma.decompress((HERE / "headers" / f"{model}.head.xz").read_bytes()))
    with path.open("r+b") as file:
        file.truncate(_table()[model]["file_bytes"])
    return path
