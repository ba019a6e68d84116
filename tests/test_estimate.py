"""``estimate`` and its values."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest

import llama_gpu as lg
from llama_gpu.errors import UnsupportedModelError
from support import ground_truth

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
