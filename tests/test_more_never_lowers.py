"""More context, slots, batch, outputs or layers never lower an estimate where llama.cpp is not lower.

Weights, caches and the driver's overhead never go down, and a larger logical batch changes nothing.
A compute buffer may go down: it is planned by best fit, and a tensor of another size can close a hole
that others left; more slots make the tables of each shorter. So what holds of compute buffers is said
where it always does, and else with how often, and by how much, they are lower in llama.cpp itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import llama_gpu as lg
from support import ground_truth

Options = dict[str, Any]
More = Callable[[Random, Options], tuple[Options, Options]]

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q5_1")
MODELS = ground_truth.model_names()
PAIRS_PER_MODEL = 20

of_any_model = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
models = st.sampled_from(MODELS)
randoms = st.randoms(use_true_random=True)


@dataclass(frozen=True)
class Model:
    """A carried header, and how many layers it has without the output layer."""

    header: lg.Header
    layers: int

    def pair(self, options: Options, more: Options) -> tuple[lg.MemoryEstimate, lg.MemoryEstimate] | None:
        """Both estimates; ``None`` where llama.cpp refuses the options for this model."""
        try:
            return lg.estimate(self.header, **options), lg.estimate(self.header, **more)
        except ValueError:
            return None


class Carried(dict[str, Model]):
    """Every carried model by its name."""

    def __repr__(self) -> str:
        return "the carried models"


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Carried:
    folder = tmp_path_factory.mktemp("headers")
    headers = {name: lg.read_header(ground_truth.write_model(name, folder)) for name in MODELS}
    layers = {name: lg.estimate(header, context_length=512) for name, header in headers.items()}
    return Carried(
        {name: Model(header, layers[name].devices[0].layers - 1) for name, header in headers.items()}
    )


def any_options(random: Random, layers: int, *, devices: int | None = None) -> Options:
    """Options of any kind; one in two has everything on the devices, if there are any."""
    devices = random.choice((0, 1, 1, 1, 2, 2, 3)) if devices is None else devices
    micro_batch = random.choice((1, 32, 64, 128, 200, 256, 500, 512, 1024, 2048))
    flash_attention = random.choice(("auto", "auto", "on", "off"))
    cache_type = random.choice(CACHE_TYPES) if random.random() < 0.4 else "f16"
    options: Options = {
        "context_length": random.choice((512, 1000, 2048, 4096, 5000, 8192, 12288, 32768, 65536)),
        "parallel": random.choice((1, 1, 2, 3, 4, 5, 8)),
        "kv_unified": random.random() < 0.5,
        "micro_batch": micro_batch,
        "batch": random.choice((micro_batch, 2 * micro_batch, 2048)),
        "flash_attention": flash_attention,
        "cache_type_k": cache_type,
        "cache_type_v": "f16" if flash_attention == "off" and cache_type.startswith("q") else cache_type,
        "devices": devices,
        "backend": random.choice(("cuda", "generic")),
        "swa_full": random.random() < 0.15,
    }
    if devices > 1 and random.random() < 0.5:
        options["tensor_split"] = [random.choice((1, 1, 2, 3, 0.5)) for _ in range(devices)]
    if random.random() < 0.5:
        return options
    options["gpu_layers"] = random.choice((None, random.randint(0, layers + 1)))
    options["cpu_moe_layers"] = random.choice((0, 0, "all", random.randint(1, layers)))
    options["kv_offload"] = random.random() < 0.7
    return options


def all_on_devices(options: Options) -> bool:
    """Whether the host only feeds the devices."""
    return (
        options["devices"] > 0
        and options.get("gpu_layers") is None
        and options.get("cpu_moe_layers", 0) == 0
        and options.get("kv_offload", True)
    )


def longer_context(random: Random, options: Options) -> tuple[Options, Options]:
    more = random.choice((1, 256, 1000, 4096, 20_000))
    return options, {**options, "context_length": options["context_length"] + more}


def larger_micro_batch(random: Random, options: Options) -> tuple[Options, Options]:
    micro_batch = options["micro_batch"] + random.choice((1, 32, 100, 300, 512))
    return options, {**options, "micro_batch": micro_batch, "batch": max(options["batch"], micro_batch)}


def larger_batch(random: Random, options: Options) -> tuple[Options, Options]:
    """The logical one; what is computed at once stays."""
    return options, {**options, "batch": options["batch"] + random.choice((1, 64, 512, 2048))}


def more_outputs(random: Random, options: Options) -> tuple[Options, Options]:
    """Logits of more tokens."""
    outputs = random.choice((1, 4, 32, 200))
    return {**options, "max_outputs": outputs}, {
        **options,
        "max_outputs": outputs + random.choice((1, 28, 300)),
    }


def more_slots_on_one_cache(random: Random, options: Options) -> tuple[Options, Options]:
    one = {**options, "kv_unified": True}
    return one, {**one, "parallel": one["parallel"] + random.choice((1, 1, 2, 4))}


def more_slots_with_a_cache_each(random: Random, options: Options) -> tuple[Options, Options]:
    """Every slot keeps its context: of the same context in smaller shares each buffer may be smaller."""
    each = random.choice((256, 512, 1024, 4096, 16384))
    slots = options["parallel"] + random.choice((1, 1, 2, 4))
    few = {**options, "kv_unified": False, "context_length": each * options["parallel"]}
    return few, {**few, "parallel": slots, "context_length": each * slots}


def more_layers(
    random: Random, options: Options, layers: int, *, output: bool = True
) -> tuple[Options, Options]:
    """On the devices; ``output`` says whether the output layer may be among them."""
    most = layers + output
    few = {**options, "gpu_layers": random.randrange(most)}
    return few, {**few, "gpu_layers": min(few["gpu_layers"] + random.choice((1, 1, 2, 5)), most)}


MORE: dict[str, More] = {
    more.__name__: more
    for more in (
        longer_context,
        larger_micro_batch,
        larger_batch,
        more_outputs,
        more_slots_on_one_cache,
        more_slots_with_a_cache_each,
    )
}


def places(estimate: lg.MemoryEstimate) -> tuple[lg.DeviceMemory, ...]:
    """Every device, then the host."""
    return (*estimate.devices, estimate.host)


def together(estimate: lg.MemoryEstimate, term: str) -> int:
    """One term of all devices."""
    return sum(getattr(device, term) for device in estimate.devices)


def tokens_at_once(options: Options) -> int:
    """llama.cpp reserves as many for each slot: it rounds a physical batch up to a multiple of them."""
    tokens = min(options["context_length"], options["batch"], options["micro_batch"])
    return -(-tokens // options["parallel"]) * int(options["parallel"])


@of_any_model
@given(name=models, random=randoms)
def test_a_sum_over_devices_equals_the_whole(carried: Carried, name: str, random: Random) -> None:
    model = carried[name]
    split = any_options(random, model.layers, devices=random.choice((2, 3, 4)))
    whole = {key: value for key, value in split.items() if key != "tensor_split"} | {"devices": 1}
    estimates = model.pair(whole, split)
    assume(estimates is not None)
    assert estimates is not None
    one, several = estimates
    assert several.total_device_bytes == sum(device.total_bytes for device in several.devices)
    for device in places(several):
        terms = (device.weights_bytes, device.context_bytes, device.compute_bytes, device.overhead_bytes)
        assert device.total_bytes == sum(terms)
    assert together(several, "layers") == together(one, "layers")
    assert together(several, "context_bytes") == together(one, "context_bytes")
    assert (several.host.layers, several.host.context_bytes) == (one.host.layers, one.host.context_bytes)
    assert several.host.weights_bytes == one.host.weights_bytes
    # Every device has a copy of the factors that positions are rotated by, in CUDA's steps of 128 bytes.
    copies = together(several, "weights_bytes") - together(one, "weights_bytes")
    factors = [tensor.shape[0] for tensor in model.header.tensors if tensor.name.startswith("rope_f")]
    each = sum(-(-4 * count // 128) * 128 for count in factors)
    assert 0 <= copies <= each * (split["devices"] - 1)


@pytest.mark.parametrize("what", MORE)
@of_any_model
@given(name=models, random=randoms)
def test_more_leaves_the_weights_and_never_lowers_a_cache(
    carried: Carried, what: str, name: str, random: Random
) -> None:
    model = carried[name]
    estimates = model.pair(*MORE[what](random, any_options(random, model.layers)))
    assume(estimates is not None)
    assert estimates is not None
    for before, after in zip(*map(places, estimates), strict=True):
        assert after.weights_bytes == before.weights_bytes
        assert after.context_bytes >= before.context_bytes
        assert after.overhead_bytes >= before.overhead_bytes


@of_any_model
@given(name=models, random=randoms)
def test_more_layers_never_lower_what_weights_and_caches_take(
    carried: Carried, name: str, random: Random
) -> None:
    model = carried[name]
    options = any_options(random, model.layers, devices=random.choice((1, 1, 2, 3)))
    estimates = model.pair(*more_layers(random, options, model.layers))
    assume(estimates is not None)
    assert estimates is not None
    before, after = estimates
    for term in ("weights_bytes", "context_bytes", "overhead_bytes", "layers"):
        # Of several devices the first may hand layers to the others; the last one only gets some.
        assert together(after, term) >= together(before, term)
        assert getattr(after.devices[-1], term) >= getattr(before.devices[-1], term)
        assert getattr(after.host, term) <= getattr(before.host, term)


@of_any_model
@given(name=models, random=randoms)
def test_a_larger_logical_batch_changes_nothing(carried: Carried, name: str, random: Random) -> None:
    model = carried[name]
    estimates = model.pair(*larger_batch(random, any_options(random, model.layers)))
    assume(estimates is not None)
    assert estimates is not None
    before, after = estimates
    assert after == before


@of_any_model
@given(name=models, random=randoms)
def test_on_devices_alone_twice_the_physical_batch_never_lowers_their_compute_buffers(
    carried: Carried, name: str, random: Random
) -> None:
    model = carried[name]
    options = any_options(random, model.layers, devices=random.choice((1, 1, 2, 3)))
    # With fewer tokens than these llama.cpp's kernels are other ones, with buffers of their own.
    options["micro_batch"] = max(options["micro_batch"], 32)
    options |= {"batch": 4096, "context_length": max(options["context_length"], 4096)}
    # CUDA's kernels have a quantised cache copied, now into a hole, now behind everything.
    options |= {"cache_type_k": "f16", "cache_type_v": "f16"}
    assume(all_on_devices(options))
    estimates = model.pair(options, {**options, "micro_batch": 2 * options["micro_batch"]})
    assume(estimates is not None)
    assert estimates is not None
    before, after = estimates
    for one, other in zip(before.devices, after.devices, strict=True):
        assert other.compute_bytes >= one.compute_bytes


@of_any_model
@given(name=models, random=randoms)
def test_on_devices_alone_a_longer_context_never_lowers_the_hosts_compute_buffer(
    carried: Carried, name: str, random: Random
) -> None:
    model = carried[name]
    options = any_options(random, model.layers, devices=random.choice((1, 1, 2, 3)))
    assume(all_on_devices(options))
    estimates = model.pair(*longer_context(random, options))
    assume(estimates is not None)
    assert estimates is not None
    before, after = estimates
    assert after.host.compute_bytes >= before.host.compute_bytes


@dataclass(frozen=True)
class Lower:
    """What of a model's options became more, and the one compute buffer that it made smaller."""

    model: str
    options: Options
    more: Options
    place: str
    before: int
    after: int


# Each as llama.cpp's dry run answers (scripts/ground_truth.py has its build).
LOWER_IN_LLAMA_CPP = [
    Lower(
        "qwen2-57b-a14b-q4k",
        {"devices": 1, "parallel": 3, "kv_unified": True, "micro_batch": 256, "context_length": 4096},
        {"context_length": 24096},
        *("device 0", 198101088, 162922496),
    ),
    Lower(
        "smollm3-3b-q4k",
        {"devices": 1, "kv_offload": False, "context_length": 512},
        {"context_length": 20512},
        *("device 0", 272107520, 266862592),
    ),
    Lower(
        "gemma-3-4b-q4k",
        {"devices": 0, "kv_unified": True, "micro_batch": 128, "context_length": 32768},
        {"context_length": 52768},
        *("host", 138150400, 136839680),
    ),
    Lower(
        "llama-3.2-3b-q8",
        {
            "context_length": 512,
            "parallel": 8,
            "kv_unified": True,
            "flash_attention": "off",
            "micro_batch": 32,
        },
        {"micro_batch": 33},
        *("device 0", 18317824, 17335296),
    ),
    Lower(
        "qwen3-8b-q4k",
        {"devices": 2, "cache_type_k": "f32", "cache_type_v": "f32", "context_length": 2048, "parallel": 2},
        {"context_length": 3072, "parallel": 3},
        *("device 0", 138452992, 130318720),
    ),
    Lower(
        "minimax-m3-moe",
        {"context_length": 512, "micro_batch": 200, "kv_unified": True, "parallel": 1},
        {"parallel": 2},
        *("device 0", 2927872, 2257600),
    ),
    Lower(
        "command-r-35b-q4k",
        {"context_length": 1000, "micro_batch": 1024, "gpu_layers": 21},
        {"gpu_layers": 22},
        *("device 0", 1089536000, 1056768000),
    ),
    Lower(
        "qwen2-57b-a14b-q4k",
        {"context_length": 32768, "gpu_layers": 28},
        {"gpu_layers": 29},
        *("device 0", 392183808, 325844992),
    ),
]


@pytest.mark.parametrize("lower", LOWER_IN_LLAMA_CPP, ids=lambda lower: f"{lower.model}-{[*lower.more]}")
def test_where_llama_cpp_has_a_smaller_compute_buffer_so_has_the_estimate(
    carried: Carried, lower: Lower
) -> None:
    options = {"backend": "generic", **lower.options}
    estimates = carried[lower.model].pair(options, {**options, **lower.more})
    assert estimates is not None
    sizes = [
        estimate.host if lower.place == "host" else estimate.devices[int(lower.place[-1])]
        for estimate in estimates
    ]
    assert [size.compute_bytes for size in sizes] == [lower.before, lower.after]


def compute_buffers(carried: Carried, what: str) -> Iterator[tuple[int, int]]:
    """Every compute buffer before and after, of the same pairs every time."""
    for name, model in carried.items():
        random = Random(f"{what} of {name}")
        for _ in range(PAIRS_PER_MODEL):
            options = any_options(random, model.layers)
            if what == "more_layers":
                # On CUDA a device also computes for layers on the host, whose weights it copies.
                options |= {"devices": 1, "tensor_split": None, "backend": "generic"}
                # With the output layer the last tokens' rows are picked on the device.
                pair = more_layers(random, options, model.layers, output=False)
            else:
                pair = MORE[what](random, options)
            estimates = model.pair(*pair)
            if estimates is None or tokens_at_once(pair[1]) < tokens_at_once(pair[0]):
                continue
            before, after = estimates
            # A host with fewer layers computes less.
            counted = (before.devices, after.devices) if what == "more_layers" else map(places, estimates)
            for old, new in zip(*counted, strict=True):
                yield old.compute_bytes, new.compute_bytes


@pytest.mark.parametrize(
    ("what", "lower", "by_a_quarter"),
    [
        ("longer_context", 6, 0.3),
        ("larger_micro_batch", 2, 0.5),
        ("more_outputs", 0.5, 0.2),
        ("more_slots_on_one_cache", 9, 1.6),
        ("more_slots_with_a_cache_each", 13, 1.4),
        ("more_layers", 25, 1.8),
    ],
)
def test_more_hardly_ever_lowers_a_compute_buffer(
    carried: Carried, what: str, lower: float, by_a_quarter: float
) -> None:
    """``lower`` and ``by_a_quarter`` are of a thousand buffers, twice what was counted."""
    buffers = list(compute_buffers(carried, what))
    losses = [1 - after / before for before, after in buffers if after < before]
    assert len(buffers) > 3000
    assert len(losses) <= lower / 1000 * len(buffers)
    assert sum(loss > 0.25 for loss in losses) <= by_a_quarter / 1000 * len(buffers)
