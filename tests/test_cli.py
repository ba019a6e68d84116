"""The commands as a person runs them: the installed script, its output and its exit code."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import llama_gpu
from support.fake_nvml import FakeGpu
from support.gguf_builder import write_llama, write_sparse

SCRIPT = (str(Path(sys.executable).with_name("llama-gpu")),)
MODULE = (sys.executable, "-m", "llama_gpu")
NO_DRIVER = {"LLAMA_GPU_NVML_LIBRARY": "/nonexistent/libnvidia-ml.so.1"}
MIB = 1024 * 1024


def call(*arguments, program=SCRIPT, **environment) -> subprocess.CompletedProcess:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("LLAMA_GPU_")}
    nvml = {key: value for key, value in os.environ.items() if "NVML" in key or "MEMORY_FILE" in key}
    return subprocess.run(
        [*program, *map(str, arguments)],
        env={**inherited, **NO_DRIVER, **nvml, "COLUMNS": "100", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def output_of(*arguments, **options) -> str:
    done = call(*arguments, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def refusal_of(*arguments, code=1, **options) -> str:
    done = call(*arguments, **options)
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return write_llama(folder / "small-F32.gguf")


def test_script_and_module_are_the_same():
    assert output_of("--version") == output_of("--version", program=MODULE) != ""


@pytest.mark.parametrize(
    "command", ["serve", "plan", "simulate", "estimate", "accuracy", "inspect", "gpus", "doctor"]
)
def test_every_command_explains_itself(command):
    assert command in output_of("--help")
    assert "--json" in output_of(command, "--help")


def test_without_the_extra_the_script_says_how_to_get_it(tmp_path):
    # The first place to look for modules has a cyclopts that is not there.
    (tmp_path / "cyclopts.py").write_text("raise ModuleNotFoundError('no cyclopts', name='cyclopts')")
    done = call("gpus", program=MODULE, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "llama-gpu's commands need cyclopts: pip install 'llama-gpu[serve]'\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["srve"], "serve"),
        (["serve", "--prot", "1"], "Did you mean --port?"),
        (["serve", "--port", "many"], "--port"),
        (["inspect"], "FILE"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_told_in_one_line(arguments, said):
    error = refusal_of(*arguments, code=2)
    assert said in error
    assert error.startswith("llama-gpu: ")
    assert error.count("\n") == 1


def test_gpus_without_a_driver_says_why_and_is_no_failure():
    assert output_of("gpus").startswith("No GPU: the NVIDIA driver library could not be loaded")
    answer = json.loads(output_of("gpus", "--json"))
    assert answer["gpus"] == []
    assert "could not be loaded" in answer["error"]


def test_gpus_shows_what_the_driver_tells(fake_nvml):
    fake_nvml.set_gpus([FakeGpu(name="NVIDIA Tiny", total_bytes=8192 * MIB), FakeGpu(name="NVIDIA Big")])
    table = output_of("gpus")
    assert "NVIDIA Tiny" in table
    assert "8.00 GiB" in table
    answer = json.loads(output_of("gpus", "--json"))
    assert [gpu["total_bytes"] for gpu in answer["gpus"]] == [8192 * MIB, 24 * 1024 * MIB]


def test_inspect_shows_what_the_header_says(model):
    text = output_of("inspect", model, "--layers", "--metadata")
    for part in ("llama", "F32", "token_embd.weight", "general.architecture"):
        assert part in text
    answer = json.loads(output_of("inspect", model, "--json"))
    assert answer["architecture"] == "llama"
    assert answer["file_bytes"] == model.stat().st_size
    assert sum(answer["layers"].values()) == sum(kind["bytes"] for kind in answer["types"].values())
    assert answer["metadata"]["tokenizer.ggml.tokens"].startswith(f"array of {answer['vocabulary']} ")


def test_estimate_says_where_the_context_stops_fitting(model):
    def told(gpu_bytes):
        answer = json.loads(output_of("estimate", model, "--gpu", gpu_bytes, "--json"))["gpu"]
        assert answer["device_bytes"] == gpu_bytes
        return answer["largest_context_length"]

    trained = llama_gpu.read_header(model).trained_context_length
    need = {
        c: llama_gpu.estimate(model, context_length=c).devices[0].total_bytes for c in (256, 1024, trained)
    }
    assert told(need[trained]) == trained
    assert told(need[1024]) == 1024
    assert told(need[1024] - 1) == 768
    assert told(need[256] - 1) == 0
    assert f"fits up to 1024 tokens of context, trained for {trained}" in output_of(
        "estimate", model, "--gpu", need[1024]
    )
    assert "does not fit with any context" in output_of("estimate", model, "--gpu", "1MiB")
    assert "--gpu large: should be" in refusal_of("estimate", model, "--gpu", "large")


def test_estimate_says_what_the_library_says(model):
    estimated = llama_gpu.estimate(model, context_length=1024, parallel=2, cache_type_k="f32", devices=2)
    flags = ["-c", 1024, "--parallel", 2, "--cache-type-k", "f32", "--devices", 2]
    answer = json.loads(output_of("estimate", model, *flags, "--json"))
    assert [device["total_bytes"] for device in answer["devices"]] == [
        device.total_bytes for device in estimated.devices
    ]
    assert answer["host"]["weights_bytes"] == estimated.host.weights_bytes
    assert (answer["context_length"], answer["basis"]) == (1024, estimated.basis)
    assert "device 1" in output_of("estimate", model, *flags)


@pytest.mark.parametrize(
    ("flags", "keyword"),
    [
        (["--gpu-layers", 1], {"gpu_layers": 1}),
        (["--cpu-moe-layers", "all"], {"cpu_moe_layers": "all"}),
        (["--no-kv-offload"], {"kv_offload": False}),
        (["--devices", 2, "--tensor-split", 3, 1], {"devices": 2, "tensor_split": [3, 1]}),
        (["--backend", "generic", "--kv-unified"], {"backend": "generic", "kv_unified": True}),
    ],
)
def test_estimate_hands_its_flags_on(model, flags, keyword):
    answer = json.loads(output_of("estimate", model, *flags, "--json"))
    assert answer["total_device_bytes"] == llama_gpu.estimate(model, **keyword).total_device_bytes


def test_a_refused_option_is_told_in_one_line(model):
    assert "cache_type_k" in refusal_of("estimate", model, "--cache-type-k", "q9_9")


def plan_of(*arguments, **options) -> dict[str, dict]:
    return {
        model["id"]: model
        for model in json.loads(output_of("plan", *arguments, "--json", **options))["models"]
    }


@pytest.fixture
def big_models(tmp_path) -> Path:
    for name, layers in {"small": 8, "middle": 16, "large": 64}.items():
        write_sparse(tmp_path / f"{name}.gguf", layers=layers, vocabulary=1000)
    return tmp_path


def test_plan_says_where_each_model_goes_and_which_stand_together(big_models):
    planned = plan_of(big_models, "--gpus", "8GiB,6GiB")
    assert planned["large"]["placement"]["mode"] == "multi"
    assert sum(planned["large"]["placement"]["layers"]) == 65
    assert planned["large"]["together"] is None
    assert "are needed, and the others leave" in planned["large"]["left_out"]
    assert [planned[name]["together"] for name in ("small", "middle")] != [None, None]
    assert planned == plan_of(big_models, "--gpu", "8GiB", "--gpu", "6GiB")
    table = output_of("plan", big_models, "--gpus", "8GiB,6GiB")
    assert "GPU 0 + 1" in table
    assert "Together" in table


def test_plan_says_by_how_much_a_model_does_not_fit_and_what_became_of_each_alternative(big_models):
    large = plan_of(big_models, "--gpus", "1GiB,2GiB")["large"]
    assert large["placement"] is None
    assert "GiB" in large["refusal"]["message"]
    alone, *_ = large["alternatives"]
    assert (alone["step"], alone["outcome"]) == ("one", "short")
    assert alone["short_bytes"] == alone["devices"][0]["required_bytes"] - alone["devices"][0]["free_bytes"]
    steps = {one["step"]: one["outcome"] for one in large["alternatives"]}
    assert steps == {
        "one": "short",
        "several": "short",
        "one-evicting": "refused",
        "partial": "refused",
        "cpu": "refused",
    }
    text = output_of("plan", big_models / "large.gguf", "--gpus", "1GiB,2GiB")
    assert "short on GPU 1" in text
    assert "cpu: never" in text


def test_plan_says_who_would_leave(big_models):
    arguments = (big_models, "--gpus", "4GiB", "--running", "small@0")
    middle = plan_of(*arguments)["middle"]
    assert middle["placement"]["evict"] == ["small"]
    taken = next(one for one in middle["alternatives"] if one["outcome"] == "taken")
    assert (taken["step"], taken["evict"]) == ("one-evicting", ["small"])
    assert taken["eviction_cost"] > 0
    assert plan_of(*arguments)["small"]["resident"]
    error = refusal_of("plan", big_models, "--gpus", "4GiB", "--running", "small@7")
    assert error == "llama-gpu: --running small@7: there is no GPU 7; there are 0\n"
    unknown = refusal_of("plan", big_models, "--gpus", "4GiB", "--running", "smal")
    assert "no model is called 'smal'" in unknown


def test_plan_takes_pinned_models_first_and_says_when_they_cannot_stand_together(big_models):
    config = big_models / "c.yaml"
    config.write_text("models: {small: {pinned: true}, middle: {pinned: true}}")
    answer = json.loads(output_of("plan", big_models, "--config", config, "--gpus", "4GiB", "--json"))
    assert {model["id"] for model in answer["models"][:2]} == {"small", "middle"}
    problem = answer["pinned_problem"]
    assert problem.startswith("these pinned models cannot stand together: ")
    assert "short on GPU 0" in problem
    assert problem in output_of("plan", big_models, "--config", config, "--gpus", "4GiB")
    roomy = json.loads(output_of("plan", big_models, "--config", config, "--gpus", "9GiB", "--json"))
    assert roomy["pinned_problem"] is None


def test_plan_uses_the_gpus_of_this_machine(big_models, fake_nvml):
    fake_nvml.set_gpus([FakeGpu(uuid="GPU-a", total_bytes=80 * 1024 * MIB)])
    planned = plan_of(big_models, "--gpus", "live")
    assert {model["placement"]["gpu_uuids"][0] for model in planned.values()} == {"GPU-a"}
    assert plan_of(big_models) == planned


def test_plan_without_a_gpu_says_that_all_runs_on_the_cpu(big_models):
    for larger in ("middle", "large"):
        (big_models / f"{larger}.gguf").unlink()
    assert output_of("plan", big_models).startswith("No GPU (the NVIDIA driver library could not be loaded")
    assert {model["placement"]["mode"] for model in plan_of(big_models).values()} == {"cpu"}


def test_plan_reckons_with_the_host_s_memory(big_models):
    config = big_models / "c.yaml"
    limit = "memory: {host_limit_bytes: 3GiB, host_headroom_bytes: 0}"
    config.write_text(f"{limit}\ndefaults: {{cache_ram_bytes: 0}}\nmodels: {{small: {{priority: 1}}}}")
    planned = plan_of(big_models, "--config", config)
    assert planned["small"]["placement"]["host_bytes"] < 3 * 1024 * MIB
    assert planned["large"]["placement"] is None
    assert "of host memory" in planned["large"]["refusal"]["message"]


def test_doctor_says_what_memory_there_is_and_what_servers_may_take_of_it(model):
    settings = {"LLAMA_GPU_SERVER_PORT": "0", "LLAMA_GPU_MEMORY_HOST_LIMIT_BYTES": "2GiB"}
    text = output_of("doctor", model.parent, **settings)
    assert "ok    memory: " in text
    assert "of which servers may take 2.00 GiB (memory.host_limit_bytes)" in text
    found = call("doctor", model.parent, "--json", LLAMA_GPU_MEMORY_HOST_HEADROOM_BYTES="1PiB", **settings)
    memory = next(f for f in json.loads(found.stdout)["findings"] if f["about"] == "memory")
    assert not memory["ok"]
    assert "lower memory.host_headroom_bytes" in memory["text"]


def test_plan_asks_for_sizes_it_can_read(big_models):
    assert "should be live, or sizes such as 24GiB" in refusal_of("plan", big_models, "--gpus", "much")


def test_a_file_that_is_not_there_is_named():
    assert (
        refusal_of("inspect", "/nowhere/a.gguf") == "llama-gpu: /nowhere/a.gguf: No such file or directory\n"
    )


def test_a_broken_file_is_told_with_its_place(tmp_path):
    (tmp_path / "a.gguf").write_text("nothing like a model, but long enough")
    assert "byte 0" in refusal_of("inspect", tmp_path / "a.gguf")


def test_output_may_end_early(model):
    done = subprocess.run(
        f"'{SCRIPT[0]}' inspect '{model}' --json | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("{", "")


def test_doctor_finds_a_machine_without_a_gpu_fit_to_serve(model):
    text = output_of("doctor", model.parent, LLAMA_GPU_SERVER_PORT="0")
    assert "look  gpu: the NVIDIA driver library could not be loaded" in text
    assert f"ok    models: 1 in {model.parent}" in text
    assert "ok    engine: " in text


def test_doctor_says_what_keeps_models_from_being_served(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = call(
            "doctor",
            tmp_path / "nowhere",
            "--json",
            LLAMA_GPU_SERVER_PORT=str(port),
            LLAMA_GPU_ENGINE_PATH="/nowhere",
        )
    found = {finding["about"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1
    assert f"127.0.0.1:{port} cannot be used" in found["port"]["text"]
    assert "no such folder" in found["models"]["text"]
    assert "/nowhere" in found["engine"]["text"]


def test_doctor_names_broken_files_and_they_keep_nobody_from_serving(model):
    (model.parent / "broken.gguf").write_bytes(model.read_bytes()[:64])
    text = output_of("doctor", model.parent, LLAMA_GPU_SERVER_PORT="0")
    assert f"look  model file: {model.parent}/broken.gguf" in text


@pytest.mark.parametrize("command", ["serve", "doctor"])
def test_a_wrong_setting_is_named_with_its_line(tmp_path, command):
    file = tmp_path / "c.yaml"
    file.write_text("server:\n  prot: 1\n")
    error = refusal_of(command, "--config", file)
    assert error == f'llama-gpu: {file}, line 2: unknown key "server.prot"; did you mean "server.port"?\n'


def test_a_wrong_flag_value_is_named_as_such():
    error = refusal_of("serve", "--port", 70000)
    assert error.startswith("llama-gpu: the command line: server.port = 70000 should be")


def test_gpus_watch_draws_what_changes_until_ctrl_c(fake_nvml):
    fake_nvml.set_gpus([FakeGpu(temperature=41)])
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [*SCRIPT, "gpus", "--watch", "--interval", "0.05"], stdin=theirs, stdout=theirs, stderr=theirs
    ) as watching:
        os.close(theirs)
        seen = b""
        for degrees in (41, 77):
            fake_nvml.update(0, temperature=degrees)
            while str(degrees).encode() not in seen:
                seen = seen[-4096:] + os.read(ours, 65536)
        watching.send_signal(signal.SIGINT)
        while watching.poll() is None:
            select.select([ours], [], [], 0.1)
            with contextlib.suppress(OSError):
                seen += os.read(ours, 65536)
        os.close(ours)
    assert watching.returncode == 0
    assert "━".encode() in seen or "─".encode() in seen
    assert b"Traceback" not in seen


def test_gpus_watch_as_json_gives_one_document_per_line(fake_nvml):
    fake_nvml.set_gpus([FakeGpu()])
    with subprocess.Popen(
        [*SCRIPT, "gpus", "--watch", "--json", "--interval", "0.01"], stdout=subprocess.PIPE
    ) as watching:
        documents = [json.loads(watching.stdout.readline()) for _ in range(3)]
        watching.send_signal(signal.SIGINT)
    assert [len(document["gpus"]) for document in documents] == [1, 1, 1]
    assert watching.returncode == 0


def test_doctor_says_when_pinned_models_cannot_stand_together(big_models, fake_nvml):
    config = big_models / "c.yaml"
    config.write_text("models: {small: {pinned: true}, middle: {pinned: true}}")

    def told(mebibytes):
        fake_nvml.set_gpus([FakeGpu(total_bytes=mebibytes * MIB)])
        done = call("doctor", big_models, "--config", config, "--json", LLAMA_GPU_SERVER_PORT="0")
        assert done.returncode == 0
        return next(f for f in json.loads(done.stdout)["findings"] if f["about"] == "pinned models")

    assert told(4096)["text"].startswith("these pinned models cannot stand together: ")
    assert told(8192) == {"about": "pinned models", "ok": True, "text": "middle, small have room together"}


def test_doctor_names_the_library_the_driver_came_from_and_what_the_engine_sees(model, fake_nvml):
    fake_nvml.set_gpus([FakeGpu()])
    done = call("doctor", model.parent, "--json", LLAMA_GPU_SERVER_PORT="0")
    found = {finding["about"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert str(fake_nvml.library_path) in found["driver"]["text"]
    assert not found["engine devices"]["ok"]
    assert "sees none of the 1 GPUs" in found["engine devices"]["text"]
    assert "available of" in found["memory"]["text"]
    assert done.returncode == 0, "it serves all the same"
