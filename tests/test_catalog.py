"""The catalogue: real files in real folders, what they are called and what is wrong with them."""

import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from llama_gpu.catalog import Catalog, scan
from llama_gpu.config import load_config
from llama_gpu.errors import ConfigError, UnknownModelError


def write_gguf(path: Path, architecture: str = "llama", *, tensors: int = 1, split=None, **metadata) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key.replace("__", "."), value)
    if split:
        number, count = split
        writer.add_uint16("split.no", number - 1)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", count * tensors)
    for index in range(tensors):
        name = f"blk.{index if not split else split[0]}.attn_q.weight"
        writer.add_tensor(name, np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_projector(path: Path, width: int = 32) -> Path:
    return write_gguf(path, "clip", clip__vision__projection_dim=width)


def write_shards(folder: Path, stem: str, count: int, leave_out=()) -> None:
    for number in set(range(1, count + 1)) - set(leave_out):
        write_gguf(folder / f"{stem}-{number:05}-of-{count:05}.gguf", split=(number, count))


@pytest.fixture
def look(tmp_path):
    def look(*folders: Path, **options) -> Catalog:
        overrides = {f"models.{pattern.replace('__', '*')}": value for pattern, value in options.items()}
        return scan(folders or [tmp_path], load_config(None, overrides, environment={}))

    return look


def ids(catalog: Catalog) -> list[str]:
    return [entry.id for entry in catalog.entries]


def test_files_are_found_to_the_bottom_and_named_by_their_stem(tmp_path, look):
    write_gguf(tmp_path / "Qwen3-8B-Q4_K_M.gguf")
    write_gguf(tmp_path / "deep" / "er" / "llama.GGUF")
    (tmp_path / "readme.md").write_text("no model")
    assert ids(look()) == ["llama", "Qwen3-8B-Q4_K_M"]


def test_hidden_files_and_folders_are_left_out(tmp_path, look):
    write_gguf(tmp_path / ".half.gguf")
    write_gguf(tmp_path / ".cache" / "a.gguf")
    assert look().entries == ()


def test_links_are_followed_and_a_circle_ends(tmp_path, look):
    write_gguf(tmp_path / "elsewhere" / "a.gguf")
    models = tmp_path / "models"
    models.mkdir()
    (models / "b.gguf").symlink_to(tmp_path / "elsewhere" / "a.gguf")
    (models / "circle").symlink_to(models)
    assert ids(look(models)) == ["b"]


def test_overlapping_folders_give_each_model_once(tmp_path, look):
    write_gguf(tmp_path / "sub" / "a.gguf")
    assert ids(look(tmp_path, tmp_path / "sub")) == ["a"]


def test_a_single_file_may_stand_for_a_folder(tmp_path, look):
    assert ids(look(write_gguf(tmp_path / "a.gguf"))) == ["a"]


def test_a_missing_folder_is_named(tmp_path, look):
    with pytest.raises(ConfigError, match=r"nowhere: no such folder$") as caught:
        look(tmp_path / "nowhere")
    assert caught.value.key == "models_dirs"


def test_a_file_that_is_no_model_is_refused_as_a_folder(tmp_path, look):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ConfigError, match=r"neither a folder nor a \.gguf file"):
        look(tmp_path / "a.txt")


def test_an_empty_folder_is_no_error_but_is_said(tmp_path, look):
    catalog = look()
    assert catalog.entries == ()
    assert catalog.warnings == (f"no *.gguf files in {tmp_path}",)


def test_shards_are_one_model(tmp_path, look):
    write_shards(tmp_path, "big", 3)
    (entry,) = look().entries
    assert (entry.id, entry.error) == ("big", None)
    assert entry.path.name == "big-00001-of-00003.gguf"
    assert entry.file_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert entry.created == int(max(path.stat().st_mtime for path in tmp_path.iterdir()))


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_missing_shard_breaks_its_model_and_is_named(tmp_path, look, missing):
    write_shards(tmp_path, "big", 3, leave_out=[missing])
    write_gguf(tmp_path / "small.gguf")
    catalog = look()
    (broken,) = catalog.broken
    assert broken.id == "big"
    assert f"big-{missing:05}-of-00003.gguf" in broken.error
    assert [entry.id for entry in catalog.models] == ["small"]


def test_broken_files_stop_nobody_else(tmp_path, look):
    whole = write_gguf(tmp_path / "whole.gguf")
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:100])
    (tmp_path / "text.gguf").write_text("not a model at all, but long enough for a header")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "absurd.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 16)
    (tmp_path / "dangling.gguf").symlink_to(tmp_path / "gone")
    catalog = look()
    assert [entry.id for entry in catalog.models] == ["whole"]
    assert [entry.id for entry in catalog.broken] == ["absurd", "cut", "dangling", "empty", "text"]
    assert all(str(entry.path) in entry.error for entry in catalog.broken)
    assert "gone, which is not there" in catalog.find("dangling").error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_broken(tmp_path, look):
    write_gguf(tmp_path / "secret.gguf").chmod(0)
    assert "ermission" in look().broken[0].error


@pytest.mark.parametrize(
    ("metadata", "tensors", "reason"),
    [({"general__type": "adapter"}, 1, "a LoRA adapter, not a model"), ({}, 0, "a vocabulary only")],
)
def test_what_is_no_model_is_listed_with_what_it_is(tmp_path, look, metadata, tensors, reason):
    write_gguf(tmp_path / "a.gguf", tensors=tensors, **metadata)
    assert look().broken[0].error.endswith(reason)


def test_two_of_one_name_are_told_apart_by_their_folders(tmp_path, look):
    for folder in ("a/x", "b/x", "c"):
        write_gguf(tmp_path / folder / "m.gguf")
    assert ids(look()) == ["a/x/m", "b/x/m", "c/m"]


def test_a_model_beside_shards_of_the_same_name_keeps_its_file_name(tmp_path, look):
    write_gguf(tmp_path / "m.gguf")
    write_shards(tmp_path, "m", 2)
    assert ids(look()) == ["m-00001-of-00002.gguf", "m.gguf"]


def test_a_projector_is_no_model_and_goes_to_its_only_neighbour(tmp_path, look):
    write_gguf(tmp_path / "gemma" / "gemma-Q4_K_M.gguf")
    projector = write_projector(tmp_path / "gemma" / "mmproj-model-f16.gguf")
    write_gguf(tmp_path / "llama.gguf")
    catalog = look()
    assert ids(catalog) == ["gemma-Q4_K_M", "llama"]
    assert catalog.find("gemma-Q4_K_M").mmproj == projector
    assert catalog.find("llama").mmproj is None
    assert catalog.projectors == (projector,)


def test_quantisations_of_one_model_share_its_projector(tmp_path, look):
    write_gguf(tmp_path / "gemma-Q4_K_M.gguf")
    write_gguf(tmp_path / "gemma-UD-Q8_0.gguf")
    projector = write_projector(tmp_path / "mmproj-F16.gguf")
    assert {entry.mmproj for entry in look().entries} == {projector}


def test_among_different_models_the_projector_follows_its_name(tmp_path, look):
    write_gguf(tmp_path / "gemma-3-4b-it-Q4_K_M.gguf")
    write_gguf(tmp_path / "qwen2-vl-7b-Q4_K_M.gguf")
    projector = write_projector(tmp_path / "mmproj-gemma-3-4b-it-f16.gguf")
    catalog = look()
    assert catalog.find("gemma-3-4b-it-q4_k_m").mmproj == projector
    assert catalog.find("qwen2-vl-7b-q4_k_m").mmproj is None


def test_a_nameless_projector_among_different_models_is_left_to_the_owner(tmp_path, look):
    write_gguf(tmp_path / "gemma.gguf")
    write_gguf(tmp_path / "qwen.gguf")
    write_projector(tmp_path / "mmproj-f16.gguf")
    catalog = look()
    assert [entry.mmproj for entry in catalog.entries] == [None, None]
    assert "set its mmproj" in catalog.warnings[0]


def test_of_one_projector_in_several_precisions_the_half_one_is_taken(tmp_path, look):
    write_gguf(tmp_path / "gemma.gguf")
    for precision in ("BF16", "F16", "F32"):
        write_projector(tmp_path / f"mmproj-{precision}.gguf")
    assert look().entries[0].mmproj == tmp_path / "mmproj-F16.gguf"


def test_a_projector_of_another_width_is_not_paired(tmp_path, look):
    write_gguf(tmp_path / "gemma.gguf", llama__embedding_length=64)
    write_projector(tmp_path / "mmproj-gemma.gguf", width=32)
    assert look().entries[0].mmproj is None


def test_the_configuration_may_name_a_projector_or_refuse_one(tmp_path, look):
    write_gguf(tmp_path / "gemma.gguf")
    write_projector(tmp_path / "mmproj-gemma.gguf")
    other = write_projector(tmp_path / "elsewhere" / "mmproj-x.gguf")
    assert look(gemma={"mmproj": "none"}).entries[0].mmproj is None
    assert look(gemma={"mmproj": str(other)}).entries[0].mmproj == other
    assert "gone.gguf, which is not there" in look(gemma={"mmproj": "/gone.gguf"}).entries[0].error


def test_options_and_aliases_come_from_the_configuration(tmp_path, look):
    write_gguf(tmp_path / "qwen-8b.gguf")
    catalog = look(qwen__={"context_length": 512, "aliases": ["gpt-4o", "small"]})
    entry = catalog.find("GPT-4o")
    assert (entry.id, entry.options.context_length, entry.aliases) == ("qwen-8b", 512, ("gpt-4o", "small"))


def test_an_alias_that_is_taken_is_dropped_and_said(tmp_path, look):
    write_gguf(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf")
    catalog = look(__={"alias": "both"}, a={"aliases": ["B", "both"]})
    assert catalog.find("b").id == "b"
    assert catalog.find("both").id == "a"
    assert catalog.warnings == (
        "the alias B of a is already the name of b",
        "the alias both of b is already the name of a",
    )


def test_a_pattern_that_matches_nothing_is_said(tmp_path, look):
    write_gguf(tmp_path / "a.gguf")
    assert look(qwne={"parallel": 1}).warnings == ("models.qwne in the configuration matches no model",)


@pytest.mark.parametrize("name", ["Tiny-Q8_0", "tiny-q8_0", "Tiny-Q8_0.gguf"])
def test_a_model_is_found_by_its_id_in_any_case_and_by_its_file(tmp_path, look, name):
    write_gguf(tmp_path / "Tiny-Q8_0.gguf")
    assert look().find(name).id == "Tiny-Q8_0"


def test_names_that_differ_only_in_case_stay_apart(tmp_path, look):
    write_gguf(tmp_path / "a" / "M.gguf")
    write_gguf(tmp_path / "b" / "m.gguf")
    assert ids(look()) == ["a/M", "b/m"]


def test_an_unknown_model_is_answered_with_the_nearest(tmp_path, look):
    write_gguf(tmp_path / "qwen3-8b.gguf")
    write_gguf(tmp_path / "llama.gguf")
    with pytest.raises(
        UnknownModelError, match=r"no model is called 'qwen3-7b'; did you mean qwen3-8b\?"
    ) as caught:
        look().find("qwen3-7b")
    assert caught.value.known_models == ("llama", "qwen3-8b")
    assert caught.value.model == "qwen3-7b"
    with pytest.raises(UnknownModelError, match="there are llama, qwen3-8b"):
        look().find("zzzzzzzzz")


def test_encoders_and_models_with_pooling_answer_with_embeddings(tmp_path, look):
    write_gguf(tmp_path / "bge.gguf", "bert", bert__pooling_type=2)
    write_gguf(tmp_path / "qwen-embedding.gguf", "qwen3", qwen3__pooling_type=3)
    write_gguf(tmp_path / "reranker.gguf", "bert", bert__pooling_type=4)
    write_gguf(tmp_path / "chat.gguf")
    catalog = look()
    assert {entry.id for entry in catalog.entries if entry.embedding} == {"bge", "qwen-embedding", "reranker"}
    assert {entry.id for entry in catalog.entries if entry.reranking} == {"reranker"}
    assert look(chat={"embeddings": True}).find("chat").embedding


def test_scanning_again_sees_what_changed(tmp_path, look):
    write_gguf(tmp_path / "a.gguf")
    before = look()
    write_gguf(tmp_path / "b.gguf")
    (tmp_path / "a.gguf").unlink()
    assert (ids(before), ids(look())) == (["a"], ["b"])
    assert before != look()
