"""Remembers what every load of the proxy took, and what llama.cpp projected, for the next one.

Requests never wait for it: files are read and written in threads, by tasks of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

import structlog

from llama_gpu import Gpu, estimate
from llama_gpu.budget import Claim
from llama_gpu.buffer_lines import LoadedBuffers
from llama_gpu.catalog import ModelEntry
from llama_gpu.config import Config
from llama_gpu.launch import Engine
from llama_gpu.loading import load_of, outputs_of_slots
from llama_gpu.measured import taken_by_load
from llama_gpu.memory.known import KnownMemory
from llama_gpu.memory.projection import projection_tool
from llama_gpu.memory.record import Taken
from llama_gpu.memory.store import store_at
from llama_gpu.projecting import Projecting
from llama_gpu.residents import Assignment

__all__ = ["Remembering"]

Spawn = Callable[[Coroutine[Any, Any, None], str], None]

_log = structlog.get_logger("llama_gpu")


class Remembering:
    """``known`` is what placing asks; ``spawn`` runs a coroutine on its own.

    ``place`` says where a model would go now, ``gpus`` reads the last snapshot.
    """

    def __init__(
        self,
        config: Config,
        spawn: Spawn,
        *,
        place: Callable[[str], Assignment],
        gpus: Callable[[], Iterable[Gpu]],
    ) -> None:
        self.known = KnownMemory(store_at(config.memory.path))
        self._projecting = Projecting(self.known, place, gpus) if config.memory.projection else None
        self._spawn = spawn
        self._entries: tuple[ModelEntry, ...] = ()
        self._engine: Engine | None = None
        self._recalled = False

    def recall(self, entries: Iterable[ModelEntry]) -> None:
        """Read what earlier processes remembered; until that is done, estimates are analytic."""
        self._entries = tuple(entries)
        headers = [entry.header for entry in self._entries if entry.header is not None]

        async def read() -> None:
            count = await asyncio.to_thread(self.known.read, headers)
            if count and not self._recalled:
                _log.info(f"memory of earlier loads is known: {count}")
            self._recalled = True
            self._project()

        self._spawn(read(), "recalling memory")

    def engine_found(self, engine: Engine) -> None:
        """From now on loads are made with this llama.cpp."""
        if mark := self.known.use_engine(engine):
            self._engine = engine
            self._spawn(_in_thread(self.known.store.set_engine, mark), "remembering the engine")
            self._project()

    def _project(self) -> None:
        """Ask the dry run once what is remembered and which engine it is stand fast."""
        tool = projection_tool(self._engine) if self._engine and self._recalled else None
        if tool and self._projecting:
            self._spawn(self._projecting.ask(tool, self._entries), "projecting memory")

    def loading(self, loads: bool) -> None:
        """Whether a server loads now: the dry run keeps out of its way."""
        if self._projecting:
            self._projecting.loading(loads)

    def claims(self) -> Sequence[Claim]:
        """Processes of ours that are no servers: what they hold counts as free."""
        return self._projecting.claims if self._projecting else ()

    def load_seconds(self, entry: ModelEntry) -> float | None:
        """What the last load of this model took, in this process or an earlier one."""
        return self.known.load_seconds(entry.header) if entry.header else None

    def loaded(
        self,
        entry: ModelEntry,
        assignment: Assignment,
        gpus: Sequence[Gpu],
        buffers: LoadedBuffers,
        *,
        pid: int | None,
        seconds: float,
        build: str | None,
    ) -> None:
        """A server became ready, after ``seconds``.

        ``gpus`` is a snapshot of that time, ``pid`` the server as the driver knows it, None where it does
        not, and ``build`` the llama.cpp that it was started with.
        """
        if entry.header is not None:
            work = _in_thread(self.known.remember_load_seconds, entry.header, seconds)
            self._spawn(work, f"remembering how long {entry.id} took")
        taken = taken_by_load(
            gpus,
            pid,
            assignment.gpu_uuids,
            buffers,
            logged_in_full=entry.mmproj is None,
            says_outputs=outputs_of_slots(entry, assignment.options) is not None,
        )
        by_uuid = {gpu.uuid: gpu for gpu in gpus}
        used = [by_uuid[uuid] for uuid in assignment.gpu_uuids if uuid in by_uuid]
        # The engine may have been replaced since; then nobody knows which of the two this was.
        if taken is not None and entry.header is not None and build == self.known.build:
            self._spawn(_in_thread(self._remember, entry, assignment, used, taken), f"remembering {entry.id}")

    def _remember(self, entry: ModelEntry, assignment: Assignment, gpus: Sequence[Gpu], taken: Taken) -> None:
        load, said = load_of(entry, assignment.options), assignment.estimate
        if said is None or len(said.devices) != len(gpus):
            said = estimate(load.header, **{**load.options, "devices": len(gpus)})
        case = self.known.case(load, said, gpus)
        if case is None:
            return
        record = self.known.remember(case, entry.id, entry.path, said, taken=taken)
        if record.measured is not None:
            took = record.measured.total_device_bytes or record.measured.host.total_bytes
            expected = said.total_device_bytes or said.host.total_bytes
            _log.debug(f"{entry.id} took {took} bytes where {expected} were estimated")


async def _in_thread(work: Callable[..., object], *values: object) -> None:
    await asyncio.to_thread(work, *values)
