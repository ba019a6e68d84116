"""The command that starts a server: what is placed is what llama.cpp is told."""

from pathlib import Path

import pytest

from llama_gpu.engine.arguments import build_parser, known_flags
from llama_gpu.launch import Engine, LaunchPlan, plan_launch

ENGINE = Engine(kind="llama-server", command=("/opt/llama-server",), flags=known_flags() | {"-dev"})


def planned(engine: Engine = ENGINE, **options: object) -> LaunchPlan:
    return plan_launch(
        engine=engine, model_path=Path("/models/a.gguf"), alias="a", api_key="secret", **options
    )  # type: ignore[arg-type]


def value(plan: LaunchPlan, flag: str) -> str:
    assert plan.argv.count(flag) == 1
    return plan.argv[plan.argv.index(flag) + 1]


def test_a_model_on_two_gpus_gets_their_uuids_and_its_split() -> None:
    plan = planned(gpu_uuids=["GPU-b", "GPU-a"], gpu_layers=33, tensor_split=[24, 9])
    assert plan.environment["CUDA_VISIBLE_DEVICES"] == "GPU-b,GPU-a"
    assert plan.environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert (value(plan, "-ngl"), value(plan, "-ts"), value(plan, "-sm")) == ("33", "24,9", "layer")
    assert value(plan, "--fit") == "off"
    assert "-dev" not in plan.argv


def test_a_split_loses_no_digit() -> None:
    plan = planned(gpu_uuids=["GPU-a", "GPU-b"], tensor_split=[0.1234567890123, 2.0])
    assert value(plan, "-ts") == "0.1234567890123,2"


def test_one_gpu_needs_no_split() -> None:
    plan = planned(gpu_uuids=["GPU-a"], tensor_split=[1.0])
    assert "-ts" not in plan.argv
    assert int(value(plan, "-ngl")) > 500


def test_on_the_cpu_no_gpu_is_seen_and_no_device_used() -> None:
    plan = planned()
    assert plan.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert (value(plan, "-ngl"), value(plan, "-dev")) == ("0", "none")
    assert "-sm" not in plan.argv


def test_a_split_for_another_number_of_gpus_is_refused() -> None:
    with pytest.raises(ValueError, match="2 proportions for 3 GPUs"):
        planned(gpu_uuids=["a", "b", "c"], tensor_split=[1, 2])


def test_a_projector_on_the_cpu_and_fewer_checkpoints_are_said_in_llama_cpp_s_words() -> None:
    plan = planned(gpu_uuids=["GPU-a"], mmproj="/m.gguf", mmproj_offload=False, context_checkpoints=3)
    assert "--no-mmproj-offload" in plan.argv
    assert value(plan, "--ctx-checkpoints") == "3"
    plain = planned(gpu_uuids=["GPU-a"])
    assert not {"--no-mmproj-offload", "--ctx-checkpoints"} & set(plain.argv)


def test_the_key_is_not_on_the_command_line_nor_in_the_repr() -> None:
    plan = planned()
    assert not any("secret" in argument for argument in plan.argv)
    assert plan.environment["LLAMA_API_KEY"] == "secret"


def test_the_options_are_those_of_the_estimate() -> None:
    plan = planned(
        gpu_uuids=["GPU-a"],
        context_length=8192,
        parallel=4,
        kv_unified=True,
        batch=1024,
        micro_batch=256,
        flash_attention="on",
        cache_type_k="q8_0",
        cache_type_v="q4_0",
        cpu_moe_layers=3,
        kv_offload=False,
        swa_full=True,
        mmproj="/models/mmproj.gguf",
        embeddings=True,
        pooling="mean",
        threads=6,
        cache_ram_bytes=256 * 1024 * 1024,
        extra_arguments=("--seed", "7"),
    )
    flags = {
        "-c": "8192",
        "-np": "4",
        "-b": "1024",
        "-ub": "256",
        "-fa": "on",
        "-ctk": "q8_0",
        "-ctv": "q4_0",
    }
    flags |= {"-ncmoe": "3", "--mmproj": "/models/mmproj.gguf", "--pooling": "mean", "-t": "6"}
    flags |= {"--cache-ram": "256", "-m": "/models/a.gguf", "--alias": "a", "--seed": "7"}
    assert {flag: value(plan, flag) for flag in flags} == flags
    assert {"-kvu", "-nkvo", "--swa-full", "--embeddings"} <= set(plan.argv)
    assert plan.argv[-2:] == ("--seed", "7")


def test_all_experts_on_the_host_is_a_flag_of_its_own() -> None:
    plan = planned(cpu_moe_layers="all")
    assert "-cmoe" in plan.argv
    assert "-ncmoe" not in plan.argv


def test_an_older_server_is_not_given_flags_it_does_not_know() -> None:
    old = Engine(kind="llama-server", command=("old",), flags=frozenset({"-m", "--no-webui"}))
    argv = planned(old).argv
    assert "--no-webui" in argv
    assert not {"--fit", "-dev", "--no-ui", "--offline", "--log-prefix"} & set(argv)


def test_a_plan_moves_to_another_port() -> None:
    plan = planned()
    moved = plan.on_port(9001)
    assert (value(moved, "--port"), moved.port, moved.base_url) == ("9001", 9001, "http://127.0.0.1:9001")
    assert moved.on_port(0) == plan


def test_variables_that_llama_server_would_obey_are_not_inherited() -> None:
    inherited = {"PATH": "/bin", "LLAMA_ARG_N_GPU_LAYERS": "0", "LLAMA_API_KEY": "theirs"}
    environment = planned().full_environment(inherited)
    assert environment["PATH"] == "/bin"
    assert environment["LLAMA_API_KEY"] == "secret"
    assert "LLAMA_ARG_N_GPU_LAYERS" not in environment


@pytest.mark.parametrize("gpus", [[], ["GPU-a", "GPU-b"]])
def test_the_embedded_engine_understands_every_plan(gpus: list[str]) -> None:
    embedded = Engine(kind="embedded", command=("engine",), flags=known_flags())
    plan = planned(
        embedded,
        gpu_uuids=gpus,
        gpu_layers=5,
        tensor_split=[3, 1.5][: len(gpus)],
        cpu_moe_layers=2,
        swa_full=True,
        kv_offload=False,
        mmproj="p.gguf",
        embeddings=True,
        pooling="last",
        threads=2,
    )
    understood = build_parser().parse_args(plan.argv[1:])
    assert understood.model == "/models/a.gguf"
    assert understood.gpu_layers == (5 if gpus else 0)
    assert understood.tensor_split == ([3.0, 1.5] if gpus else [])
