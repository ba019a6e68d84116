"""GGUF files byte by byte, right and wrong ones: ``gguf_bytes(...)`` writes whatever it is told."""

from __future__ import annotations

import struct
from collections.abc import Sequence

U32, BOOL, STRING, ARRAY = 4, 7, 8, 9
Entry = tuple[str, int, bytes]
TensorEntry = tuple[str, Sequence[int], int, int]


def text(value: str, order: str = "<") -> bytes:
    """A string as the file has it: its length, then its bytes."""
    encoded = value.encode()
    return struct.pack(order + "Q", len(encoded)) + encoded


def gguf_bytes(
    entries: Sequence[Entry] = (),
    tensors: Sequence[TensorEntry] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    order: str = "<",
    tensor_count: int | None = None,
    metadata_count: int | None = None,
    data_bytes: int = 0,
) -> bytes:
    """A file: entries are (key, value type, value's bytes), tensors (name, shape, ggml type, offset).

    ``order`` is ``"<"`` or ``">"``; counts follow what is given unless they are named.
    """
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(entries) if metadata_count is None else metadata_count,
    )
    parts = [magic, struct.pack(order + "IQQ", version, *counts)]
    parts += [text(key, order) + struct.pack(order + "I", kind) + value for key, kind, value in entries]
    for name, shape, kind, offset in tensors:
        parts.append(
            text(name, order) + struct.pack(order + f"I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        )
    head = b"".join(parts)
    return head + bytes(-len(head) % 32) + bytes(data_bytes)
