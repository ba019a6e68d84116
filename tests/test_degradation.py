"""What a model gives up: the ladder alone, then asked of placement on GPUs of every size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llama_gpu as lg
from llama_gpu.budget import Claim, HostMemory
from llama_gpu.catalog import ModelEntry, scan
from llama_gpu.config import load_config
from llama_gpu.degradation import Rung, given_up, ladder, longest_context
from llama_gpu.errors import ConfigError, DoesNotFitError
from llama_gpu.placing import Placing
from llama_gpu.residents import Assignment, ResidentView
from support.gguf_builder import write_projector, write_sparse

MIB = 1 << 20
GIB = 1 << 30

CONFIGURED = {
    "context_length": 8192,
    "parallel": 4,
    "cache_type_k": "f16",
    "cache_type_v": "f16",
    "micro_batch": 512,
    "cpu_moe_layers": 0,
    "kv_offload": True,
    "mmproj_offload": True,
    "cache_ram_bytes": GIB,
}
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "context_length": st.integers(1, 20000),
        "parallel": st.integers(1, 8),
        "cache_type_k": st.sampled_from(["f32", "bf16", "q8_0", "q4_0"]),
        "micro_batch": st.integers(1, 1024),
        "cpu_moe_layers": st.one_of(st.integers(1, 99), st.just("all")),
        "kv_offload": st.just(False),
        "cache_ram_bytes": st.integers(0, 2 * GIB),
    },
)
STEPS = st.lists(st.one_of(CHANGES, st.sampled_from(["partial", "cpu"])), max_size=8)
CPU = st.sampled_from(["never", "partial", "allow"])


@given(steps=STEPS, cpu=CPU)
def test_the_first_rung_gives_up_nothing_and_each_one_more_than_the_one_before(
    steps: list[Any], cpu: Any
) -> None:
    rungs = list(ladder(CONFIGURED, steps, cpu=cpu))
    assert rungs[0] == Rung()
    uses = ("never", "partial", "allow")
    for before, after in pairwise(rungs):
        assert after != before
        assert after.changes.keys() >= before.changes.keys()
        assert uses.index(after.cpu) >= uses.index(before.cpu)
        for name, value in after.changes.items():
            then = {**CONFIGURED, **before.changes}[name]
            if isinstance(value, int) and name != "cpu_moe_layers":
                assert value <= then, "nothing grows again"
    allowed = max([cpu, *("allow" if s == "cpu" else s for s in steps if isinstance(s, str))], key=uses.index)
    assert rungs[-1].cpu == allowed


def test_a_step_that_is_no_less_than_what_is_configured_is_left_out() -> None:
    steps: list[Mapping[str, Any]] = [
        {"context_length": 8192},
        {"parallel": 4},
        {"cache_type_k": "bf16"},
        {"draft": "none"},
    ]
    assert list(ladder(CONFIGURED, steps)) == [Rung()]


def test_a_step_that_llama_cpp_refuses_is_left_out_of_those_after_it_too() -> None:
    def allowed(changes: Mapping[str, Any]) -> bool:
        return "cache_type_v" not in changes

    rungs = ladder(CONFIGURED, [{"cache_type_v": "q8_0"}, {"parallel": 1}], allowed=allowed)
    assert [dict(rung.changes) for rung in rungs] == [{}, {"parallel": 1}]


def test_the_policy_s_word_on_the_cpu_comes_after_all_steps_unless_they_say_it_earlier() -> None:
    rungs = list(ladder(CONFIGURED, ["partial", {"parallel": 1}], cpu="allow"))
    assert [(rung.cpu, dict(rung.changes)) for rung in rungs] == [
        ("never", {}),
        ("partial", {}),
        ("partial", {"parallel": 1}),
        ("allow", {"parallel": 1}),
    ]


@given(
    shortest=st.integers(1, 9000),
    more=st.integers(1, 9000),
    fits=st.integers(0, 20000),
    slots=st.integers(1, 4),
)
def test_the_longest_context_is_the_one_that_trying_every_multiple_finds(
    shortest: int, more: int, fits: int, slots: int
) -> None:
    step, configured = 256 * slots, shortest + more
    fits = max(fits, shortest)
    found = longest_context(shortest, configured, step, lambda n: n if n <= fits else None, shortest)
    candidates = {shortest, configured, *range(0, configured, step)}
    assert found == max(n for n in candidates if shortest <= n <= fits)


def test_what_is_given_up_is_said_with_its_values_before_and_after() -> None:
    held = {**CONFIGURED, "context_length": 4096, "kv_offload": False}
    texts = [one.text for one in given_up(CONFIGURED, held, cpu_layers=3, all_layers=33)]
    assert texts == ["context_length 8192 -> 4096", "kv_offload true -> false", "3 of 33 layers on the CPU"]
    assert [one.kind for one in given_up(CONFIGURED, CONFIGURED, 33, 33)] == ["cpu"]
    assert given_up(CONFIGURED, CONFIGURED) == ()


def test_never_is_never(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("models: {big: {cpu: never, degrade: [cpu]}}")
    with pytest.raises(ConfigError, match=r"models\.big .* cpu is never"):
        load_config(file)
    file.write_text("defaults: {degrade: [{parallel: 1}, cpu]}\nmodels: {big: {cpu: never}}")
    assert [step for step in load_config(file).options_for("big").degrade if step == "cpu"] == []


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("{context_lenght: 1}", 'unknown key "models.big.degrade.0.context_lenght"; did you mean'),
        ("{}", "should name at least one option"),
        ("gpu", "should be 'partial' or 'cpu'"),
        ("{kv_offload: true}", "should be False"),
        ("{parallel: 0}", "should be greater than 0"),
    ],
)
def test_a_wrong_step_is_named(tmp_path: Path, step: str, said: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"models: {{big: {{degrade: [{step}]}}}}")
    with pytest.raises(ConfigError, match=r"line 1") as caught:
        load_config(file)
    assert said in str(caught.value)


# -- asked of placement -----------------------------------------------------------------------

DEGRADE: list[Any] = [
    {"context_length": 4096},
    {"cache_type_k": "q8_0", "cache_type_v": "q8_0"},
    {"parallel": 1},
]
OPTIONS = {"context_length": 32768, "parallel": 4, "kv_unified": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse(tmp_path_factory.mktemp("model") / "big.gguf")


def entry_of(model: Path, **options: Any) -> tuple[Any, ModelEntry]:
    chosen = {f"defaults.{name}": value for name, value in {**OPTIONS, **options}.items()}
    config = load_config(None, {"gpu.headroom_bytes": 0, **chosen}, environment={})
    (entry,) = scan([model], config).models
    return config, entry


@pytest.fixture
def placed(model: Path) -> Callable[..., Assignment]:
    def placed(
        free_bytes: int,
        residents: tuple[ResidentView, ...] = (),
        claims: tuple[Claim, ...] = (),
        host: HostMemory | None = None,
        **options: Any,
    ) -> Assignment:
        config, entry = entry_of(model, **options)
        placing = Placing(config, lambda _: entry, host=lambda: host)
        gpu = lg.Gpu(index=0, total_bytes=free_bytes, free_bytes=free_bytes, uuid="GPU-a")
        placing.snapshot = lg.GpuSnapshot([gpu] if free_bytes else [])
        return placing("big", residents, claims)

    return placed


def need(model: Path, **options: Any) -> int:
    return lg.estimate(model, **{**OPTIONS, **options}).devices[0].total_bytes


def test_a_model_that_fits_gives_up_nothing(placed: Callable[..., Assignment], model: Path) -> None:
    assignment = placed(need(model), degrade=DEGRADE)
    assert assignment.degraded == ()
    assert assignment.options["context_length"] == OPTIONS["context_length"]


def test_the_context_is_as_long_as_there_is_room_for(placed: Callable[..., Assignment], model: Path) -> None:
    room = need(model, context_length=20 * 1024) + MIB
    assignment = placed(room, degrade=DEGRADE)
    assert assignment.options["context_length"] == 20 * 1024
    assert [one.text for one in assignment.degraded] == ["context_length 32768 -> 20480"]
    assert assignment.bytes_by_gpu["GPU-a"] <= room
    assert "given up: context_length 32768 -> 20480" in assignment.reason


def test_steps_add_up_in_their_order(placed: Callable[..., Assignment], model: Path) -> None:
    floor = need(model, context_length=4096)
    quantised = {"context_length": 4096, "cache_type_k": "q8_0", "cache_type_v": "q8_0"}
    assert need(model, **quantised) < floor
    kinds = [one.kind for one in placed(floor - 1, degrade=DEGRADE).degraded]
    assert kinds == ["context_length", "cache_type_k", "cache_type_v"]


def test_a_later_step_may_give_the_context_back(placed: Callable[..., Assignment], model: Path) -> None:
    room = need(model, cache_type_k="q8_0", cache_type_v="q8_0")
    degrade = [{"context_length": 31 * 1024}, *DEGRADE[1:]]
    assignment = placed(room, degrade=degrade)
    assert [one.kind for one in assignment.degraded] == ["cache_type_k", "cache_type_v"]


@given(share=st.floats(0.5, 1.1))
def test_on_a_gpu_of_any_size_the_first_step_that_helps_is_taken_and_no_other(
    model: Path, share: float
) -> None:
    room = round(need(model) * share)
    sizes = [need(model)]
    changes: dict[str, Any] = {}
    for step in DEGRADE:
        changes |= step
        sizes.append(need(model, **changes))
    config, entry = entry_of(model, degrade=DEGRADE)
    placing = Placing(config, lambda _: entry)
    placing.snapshot = lg.GpuSnapshot([lg.Gpu(index=0, total_bytes=room, free_bytes=room, uuid="GPU-a")])
    taken = next((number for number, size in enumerate(sizes) if size <= room), None)
    if taken is None:
        with pytest.raises(DoesNotFitError) as caught:
            placing("big", (), ())
        assert len(caught.value.degradations_tried) == len(DEGRADE)
        assert caught.value.short_by_bytes == sizes[0] - room
        return
    assignment = placing("big", (), ())
    allowed = {name for step in DEGRADE[:taken] for name in step}
    assert {one.kind for one in assignment.degraded} <= allowed
    assert bool(assignment.degraded) == (taken > 0)
    kept = {name: assignment.options[name] for name in changes}
    assert assignment.bytes_by_gpu == {"GPU-a": need(model, **kept)}
    assert need(model, **kept) <= room


def test_a_refusal_says_what_was_tried_and_by_how_much_it_fell_short(
    placed: Callable[..., Assignment], model: Path
) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        placed(GIB, degrade=DEGRADE)
    error = caught.value
    first, second, third = error.degradations_tried
    assert first.startswith("context_length 32768 -> 4096 (")
    assert second.startswith("cache_type_k f16 -> q8_0, cache_type_v f16 -> q8_0 (")
    assert third.startswith("parallel 4 -> 1")
    assert all(tried.endswith(" short)") for tried in error.degradations_tried)
    assert error.short_by_bytes == need(model) - GIB
    assert str(error).endswith(f"one after the other: {first}; {second}; {third}")


def test_the_cpu_is_used_only_where_it_is_allowed_and_never_in_silence(
    placed: Callable[..., Assignment],
) -> None:
    with pytest.raises(DoesNotFitError):
        placed(GIB)
    with pytest.raises(DoesNotFitError):
        placed(GIB, degrade=["partial"], gpus=["GPU-b"])
    partial = placed(2 * GIB, degrade=["partial"])
    assert partial.mode == "partial"
    assert [one.kind for one in partial.degraded] == ["partial"]
    assert partial.degraded[0].text == f"{33 - partial.gpu_layers} of 33 layers on the CPU"
    on_cpu = placed(GIB // 4, cpu="allow")
    assert (on_cpu.mode, on_cpu.gpu_uuids) == ("cpu", ())
    assert [one.text for one in on_cpu.degraded] == ["all layers on the CPU"]
    asked_for = placed(GIB // 4, gpu_layers=0)
    assert (asked_for.mode, asked_for.degraded) == ("cpu", ())


def busy(held: int, **changes: Any) -> ResidentView:
    values: dict[str, Any] = {
        "server": "other", "model": "other", "bytes_by_gpu": {"GPU-a": held}, "busy": True,
        "idle_seconds": 0.0, "reload_seconds": 1.0, **changes,
    }  # fmt: skip
    return ResidentView(**values)


def test_a_model_waits_for_a_busy_one_rather_than_be_degraded_unless_it_is_told_not_to(
    placed: Callable[..., Assignment], model: Path
) -> None:
    total, held = need(model) + GIB, 2 * GIB
    claims = (Claim({"GPU-a": held}, settled=True),)

    def ask(view: ResidentView, **options: Any) -> Assignment:
        return placed(total, (view,), claims, degrade=DEGRADE, **options)

    with pytest.raises(DoesNotFitError, match="once a model that is busy now is idle"):
        ask(busy(held))
    for _ in ("never leaves", "is told not to wait"):
        assert [one.kind for one in ask(busy(held, stays=True)).degraded] == ["context_length"]
        assert [one.kind for one in ask(busy(held), degrade_at_once=True).degraded] == ["context_length"]
    evicting = ask(busy(held, busy=False))
    assert (evicting.degraded, evicting.evict) == ((), ("other",))


def test_one_more_server_of_a_model_gives_nothing_up(placed: Callable[..., Assignment], model: Path) -> None:
    beside = busy(GIB, server="big", model="big", bytes_by_gpu={"GPU-b": GIB})
    with pytest.raises(DoesNotFitError):
        placed(need(model) - GIB, (beside,), degrade=DEGRADE, cpu="allow")


def test_a_projector_on_the_cpu_spares_the_gpu_all_its_bytes(
    placed: Callable[..., Assignment], model: Path, tmp_path: Path
) -> None:
    projector = write_projector(tmp_path / "mmproj.gguf")
    with_it, without = need(model, mmproj=projector), need(model)
    assert with_it > without
    spared = lg.estimate(model, mmproj=projector, mmproj_offload=False, **OPTIONS)
    assert spared.devices[0].total_bytes == without

    def host(**options: Any) -> int:
        return lg.estimate(model, **{**OPTIONS, **options}).host.total_bytes

    on_the_cpu_alone = host(mmproj=projector, devices=0) - host(devices=0)
    assert spared.host.total_bytes - host() == on_the_cpu_alone
    assignment = placed(without, mmproj=projector, degrade=[{"mmproj_offload": False}])
    assert [one.text for one in assignment.degraded] == ["mmproj_offload true -> false"]
    assert assignment.options["mmproj_offload"] is False


def test_experts_on_the_cpu_are_no_step_for_a_model_without_any(placed: Callable[..., Assignment]) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        placed(GIB, degrade=[{"cpu_moe_layers": "all"}, {"mmproj_offload": False}])
    assert caught.value.degradations_tried == ()


# -- the host's memory ------------------------------------------------------------------------


def test_a_host_that_is_too_small_refuses_with_its_figures(
    placed: Callable[..., Assignment], model: Path
) -> None:
    taken = placed(0, host=HostMemory(64 * GIB, 64 * GIB)).host_bytes
    assert taken > lg.estimate(model, devices=0, **OPTIONS).host.total_bytes
    host = HostMemory(64 * GIB, taken + GIB // 2 - 1)
    with pytest.raises(DoesNotFitError, match=r"of host memory, .* more than there is") as caught:
        placed(0, host=host)
    assert caught.value.required_bytes == taken
    assert caught.value.short_by_bytes == 1
    assert caught.value.free_bytes_by_gpu == {"host": taken - 1}
    assert placed(0, host=HostMemory(64 * GIB, taken + GIB // 2)).degraded == ()


def test_on_the_cpu_a_shorter_context_spares_host_memory(placed: Callable[..., Assignment]) -> None:
    roomy = HostMemory(64 * GIB, 64 * GIB)
    taken = placed(0, host=roomy).host_bytes
    tight = HostMemory(64 * GIB, taken)
    assignment = placed(0, host=tight, degrade=["cpu", {"kv_offload": False}, *DEGRADE])
    assert [one.kind for one in assignment.degraded] == ["context_length"]
    assert assignment.host_bytes + GIB // 2 <= taken


def test_idle_servers_leave_for_host_memory_and_busy_ones_are_waited_for(
    placed: Callable[..., Assignment],
) -> None:
    taken = placed(0, host=HostMemory(64 * GIB, 64 * GIB)).host_bytes
    held = 3 * GIB
    claims = (Claim(host_bytes=held, server="other"),)
    host = HostMemory(64 * GIB, taken + 2 * GIB)
    idle = busy(0, bytes_by_gpu={}, busy=False, host_bytes=held)
    assert placed(0, (idle,), claims, host=host).evict == ("other",)
    with pytest.raises(DoesNotFitError, match="once a model that is busy now is idle"):
        placed(0, (busy(0, bytes_by_gpu={}, host_bytes=held),), claims, host=host)


def test_layers_on_the_cpu_need_host_memory(placed: Callable[..., Assignment]) -> None:
    assert placed(2 * GIB, cpu="partial", host=HostMemory(64 * GIB, 64 * GIB)).mode == "partial"
    with pytest.raises(DoesNotFitError) as caught:
        placed(2 * GIB, cpu="partial", host=HostMemory(64 * GIB, GIB))
    assert "layers on the CPU" in caught.value.degradations_tried[0]
