"""Write a tiny model that says of itself that it talks nonsense: ``make_demo_model.py FOLDER``.

It is a llama of one layer whose attention and feed-forward weights are zero, so that a token's
embedding reaches the output unchanged. The embedding of piece n of the sentence is the unit vector
n + 1, the output row of piece n is the unit vector n: each piece calls up the next, whatever came
before, and every other token calls up the first. Nothing but the standard library is needed.
"""

from __future__ import annotations

import struct
import sys
from array import array
from itertools import accumulate
from pathlib import Path

SENTENCE = (
    "I am a tiny demo model and I talk nonsense: I have learnt one sentence, this one, whatever you ask. "
    "Put a real GGUF model into the models folder and ask again."
)
SPECIALS = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
BEGIN, END = 0, 1
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
EMBEDDING, FEED_FORWARD, HEADS, CONTEXT = 64, 64, 2, 4096
CERTAINTY = 8.0  # times the root of EMBEDDING: the logit of the next piece, all others have 0
ALIGNMENT = 32
NORMAL, CONTROL = 1, 3  # token types
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # value types


def byte_spelling() -> list[str]:
    """How byte-level BPE writes each byte as one printable character (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelled = {byte: chr(byte) for byte in plain}
    others = (byte for byte in range(256) if byte not in spelled)
    spelled.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    return [spelled[byte] for byte in range(256)]


def pieces_of(sentence: str) -> list[str]:
    """The sentence in pieces of whole words, none of them twice and none a single byte."""
    pieces: list[str] = []
    piece = ""
    for index, word in enumerate(sentence.split(" ")):
        piece += word if index == 0 else " " + word
        if len(piece) > 1 and piece not in pieces:
            pieces.append(piece)
            piece = ""
    if piece:
        pieces[-1] += piece
    return pieces


def text(value: str) -> bytes:
    """A string as GGUF writes it: its length, then its bytes."""
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def string_array(values: list[str]) -> tuple[int, bytes]:
    """Value type and value of a list of strings."""
    return ARRAY, struct.pack("<IQ", STRING, len(values)) + b"".join(map(text, values))


def unit_rows(ones: dict[int, int], rows: int, value: float) -> array[float]:
    """A matrix of zeros with one ``value`` per given row, at the given column."""
    matrix = array("f", bytes(4 * rows * EMBEDDING))
    for row, column in ones.items():
        matrix[row * EMBEDDING + column] = value
    return matrix


def demo_model() -> bytes:
    """The whole file."""
    spelling = byte_spelling()
    pieces = pieces_of(SENTENCE)
    words = ["".join(spelling[byte] for byte in piece.encode()) for piece in pieces]
    tokens = SPECIALS + spelling + words
    first = len(SPECIALS) + len(spelling)
    chain = [*range(first, len(tokens)), END]

    def u32(value: int) -> tuple[int, bytes]:
        return U32, struct.pack("<I", value)

    def string(value: str) -> tuple[int, bytes]:
        return STRING, text(value)

    types = [CONTROL] * len(SPECIALS) + [NORMAL] * (len(tokens) - len(SPECIALS))
    metadata = {
        "general.architecture": string("llama"),
        "general.name": string("Demo model that talks nonsense"),
        "general.description": string(
            "Says one sentence about itself, whatever it is asked. Made for a first try."
        ),
        "general.file_type": u32(0),
        "llama.block_count": u32(1),
        "llama.context_length": u32(CONTEXT),
        "llama.embedding_length": u32(EMBEDDING),
        "llama.feed_forward_length": u32(FEED_FORWARD),
        "llama.attention.head_count": u32(HEADS),
        "llama.attention.head_count_kv": u32(HEADS),
        "llama.attention.layer_norm_rms_epsilon": (F32, struct.pack("<f", 1e-5)),
        "llama.rope.dimension_count": u32(EMBEDDING // HEADS),
        "llama.vocab_size": u32(len(tokens)),
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string("gpt-2"),
        "tokenizer.ggml.tokens": string_array(tokens),
        "tokenizer.ggml.token_type": (ARRAY, struct.pack(f"<IQ{len(types)}i", I32, len(types), *types)),
        "tokenizer.ggml.merges": string_array([]),
        "tokenizer.ggml.bos_token_id": u32(BEGIN),
        "tokenizer.ggml.eos_token_id": u32(END),
        "tokenizer.ggml.add_bos_token": (BOOL, b"\x01"),
        "tokenizer.chat_template": string(TEMPLATE),
    }

    after = {token: index + 1 for index, token in enumerate(chain[:-1])}
    embedding = unit_rows({token: after.get(token, 0) for token in range(len(tokens))}, len(tokens), 1.0)
    output = unit_rows({token: index for index, token in enumerate(chain)}, len(tokens), CERTAINTY)

    def zeros(columns: int, rows: int) -> tuple[list[int], array[float]]:
        return [columns, rows], array("f", bytes(4 * columns * rows))

    ones = [EMBEDDING], array("f", [1.0] * EMBEDDING)
    tensors = {
        "token_embd.weight": ([EMBEDDING, len(tokens)], embedding),
        "blk.0.attn_norm.weight": ones,
        "blk.0.attn_q.weight": zeros(EMBEDDING, EMBEDDING),
        "blk.0.attn_k.weight": zeros(EMBEDDING, EMBEDDING),
        "blk.0.attn_v.weight": zeros(EMBEDDING, EMBEDDING),
        "blk.0.attn_output.weight": zeros(EMBEDDING, EMBEDDING),
        "blk.0.ffn_norm.weight": ones,
        "blk.0.ffn_gate.weight": zeros(EMBEDDING, FEED_FORWARD),
        "blk.0.ffn_up.weight": zeros(EMBEDDING, FEED_FORWARD),
        "blk.0.ffn_down.weight": zeros(FEED_FORWARD, EMBEDDING),
        "output_norm.weight": ones,
        "output.weight": ([EMBEDDING, len(tokens)], output),
    }
    return gguf(metadata, tensors)


def gguf(metadata: dict[str, tuple[int, bytes]], tensors: dict[str, tuple[list[int], array[float]]]) -> bytes:
    """Lays out a version 3 file of 32-bit floats."""

    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % ALIGNMENT)

    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    parts += [text(key) + struct.pack("<I", kind) + value for key, (kind, value) in metadata.items()]
    data = [padded(little_endian(values)) for _, values in tensors.values()]
    offsets = accumulate((len(block) for block in data), initial=0)
    for (name, (shape, _)), offset in zip(tensors.items(), offsets, strict=False):
        parts.append(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset))
    return padded(b"".join(parts)) + b"".join(data)


def little_endian(values: array[float]) -> bytes:
    """The bytes of the floats on any machine."""
    if sys.byteorder == "big":
        values = array("f", values)
        values.byteswap()
    return values.tobytes()


def write_demo_model(folder: Path) -> Path:
    """Writes ``demo-nonsense.gguf`` into the folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "demo-nonsense.gguf"
    path.write_bytes(demo_model())
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:  # noqa: PLR2004
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    print(write_demo_model(Path(sys.argv[1])))
