"""``estimate`` and its values."""

from __future__ import annotations

import pickle
from random import Random
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest

import llama_gpu as lg
from llama_gpu.errors import UnsupportedModelError
from support import ground_truth
from support.gguf_builder import write_sparse
from support.stretched import write_stretched

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the shape of Llama 3.1 8B, its weights a hole."""
    return ground_truth.write_model("llama-3.1-8b-q4k", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts of the shape of Qwen3 30B-A3B."""
    return ground_truth.write_model("qwen3-30b-a3b-q4k", tmp_path_factory.mktemp("mixture"))


def test_takes_a_path_or_a_header(llama: Path) -> None:
    assert lg.estimate(llama) == lg.estimate(str(llama)) == lg.estimate(lg.read_header(llama))


def test_the_default_context_is_the_trained_length(llama: Path) -> None:
    assert lg.estimate(llama).context_length == lg.read_header(llama).trained_context_length


def test_a_total_is_the_sum_of_its_parts(llama: Path) -> None:
    estimate = lg.estimate(llama, devices=3, context_length=8192)
    for device in estimate.devices:
        parts = device.weights_bytes + device.context_bytes + device.compute_bytes + device.overhead_bytes
        assert device.total_bytes == parts
    assert estimate.total_device_bytes == sum(device.total_bytes for device in estimate.devices)


def test_every_layer_is_somewhere(llama: Path) -> None:
    estimate = lg.estimate(llama, devices=2, gpu_layers=20)
    assert [device.layers for device in estimate.devices] == [10, 10]
    assert estimate.host.layers == 13


def test_without_devices_all_is_on_the_host(llama: Path) -> None:
    estimate = lg.estimate(llama, devices=0)
    assert estimate.devices == ()
    assert estimate.host.context_bytes > 0


def test_experts_on_the_cpu_leave_the_device(mixture: Path) -> None:
    all_on_device = lg.estimate(mixture, context_length=4096).devices[0].weights_bytes
    some = lg.estimate(mixture, context_length=4096, cpu_moe_layers=10).devices[0].weights_bytes
    none = lg.estimate(mixture, context_length=4096, cpu_moe_layers="all").devices[0].weights_bytes
    assert none < some < all_on_device


def test_host_memory_counts_what_the_cpu_repacks_only_where_overheads_count(llama: Path) -> None:
    cuda = lg.estimate(llama, context_length=4096, gpu_layers=0)
    generic = lg.estimate(llama, context_length=4096, gpu_layers=0, backend="generic")
    assert cuda.host.overhead_bytes > 4 << 30
    assert generic.host.overhead_bytes == 0


def test_values_survive_pickling(llama: Path) -> None:
    estimate = lg.estimate(llama, devices=2)
    copy = pickle.loads(pickle.dumps(estimate))
    assert copy == estimate
    assert hash(copy) == hash(estimate)


def test_a_repr_makes_the_value_again(llama: Path) -> None:
    estimate = lg.estimate(llama)
    names = {"MemoryEstimate": lg.MemoryEstimate, "DeviceMemory": lg.DeviceMemory}
    assert eval(repr(estimate), names) == estimate


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("context_length", -1),
        ("parallel", 0),
        ("parallel", 1000),
        ("batch", 0),
        ("micro_batch", 0),
        ("max_outputs", 0),
        ("flash_attention", "maybe"),
        ("cache_type_k", "q3_k"),
        ("cache_type_v", "f15"),
        ("gpu_layers", -1),
        ("devices", 100),
        ("tensor_split", [1.0, 2.0]),
        ("tensor_split", [-1.0]),
        ("tensor_split", [0.0]),
        ("cpu_moe_layers", "some"),
        ("backend", "vulkan"),
        ("tier", "perfect"),
    ],
)
def test_refuses_a_value_out_of_range_by_the_option_s_name(llama: Path, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{option} "):
        lg.estimate(llama, **{option: value})


def test_refuses_a_quantised_cache_of_values_without_flash_attention(llama: Path) -> None:
    with pytest.raises(ValueError, match="cache_type_v is quantised, which requires flash attention"):
        lg.estimate(llama, cache_type_v="q8_0", flash_attention="off")


def test_refuses_an_unknown_option(llama: Path) -> None:
    with pytest.raises(TypeError, match="'n_ctx'"):
        lg.estimate(llama, n_ctx=4096)  # type: ignore[call-arg]


def test_refuses_a_value_of_the_wrong_type(llama: Path) -> None:
    with pytest.raises(TypeError, match="context_length must be a whole number, not str"):
        lg.estimate(llama, context_length="8k")  # type: ignore[arg-type]


def test_refuses_a_projector_that_is_none(llama: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no projector") as caught:
        lg.estimate(llama, mmproj=llama)
    assert caught.value.architecture == "llama"
    assert caught.value.path == str(llama)


def test_a_draft_model_adds_its_buffers(llama: Path, tmp_path: Path) -> None:
    draft = ground_truth.write_model("llama-3.2-3b-q8", tmp_path)
    alone = lg.estimate(llama, context_length=8192).devices[0]
    other = lg.estimate(draft, context_length=8192).devices[0]
    both = lg.estimate(llama, context_length=8192, draft=draft).devices[0]
    assert both.weights_bytes == alone.weights_bytes + other.weights_bytes
    assert both.context_bytes == alone.context_bytes + other.context_bytes
    assert both.overhead_bytes == alone.overhead_bytes


def write_adapter(path: Path, architecture: str, shapes: dict[str, tuple[int, int]]) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    for name, (inputs, outputs) in shapes.items():
        writer.add_tensor(f"{name}.lora_a", np.zeros((16, inputs), np.float16))
        writer.add_tensor(f"{name}.lora_b", np.zeros((outputs, 16), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_adapter_lies_with_the_layers_that_it_changes(llama: Path, tmp_path: Path) -> None:
    shapes = {f"blk.{layer}.attn_q.weight": (4096, 4096) for layer in range(32)}
    adapter = write_adapter(tmp_path / "adapter.gguf", "llama", shapes)
    options: dict[str, Any] = {"context_length": 4096, "devices": 2, "gpu_layers": 17, "backend": "generic"}
    without = lg.estimate(llama, **options)
    with_it = lg.estimate(llama, lora=[adapter], **options)
    one_layer = 2 * 16 * 4096 * 2
    added = [
        after.weights_bytes - before.weights_bytes
        for before, after in zip(without.devices, with_it.devices, strict=True)
    ]
    on_devices = [device.layers for device in without.devices]
    assert added == [on_devices[0] * one_layer, (on_devices[1] - 1) * one_layer]
    assert with_it.host.weights_bytes - without.host.weights_bytes == 16 * one_layer


def test_refuses_an_adapter_for_another_architecture(llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter.gguf", "qwen3", {"blk.0.attn_q.weight": (64, 64)})
    with pytest.raises(UnsupportedModelError, match="another architecture"):
        lg.estimate(llama, lora=[adapter])


def test_an_adapter_alone_is_no_model(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter.gguf", "llama", {"blk.0.attn_q.weight": (64, 64)})
    with pytest.raises(UnsupportedModelError, match="LoRA adapter, not a language model"):
        lg.estimate(adapter)


def write_projector(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_string("clip.projector_type", "gemma3")
    for key, value in {"image_size": 896, "patch_size": 14, "embedding_length": 1152}.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_uint32("clip.vision.feed_forward_length", 4304)
    writer.add_tensor("v.patch_embd.weight", np.zeros((1152, 588), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_projector_goes_to_the_first_device(llama: Path, tmp_path: Path) -> None:
    projector = write_projector(tmp_path / "mmproj.gguf")
    without = lg.estimate(llama, context_length=4096, devices=2)
    with_it = lg.estimate(llama, context_length=4096, devices=2, mmproj=projector)
    first, second = with_it.devices
    assert first.weights_bytes - without.devices[0].weights_bytes == 1152 * 588 * 4
    assert first.compute_bytes > without.devices[0].compute_bytes
    assert second == without.devices[1]


def test_what_is_asked_again_is_answered_as_the_first_time(mixture: Path, llama: Path) -> None:
    chance = Random(5)
    sets: list[dict[str, Any]] = [
        {
            "context_length": chance.choice((2048, 8192)),
            "parallel": chance.choice((1, 4)),
            "kv_unified": chance.random() < 0.5,
            "micro_batch": chance.choice((128, 512)),
            "flash_attention": chance.choice(("auto", "off")),
            "gpu_layers": chance.choice((None, 7)),
            "devices": (devices := chance.choice((0, 1, 2))),
            "tensor_split": [3, 1] if devices == 2 and chance.random() < 0.5 else None,
            "cpu_moe_layers": chance.choice((0, 3)),
            "kv_offload": chance.random() < 0.5,
            "backend": chance.choice(("cuda", "generic")),
            # Its cache is another one, and so is a recurrent state's beside it.
            "draft": chance.choice((None, str(llama))),
        }
        for _ in range(60)
    ]
    header = lg.read_header(mixture)
    first = [lg.estimate(header, **options) for options in sets]
    assert len(set(first)) > len(sets) // 2
    for options, known in zip(sets, first, strict=True):
        assert lg.estimate(header, **options) == known
        assert lg.estimate(lg.read_header(mixture, cached=False), **options) == known


def test_more_streams_than_llama_cpps_graph_has_room_for_get_the_generic_rules(tmp_path: Path) -> None:
    small = lg.read_header(ground_truth.write_model("minimax-m3-moe", tmp_path))
    deep = lg.read_header(write_stretched(small, tmp_path / "deep.gguf", 60))
    by_slots = {slots: lg.estimate(deep, parallel=slots, context_length=256 * slots) for slots in (4, 180)}
    assert {slots: each.basis for slots, each in by_slots.items()} == {4: "exact", 180: "generic rules"}
    assert by_slots[180].total_device_bytes > by_slots[4].total_device_bytes


def test_a_projector_alone_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="projector, not a language model"):
        lg.estimate(write_projector(tmp_path / "mmproj.gguf"))


def test_where_only_the_slots_have_logits_a_device_takes_less_by_them(llama: Path) -> None:
    whole = lg.estimate(llama, context_length=8192)
    slots = lg.estimate(llama, context_length=8192, max_outputs=1)
    (embeddings,) = (t for t in lg.read_header(llama).tensors if t.name == "token_embd.weight")
    logits = embeddings.shape[1] * 4
    # What needed the second most room then needs the most.
    assert logits * 256 < whole.devices[0].compute_bytes - slots.devices[0].compute_bytes < logits * 512
    for term in ("weights_bytes", "context_bytes", "overhead_bytes"):
        assert getattr(slots.devices[0], term) == getattr(whole.devices[0], term)
    assert lg.estimate(llama, context_length=8192, max_outputs=512) == whole


def test_an_encoder_has_outputs_for_all_tokens_whatever_is_asked(tmp_path: Path) -> None:
    header = lg.read_header(ground_truth.write_model("t5-dense", tmp_path))
    assert lg.estimate(header, max_outputs=1) == lg.estimate(header)


def test_a_draft_model_has_logits_for_the_slots_where_the_model_has(llama: Path, tmp_path: Path) -> None:
    draft = ground_truth.write_model("llama-3.2-3b-q8", tmp_path)
    alone = lg.estimate(llama, context_length=8192, parallel=2, max_outputs=8).devices[0]
    other = lg.estimate(draft, context_length=8192, parallel=2, max_outputs=2).devices[0]
    both = lg.estimate(llama, context_length=8192, parallel=2, max_outputs=8, draft=draft).devices[0]
    assert both.compute_bytes == alone.compute_bytes + other.compute_bytes


def test_larger_boards_have_a_larger_overhead(llama: Path) -> None:
    turing = lg.estimate(llama, compute_capability=(7, 5)).devices[0].overhead_bytes
    blackwell = lg.estimate(llama, compute_capability=(12, 0)).devices[0].overhead_bytes
    assert 200 << 20 < turing < blackwell < 800 << 20


def test_any_option_set_gives_an_estimate_or_names_the_option(tmp_path: Path) -> None:
    random = Random(7)
    for model in ground_truth.model_names():
        header = lg.read_header(ground_truth.write_model(model, tmp_path))
        for _ in range(10):
            options = {
                "context_length": random.choice([0, 1, 255, 4096, 70_000, 2**32 - 1]),
                "parallel": random.choice([1, 3, 8, 256]),
                "kv_unified": random.random() < 0.5,
                "batch": random.choice([1, 100, 2048]),
                "micro_batch": random.choice([1, 64, 512, 2**32 - 1]),
                "flash_attention": random.choice(["on", "off", "auto"]),
                "cache_type_k": random.choice(["f16", "q8_0", "f32", "q4_0"]),
                "cache_type_v": random.choice(["f16", "q8_0", "bf16"]),
                "gpu_layers": random.choice([None, 0, 1, 5, 10**6]),
                "devices": random.choice([0, 1, 2, 5]),
                "cpu_moe_layers": random.choice([0, 1, "all"]),
                "kv_offload": random.random() < 0.8,
                "swa_full": random.random() < 0.3,
                "backend": random.choice(["cuda", "generic"]),
            }
            try:
                estimate = lg.estimate(header, **options)
            except ValueError as error:
                assert str(error).split()[0] in options  # noqa: PT017
            else:
                assert len(estimate.devices) == options["devices"]


@pytest.mark.parametrize(
    ("key", "value"), [("ple.conv_kernel", 1025), ("attention.compress_ratios", (4, 1025))]
)
def test_refuses_more_steps_than_any_model_takes(tmp_path: Path, key: str, value: Any) -> None:
    header = lg.read_header(ground_truth.write_model("qwen4exp-moe", tmp_path))
    layers = header.metadata["qwen4exp.block_count"]
    path = write_stretched(header, tmp_path / "odd.gguf", layers, {f"qwen4exp.{key}": value})
    with pytest.raises(UnsupportedModelError, match=f"{key} must be at most 1024"):
        lg.estimate(path)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("llama.expert_used_count", 2**31, "at most 1024"),
        ("llama.block_count", 0, "between 1 and 512"),
        ("llama.block_count", 513, "between 1 and 512"),
        ("llama.nextn_predict_layers", 1000, "more than block_count"),
        ("llama.embedding_length", 2**25, "at most 16777216"),
        ("llama.attention.head_count_kv", 2**25, "head_count_kv times the length of a head"),
        ("llama.hyper_connection.count", 17, "at most 16"),
        ("llama.attention.indexer.head_count", 1025, "at most 1024"),
    ],
)
def test_refuses_a_header_that_no_model_has(tmp_path: Path, key: str, value: int, reason: str) -> None:
    path = write_sparse(tmp_path / "odd.gguf", layers=2, metadata={key: value})
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        lg.estimate(path)
    assert caught.value.architecture == "llama"
