"""Asks llama.cpp's dry run what the models will take, in the background, before they are loaded.

One question at a time, at low priority, none while a server loads: the tool holds a context on the
GPUs for as long as it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog

from llama_gpu import Gpu, MemoryEstimate, estimate
from llama_gpu.budget import Claim
from llama_gpu.catalog import ModelEntry
from llama_gpu.errors import LlamaGpuError
from llama_gpu.launch import DryRun, plan_dry_run
from llama_gpu.loading import estimate_options, load_of
from llama_gpu.memory.case import Case
from llama_gpu.memory.known import KnownMemory
from llama_gpu.memory.projection import projected_estimate, read_projection
from llama_gpu.residents import Assignment

__all__ = ["Projecting"]

ANSWER_SECONDS = 60.0
"""A dry run takes about a second; one that hangs ends then."""

CONTEXT_BYTES = 1 << 30
"""A GPU with less left is not asked on: the tool's context could take what a server is about to need."""

NICENESS = 10
SPAWN = Path(__file__).with_name("engine") / "spawn.py"

_log = structlog.get_logger("llama_gpu")


@dataclass(frozen=True, slots=True)
class _Question:
    case: Case
    said: MemoryEstimate
    whole: MemoryEstimate
    run: DryRun
    gpu_uuids: tuple[str, ...]


class Projecting:
    """Questions to one tool after the other.

    ``place`` says where a model would go now, ``gpus`` reads the last snapshot.
    """

    def __init__(
        self, known: KnownMemory, place: Callable[[str], Assignment], gpus: Callable[[], Iterable[Gpu]]
    ) -> None:
        self._known = known
        self._place = place
        self._gpus = gpus
        self._asked: set[Case] = set()
        self._one = asyncio.Lock()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._child: asyncio.subprocess.Process | None = None
        self.claims: tuple[Claim, ...] = ()
        """The tool's process, which holds memory now that is as good as free."""

    def loading(self, loads: bool) -> None:
        """Whether a server loads now: then the question under way is given up and asked again later."""
        if not loads:
            self._quiet.set()
        elif self._quiet.is_set():
            self._quiet.clear()
            self._end_child()

    async def ask(self, tool: Path, entries: Iterable[ModelEntry]) -> None:
        """Ask of every model of which nothing better than the estimate is known where it would go now."""
        async with self._one:
            for entry in entries:
                answered = False
                while not answered:
                    await self._quiet.wait()
                    question = self._question(tool, entry)
                    answered = question is None or await self._answer(question, entry)

    def _question(self, tool: Path, entry: ModelEntry) -> _Question | None:
        """None where there is nothing to ask, or no room to ask it."""
        if entry.header is None or entry.mmproj or entry.options.draft or entry.options.extra_arguments:
            return None  # the tool knows nothing of those
        try:
            assignment = self._place(entry.id)
        except LlamaGpuError:
            return None
        by_uuid = {gpu.uuid: gpu for gpu in self._gpus()}
        gpus = [by_uuid[uuid] for uuid in assignment.gpu_uuids if uuid in by_uuid]
        said = assignment.estimate
        roomy = gpus and all((gpu.free_bytes or 0) >= CONTEXT_BYTES for gpu in gpus)
        load = load_of(entry, assignment.options)
        case = self._known.case(load, said, gpus) if said and roomy else None
        if said is None or case is None or case in self._asked or self._known.find(case):
            return None
        run = plan_dry_run(
            tool,
            model_path=entry.path,
            gpu_uuids=assignment.gpu_uuids,
            gpu_layers=assignment.gpu_layers,
            tensor_split=assignment.tensor_split or (),
            **estimate_options(assignment.options),
        )
        if run is None:
            return None
        # As the tool reckons: with the logits of a whole physical batch.
        whole = estimate(
            load.header,
            devices=len(gpus),
            gpu_layers=assignment.gpu_layers,
            tensor_split=assignment.tensor_split,
            **load.options,
        )
        return _Question(case, said, whole, run, assignment.gpu_uuids)

    async def _answer(self, question: _Question, entry: ModelEntry) -> bool:
        """Ask, and remember the answer; False to ask again."""
        text = await self._output(question)
        if not self._quiet.is_set():
            return False
        self._asked.add(question.case)
        rows = None if text is None else read_projection(text, len(question.gpu_uuids))
        if rows is None:
            _log.debug(f"the dry run does not say what {entry.id} takes")
            return True
        said = question.said
        projected = projected_estimate(rows, said, question.whole)
        await asyncio.to_thread(
            self._known.remember, question.case, entry.id, entry.path, said, projected=projected
        )
        _log.debug(
            f"{entry.id}: {projected.total_device_bytes} bytes projected, {said.total_device_bytes} estimated"
        )
        return True

    async def _output(self, question: _Question) -> str | None:
        try:
            self._child = child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(SPAWN), str(os.getpid())),
                *question.run.argv,
                env=question.run.full_environment(os.environ),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError:
            return None
        self.claims = (Claim(dict.fromkeys(question.gpu_uuids, 0), child.pid),)
        try:
            with contextlib.suppress(OSError):  # it has ended already
                os.setpriority(os.PRIO_PROCESS, child.pid, NICENESS)
            async with asyncio.timeout(ANSWER_SECONDS):
                output, _ = await child.communicate()
            return output.decode("utf-8", "replace") if child.returncode == 0 else None
        except TimeoutError:
            return None
        finally:
            self._end_child()
            await child.wait()
            self._child, self.claims = None, ()

    def _end_child(self) -> None:
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
