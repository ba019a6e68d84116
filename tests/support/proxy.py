"""Runs the real ``llama-gpu serve`` as a process, as a user would."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2

ADDRESS = re.compile(r"serves \d+ models? at (http://\S+)/v1")
START_SECONDS = 60.0
# Also outside pytest, whose fixtures name a file of their own.
NOT_THE_USER_S = {
    "LLAMA_GPU_MEMORY_FILE": str(Path(tempfile.gettempdir()) / f"llama-gpu-test-{os.getpid()}.sqlite3")
}


class Proxy:
    """A running proxy: ``url`` once it listens, ``log`` lines as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.url = ""
        self.lines: deque[str] = deque(maxlen=5000)
        self._grown = threading.Condition()
        self._ended = False
        self._readers = [
            threading.Thread(target=self._read, args=(pipe,), daemon=True) for pipe in self._pipes()
        ]
        for reader in self._readers:
            reader.start()

    def _pipes(self) -> list[Any]:
        return [self.process.stdout, self.process.stderr]

    def _read(self, pipe: Any) -> None:
        for line in pipe:
            with self._grown:
                self.lines.append(line.rstrip("\n"))
                self._grown.notify_all()
        with self._grown:
            self._ended = True
            self._grown.notify_all()

    def wait_for_line(self, pattern: str, seconds: float = START_SECONDS) -> re.Match[str]:
        """The first line, past or to come, that matches; fails with the log when none does."""

        def found() -> re.Match[str] | None:
            return next((m for line in list(self.lines) if (m := re.search(pattern, line))), None)

        with self._grown:
            self._grown.wait_for(lambda: found() is not None or self._ended, timeout=seconds)
        match = found()
        assert match is not None, f"no line matches {pattern!r} in:\n{self.log}"
        return match

    @property
    def log(self) -> str:
        """All that the proxy has written so far."""
        return "\n".join(self.lines)

    @property
    def client(self) -> httpx2.Client:
        """A fresh HTTP client of the proxy."""
        return httpx2.Client(base_url=self.url, timeout=60)

    def get(self, path: str) -> Any:
        """The JSON of a GET that must succeed."""
        with self.client as client:
            answer = client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def chat(self, model: str, **options: Any) -> httpx2.Response:
        """One chat completion, not streamed."""
        with self.client as client:
            return client.post("/v1/chat/completions", json=chat_body(model, **options))

    def servers(self) -> dict[str, dict[str, Any]]:
        """``/health``'s servers by model id."""
        return {server["model_id"]: server for server in self.get("/health")["servers"]}

    def pid_of(self, model: str) -> int:
        """The process that serves ``model``."""
        return int(self.servers()[model]["process"])

    def wait_until(self, holds: Callable[[dict[str, Any]], Any], seconds: float = 30) -> dict[str, Any]:
        """Ask ``/health`` again and again until ``holds`` of its answer; the answer."""
        deadline = time.monotonic() + seconds
        while not holds(state := self.get("/health")):
            assert time.monotonic() < deadline, f"{state}\n{self.log}"
        return state

    def terminate(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Send a signal, wait for the end; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=seconds)


def chat_body(model: str, *, content: str = "Hello", max_tokens: int = 8, **options: Any) -> dict[str, Any]:
    """A request that always gives the same answer."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "seed": 1,
        **options,
    }


def endless_body(model: str) -> dict[str, Any]:
    """A stream far larger than every buffer between the engine and a client that does not read."""
    return chat_body(model, max_tokens=20000, stream=True, ignore_eos=True, logprobs=True, top_logprobs=20)


@contextlib.contextmanager
def running_proxy(
    *arguments: str | Path,
    config: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[Proxy]:
    """``llama-gpu serve ARGUMENTS --port 0`` until the block ends; killed if it will not end."""
    extra: list[str] = []
    if config is not None:
        assert folder is not None
        path = folder / "config.json"
        path.write_text(json.dumps(config))
        extra = ["--config", str(path)]
    process = start_process([*map(str, arguments), "--port", "0", *extra], environment or {})
    proxy = Proxy(process)
    try:
        proxy.url = proxy.wait_for_line(ADDRESS.pattern)[1]
        yield proxy
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pipe in (process.stdout, process.stderr):
            pipe.close() if pipe else None


def start_process(arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """``python -m llama_gpu serve …`` with its output in pipes and no GPU but the given ones."""
    return subprocess.Popen(
        [sys.executable, "-m", "llama_gpu", "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**NOT_THE_USER_S, **os.environ, "NO_COLOR": "1", **environment},
    )


def wait_until_gone(pid: int, seconds: float) -> bool:
    """Wait for a process that need not be our child; True when it ended in time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        return bool(ready)
    finally:
        os.close(descriptor)
