"""The carried small models at the depth of large ones, for what depends on the number of layers."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import gguf

import llama_gpu as lg

from .gguf_bytes import ARRAY, BOOL, STRING, U32, Entry, TensorEntry, gguf_bytes, text

I32, F32 = 5, 6


def write_stretched(
    header: lg.Header, path: Path, layers: int, changed: dict[str, Any] | None = None
) -> Path:
    """``header`` with ``layers`` layers and ``changed`` metadata, without a vocabulary.

    The pattern in which the layers behind the leading ones follow each other goes on.
    """
    architecture = header.architecture
    have = _number(header, "block_count")
    by_layer = _tensors_by_layer(header)
    order = _order(header, by_layer, layers)
    entries: list[Entry] = []
    for key, value in (dict(header.metadata) | (changed or {})).items():
        if key == f"{architecture}.block_count":
            entries.append((key, *encoded(layers)))
        elif isinstance(value, tuple) and len(value) == have:
            entries.append((key, *encoded(tuple(value[index] for index in order))))
        elif isinstance(value, str | int | float) or (isinstance(value, tuple) and 0 < len(value) <= 8):
            entries.append((key, *encoded(value)))

    named = [(tensor.name, tensor) for tensor in by_layer[-1]]
    for place, index in enumerate(order):
        named += [(re.sub(r"\d+", str(place), one.name, count=1), one) for one in by_layer.get(index, [])]
    tensors: list[TensorEntry] = []
    offset = 0
    for name, tensor in named:
        tensors.append((name, tensor.shape, gguf.GGMLQuantizationType[tensor.type], offset))
        offset += tensor.bytes + -tensor.bytes % 32
    path.write_bytes(gguf_bytes(entries, tensors))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + offset)
    return path


def _number(header: lg.Header, key: str) -> int:
    value = header.metadata.get(f"{header.architecture}.{key}", 0)
    return value if isinstance(value, int) else 0


def _tensors_by_layer(header: lg.Header) -> dict[int, list[lg.Tensor]]:
    """Those that belong to no layer are under -1."""
    by_layer: dict[int, list[lg.Tensor]] = {}
    for tensor in header.tensors:
        match = re.match(r"(?:enc\.|dec\.)?blk\.(\d+)\.", tensor.name)
        by_layer.setdefault(int(match[1]) if match else -1, []).append(tensor)
    return by_layer


def _order(header: lg.Header, by_layer: dict[int, list[lg.Tensor]], layers: int) -> list[int]:
    """The old number of each layer."""
    have, tail = _number(header, "block_count"), _number(header, "nextn_predict_layers")
    lists = [value for value in header.metadata.values() if isinstance(value, tuple) and len(value) == have]

    def kind(layer: int) -> Any:
        own = by_layer.get(layer, [])
        shapes = sorted((re.sub(r"\d+", "", one.name, count=1), one.shape, one.type) for one in own)
        return shapes, [value[layer] for value in lists]

    leading = _number(header, "leading_dense_block_count")
    first = leading if leading < have - tail else 0
    period = _period([kind(layer) for layer in range(first, have - tail)])
    order = list(range(have - tail))
    while len(order) + tail < layers:
        order.append(order[-period])
    return order + list(range(have - tail, have))


def _period(kinds: list[Any]) -> int:
    """After how many layers the pattern begins anew; one or two may lead where the others then repeat."""

    def shortest(body: list[Any]) -> int:
        periods = range(1, len(body) + 1)
        return next(period for period in periods if body[period:] == body[: len(body) - period])

    for lead in range(min(3, len(kinds))):
        period = shortest(kinds[lead:])
        if 2 * period <= len(kinds) - lead:
            return period
    return shortest(kinds)


def encoded(value: Any) -> tuple[int, bytes]:
    """A value type and the value's bytes."""
    if isinstance(value, bool):
        return BOOL, bytes([value])
    if isinstance(value, int):
        return (U32, struct.pack("<I", value)) if value >= 0 else (I32, struct.pack("<i", value))
    if isinstance(value, float):
        return F32, struct.pack("<f", value)
    if isinstance(value, str):
        return STRING, text(value)
    parts = [encoded(item) for item in value]
    kinds = {kind for kind, _ in parts}
    kind = kinds.pop() if len(kinds) == 1 else I32
    return ARRAY, struct.pack("<IQ", kind, len(parts)) + b"".join(data for _, data in parts)
