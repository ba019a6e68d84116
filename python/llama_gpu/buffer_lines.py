"""Read from llama.cpp's log how much memory a load really took.

Pure: lines in, :class:`LoadedBuffers` out. Sizes are printed in MiB with two decimals, so each is
known to about 5 KiB. The lines appear at verbosity 4 only, which the launch plan asks for.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["BufferLines", "LoadedBuffers", "split_prefix"]

MIB = 1024 * 1024

# common/log.cpp puts "0.00.031.659 I " before a line: minutes to microseconds since the start, and the level.
PREFIX = re.compile(r"^\d+\.\d\d\.\d\d\d\.\d\d\d ([A-Z]) ")

# llama-model.cpp load_tensors, llama-kv-cache.cpp, llama-memory-recurrent.cpp, llama-context.cpp
# sched_reserve and output_reserve, llama-adapter.cpp
BUFFER = re.compile(
    r"(?P<source>[A-Za-z_]\w*):\s+(?P<device>\S+)\s+(?P<kind>model|KV|compute|output|RS|LoRA)"
    r"\s+buffer size\s*=\s*(?P<mib>\d{1,12}(?:\.\d{1,6})?)\s*MiB"
)
OFFLOADED = re.compile(r"offloaded\s+(\d+)/(\d+)\s+layers to GPU")
OUTPUTS = re.compile(r"\bn_outputs_max\s*=\s*(\d{1,9})")
DRY_LOAD = re.compile(r"print_info:\s+no_alloc\s*=\s*(\d)")
NEW_CONTEXT = "constructing llama_context"
# server.cpp main and server-context.cpp init, when everything is loaded
LOADED = re.compile(r"\bmodel loaded\b")
VARIANT = re.compile(r"_(Mapped|REPACK|Private)$")

# The patterns take quadratic time on a long run of letters, and buffer lines are short.
LONGEST_LINE = 300

# A context that reserves again gives back what it had reserved before; caches and weights add up.
REPLACED = frozenset({"compute", "output"})


def split_prefix(line: str) -> tuple[str, str]:
    """The level of a log line (``"E"``, ``"W"``, ``"I"``, …; empty where it has none) and its text."""
    if found := PREFIX.match(line):
        return found[1], line[found.end() :]
    return "", line


@dataclass(frozen=True, slots=True)
class LoadedBuffers:
    """What one server took, as llama.cpp logged it.

    ``by_device`` holds bytes by device (``"CUDA0"``, ``"CPU"``, ``"CUDA_Host"``) and kind (``"model"``,
    ``"KV"``, ``"RS"``, ``"compute"``, ``"output"``, ``"LoRA"``).
    """

    by_device: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    offloaded_layers: int | None = None
    total_layers: int | None = None
    max_outputs: int | None = None
    """Tokens whose logits the model's own context keeps (``n_outputs_max``), where the log says so."""
    complete: bool = False
    """Whether the log says that loading is over: a thread of its own writes it, which may be late."""

    @property
    def device_bytes(self) -> dict[str, int]:
        """Total per device that is not host memory."""
        return {name: sum(kinds.values()) for name, kinds in self.by_device.items() if not _is_host(name)}

    @property
    def host_bytes(self) -> int:
        """Total in host memory, mapped weights included."""
        return sum(self.host_by_kind.values())

    @property
    def host_by_kind(self) -> dict[str, int]:
        """Bytes in host memory by kind, over all its buffers."""
        added: defaultdict[str, int] = defaultdict(int)
        for name, kinds in self.by_device.items():
            for kind, size in kinds.items() if _is_host(name) else ():
                added[kind] += size
        return dict(added)


def _is_host(device: str) -> bool:
    return device.startswith(("CPU", "BLAS")) or device.endswith("_Host")


class BufferLines:
    """Gathers the buffer lines of one server's log, fed line by line."""

    def __init__(self) -> None:
        self._added: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._replaced: dict[tuple[str, str, str, int], int] = {}
        self._context = 0
        self._dry = False
        self._layers: tuple[int, int] | None = None
        self._outputs: int | None = None
        self.complete = False

    def feed(self, line: str) -> None:
        """Take one line; anything but a buffer line is passed over."""
        if len(line) > LONGEST_LINE:
            return
        if dry := DRY_LOAD.search(line):
            self._dry = dry[1] != "0"
        elif NEW_CONTEXT in line:
            self._context += 1
        elif layers := OFFLOADED.search(line):
            self._layers = (int(layers[1]), int(layers[2]))
        elif (outputs := OUTPUTS.search(line)) and not self._dry:
            # A draft model's context comes later.
            self._outputs = int(outputs[1]) if self._outputs is None else self._outputs
        elif LOADED.search(line):
            self.complete = True
        elif (found := BUFFER.search(line)) and not self._dry:
            device = VARIANT.sub("", found["device"])
            size = round(float(found["mib"]) * MIB)
            if found["kind"] in REPLACED:
                self._replaced[found["kind"], device, found["source"], self._context] = size
            else:
                self._added[found["kind"], device] += size

    def read(self) -> LoadedBuffers:
        """What has been seen so far."""
        by_device: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        for (kind, device), size in self._added.items():
            by_device[device][kind] += size
        for (kind, device, _, _), size in self._replaced.items():
            by_device[device][kind] += size
        offloaded, total = self._layers or (None, None)
        devices = {name: dict(kinds) for name, kinds in by_device.items()}
        return LoadedBuffers(devices, offloaded, total, self._outputs, self.complete)
