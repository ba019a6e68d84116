#!/usr/bin/env python3
"""A stand-in for ``llama-server`` whose misbehaviour can be scripted; standard library only.

Give its path wherever an engine is configured. It takes the flags of a launch plan and refuses others,
answers ``--help`` and ``--version``, loads, listens, checks its key, streams, and ends on TERM. What it does
besides is told by JSON, the later winning: the variable ``FAKE_LLAMA_SERVER``, the file
``MODEL_PATH.fake.json``, the flag ``--fake``:

    load_seconds 0.0          time from listening to ready; /health answers 503 meanwhile
    load_gate null            path of a FIFO: ready only once somebody has opened it for writing
    exit_at_load null         exit code: ends instead of becoming ready, after `log_lines`
    exit_after_answers null   ends with `exit_code` when that many answers have been begun and this one is due
    exit_after_tokens null    ends with `exit_code` in the middle of a stream, after so many tokens
    exit_code 139             as above
    ignore_term false         TERM does nothing
    tokens 8                  how many tokens an answer has, unless the request says max_tokens
    seconds_per_token 0.0     pause before each token
    stream_gate null          path of a FIFO: each byte written to it lets one token out
    log_lines []              written to stderr while loading
    load_log "at once"        when it writes what it loaded: "late" is behind its first answers, "never"
    stderr_bytes 0            so many bytes without a newline on stderr while loading
    count_starts false        counts its starts in MODEL_PATH.starts
    port_taken_times 0        says so often that its port is taken; needs count_starts
    grandchild false          starts a process of its own that ignores TERM; its id is in /props

Besides llama-server's paths it answers ``POST /fake/echo`` (what it received) and ``GET /fake/requests``
(paths so far).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DEFAULTS: dict[str, Any] = {
    "load_seconds": 0.0,
    "load_gate": None,
    "exit_at_load": None,
    "exit_after_answers": None,
    "exit_after_tokens": None,
    "exit_code": 139,
    "ignore_term": False,
    "tokens": 8,
    "seconds_per_token": 0.0,
    "stream_gate": None,
    "log_lines": [],
    "load_log": "at once",
    "stderr_bytes": 0,
    "count_starts": False,
    "port_taken_times": 0,
    "grandchild": False,
}
VALUES = {
    "-m": "model",
    "--alias": "alias",
    "--host": "host",
    "--port": "port",
    "-c": "context",
    "-np": "parallel",
    "-ngl": "layers",
    "-sm": "mode",
    "-ts": "split",
    "-dev": "device",
    "--fit": "fit",
    "-fa": "flash",
    "-b": "batch",
    "-ub": "ubatch",
    "-ctk": "ctk",
    "-ctv": "ctv",
    "-ncmoe": "ncmoe",
    "-lv": "verbosity",
    "--mmproj": "mmproj",
    "--pooling": "pooling",
    "-t": "threads",
    "--cache-ram": "cache_ram",
    "-md": "draft",
    "-ngld": "draft_layers",
    "--spec-type": "spec_type",
    "--ctx-checkpoints": "checkpoints",
    "--fake": "fake",
}
SWITCHES = (
    "-kvu",
    "-no-kvu",
    "-cmoe",
    "-nkvo",
    "--no-mmproj-offload",
    "--swa-full",
    "--embeddings",
    "--metrics",
    "--slots",
    "--no-ui",
)
SWITCHES += ("--log-prefix", "--log-timestamps", "--offline", "--list-devices")
PUBLIC = ("/health", "/v1/health")
MIB = 1024 * 1024


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, name in VALUES.items():
        parser.add_argument(flag, dest=name, default="")
    for flag in SWITCHES:
        parser.add_argument(flag, action="store_true")
    return parser.parse_args(arguments)


def read_script(options: argparse.Namespace) -> dict[str, Any]:
    beside = Path(f"{options.model}.fake.json")
    texts = [
        os.environ.get("FAKE_LLAMA_SERVER", ""),
        beside.read_text() if beside.exists() else "",
        options.fake,
    ]
    script = dict(DEFAULTS)
    for text in filter(None, texts):
        script.update(json.loads(text))
    if unknown := script.keys() - DEFAULTS.keys():
        sys.exit(f"fake_llama_server: unknown script keys {sorted(unknown)}")
    return script


def log(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, options: argparse.Namespace, script: dict[str, Any]) -> None:
        self.options, self.script = options, script
        self.ready = False
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.answers = 0
        self.grandchild: int | None = None
        self.asked = threading.Event()
        super().__init__((options.host, int(options.port)), Handler)

    def end_if_due(self) -> None:
        with self.lock:
            self.answers += 1
            limit = self.script["exit_after_answers"]
        if limit is not None and self.answers > limit:
            os._exit(self.script["exit_code"])

    def load(self) -> None:
        script = self.script
        if script["grandchild"]:
            ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
            self.grandchild = subprocess.Popen([sys.executable, "-c", ignore]).pid
        for line in script["log_lines"]:
            log(line)
        sys.stderr.write("x" * script["stderr_bytes"])
        if script["load_gate"]:
            Path(script["load_gate"]).open("rb").close()
        time.sleep(script["load_seconds"])
        if script["exit_at_load"] is not None:
            log("error: failed to load model")
            os._exit(script["exit_at_load"])
        if script["load_log"] == "late":
            self.ready = True
            self.asked.wait()
        if script["load_log"] != "never":
            self.log_load()
        self.ready = True

    def log_load(self) -> None:
        layers = int(self.options.layers or 0)
        device = "CUDA0" if layers else "CPU"
        log(f"load_tensors: offloaded {layers}/{max(layers, 1)} layers to GPU")
        log(f"load_tensors: {device:>12s} model buffer size = {10.0:8.2f} MiB")
        log(f"llama_kv_cache: {device:>10s} KV buffer size = {2.0:8.2f} MiB")
        log(f"sched_reserve: {device:>10s} compute buffer size = {1.5:8.2f} MiB")
        log("main: model loaded")


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *values: object) -> None:  # noqa: A002 - the base class says so
        log(f"srv  log_server_r: {format % values}")

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/fake/echo":
            echo = {
                "path": self.path,
                "headers": dict(self.headers.items()),
                "body": body.decode("utf-8", "replace"),
            }
            self.send_json(200, echo)
            return
        try:
            self.answer(json.loads(body))
        except json.JSONDecodeError as error:
            self.fail(400, f"invalid JSON: {error}", "invalid_request_error")

    def answer(self, request: dict[str, Any]) -> None:
        server, path = self.server, self.path.partition("?")[0]
        key = os.environ.get("LLAMA_API_KEY", "")
        if path not in PUBLIC:
            server.requests.append(path)
            if key and self.headers.get("Authorization") != f"Bearer {key}":
                return self.fail(401, "Invalid API Key", "authentication_error")
        if not server.ready:
            self.fail(503, "Loading model", "unavailable_error")
        elif path in ("/v1/chat/completions", "/v1/completions", "/completion"):
            server.end_if_due()
            self.complete(request, chat="chat" in path)
        elif path == "/v1/embeddings":
            server.end_if_due()
            self.embed(request)
        elif path in (facts := self.facts()):
            self.send_json(200, facts[path])
            if path == "/props":
                server.asked.set()
        else:
            self.fail(404, "File Not Found", "not_found_error")
        return None

    def facts(self) -> dict[str, Any]:
        options, server = self.server.options, self.server
        slots = int(options.parallel or 1)
        context = int(options.context or 0) or 2048
        return {
            **{path: {"status": "ok"} for path in PUBLIC},
            "/fake/requests": server.requests,
            "/props": {
                "model_alias": options.alias,
                "model_path": options.model,
                "total_slots": slots,
                "default_generation_settings": {"n_ctx": context // slots},
                "build_info": "fake",
                "grandchild": server.grandchild,
            },
            "/v1/models": {
                "object": "list",
                "data": [{"id": options.alias, "object": "model", "owned_by": "fake"}],
            },
            "/slots": [
                {"id": number, "n_ctx": context // slots, "is_processing": False} for number in range(slots)
            ],
            "/metrics": {"note": "the real one is Prometheus text"},
        }

    def complete(self, request: dict[str, Any], *, chat: bool) -> None:
        server, script = self.server, self.server.script
        count = int(request.get("max_tokens") or request.get("n_predict") or script["tokens"])
        words = [f"word{number} " for number in range(count)]
        identity = {"id": "fake-1", "created": 0, "model": server.options.alias}
        if not request.get("stream"):
            for number in range(count):
                self.before_token(number)
            text = "".join(words)
            choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}
            kind = "chat.completion" if chat else "text_completion"
            choices = [{"index": 0, "finish_reason": "stop", **choice}]
            return self.send_json(200, {**identity, "object": kind, "choices": choices, "usage": usage})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        kind = "chat.completion.chunk" if chat else "text_completion"
        gate = Path(script["stream_gate"]).open("rb", 0) if script["stream_gate"] else None  # noqa: SIM115
        for number, word in enumerate(words):
            if gate is not None:
                gate.read(1)
            self.before_token(number)
            piece = {"delta": {"content": word}} if chat else {"text": word}
            last = "stop" if number == count - 1 else None
            choices = [{"index": 0, "finish_reason": last, **piece}]
            self.send_chunk(
                b"data: " + json.dumps({**identity, "object": kind, "choices": choices}).encode() + b"\n\n"
            )
        self.send_chunk(b"data: [DONE]\n\n")
        self.send_chunk(b"")
        return None

    def before_token(self, number: int) -> None:
        script = self.server.script
        if script["exit_after_tokens"] is not None and number >= script["exit_after_tokens"]:
            self.wfile.flush()
            os._exit(script["exit_code"])
        time.sleep(script["seconds_per_token"])

    def embed(self, request: dict[str, Any]) -> None:
        if not self.server.options.embeddings:
            return self.fail(
                501, "This server does not support embeddings. Start it with `--embeddings`", "not_supported"
            )
        inputs = request.get("input", "")
        inputs = inputs if isinstance(inputs, list) else [inputs]
        rows = [
            {"object": "embedding", "index": number, "embedding": [float(len(str(text))), 0.5]}
            for number, text in enumerate(inputs)
        ]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        answer = {"object": "list", "model": self.server.options.alias, "data": rows, "usage": usage}
        return self.send_json(200, answer)

    def fail(self, status: int, message: str, kind: str) -> None:
        self.send_json(status, {"error": {"code": status, "message": message, "type": kind}})

    def send_json(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


def count_start(options: argparse.Namespace) -> int:
    counter = Path(f"{options.model}.starts")
    starts = int(counter.read_text()) + 1 if counter.exists() else 1
    counter.write_text(str(starts))
    return starts


def main(arguments: list[str]) -> None:
    if "--help" in arguments:
        sys.stdout.write("".join(f"{flag}\n" for flag in (*VALUES, *SWITCHES)))
        return
    if "--list-devices" in arguments:
        sys.stdout.write("Available devices:\n  CUDA0: NVIDIA Fake (24077 MiB, 23600 MiB free)\n")
        return
    if "--version" in arguments:
        sys.stdout.write("version: 0 (fake)\n")
        return
    options = parse(arguments)
    script = read_script(options)
    if script["ignore_term"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if script["count_starts"] and count_start(options) <= script["port_taken_times"]:
        log(f"couldn't bind HTTP server socket, hostname: {options.host}, port: {options.port}")
        sys.exit(1)
    try:
        server = Server(options, script)
    except OSError:
        sys.exit(f"couldn't bind HTTP server socket, hostname: {options.host}, port: {options.port}")
    threading.Thread(target=server.load, daemon=True).start()
    server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main(sys.argv[1:])
