"""Waiting and being turned away, with a scripted server process whose load a test holds up."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from llama_gpu.load_times import DEFAULT_LOAD_SECONDS
from support.gguf_builder import write_llama
from support.proxy import Proxy, running_proxy

FAKE_ENGINE = Path(__file__).parent / "support" / "fake_llama_server.py"
CONFIG = {"engine": {"path": str(FAKE_ENGINE)}, "server_pool": {"queue_size": 2, "stop_timeout": 1}}


@dataclass(frozen=True)
class SlowProxy:
    proxy: Proxy
    gate: Path

    def let_it_load(self) -> None:
        with self.gate.open("wb"):
            pass


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[SlowProxy]:
    """A proxy with room for two waiting requests, whose model loads when the gate is opened."""
    models = tmp_path / "models"
    models.mkdir()
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    path = write_llama(models / "slow.gguf")
    Path(f"{path}.fake.json").write_text(json.dumps({"load_gate": str(gate)}))
    with running_proxy(models, config=CONFIG, folder=tmp_path) as proxy:
        yield SlowProxy(proxy, gate)


def test_requests_beyond_the_queue_are_told_when_to_come_back_and_the_others_are_served(
    slow: SlowProxy,
) -> None:
    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(slow.proxy.chat, "slow") for _ in range(3)]
        slow.proxy.wait_for_line("refuse: 2 requests already wait for 'slow'")
        slow.let_it_load()
        statuses = sorted(answer.result().status_code for answer in answers)
        (refused,) = [answer.result() for answer in answers if answer.result().status_code == 429]
    assert statuses == [200, 200, 429]
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"


def test_when_to_come_back_goes_by_what_the_load_took_in_an_earlier_process(
    slow: SlowProxy, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(slow.proxy.chat, "slow")
        slow.let_it_load()
        assert answer.result().status_code == 200
    slow.proxy.terminate()
    with running_proxy(tmp_path / "models", config=CONFIG, folder=tmp_path) as proxy:
        proxy.wait_for_line("serves 1 model")
        with ThreadPoolExecutor(3) as threads:
            answers = [threads.submit(proxy.chat, "slow") for _ in range(3)]
            proxy.wait_for_line("refuse: 2 requests already wait for 'slow'")
            slow.let_it_load()
            (refused,) = [answer.result() for answer in answers if answer.result().status_code == 429]
    assert float(refused.json()["error"]["retry_after_seconds"]) < DEFAULT_LOAD_SECONDS / 2


def test_health_answers_and_shows_who_starts_while_requests_wait(slow: SlowProxy) -> None:
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(slow.proxy.chat, "slow")
        slow.proxy.wait_for_line("load slow")
        slow.proxy.wait_until(lambda state: state["servers"])
        state = slow.proxy.get("/health")
        assert state["waiting_requests"] == 1
        assert [server["status"] for server in state["servers"]] == ["starting"]
        slow.let_it_load()
        assert answer.result().status_code == 200
    assert slow.proxy.get("/health")["waiting_requests"] == 0


def test_term_while_a_request_waits_answers_it_and_ends(slow: SlowProxy) -> None:
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(slow.proxy.chat, "slow")
        slow.proxy.wait_for_line("load slow")
        assert slow.proxy.terminate() == 0
        assert answer.result().status_code == 503
        assert "shutting down" in answer.result().json()["error"]["message"]
