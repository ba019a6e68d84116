"""How an entry of the catalogue is loaded: the options that its memory depends on, resolved for its file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_gpu.catalog import ModelEntry
from llama_gpu.memory.known import KnownMemory, Load

__all__ = [
    "HOST_ONLY",
    "estimate_options",
    "has_experts",
    "load_of",
    "memory_options",
    "output_options",
    "outputs_of_slots",
    "with_trained_length",
]

HOST_ONLY = ("cache_ram_bytes", "context_checkpoints")
"""Options of a server that ``estimate`` does not know: they take host memory beside llama.cpp's buffers."""

_FOR_ESTIMATES = (
    *("context_length", "parallel", "kv_unified", "batch", "micro_batch", "flash_attention"),
    *("cache_type_k", "cache_type_v", "cpu_moe_layers", "kv_offload", "swa_full", "mmproj_offload"),
)


_RESERVED_AGAIN = frozenset({"kimi-linear", "minimax-01"})
"""One sequence needs a larger graph than all slots, and llama.cpp reserves both (``sched_reserve``)."""


def memory_options(entry: ModelEntry, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options that decide a model's memory, under the names that ``place`` and the launch plan share.

    ``changes`` are options that differ from the configured ones; others than these are passed over. A
    context beyond the trained one costs memory and gives nonsense, so it is cut to that.
    """
    options: dict[str, Any] = {name: getattr(entry.options, name) for name in _FOR_ESTIMATES}
    options |= {name: value for name, value in (changes or {}).items() if name in options}
    trained = entry.header.trained_context_length if entry.header else None
    if trained and options["context_length"]:
        most = trained if options["kv_unified"] else trained * options["parallel"]
        options["context_length"] = min(options["context_length"], most)
    if entry.embedding:
        # llama-server takes a whole input in one micro batch and refuses longer ones.
        options["micro_batch"] = max(options["micro_batch"], options["batch"])
    options["mmproj_offload"] = options["mmproj_offload"] or entry.mmproj is None
    return options


def estimate_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a server's options that ``estimate`` and ``place`` take."""
    return {name: value for name, value in options.items() if name not in HOST_ONLY}


def outputs_of_slots(entry: ModelEntry, options: Mapping[str, Any]) -> int | None:
    """How many logits a server keeps that keeps those of its slots alone (``server_output_limits``).

    None where it keeps all, or where that is not known: with flags that pass through unread, with a draft.
    """
    architecture = entry.header.architecture if entry.header else None
    if (
        entry.embedding
        or entry.options.draft
        or entry.options.extra_arguments
        or architecture in _RESERVED_AGAIN
    ):
        return None
    outputs: int = min(options["parallel"], options["batch"])
    return outputs


def output_options(
    known: KnownMemory | None, entry: ModelEntry, options: Mapping[str, Any]
) -> dict[str, Any]:
    """``max_outputs`` as ``estimate`` and ``place`` take it, where servers are known to keep no more."""
    outputs = outputs_of_slots(entry, options) if known and known.keeps_logits_of_slots_alone else None
    return {} if outputs is None else {"max_outputs": outputs}


def load_of(entry: ModelEntry, options: Mapping[str, Any] | None = None) -> Load:
    """What decides the memory of an entry, wherever it goes: started with ``options``, or as configured.

    It must have a header.
    """
    assert entry.header is not None  # noqa: S101 - callers take only what can be served
    chosen = memory_options(entry) if options is None else estimate_options(options)
    taken = {**chosen, "mmproj": entry.mmproj, "draft": entry.options.draft}
    extra = entry.options.extra_arguments
    if entry.options.embeddings is not None:  # else it follows from the file
        extra = (*extra, f"embeddings={entry.embedding}")
    return Load(entry.header, taken, extra)


def with_trained_length(entry: ModelEntry, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the trained context by its length instead of 0."""
    trained = entry.header.trained_context_length if entry.header else None
    return {**options, "context_length": options["context_length"] or trained or 0}


def has_experts(entry: ModelEntry) -> bool:
    """Whether there is anything that ``cpu_moe_layers`` keeps on the CPU."""
    header = entry.header
    return header is not None and bool(header.metadata.get(f"{header.architecture}.expert_count"))
