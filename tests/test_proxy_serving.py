"""The proxy end to end, with the real engine on small models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from support.gguf_builder import write_embedding_model, write_llama
from support.proxy import Proxy, chat_body, endless_body, running_proxy


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("ant", "bee", "cat", "dog"), start=1):
        write_llama(folder / f"{name}.gguf", seed=seed, context=32768)
    write_embedding_model(folder / "vectors.gguf")
    return folder


@pytest.fixture(scope="module")
def proxy(models: Path) -> Iterator[Proxy]:
    with running_proxy(models) as running:
        yield running


@pytest.fixture
def pool_of_two(models: Path, tmp_path: Path) -> Iterator[Proxy]:
    config = {"server_pool": {"size": 2}, "defaults": {"context_length": 32768, "threads": 1}}
    with running_proxy(models, config=config, folder=tmp_path) as running:
        yield running


def events(text: str) -> list[dict[str, Any]]:
    """The JSON of a stream's events, less what differs from answer to answer."""
    found = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    for event in found:
        for key in ("id", "created", "timings"):
            event.pop(key, None)
    return found


def test_a_stream_through_the_proxy_equals_the_engines_own_answer(proxy: Proxy) -> None:
    body = chat_body("ant", max_tokens=32, stream=True)
    with proxy.client as client:
        through = client.post("/v1/chat/completions", json=body)
    server = proxy.servers()["ant"]
    environment = Path(f"/proc/{server['process']}/environ").read_bytes().split(b"\0")
    key = next(item.split(b"=", 1)[1] for item in environment if item.startswith(b"LLAMA_API_KEY="))
    direct = httpx2.post(
        f"http://{server['host']}:{server['port']}/v1/chat/completions",
        json=body,
        headers={"Authorization": f"Bearer {key.decode()}"},
    )
    assert through.headers["content-type"] == direct.headers["content-type"]
    assert len(events(through.text)) > 5
    assert events(through.text) == events(direct.text)
    assert through.text.rstrip().endswith("data: [DONE]")


def test_a_server_refuses_who_comes_without_its_key(proxy: Proxy) -> None:
    assert proxy.chat("ant").status_code == 200
    server = proxy.servers()["ant"]
    answer = httpx2.post(f"http://127.0.0.1:{server['port']}/v1/chat/completions", json=chat_body("ant"))
    assert answer.status_code == 401


def test_two_models_answer_at_once(proxy: Proxy) -> None:
    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(proxy.chat, ["ant", "bee"]))
    assert [answer.status_code for answer in answers] == [200, 200]
    assert {answer.json()["model"] for answer in answers} == {"ant", "bee"}
    servers = proxy.servers()
    assert servers["ant"]["status"] == servers["bee"]["status"] == "running"
    assert servers["ant"]["process"] != servers["bee"]["process"]


def test_a_third_model_makes_the_idle_one_leave_and_never_the_busy_one(pool_of_two: Proxy) -> None:
    proxy = pool_of_two
    with (
        proxy.client as client,
        client.stream("POST", "/v1/chat/completions", json=endless_body("ant")) as busy,
    ):
        stream = busy.iter_lines()
        assert next(stream).startswith("data: ")  # and nothing more is read: it stays busy
        assert proxy.chat("bee").status_code == 200
        assert proxy.chat("cat").status_code == 200
        assert proxy.servers().keys() == {"ant", "cat"}
        assert next(line for line in stream if line).startswith("data: ")


def test_fifty_first_requests_at_once_start_one_server(proxy: Proxy) -> None:
    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(lambda _: proxy.chat("dog"), range(50)))
    assert [answer.status_code for answer in answers] == [200] * 50
    assert sum("load dog" in line for line in proxy.lines) == 1
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1


def test_the_official_openai_client_works_streaming_and_not(proxy: Proxy) -> None:
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="none needed", max_retries=0) as client:
        assert {model.id for model in client.models.list()} == {"ant", "bee", "cat", "dog", "vectors"}
        body = {k: v for k, v in chat_body("cat", max_tokens=16).items() if k != "model"}
        whole = client.chat.completions.create(model="cat", **body)
        pieces = list(client.chat.completions.create(model="cat", stream=True, **body))
        streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert streamed == whole.choices[0].message.content
        completion = client.completions.create(model="cat", prompt="Once", max_tokens=4, temperature=0)
        assert completion.usage is not None
        assert completion.usage.completion_tokens > 0
        vectors = client.embeddings.create(model="vectors", input=["one", "two"]).data
        assert len(vectors) == 2
        assert len(vectors[0].embedding) == len(vectors[1].embedding) > 0


def test_every_other_path_of_llama_server_reaches_the_named_model(proxy: Proxy) -> None:
    with proxy.client as client:
        tokens = client.post("/tokenize", json={"model": "ant", "content": "Hello"})
        properties = client.get("/props", params={"model": "ant"})
        slots = client.get("/slots?model=ant")
    assert tokens.json()["tokens"]
    assert properties.json()["model_path"].endswith("ant.gguf")
    assert isinstance(slots.json(), list)


def test_every_decision_is_logged_in_one_line_with_its_microseconds(proxy: Proxy) -> None:
    assert proxy.chat("ant").status_code == 200
    assert int(proxy.wait_for_line(r"load ant: .*decided_us=(\d+)")[1]) >= 0


def test_a_model_dropped_into_the_folder_while_serving_can_be_asked(proxy: Proxy, models: Path) -> None:
    newcomer = models / "dove.gguf"
    try:
        write_llama(newcomer, seed=9)
        assert proxy.chat("dove").status_code == 200
    finally:
        newcomer.unlink(missing_ok=True)


def test_a_client_that_leaves_frees_its_model_for_others(pool_of_two: Proxy) -> None:
    proxy = pool_of_two
    for model in ("ant", "bee"):
        with (
            proxy.client as client,
            client.stream("POST", "/v1/chat/completions", json=endless_body(model)) as busy,
        ):
            assert next(busy.iter_lines()).startswith("data: ")
    assert proxy.chat("cat").status_code == 200


def test_health_has_the_shape_that_clients_know(proxy: Proxy) -> None:
    proxy.chat("ant")
    state = proxy.get("/health")
    assert state["status"] == "ok"
    assert state["mode"] == "cpu"
    assert state["gpu_pool_status"]["gpu_list"] == []
    assert state["gpu_pool_status"]["total_gpus"] == state["gpu_pool_status"]["available_gpus"] == 0
    assert state["gpu_pool_status"]["reason"]
    server = proxy.servers()["ant"]
    assert server["gpu_assignment"] is None
    assert server["status"] == "running"
    assert 1 <= server["port"] <= 65535


def test_a_pinned_model_is_loaded_at_start_and_an_idle_one_leaves_after_its_time(
    models: Path, tmp_path: Path
) -> None:
    config = {"models": {"ant": {"pinned": True}, "bee": {"ttl_seconds": 0.1}}}
    with running_proxy(models, config=config, folder=tmp_path) as proxy:
        proxy.wait_until(lambda state: [server["status"] for server in state["servers"]] == ["running"])
        assert proxy.chat("bee").status_code == 200
        proxy.wait_for_line("unload bee: idle for")
        proxy.wait_until(lambda state: [server["model_id"] for server in state["servers"]] == ["ant"])


def test_a_model_whose_file_is_deleted_while_it_is_served_does_not_stop_the_others(
    models: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    (folder / "ant.gguf").write_bytes((models / "ant.gguf").read_bytes())
    (folder / "bee.gguf").write_bytes((models / "bee.gguf").read_bytes())
    config = {"server_pool": {"size": 1}}
    with running_proxy(folder, config=config, folder=tmp_path) as proxy:
        assert proxy.chat("ant").status_code == 200
        (folder / "ant.gguf").unlink()
        assert [model["id"] for model in proxy.get("/v1/models")["data"]] == ["bee"]
        assert proxy.chat("bee").status_code == 200
        assert proxy.chat("ant").status_code == 404
