"""GGUF files for tests: small models that llama.cpp loads and runs, big ones without their weights.

- ``write_llama``: a random llama that chats in a few hundred made-up words.
- ``write_embedding_model``: a random BERT, for ``/v1/embeddings``.
- ``write_sparse``: the real header and length of a big llama; its weights are a hole.
- ``split_model``: any of them as ``NAME-00001-of-0000N.gguf``.

Broken files are made by ``support.gguf_bytes``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

SPECIALS = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
BEGIN, END = 0, 1
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NORMAL, UNKNOWN, CONTROL = 1, 2, 3
Shape = tuple[int, ...]


def write_llama(
    path: Path,
    *,
    layers: int = 2,
    embedding: int = 64,
    feed_forward: int = 128,
    heads: int = 4,
    heads_kv: int = 2,
    words: int = 400,
    context: int = 2048,
    seed: int = 1,
    name: str = "random-llama",
    metadata: dict[str, Any] | None = None,
) -> Path:
    """A random llama (32-bit floats, some 0.6 MB) with a byte-level vocabulary and a chat template.

    Only the made-up words have a chance against each other, so that what it says is text and goes
    on until ``max_tokens``. The same seed gives the same file, another one another speaker.
    ``metadata`` adds keys or replaces them.
    """
    random = np.random.default_rng(seed)
    tokens, types = byte_level_vocabulary(words)
    llama = Llama(layers, embedding, feed_forward, heads, heads_kv, len(tokens))
    fields = llama.fields(name, context)
    fields |= byte_level_tokenizer(tokens, types) | (metadata or {})
    data: dict[str, np.ndarray] = {}
    for tensor, shape in llama.tensors().items():
        if len(shape) == 1:
            data[tensor] = np.ones(shape, np.float32)
        else:
            data[tensor] = random.standard_normal(shape[::-1], np.float32) * np.float32(2 / np.sqrt(shape[0]))
    data["output.weight"][: len(SPECIALS) + 256] = 0
    return write_model(path, "llama", fields, data)


def write_embedding_model(
    path: Path, *, layers: int = 2, embedding: int = 64, heads: int = 4, context: int = 512, seed: int = 1
) -> Path:
    """A random BERT with mean pooling and a small word-piece vocabulary."""
    random = np.random.default_rng(seed)
    letters = [chr(code) for code in range(0x21, 0x7F)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens += ["▁" + letter for letter in letters] + letters
    feed_forward = 2 * embedding
    fields: dict[str, Any] = {
        "general.name": "random-bert",
        "bert.block_count": layers,
        "bert.context_length": context,
        "bert.embedding_length": embedding,
        "bert.feed_forward_length": feed_forward,
        "bert.attention.head_count": heads,
        "bert.attention.layer_norm_epsilon": 1e-12,
        "bert.attention.causal": False,
        "bert.pooling_type": 1,
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * 5 + [NORMAL] * (len(tokens) - 5),
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.mask_token_id": 4,
    }
    shapes: dict[str, Shape] = {
        "token_embd.weight": (embedding, len(tokens)),
        "token_types.weight": (embedding, 2),
        "position_embd.weight": (embedding, context),
    }
    shapes |= {f"token_embd_norm.{part}": (embedding,) for part in ("weight", "bias")}
    for layer in range(layers):
        for part, columns, rows in (
            ("attn_q", embedding, embedding),
            ("attn_k", embedding, embedding),
            ("attn_v", embedding, embedding),
            ("attn_output", embedding, embedding),
            ("ffn_up", embedding, feed_forward),
            ("ffn_down", feed_forward, embedding),
        ):
            shapes[f"blk.{layer}.{part}.weight"] = (columns, rows)
            shapes[f"blk.{layer}.{part}.bias"] = (rows,)
        for norm in ("attn_output_norm", "layer_output_norm"):
            shapes[f"blk.{layer}.{norm}.weight"] = (embedding,)
            shapes[f"blk.{layer}.{norm}.bias"] = (embedding,)
    data = {
        tensor: random.standard_normal(shape[::-1], np.float32) / np.float32(np.sqrt(shape[0]))
        for tensor, shape in shapes.items()
    }
    return write_model(path, "bert", fields, data)


def write_sparse(
    path: Path,
    *,
    layers: int = 32,
    embedding: int = 4096,
    feed_forward: int = 14336,
    heads: int = 32,
    heads_kv: int = 8,
    vocabulary: int = 32000,
    context: int = 131072,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q4_K,
    name: str = "sparse-llama",
    metadata: dict[str, Any] | None = None,
) -> Path:
    """The header and the length of a llama of any size (by default 8B at Q4_K): its weights take no disk.

    llama.cpp plans and, given the memory, loads it: the weights are zeros.
    """
    tokens, types = byte_level_vocabulary(vocabulary - len(SPECIALS) - 256)
    llama = Llama(layers, embedding, feed_forward, heads, heads_kv, len(tokens))
    fields = llama.fields(name, context)
    fields |= byte_level_tokenizer(tokens, types) | (metadata or {})
    writer = new_writer("llama", fields)
    size = 0
    for tensor, shape in llama.tensors().items():
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else quantization
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        tensor_bytes = int(np.prod(shape, dtype=np.int64)) // block * block_bytes
        writer.add_tensor_info(tensor, shape[::-1], np.dtype(np.float32), tensor_bytes, raw_dtype=kind)
        size += gguf.GGUFWriter.ggml_pad(tensor_bytes, writer.data_alignment)
    write_head(writer, path)
    header_bytes = path.stat().st_size
    os.truncate(path, gguf.GGUFWriter.ggml_pad(header_bytes, writer.data_alignment) + size)
    return path


def write_projector(path: Path, *, embedding: int = 1024, layers: int = 8) -> Path:
    """The header and the length of an image encoder: its weights take no disk."""
    fields = {"clip.vision.embedding_length": embedding, "clip.vision.feed_forward_length": 4 * embedding}
    fields |= {"clip.vision.image_size": 224, "clip.vision.patch_size": 14, "clip.has_vision_encoder": True}
    writer = new_writer("clip", fields)
    size = 0
    for layer in range(layers):
        nbytes = embedding * embedding * 2
        kind = gguf.GGMLQuantizationType.F16
        name = f"v.blk.{layer}.attn_q.weight"
        writer.add_tensor_info(name, (embedding, embedding), np.dtype(np.float16), nbytes, raw_dtype=kind)
        size += gguf.GGUFWriter.ggml_pad(nbytes, writer.data_alignment)
    write_head(writer, path)
    os.truncate(path, gguf.GGUFWriter.ggml_pad(path.stat().st_size, writer.data_alignment) + size)
    return path


def split_model(path: Path, shards: int) -> list[Path]:
    """The model at ``path`` as that many shards beside it, as ``llama-gguf-split`` writes them."""
    reader = gguf.GGUFReader(path)
    tensors = reader.tensors
    parts = [list(part) for part in np.array_split(np.arange(len(tensors)), shards)]
    written = []
    for number, part in enumerate(parts):
        split: dict[str, Any] = {
            "split.no": np.uint16(number),
            "split.count": np.uint16(shards),
            "split.tensors.count": np.int32(len(tensors)),
        }
        fields: dict[str, Any] = {}
        if number == 0:
            fields = {key: field.contents() for key, field in reader.fields.items() if "." in key}
        architecture = fields.pop("general.architecture", None)
        writer = new_writer(architecture, fields | split)
        for index in part:
            tensor = tensors[index]
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        shard = path.with_name(f"{path.stem}-{number + 1:05}-of-{shards:05}.gguf")
        write_head(writer, shard, with_tensors=True)
        written.append(shard)
    return written


# --- the parts -----------------------------------------------------------------


def byte_level_vocabulary(words: int) -> tuple[list[str], list[int]]:
    """Specials, the 256 bytes as GPT-2 spells them, and that many made-up words."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelled = {byte: chr(byte) for byte in plain}
    others = (byte for byte in range(256) if byte not in spelled)
    spelled.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    tokens = SPECIALS + [spelled[byte] for byte in range(256)] + [made_up(index) for index in range(words)]
    return tokens, [CONTROL] * len(SPECIALS) + [NORMAL] * (len(tokens) - len(SPECIALS))


def made_up(index: int) -> str:
    """A word of two or more syllables, with the space before it (``Ġ``)."""
    consonants, vowels = "bfgklmnprst", "aeiou"
    word = ""
    rest = index + len(consonants) * len(vowels)
    while rest:
        rest, syllable = divmod(rest, len(consonants) * len(vowels))
        word += consonants[syllable // len(vowels)] + vowels[syllable % len(vowels)]
    return "\u0120" + word


def byte_level_tokenizer(tokens: list[str], types: list[int]) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["\u0120 t"],
        "tokenizer.ggml.bos_token_id": BEGIN,
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


@dataclass(frozen=True)
class Llama:
    """The sizes of a llama."""

    layers: int
    embedding: int
    feed_forward: int
    heads: int
    heads_kv: int
    vocabulary: int

    def fields(self, name: str, context: int) -> dict[str, Any]:
        return {
            "general.name": name,
            "llama.block_count": self.layers,
            "llama.context_length": context,
            "llama.embedding_length": self.embedding,
            "llama.feed_forward_length": self.feed_forward,
            "llama.attention.head_count": self.heads,
            "llama.attention.head_count_kv": self.heads_kv,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.dimension_count": self.embedding // self.heads,
            "llama.vocab_size": self.vocabulary,
        }

    def tensors(self) -> dict[str, Shape]:
        """Names and shapes, the row length first."""
        row, up = self.embedding, self.feed_forward
        kv = row // self.heads * self.heads_kv
        tensors: dict[str, Shape] = {"token_embd.weight": (row, self.vocabulary)}
        for layer in range(self.layers):
            tensors |= {
                f"blk.{layer}.attn_norm.weight": (row,),
                f"blk.{layer}.attn_q.weight": (row, row),
                f"blk.{layer}.attn_k.weight": (row, kv),
                f"blk.{layer}.attn_v.weight": (row, kv),
                f"blk.{layer}.attn_output.weight": (row, row),
                f"blk.{layer}.ffn_norm.weight": (row,),
                f"blk.{layer}.ffn_gate.weight": (row, up),
                f"blk.{layer}.ffn_up.weight": (row, up),
                f"blk.{layer}.ffn_down.weight": (up, row),
            }
        return tensors | {"output_norm.weight": (row,), "output.weight": (row, self.vocabulary)}


def write_model(path: Path, architecture: str, fields: dict[str, Any], data: dict[str, np.ndarray]) -> Path:
    writer = new_writer(architecture, fields)
    for tensor, values in data.items():
        writer.add_tensor(tensor, np.ascontiguousarray(values, np.float32))
    write_head(writer, path, with_tensors=True)
    return path


def new_writer(architecture: str | None, fields: dict[str, Any]) -> gguf.GGUFWriter:
    """A writer with these fields; whole numbers become ``u32`` unless numpy gives them a width."""
    writer = gguf.GGUFWriter(None, architecture or "")
    if architecture is None:
        writer.kv_data[0].pop("general.architecture", None)
    for key, value in fields.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case np.uint16():
                writer.add_uint16(key, int(value))
            case np.int32():
                writer.add_int32(key, int(value))
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case Iterable():
                writer.add_array(key, list(value))
    return writer


def write_head(writer: gguf.GGUFWriter, path: Path, *, with_tensors: bool = False) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    if with_tensors:
        writer.write_tensors_to_file()
    else:
        writer.write_ti_data_to_file()
    writer.close()
