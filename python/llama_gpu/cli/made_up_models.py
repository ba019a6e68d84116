"""Files that look like a person's folder of models: real headers and lengths, no weights.

The shapes are those of well-known dense models; how many of each, and how they are quantised, is a guess.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

__all__ = ["write_made_up_models"]

ALIGNMENT = 32
UINT32, FLOAT32, STRING = 4, 6, 8  # enum gguf_type in ggml/include/gguf.h


@dataclass(frozen=True)
class Shape:
    """The sizes of a llama; ``share`` says how common it is."""

    name: str
    share: int
    layers: int
    embedding: int
    feed_forward: int
    heads: int
    heads_kv: int
    vocabulary: int
    head_length: int = 128


SHAPES = (
    Shape("1b", 3, 16, 2048, 8192, 32, 8, 128256, 64),
    Shape("1.5b", 3, 28, 1536, 8960, 12, 2, 151936),
    Shape("3b", 5, 28, 3072, 8192, 24, 8, 128256),
    Shape("8b", 12, 32, 4096, 14336, 32, 8, 128256),
    Shape("12b", 5, 40, 5120, 14336, 32, 8, 131072),
    Shape("14b", 5, 40, 5120, 13824, 40, 8, 152064),
    Shape("24b", 3, 40, 5120, 32768, 32, 8, 131072),
    Shape("32b", 3, 64, 5120, 27648, 40, 8, 152064),
    Shape("70b", 1, 80, 8192, 28672, 64, 8, 128256),
)


@dataclass(frozen=True)
class Quantization:
    """A ggml type (enum ggml_type in ggml/include/ggml.h) with its blocks; ``share`` as of a shape."""

    name: str
    share: int
    number: int
    block: int
    block_bytes: int


F32 = Quantization("f32", 0, 0, 1, 4)
QUANTIZATIONS = (
    Quantization("q4_k", 6, 12, 256, 144),
    Quantization("q5_k", 2, 13, 256, 176),
    Quantization("q6_k", 2, 14, 256, 210),
    Quantization("q8_0", 2, 8, 32, 34),
)


def write_made_up_models(folder: Path, count: int, seed: int) -> None:
    """Write ``count`` files into ``folder``; the same seed makes the same ones.

    Raises:
        OSError: the folder cannot be written to.
    """
    draw = random.Random(seed)  # noqa: S311 - the same seed must make the same models
    shapes = draw.choices(SHAPES, [shape.share for shape in SHAPES], k=count)
    kinds = draw.choices(QUANTIZATIONS, [kind.share for kind in QUANTIZATIONS], k=count)
    for number, (shape, kind) in enumerate(zip(shapes, kinds, strict=True), 1):
        _write(folder / f"{number:02}-{shape.name}-{kind.name}.gguf", shape, kind)


def _write(path: Path, shape: Shape, kind: Quantization) -> None:
    fields = _fields(path.stem, shape)
    tensors = list(_tensors(shape))
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(fields))]
    head += [_text(key) + value for key, value in fields.items()]
    offset = 0
    for name, row in tensors:
        held = F32 if len(row) == 1 else kind
        head.append(_text(name) + struct.pack(f"<I{len(row)}QIQ", len(row), *row, held.number, offset))
        offset += _padded(prod(row) // held.block * held.block_bytes)
    header = b"".join(head)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(_padded(len(header)) + offset)


def _fields(name: str, shape: Shape) -> dict[str, bytes]:
    def whole(value: int) -> bytes:
        return struct.pack("<II", UINT32, value)

    return {
        "general.architecture": struct.pack("<I", STRING) + _text("llama"),
        "general.name": struct.pack("<I", STRING) + _text(name),
        "llama.block_count": whole(shape.layers),
        "llama.context_length": whole(131072),
        "llama.embedding_length": whole(shape.embedding),
        "llama.feed_forward_length": whole(shape.feed_forward),
        "llama.attention.head_count": whole(shape.heads),
        "llama.attention.head_count_kv": whole(shape.heads_kv),
        "llama.attention.key_length": whole(shape.head_length),
        "llama.attention.value_length": whole(shape.head_length),
        "llama.attention.layer_norm_rms_epsilon": struct.pack("<If", FLOAT32, 1e-5),
        "llama.rope.dimension_count": whole(shape.head_length),
        "llama.vocab_size": whole(shape.vocabulary),
    }


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    row, up = shape.embedding, shape.feed_forward
    q, kv = shape.heads * shape.head_length, shape.heads_kv * shape.head_length
    yield "token_embd.weight", (row, shape.vocabulary)
    for layer in range(shape.layers):
        for part, size in (
            ("attn_norm", (row,)),
            ("attn_q", (row, q)),
            ("attn_k", (row, kv)),
            ("attn_v", (row, kv)),
            ("attn_output", (q, row)),
            ("ffn_norm", (row,)),
            ("ffn_gate", (row, up)),
            ("ffn_up", (row, up)),
            ("ffn_down", (up, row)),
        ):
            yield f"blk.{layer}.{part}.weight", size
    yield "output_norm.weight", (row,)
    yield "output.weight", (row, shape.vocabulary)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
