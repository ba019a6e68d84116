"""``llama-gpu inspect``."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from llama_gpu import Header, MetadataArray, read_header
from llama_gpu.cli.show import print_json, print_lines, print_table, size

_LAYER = re.compile(r"blk\.(\d+)\.")
_SHOWN_TEXT = 100


def inspect(file: Path, /, *, metadata: bool = False, layers: bool = False, json: bool = False) -> None:
    """Show what a GGUF file holds. The weights are not read.

    Parameters
    ----------
    file
        The model; of a split one any of its files.
    metadata
        Every key, too.
    layers
        The bytes of every layer, too.
    json
        Print one JSON document, with all of it.
    """
    header = read_header(file)
    facts = _facts(header)
    if json:
        described = {key: _shown(value, full=True) for key, value in header.metadata.items()}
        print_json({**facts, "types": _types(header), "layers": _layer_bytes(header), "metadata": described})
        return
    print_table(
        ("Property", "Value"), ((key.replace("_", " "), _human(key, value)) for key, value in facts.items())
    )
    print_table(
        ("Type", ">Tensors", ">Bytes", ">Share"),
        (
            (kind, of["tensors"], size(of["bytes"]), f"{of['share_fraction']:.1%}")
            for kind, of in _types(header).items()
        ),
    )
    if layers:
        print_table(
            ("Layer", ">Bytes"), ((name, size(count)) for name, count in _layer_bytes(header).items())
        )
    if metadata:
        print_table(
            ("Key", "Value"), ((key, _shown(value, full=False)) for key, value in header.metadata.items())
        )
    if not (layers and metadata):
        print_lines("--layers shows the bytes of every layer, --metadata every key.")


def _facts(header: Header) -> dict[str, Any]:
    def of_architecture(key: str) -> Any:
        value = header.metadata.get(f"{header.architecture}.{key}")
        return sorted(set(value)) if isinstance(value, tuple) else value

    tokens = header.metadata.get("tokenizer.ggml.tokens")
    tensor_bytes = sum(tensor.bytes for tensor in header.tensors)
    facts = {
        "name": header.metadata.get("general.name"),
        "architecture": header.architecture,
        "parameters": header.parameter_count,
        "quantization": header.quantization,
        "bits_per_weight": round(8 * tensor_bytes / header.parameter_count, 2)
        if header.parameter_count
        else None,
        "file_bytes": header.file_bytes,
        "files": len(header.shards),
        "trained_context_length": header.trained_context_length,
        "layers": of_architecture("block_count"),
        "embedding_length": of_architecture("embedding_length"),
        "heads": of_architecture("attention.head_count"),
        "kv_heads": of_architecture("attention.head_count_kv"),
        "experts": of_architecture("expert_count"),
        "experts_used": of_architecture("expert_used_count"),
        "sliding_window": of_architecture("attention.sliding_window"),
        "tokenizer": header.metadata.get("tokenizer.ggml.model"),
        "vocabulary": None if tokens is None else len(tokens),
        "chat_template": "tokenizer.chat_template" in header.metadata,
        "gguf_version": header.version,
        "byte_order": header.byte_order,
    }
    return {key: value for key, value in facts.items() if value is not None}


def _types(header: Header) -> dict[str, dict[str, Any]]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor in header.tensors:
        counts[tensor.type] += 1
        sizes[tensor.type] += tensor.bytes
    whole = sizes.total() or 1
    return {
        kind: {"tensors": counts[kind], "bytes": count, "share_fraction": count / whole}
        for kind, count in sizes.most_common()
    }


def _layer_bytes(header: Header) -> dict[str, int]:
    """Bytes by layer, and by name for what belongs to none, in the file's order of layers."""
    numbered: Counter[int] = Counter()
    others: Counter[str] = Counter()
    for tensor in header.tensors:
        if found := _LAYER.match(tensor.name):
            numbered[int(found[1])] += tensor.bytes
        else:
            others[tensor.name] += tensor.bytes
    return {**{str(number): numbered[number] for number in sorted(numbered)}, **others}


def _human(key: str, value: Any) -> str:
    if key == "file_bytes":
        return size(value)
    if key == "parameters" and value >= 1_000_000:  # noqa: PLR2004
        return f"{value / 1e9:.2f} billion" if value >= 1e9 else f"{value / 1e6:.1f} million"  # noqa: PLR2004
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _shown(value: Any, *, full: bool) -> Any:
    if isinstance(value, MetadataArray):
        return f"array of {len(value)} {value.element_type}"
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if full:
        return value
    text = str(value).replace("\n", "⏎")
    return text if len(text) <= _SHOWN_TEXT else f"{text[:_SHOWN_TEXT]}… ({len(text)} characters)"
