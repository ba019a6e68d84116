#!/usr/bin/env python3
"""Write the seeds of the header target: ``make_seeds.py [FOLDER]``, by default ``corpus/parse_header``.

Small files with every value type and some tensors, in both versions and byte orders. Headers of real
models given with ``--from FILE …`` are cut down to their first 40 strings per list and added.
"""

from __future__ import annotations

import argparse
import struct
from pathlib import Path

FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


def text(order: str, value: str) -> bytes:
    """A string as the file has it."""
    return struct.pack(order + "Q", len(value)) + value.encode()


def sample(version: int, order: str) -> bytes:
    """Every value type, arrays of numbers, strings and arrays, and three tensors."""

    def entry(key: str, kind: int, value: bytes) -> bytes:
        return text(order, key) + struct.pack(order + "I", kind) + value

    entries = [
        entry("general.architecture", STRING, text(order, "llama")),
        entry("general.alignment", 4, struct.pack(order + "I", 64)),
    ]
    entries += [entry(f"k{kind}", kind, struct.pack(order + code, 1)) for kind, code in FIXED.items()]
    for kind, code in FIXED.items():
        array = struct.pack(order + f"IQ3{code}", kind, 3, 1, 0, 1)
        entries.append(entry(f"a{kind}", ARRAY, array))
    strings = struct.pack(order + "IQ", STRING, 2) + text(order, "<s>") + text(order, "hello")
    entries.append(entry("tokens", ARRAY, strings))
    entries.append(entry("nested", ARRAY, struct.pack(order + "IQ", ARRAY, 2) + strings * 2))
    tensors, offset = b"", 0
    for name, kind, shape, size in (("a", 8, (64, 2), 136), ("b", 0, (4,), 16), ("c", 12, (256,), 144)):
        tensors += text(order, name) + struct.pack(
            order + f"I{len(shape)}QIQ", len(shape), *shape, kind, offset
        )
        offset += size + -size % 64
    head = b"GGUF" + struct.pack(order + "IQQ", version, 3, len(entries)) + b"".join(entries) + tensors
    return head + bytes(-len(head) % 64) + bytes(offset)


def shortened(data: bytes, keep: int = 40) -> bytes:
    """A real little-endian header with its lists cut to ``keep`` elements and without tensors."""
    (count,) = struct.unpack_from("<Q", data, 16)
    position, parts = 24, [data[:8] + struct.pack("<QQ", 0, count)]

    def skip(kind: int, at: int) -> int:
        if kind == STRING:
            return at + 8 + struct.unpack_from("<Q", data, at)[0]
        return at + struct.calcsize("<" + FIXED[kind])

    for _ in range(count):
        start = position
        position = skip(STRING, position)
        (kind,) = struct.unpack_from("<I", data, position)
        position += 4
        if kind != ARRAY:
            position = skip(kind, position)
            parts.append(data[start:position])
            continue
        element, length = struct.unpack_from("<IQ", data, position)
        parts.append(data[start:position] + struct.pack("<IQ", element, min(length, keep)))
        position = first = kept = position + 12
        for index in range(length):
            position = skip(element, position)
            if index < keep:
                kept = position
        parts.append(data[first:kept])
    return b"".join(parts)


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path(__file__).parent / "corpus" / "parse_header"
    )
    parser.add_argument("--from", dest="files", nargs="*", type=Path, default=[])
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for version in (2, 3):
        for name, order in (("little", "<"), ("big", ">")):
            (arguments.folder / f"v{version}-{name}").write_bytes(sample(version, order))
    for file in arguments.files:
        (arguments.folder / file.stem).write_bytes(shortened(file.read_bytes()))


if __name__ == "__main__":
    main()
