"""What decides how much memory a model takes, as a key: file, options, devices, llama.cpp build.

A key is the same wherever the file lies and however a split was written down. What changes
memory changes the key, so that an old measurement is never taken for a new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

from llama_gpu._core import Gpu, Header, MemoryEstimate, read_header

__all__ = ["COMPANIONS", "DEFAULTS", "Case", "gpu_kind", "model_identity", "options_text"]

DEFAULTS: Mapping[str, Any] = {
    "parallel": 1,
    "kv_unified": False,
    "batch": 2048,
    "micro_batch": 512,
    "flash_attention": "auto",
    "cache_type_k": "f16",
    "cache_type_v": "f16",
    "cpu_moe_layers": 0,
    "kv_offload": True,
    "swa_full": False,
}
"""The options of ``estimate`` that stand in a key as they are, with their defaults.

A device's compute capability stands in ``Case.kinds``.
"""

COMPANIONS = ("mmproj", "draft")


@dataclass(frozen=True, slots=True)
class Case:
    """One way to load one model on certain devices with one llama.cpp.

    ``model`` is the file's identity (:func:`model_identity`), ``options`` the text of
    :func:`options_text`, ``kinds`` and ``layers`` have an entry per device, in device order (both
    empty on the CPU), ``build`` names the llama.cpp.
    """

    model: str
    options: str
    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    build: str


def gpu_kind(gpu: Gpu) -> str:
    """What GPUs of one kind have in common: the product's name and its compute capability."""
    major, minor = gpu.compute_capability or ("?", "?")
    return f"{gpu.name or 'unknown GPU'} {major}.{minor}"


def options_text(
    estimated: MemoryEstimate, options: Mapping[str, Any], extra_arguments: Sequence[str] = ()
) -> str:
    """The options that decide memory, as a text that is equal where they are.

    How layers are dealt out stands in ``Case.layers``; a context of 0 is the length that ``estimated``
    resolved it to. ``extra_arguments`` are flags that go to llama.cpp unread: any of them may matter.

    Raises:
        OSError: a companion's file cannot be read.
        ModelFileError: a companion's file is no GGUF.
    """
    chosen: dict[str, Any] = {name: options.get(name, default) for name, default in DEFAULTS.items()}
    chosen["context_length"] = estimated.context_length
    for name in ("cache_type_k", "cache_type_v"):
        chosen[name] = str(chosen[name]).lower()
    for name in COMPANIONS:
        companion = options.get(name)
        chosen[name] = None if companion is None else model_identity(companion)
    if options.get("lora"):
        chosen["lora"] = sorted(model_identity(adapter) for adapter in options["lora"])
    if lora := options.get("lora"):
        chosen["lora"] = [model_identity(adapter) for adapter in lora]
    if not options.get("mmproj_offload", True):  # left out otherwise, so that older keys stay good
        chosen["mmproj_offload"] = False
    if extra_arguments:
        chosen["extra_arguments"] = list(extra_arguments)
    return json.dumps(chosen, sort_keys=True, separators=(",", ":"))


def model_identity(model: Header | str | PathLike[str]) -> str:
    """A digest of what the model's files are: their headers, sizes and times, not where they lie.

    Reads the headers' bytes the first time, some milliseconds; later it asks for sizes and times only.

    Raises:
        OSError: a file cannot be read.
        ModelFileError: it is no GGUF.
    """
    header = model if isinstance(model, Header) else read_header(model)
    return _digest(
        tuple(
            (shard.path, shard.data_offset, status.st_size, status.st_mtime_ns, status.st_ino)
            for shard in header.shards
            for status in (Path(shard.path).stat(),)
        )
    )


@lru_cache(maxsize=1024)
def _digest(files: tuple[tuple[str, int, int, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, header_bytes, size, modified_ns, _ in files:
        digest.update(f"{size} {modified_ns} {header_bytes} ".encode())
        with Path(path).open("rb") as file:
            digest.update(file.read(header_bytes))
    return digest.hexdigest()
