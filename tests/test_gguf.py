"""Headers from Python: what they say, what is refused, and that files are let alone."""

from __future__ import annotations

import os
import pickle
import struct
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import pytest

import llama_gpu as lg
from llama_gpu.errors import InvalidGgufError
from support.gguf_builder import split_model, write_embedding_model, write_llama, write_sparse
from support.gguf_bytes import ARRAY, BOOL, STRING, U32, gguf_bytes, text

LLAMA = [("general.architecture", STRING, text("llama"))]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("gguf") / "llama.gguf")


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_header_says_what_the_gguf_package_says(llama: Path) -> None:
    header, reader = lg.read_header(llama), gguf.GGUFReader(llama)
    assert (header.version, header.byte_order, header.alignment) == (3, "little", 32)
    assert (header.architecture, header.trained_context_length) == ("llama", 2048)
    assert header.file_bytes == llama.stat().st_size
    assert header.path == str(llama)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    values = dict(header.metadata.items())
    assert list(values) == list(fields)
    assert {
        key: list(v) if isinstance(v, tuple | lg.MetadataArray) else v for key, v in values.items()
    } == fields
    assert len(header.tensors) == len(reader.tensors)
    [shard] = header.shards
    for ours, theirs in zip(header.tensors, reader.tensors, strict=True):
        assert (ours.name, ours.type, ours.bytes) == (theirs.name, theirs.tensor_type.name, theirs.n_bytes)
        assert list(ours.shape) == theirs.shape.tolist()
        assert shard.data_offset + ours.offset == theirs.data_offset
    assert header.parameter_count == sum(int(tensor.n_elements) for tensor in reader.tensors)


def test_the_quantisation_is_the_one_named_else_the_one_of_most_bytes(tmp_path: Path) -> None:
    guessed = write_sparse(tmp_path / "guessed.gguf", layers=1, embedding=256, feed_forward=256)
    assert lg.read_header(guessed).quantization == "Q4_K_M"
    named = write_sparse(
        tmp_path / "named.gguf", layers=1, embedding=256, feed_forward=256, metadata={"general.file_type": 14}
    )
    assert lg.read_header(named).quantization == "Q4_K_S"


def test_a_header_without_tensors_or_architecture_is_valid(tmp_path: Path) -> None:
    header = lg.read_header(written(tmp_path / "vocabulary.gguf", gguf_bytes([("k", U32, b"\1\0\0\0")])))
    assert (header.tensors, header.architecture, header.quantization) == ((), None, None)
    assert (header.parameter_count, header.trained_context_length) == (0, None)
    assert dict(header.metadata) == {"k": 1}


@pytest.mark.parametrize(("version", "order"), [(2, "<"), (3, "<"), (2, ">"), (3, ">")])
def test_versions_2_and_3_are_read_in_both_byte_orders(tmp_path: Path, version: int, order: str) -> None:
    tokens = struct.pack(order + "IQ", STRING, 2) + text("<s>", order) + text("wörld", order)
    nested = struct.pack(order + "IQ", ARRAY, 1) + struct.pack(order + "IQ2B", BOOL, 2, 1, 0)
    entries = [("k", U32, struct.pack(order + "I", 7)), ("tokens", ARRAY, tokens), ("nested", ARRAY, nested)]
    content = gguf_bytes(entries, [("t", (32, 2), 8, 0)], version=version, order=order, data_bytes=96)
    header = lg.read_header(written(tmp_path / "model.gguf", content))
    assert (header.version, header.byte_order) == (version, "little" if order == "<" else "big")
    assert header.metadata["k"] == 7
    assert header.metadata["tokens"] == ["<s>", "wörld"]
    assert header.metadata["nested"] == [(True, False)]
    assert header.tensors == (lg.Tensor(name="t", shape=(32, 2), type="Q8_0", bytes=68, offset=0),)


def test_metadata_is_a_mapping_and_lists_are_sequences(llama: Path) -> None:
    metadata = lg.read_header(llama).metadata
    assert isinstance(metadata, Mapping)
    assert "general.name" in metadata
    assert 7 not in metadata
    assert metadata.get("none", "else") == "else"
    assert list(metadata.keys()) == list(metadata)
    with pytest.raises(KeyError, match="none"):
        metadata["none"]
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, Sequence)
    assert (len(tokens), tokens.element_type) == (661, "str")
    assert (tokens[0], tokens[-661]) == ("<|begin|>", "<|begin|>")
    assert tokens[1:5:2] == ["<|end|>", "<|user|>"]
    assert tokens == list(tokens)
    for index in (661, -662):
        with pytest.raises(IndexError):
            tokens[index]


def test_strings_that_are_not_utf8_are_bytes(tmp_path: Path) -> None:
    latin = struct.pack("<Q", 4) + b"caf\xe9"
    entries = [("name", STRING, latin), ("tokens", ARRAY, struct.pack("<IQ", STRING, 1) + latin)]
    metadata = lg.read_header(written(tmp_path / "model.gguf", gguf_bytes(entries))).metadata
    assert metadata["name"] == b"caf\xe9"
    assert metadata["tokens"][0] == b"caf\xe9"


def test_a_sparse_file_of_forty_gigabytes_is_read_by_its_header(tmp_path: Path) -> None:
    path = write_sparse(
        tmp_path / "70b.gguf", layers=80, embedding=8192, feed_forward=28672, heads=64, vocabulary=128256
    )
    header = lg.read_header(path)
    assert header.file_bytes == path.stat().st_size > 39_000_000_000
    assert 70e9 < header.parameter_count < 71e9


def test_any_file_of_a_split_model_leads_to_all(tmp_path: Path) -> None:
    whole = lg.read_header(write_embedding_model(tmp_path / "model.gguf"))
    shards = split_model(tmp_path / "model.gguf", 3)
    for path in shards:
        header = lg.read_header(path)
        assert [shard.path for shard in header.shards] == [str(shard) for shard in shards]
        assert header.file_bytes == sum(shard.stat().st_size for shard in shards)
        assert [tensor.name for tensor in header.tensors] == [tensor.name for tensor in whole.tensors]
        assert {tensor.shard for tensor in header.tensors} == {0, 1, 2}
        assert header.parameter_count == whole.parameter_count
    shards[1].unlink()
    with pytest.raises(InvalidGgufError, match=r"model-00002-of-00003\.gguf is missing") as caught:
        lg.read_header(shards[0])
    assert (caught.value.reason, caught.value.path) == ("missing_shard", str(shards[0]))


REFUSED = {
    "bad_magic": gguf_bytes(magic=b"GGML"),
    "version_1": gguf_bytes(version=1),
    "unknown_version": gguf_bytes(version=9),
    "tensor_count_absurd": gguf_bytes(tensor_count=1 << 60),
    "metadata_count_absurd": gguf_bytes(metadata_count=1 << 60),
    "string_longer_than_file": gguf_bytes([("k", STRING, b"\xff" * 8)]),
    "array_longer_than_file": gguf_bytes([("k", ARRAY, struct.pack("<IQ", U32, 1 << 60))]),
    "arrays_nested_too_deep": gguf_bytes([("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 50)]),
    "duplicate_key": gguf_bytes([*LLAMA, *LLAMA]),
    "unknown_value_type": gguf_bytes([("k", 99, b"")]),
    "bad_alignment": gguf_bytes([("general.alignment", U32, struct.pack("<I", 48))]),
    "duplicate_tensor": gguf_bytes(tensors=[("t", (8,), 0, 0), ("t", (8,), 0, 32)], data_bytes=64),
    "too_many_dimensions": gguf_bytes(tensors=[("t", (1,) * 5, 0, 0)], data_bytes=64),
    "dimension_overflow": gguf_bytes(tensors=[("t", (1 << 40, 1 << 40), 0, 0)], data_bytes=64),
    "row_not_multiple_of_block": gguf_bytes(tensors=[("t", (33,), 8, 0)], data_bytes=64),
    "unknown_ggml_type": gguf_bytes(tensors=[("t", (32,), 777, 0)], data_bytes=64),
    "removed_ggml_type": gguf_bytes(tensors=[("t", (32,), 4, 0)], data_bytes=64),
    "misaligned_tensor": gguf_bytes(tensors=[("t", (8,), 0, 4)], data_bytes=64),
    "tensor_outside_file": gguf_bytes(tensors=[("t", (8,), 0, 1 << 40)], data_bytes=64),
    "unexpected_tensor_offset": gguf_bytes(tensors=[("t", (8,), 0, 32)], data_bytes=64),
    "truncated": gguf_bytes(tensors=[("t", (8,), 0, 0)], data_bytes=31),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_broken_file_is_refused_with_reason_path_and_offset(tmp_path: Path, reason: str) -> None:
    path = written(tmp_path / "broken.gguf", REFUSED[reason])
    with pytest.raises(InvalidGgufError) as caught:
        lg.read_header(path)
    assert (caught.value.reason, caught.value.path) == (reason, str(path))
    assert 0 <= caught.value.offset < len(REFUSED[reason])
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_half_downloaded_model_says_how_much_is_there(llama: Path, tmp_path: Path) -> None:
    size = llama.stat().st_size
    path = written(tmp_path / "half.gguf", llama.read_bytes()[: size // 2])
    with pytest.raises(InvalidGgufError, match=rf"tensor '.*' ends at byte \d+.* only {size // 2} bytes"):
        lg.read_header(path)


def test_what_cannot_be_read_is_pythons_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        lg.read_header(tmp_path / "none.gguf")
    assert caught.value.filename == str(tmp_path / "none.gguf")
    with pytest.raises(IsADirectoryError):
        lg.read_header(tmp_path)
    with pytest.raises(OSError, match="not a regular file"):
        lg.read_header("/dev/null")
    with pytest.raises(TypeError):
        lg.read_header(3)  # type: ignore[arg-type]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_a_permission_error(tmp_path: Path) -> None:
    path = written(tmp_path / "locked.gguf", gguf_bytes())
    path.chmod(0)
    with pytest.raises(PermissionError):
        lg.read_header(path)


def test_values_are_equal_by_value_and_survive_a_pickle(llama: Path, tmp_path: Path) -> None:
    header = lg.read_header(llama)
    assert header == lg.read_header(llama, cached=False)
    assert header != lg.read_header(write_llama(tmp_path / "other.gguf", seed=2))
    tokens = header.metadata["tokenizer.ggml.tokens"]
    for value in (header, header.metadata, header.tensors, header.shards, tokens):
        assert pickle.loads(pickle.dumps(value)) == value
    assert "llama.gguf" in repr(header)
    assert repr(header.tensors[0]).startswith(
        "Tensor(name=\"token_embd.weight\", shape=(64, 661), type='F32'"
    )


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for number in range(20):
        path.write_bytes(gguf_bytes([("k", U32, struct.pack("<I", number))]))
        assert lg.read_header(path).metadata["k"] == number


def test_a_list_of_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model.gguf")
    tokens = lg.read_header(path).metadata["tokenizer.ggml.tokens"]
    write_llama(path, words=300)
    with pytest.raises(InvalidGgufError) as caught:
        tokens[0]
    assert caught.value.reason == "file_changed"


def test_threads_read_headers_side_by_side(llama: Path) -> None:
    expected = lg.read_header(llama)
    headers: list[lg.Header] = []

    def read() -> None:
        headers.extend(lg.read_header(llama, cached=False) for _ in range(20))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert headers == [expected] * 80


def test_other_threads_run_while_a_large_header_is_read(tmp_path: Path) -> None:
    count = 4_000_000
    items = struct.pack("<IQ", STRING, count) + bytes(8) * count
    path = written(tmp_path / "large.gguf", gguf_bytes([("k", ARRAY, items)]))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10.0)  # a thread that does not let go would keep the interpreter for good
    started, steps = threading.Event(), []

    def count_up() -> None:
        started.wait()
        steps.append(time.perf_counter())

    thread = threading.Thread(target=count_up)
    thread.start()
    try:
        started.set()
        for _ in range(10):
            lg.read_header(path, cached=False)
        ended = time.perf_counter()
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert steps[0] < ended
