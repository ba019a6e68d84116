"""The health contract's rules, as the models hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from llama_gpu.api.health import Health

GIB = 1 << 30
Change = Callable[[dict[str, Any], dict[str, Any]], Any]


def answer() -> dict[str, Any]:
    gpu = {
        "id": 0, "uuid": "GPU-a", "name": "NVIDIA", "total_memory": 24.0, "total_memory_bytes": 24 * GIB,
        "free_memory": 20.0, "free_memory_bytes": 20 * GIB, "used_memory": 4.0, "used_memory_bytes": 4 * GIB,
        "available_memory_bytes": 20 * GIB, "ours_memory_bytes": 4 * GIB, "others_memory_bytes": 0,
        "reserved_memory_bytes": 0, "utilization": 3, "temperature": 40.0, "power_usage": 30.0,
        "compute_capability": "8.9", "assigned_models": ["ant"], "state": "assigned", "health": "ok",
        "health_reason": None, "age_seconds": 0.5,
    }  # fmt: skip
    assignment = {
        "gpu_ids": [0], "gpu_uuids": ["GPU-a"], "tensor_splits": None, "n_gpu_layers": 33,
        "estimated_vram_required": 4.0, "estimated_vram_required_bytes": 4 * GIB, "actual_vram_used": None,
        "actual_vram_used_bytes": None,
    }  # fmt: skip
    server = {
        "id": "ant:9000", "host": "127.0.0.1", "port": 9000, "model_id": "ant", "status": "running",
        "process": 7, "gpu_assignment": assignment, "active_requests": 0,
        "degraded": [], "estimated_host_memory_bytes": 0,
    }  # fmt: skip
    pool = {
        "total_gpus": 1, "available_gpus": 1, "total_vram": 24.0, "total_vram_bytes": 24 * GIB,
        "available_vram": 20.0, "available_vram_bytes": 20 * GIB, "allocation_strategy": "distribute",
        "gpu_list": [gpu], "reason": None,
    }  # fmt: skip
    return {
        "status": "ok", "mode": "gpu", "servers": [server], "gpu_pool_status": pool,
        "host_memory": None, "snapshot_age_seconds": 0.5, "waiting_requests": 0, "reasons": [],
    }  # fmt: skip


def test_an_answer_as_it_should_be_is_accepted_and_unknown_is_null() -> None:
    whole = answer()
    assert Health.model_validate(whole).model_dump(mode="json") == whole
    (gpu,) = whole["gpu_pool_status"]["gpu_list"]
    gpu |= dict.fromkeys(("utilization", "temperature", "power_usage", "compute_capability", "name"))
    gpu |= dict.fromkeys(("free_memory", "free_memory_bytes", "used_memory", "used_memory_bytes"))
    assert Health.model_validate(whole).model_dump(mode="json") == whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda gpu, _: gpu.update(id=-1), "greater than or equal to 0"),
        (lambda gpu, _: gpu.update(free_memory=-1.0), "greater than or equal to 0"),
        (lambda gpu, _: gpu.update(total_memory_bytes=-1), "greater than or equal to 0"),
        (lambda gpu, _: gpu.update(utilization=101), "less than or equal to 100"),
        (lambda gpu, _: gpu.update(used_memory_bytes=25 * GIB), "more free, used or available memory"),
        (lambda gpu, _: gpu.update(available_memory_bytes=25 * GIB), "more free, used or available memory"),
        (lambda gpu, _: gpu.update(health="fine"), "'ok', 'degraded' or 'lost'"),
        (lambda _, server: server.update(port=0), "greater than or equal to 1"),
        (lambda _, server: server.update(port=65536), "less than or equal to 65535"),
        (lambda _, server: server.update(status="up"), "'starting'"),
        (lambda _, server: server["gpu_assignment"].update(gpu_ids=[-1]), "greater than or equal to 0"),
        (lambda _, server: server["gpu_assignment"].update(gpu_ids=[0, 1]), "differ in length"),
        (
            lambda _, server: server["gpu_assignment"].update(actual_vram_used_bytes=25 * GIB),
            "ant is assigned more memory than its GPUs have",
        ),
        (
            lambda _, server: server["gpu_assignment"].update(estimated_vram_required_bytes=25 * GIB),
            "ant is assigned more memory than its GPUs have",
        ),
    ],
)
def test_an_answer_that_breaks_the_contract_is_refused(change: Change, said: str) -> None:
    whole = answer()
    change(whole["gpu_pool_status"]["gpu_list"][0], whole["servers"][0])
    with pytest.raises(ValidationError, match=said):
        Health.model_validate(whole)


def test_more_available_than_there_is_is_refused() -> None:
    whole = answer()
    whole["gpu_pool_status"]["available_vram_bytes"] = 25 * GIB
    with pytest.raises(ValidationError, match="more is available than there is"):
        Health.model_validate(whole)
