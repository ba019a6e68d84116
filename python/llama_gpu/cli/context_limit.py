"""Where the context stops fitting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import llama_gpu as lg

__all__ = ["largest_context"]

STEP = 256
"""llama.cpp rounds a cache up to so many cells (llama-context.cpp, GGML_PAD of n_ctx_seq)."""

UNTRAINED = 1 << 20
"""As far as is looked where a header tells no trained length."""


def largest_context(
    header: lg.Header, options: Mapping[str, Any], device_bytes: int, excess_bytes: int = 0
) -> tuple[int, int]:
    """The most tokens over all slots that fit, and the most that make sense.

    Args:
        header: the model.
        options: those of ``estimate``, less the context.
        device_bytes: what each of the devices has to give.
        excess_bytes: by how much a device is known to take more than estimated.

    Returns:
        0 for the former where not even ``STEP`` tokens a slot fit; the latter is the trained length
        (in every slot, where they share nothing).
    """
    slots = 1 if options.get("kv_unified") else int(options.get("parallel", 1))
    step = STEP * slots
    most = (header.trained_context_length or UNTRAINED) * slots

    def fits(context: int) -> bool:
        estimated = lg.estimate(header, **{**options, "context_length": context})
        return all(device.total_bytes + excess_bytes <= device_bytes for device in estimated.devices)

    if fits(most):
        return most, most
    low, high = 0, most // step + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step, most
