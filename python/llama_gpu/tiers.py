"""``estimate`` as callers see it: the Rust core's, or the best that is known of the same case."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Literal, TypedDict, Unpack

from llama_gpu import _core
from llama_gpu._core import Header, MemoryEstimate

__all__ = ["EstimateOptions", "estimate"]


class EstimateOptions(TypedDict, total=False):
    """How a model is loaded, as ``estimate`` takes it by keyword."""

    context_length: int
    """Tokens over all slots, as ``-c``; 0, the default, is the trained length."""
    parallel: int
    """Slots, as ``-np`` (default: 1)."""
    kv_unified: bool
    """One pool of cells for all slots, as ``-kvu``."""
    batch: int
    """Logical batch in tokens, as ``-b`` (default: 2048)."""
    micro_batch: int
    """Physical batch in tokens, as ``-ub`` (default: 512)."""
    max_outputs: int | None
    """Tokens of a micro-batch whose logits are kept; ``None``, the default, is all, as in the dry run.

    A llama-server that keeps them for its slots alone has ``parallel`` (``n_outputs_max`` in its log).
    """
    flash_attention: Literal["on", "off", "auto"]
    """As ``-fa`` (default: ``"auto"``)."""
    cache_type_k: str
    """Type of the cached keys, as ``-ctk`` (default: ``"f16"``)."""
    cache_type_v: str
    """Type of the cached values, as ``-ctv`` (default: ``"f16"``)."""
    gpu_layers: int | None
    """Layers on devices, the output layer counted, as ``-ngl``; ``None``, the default, is all, 0 none."""
    devices: int
    """How many devices there are; 0 is the CPU alone (default: 1)."""
    tensor_split: Sequence[float] | None
    """The devices' proportions, as ``-ts``; ``None``, the default, is equal shares."""
    cpu_moe_layers: int | Literal["all"]
    """The first so many layers, or ``"all"``, keep their experts on the CPU."""
    kv_offload: bool
    """``False`` keeps the cache on the host, as ``-nkvo``."""
    swa_full: bool
    """Sliding layers get cells for the whole context, as ``--swa-full``."""
    mmproj: str | PathLike[str] | Header | None
    """A projector that is loaded with the model."""
    mmproj_offload: bool
    """``False`` keeps the projector on the host, as ``--no-mmproj-offload``."""
    draft: str | PathLike[str] | Header | None
    """A draft model that is loaded with the model."""
    lora: Sequence[str | PathLike[str] | Header]
    """LoRA adapters that are loaded with the model (default: none)."""
    compute_capability: tuple[int, int] | None
    """The devices' CUDA compute capability, for the driver's overhead."""
    backend: Literal["cuda", "generic"]
    """Whose buffer rules count; ``"generic"`` is llama.cpp alone, without any driver's overhead."""


def estimate(
    model: str | PathLike[str] | Header,
    *,
    tier: Literal["analytic", "best"] = "analytic",
    **options: Unpack[EstimateOptions],
) -> MemoryEstimate:
    """Estimate the memory of a model, per device and on the host.

    From a ``Header``, or a path whose header is in memory, this takes microseconds and keeps the
    interpreter; else the header is read first, which lets go of it.

    The rules are llama.cpp's (commit 0c1e57098): weights from ``llama_model::memory_breakdown``
    (llama-model.cpp), contexts from the constructors in llama-kv-cache*.cpp and
    llama-memory-recurrent.cpp.

    Args:
        model: a GGUF file, or its header.
        tier: ``"best"`` takes what a load took, or else what llama.cpp's own dry run projected, where the
            proxy has remembered that for this file, these options, GPUs of the kinds that this machine has,
            and the llama.cpp that it used last; ``basis`` says which. It looks into a file, so it takes
            milliseconds. ``LLAMA_GPU_MEMORY_FILE`` names the file.
        **options: see :class:`EstimateOptions`.

    Raises:
        ValueError: an option is out of range, or llama.cpp refuses it for this model; it is named.
        UnsupportedModelError: the file is valid but no language model.
        OSError: the file cannot be read.
        InvalidGgufError: the file breaks the format.
    """
    if tier == "analytic":
        return _core.estimate(model, **options)
    if tier != "best":
        raise ValueError(f'tier must be one of "analytic", "best", not {tier!r}')
    from llama_gpu.memory.best import best_estimate  # noqa: PLC0415 - importing llama_gpu stays small

    return best_estimate(model, options)
