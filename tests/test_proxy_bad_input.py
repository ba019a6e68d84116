"""What a user gets wrong on a bad day: each time one clear error, and the proxy serves on."""

from __future__ import annotations

import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.gguf_builder import write_llama
from support.proxy import Proxy, chat_body, running_proxy, start_process


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_llama(folder / "good.gguf", seed=1)
    whole = (folder / "good.gguf").read_bytes()
    (folder / "truncated.gguf").write_bytes(whole[: len(whole) // 2])
    (folder / "absurd.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60))
    return folder


@pytest.fixture(scope="module")
def proxy(models: Path) -> Iterator[Proxy]:
    with running_proxy(models) as running:
        yield running
        assert running.chat("good").status_code == 200, "it still serves after all that"


def failed_start(*arguments: str) -> tuple[int, str]:
    """Exit code and error output of a ``serve`` that must not start."""
    process = start_process(arguments, {})
    try:
        _, errors = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, errors


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    code, errors = failed_start(str(tmp_path / "nowhere"))
    assert code != 0
    assert str(tmp_path / "nowhere") in errors
    assert "Traceback" not in errors


def test_a_port_that_is_taken_is_named_with_the_way_out(models: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, errors = failed_start(str(models), "--port", str(port))
    assert code != 0
    assert f"127.0.0.1:{port}" in errors
    assert "--port" in errors
    assert "Traceback" not in errors


def test_an_unknown_configuration_key_is_named_with_its_file_and_line(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "proxy.yaml"
    path.write_text("server_pool:\n  size: 2\n  sise: 3\n")
    code, errors = failed_start(str(models), "--config", str(path))
    assert code != 0
    assert "server_pool.sise" in errors
    assert f"{path}, line 3" in errors.replace("\n", "")
    assert "Traceback" not in errors


def test_an_unknown_model_is_answered_with_the_models_there_are(proxy: Proxy) -> None:
    answer = proxy.chat("goood")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "model_not_found"
    assert "good" in error["known_models"]
    assert "goood" in error["message"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{ this is no JSON", "no valid JSON"),
        (b"[1, 2]", "must be a JSON object"),
        (b'{"messages": []}', "names no model"),
        (b'{"model": 7}', "names no model"),
        (b"", "names no model"),
    ],
)
def test_a_body_without_a_model_is_a_bad_request(proxy: Proxy, body: bytes, says: str) -> None:
    with proxy.client as client:
        headers = {"Content-Type": "application/json"}
        answer = client.post("/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("model", "reason"), [("truncated", "truncated"), ("absurd", "absurd")])
def test_a_broken_file_is_listed_with_its_reason_and_stops_nobody_else(
    proxy: Proxy, model: str, reason: str
) -> None:
    listed = proxy.get("/v1/models")
    assert [entry["id"] for entry in listed["data"]] == ["good"]
    (broken,) = [entry for entry in listed["broken"] if entry["id"] == model]
    assert broken["path"].endswith(f"{model}.gguf")
    answer = proxy.chat(model)
    assert answer.status_code == 422
    assert reason in answer.json()["error"]["message"]
    assert broken["reason"] == answer.json()["error"]["message"]
    assert proxy.chat("good").status_code == 200


def test_an_answer_of_llama_cpp_itself_goes_through_with_its_status(proxy: Proxy) -> None:
    with proxy.client as client:
        answer = client.post("/v1/chat/completions", json={**chat_body("good"), "messages": "no list"})
    assert answer.status_code == 400
    assert "source" not in answer.json()["error"], "llama.cpp spoke, not we"


def test_a_missing_engine_says_how_to_get_one_and_the_proxy_serves_on(models: Path, tmp_path: Path) -> None:
    config = {"engine": {"path": str(tmp_path / "no-llama-server")}}
    with running_proxy(models, config=config, folder=tmp_path) as proxy:
        for _ in range(2):
            answer = proxy.chat("good")
            assert answer.status_code == 503
            assert "no-llama-server" in answer.json()["error"]["message"]
        assert proxy.get("/health")["servers"] == []


def test_an_engine_that_refuses_the_file_reports_its_last_words(models: Path, tmp_path: Path) -> None:
    config = {"models": {"good": {"extra_arguments": ["--no-such-flag"]}}}
    with running_proxy(models, config=config, folder=tmp_path) as proxy:
        answer = proxy.chat("good")
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] == "server_exited"
        assert "--no-such-flag" in " ".join(answer.json()["error"]["last_log_lines"])


def test_keys_that_are_configured_are_asked_for_everywhere_but_on_health(
    models: Path, tmp_path: Path
) -> None:
    config = {"server": {"api_keys": ["secret"]}}
    with running_proxy(models, config=config, folder=tmp_path) as proxy, proxy.client as client:
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
