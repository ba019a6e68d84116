"""Ends of all kinds: a child killed, the proxy asked to end, the proxy killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from support.gguf_builder import write_llama
from support.proxy import Proxy, chat_body, endless_body, running_proxy, wait_until_gone


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_llama(folder / "ant.gguf", seed=1, context=32768)
    write_llama(folder / "bee.gguf", seed=2)
    return folder


@pytest.fixture
def proxy(models: Path, tmp_path: Path) -> Iterator[Proxy]:
    config = {"defaults": {"context_length": 32768, "threads": 1}}
    with running_proxy(models, config=config, folder=tmp_path) as running:
        yield running


def test_a_child_killed_mid_stream_ends_the_stream_and_the_next_request_gets_a_fresh_one(
    proxy: Proxy,
) -> None:
    with (
        proxy.client as client,
        client.stream("POST", "/v1/chat/completions", json=endless_body("ant")) as busy,
    ):
        lines = busy.iter_lines()
        assert next(lines).startswith("data: ")
        killed = proxy.pid_of("ant")
        os.kill(killed, signal.SIGKILL)
        try:
            rest = [line for line in lines if line]
        except httpx2.TransportError:
            rest = []
    assert "data: [DONE]" not in rest, "a cut stream must not look complete"
    if rest:
        assert '"error"' in rest[-1]
    proxy.wait_for_line("the server of ant ended by itself")
    assert proxy.chat("ant").status_code == 200
    assert proxy.pid_of("ant") != killed


def test_a_child_killed_while_idle_is_replaced_by_the_next_request(proxy: Proxy) -> None:
    assert proxy.chat("bee").status_code == 200
    killed = proxy.pid_of("bee")
    os.kill(killed, signal.SIGKILL)
    proxy.wait_for_line("the server of bee ended by itself")
    assert proxy.chat("bee").status_code == 200
    assert proxy.pid_of("bee") != killed


def test_term_drains_streams_takes_the_children_along_and_exits_with_zero(proxy: Proxy) -> None:
    body = chat_body("ant", max_tokens=500, stream=True, ignore_eos=True)
    with proxy.client as client, client.stream("POST", "/v1/chat/completions", json=body) as busy:
        lines = busy.iter_lines()
        assert next(lines).startswith("data: ")
        child = proxy.pid_of("ant")
        proxy.process.send_signal(signal.SIGTERM)
        proxy.wait_for_line("finishing what runs")
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert proxy.process.wait(timeout=30) == 0
    assert wait_until_gone(child, 5)


def test_interrupt_from_the_keyboard_ends_it_the_same_way(proxy: Proxy) -> None:
    proxy.chat("bee")
    child = proxy.pid_of("bee")
    assert proxy.terminate(signal.SIGINT) == 0
    assert wait_until_gone(child, 5)
    assert "Traceback" not in proxy.log


def test_kill_9_of_the_proxy_takes_the_children_along_within_five_seconds(proxy: Proxy) -> None:
    with ThreadPoolExecutor() as threads:
        assert [answer.status_code for answer in threads.map(proxy.chat, ["ant", "bee"])] == [200, 200]
    children = [proxy.pid_of("ant"), proxy.pid_of("bee")]
    proxy.process.kill()
    assert all(wait_until_gone(child, 5) for child in children)
