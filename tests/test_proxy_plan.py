"""``POST /api/plan`` and what is planned at the start, on a running proxy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llama_gpu as lg
from support.fake_nvml import FakeGpu, FakeNvml, default_uuid
from support.gguf_builder import write_llama
from support.proxy import Proxy, running_proxy

MIB = 1 << 20
OPTIONS = {"context_length": 4096, "parallel": 1, "kv_unified": False, "micro_batch": 32}
CONFIG = {
    "defaults": {**OPTIONS, "threads": 1, "min_resident_seconds": 0},
    "gpu": {"headroom_bytes": 0},
}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    write_llama(folder / "ant.gguf", layers=2, context=4096, seed=1)
    write_llama(folder / "bee.gguf", layers=2, context=4096, seed=2)
    write_llama(folder / "cow.gguf", layers=48, context=4096, seed=3)
    (folder / "broken.gguf").write_bytes(b"GGUF")
    return folder


def need(models: Path, model: str) -> int:
    return lg.estimate(models / f"{model}.gguf", **OPTIONS).devices[0].total_bytes


@pytest.fixture
def proxy(models: Path, fake_nvml: FakeNvml, tmp_path: Path) -> Iterator[Proxy]:
    """One GPU that holds one small model."""
    fake_nvml.set_gpus([FakeGpu(total_bytes=need(models, "ant") + MIB)])
    with running_proxy(models, config=CONFIG, folder=tmp_path) as proxy:
        yield proxy


def asked(proxy: Proxy, **question: Any) -> Any:
    with proxy.client as client:
        answer = client.post("/api/plan", json=question)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_plan_says_who_would_leave_and_nobody_does(proxy: Proxy) -> None:
    assert proxy.chat("ant").status_code == 200
    answer = asked(proxy, models=["bee", "ant"])
    bee, ant = answer["models"]
    assert bee["placement"]["evict"] == ["ant"]
    assert [one["outcome"] for one in bee["alternatives"]] == ["short", "refused", "taken"]
    assert bee["alternatives"][-1]["evict"] == ["ant"]
    assert (ant["resident"], ant["placement"]["gpu_uuids"]) == (True, [default_uuid(0)])
    assert proxy.servers().keys() == {"ant"}


def test_imagined_gpus_and_options_are_asked_about_in_place_of_those_there_are(proxy: Proxy) -> None:
    (cow,) = asked(proxy, models="cow")["models"]
    assert cow["placement"] is None
    assert cow["refusal"]["required_bytes"] > 0
    assert {one["outcome"] for one in cow["alternatives"]} == {"short", "refused"}
    answer = asked(proxy, models="cow", gpus=["24GiB", 1 << 30])
    assert [gpu["total_bytes"] for gpu in answer["gpus"]] == [24 << 30, 1 << 30]
    assert answer["models"][0]["placement"]["mode"] == "single"
    answer = asked(proxy, models="cow", gpus=["1GiB"], options={"gpus": [7], "cpu": "allow"})
    assert answer["models"][0]["placement"]["mode"] == "cpu"


def test_models_that_stand_together_are_told_apart_from_those_that_do_not(proxy: Proxy) -> None:
    answer = asked(proxy, models=["ant", "bee"], options={"pinned": True})
    assert sorted(model["together"] or [] for model in answer["models"]) == [[], [0]]
    assert answer["pinned_problem"].startswith("these pinned models cannot stand together: ant and bee")
    assert (
        asked(proxy, models=["ant", "bee"], gpus=["1GiB"], options={"pinned": True})["pinned_problem"] is None
    )


@pytest.mark.parametrize(
    ("question", "status", "said"),
    [
        ({}, 400, "models: Field required"),
        ({"models": ["ant"], "gpus": ["much"]}, 400, "gpus.0: "),
        ({"models": ["ant"], "gpu": []}, 400, "gpu: Extra inputs are not permitted"),
        ({"models": ["ant"], "options": {"mmproj": "/etc/passwd"}}, 400, "options.mmproj: Extra"),
        ({"models": ["gnu"]}, 404, "no model is called 'gnu'"),
        ({"models": ["broken"]}, 422, "broken.gguf"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(
    proxy: Proxy, question: dict[str, Any], status: int, said: str
) -> None:
    with proxy.client as client:
        answer = client.post("/api/plan", json=question)
    assert (answer.status_code, answer.json()["error"]["source"]) == (status, "llama-gpu")
    assert said in answer.json()["error"]["message"]


def test_pinned_models_are_loaded_where_all_of_them_have_room(
    models: Path, fake_nvml: FakeNvml, tmp_path: Path
) -> None:
    """The best fit for the small one would take the only GPU that the large one may use."""
    ant, cow = need(models, "ant"), need(models, "cow")
    fake_nvml.set_gpus([FakeGpu(total_bytes=cow + MIB), FakeGpu(total_bytes=cow + ant // 2)])
    options = {"ant": {"pinned": True}, "cow": {"pinned": True, "gpus": [0]}}
    with running_proxy(models, config={**CONFIG, "models": options}, folder=tmp_path) as proxy:
        state = proxy.wait_until(
            lambda state: [server["status"] for server in state["servers"]] == ["running", "running"]
        )
        places = {server["model_id"]: server["gpu_assignment"]["gpu_ids"] for server in state["servers"]}
        assert places == {"ant": [1], "cow": [0]}
        assert "cannot stand together" not in proxy.log


def test_pinned_models_that_cannot_stand_together_are_warned_of_at_the_start(
    models: Path, fake_nvml: FakeNvml, tmp_path: Path
) -> None:
    fake_nvml.set_gpus([FakeGpu(total_bytes=need(models, "ant") + MIB)])
    options = {name: {"pinned": True} for name in ("ant", "bee")}
    with running_proxy(models, config={**CONFIG, "models": options}, folder=tmp_path) as proxy:
        proxy.wait_for_line("these pinned models cannot stand together: ant and bee")
