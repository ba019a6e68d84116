"""What the proxy knows of its models' memory: asked on the event loop, written behind its back.

Looking up takes microseconds and touches no store. :meth:`KnownMemory.read` and
:meth:`KnownMemory.remember` wait for the file and belong in a thread.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_gpu import _core
from llama_gpu._core import Gpu, Header, MemoryEstimate
from llama_gpu.errors import LlamaGpuError
from llama_gpu.launch import Engine
from llama_gpu.memory.best import build_now, mark_of
from llama_gpu.memory.builds import keeps_logits_of_slots_alone
from llama_gpu.memory.case import Case, gpu_kind, model_identity, options_text
from llama_gpu.memory.record import Record, Taken
from llama_gpu.memory.store import EngineMark, MemoryStore

__all__ = ["KnownMemory", "Load"]


@dataclass(frozen=True)
class Load:
    """A model and how it is loaded, wherever it goes.

    ``options`` are those of ``estimate`` less what a placement decides (devices, split, layers on them).
    """

    header: Header
    options: Mapping[str, Any]
    extra_arguments: Sequence[str] = ()


class KnownMemory:
    """Records by case, those of the store and those of this process. Any thread may call anything."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._records: dict[Case, Record] = {}
        self._load_seconds: dict[str, float] = {}
        self._mark: EngineMark | None = None
        self._slots_alone: dict[str, tuple[float, bool]] = {}

    @property
    def build(self) -> str | None:
        """The llama.cpp that loads are started with; None before one was found."""
        return self._mark.build if self._mark else None

    @property
    def keeps_logits_of_slots_alone(self) -> bool:
        """Whether servers do, as the last load of this llama.cpp said, or else as its build number tells.

        False where neither does: then a server may keep those of a whole physical batch, as the dry run does.
        """
        if self.build is None:
            return False
        told = self._slots_alone.get(self.build)
        return keeps_logits_of_slots_alone(self.build) if told is None else told[1]

    def read(self, headers: Iterable[Header]) -> int:
        """Read the store, and the headers' bytes once, so that looking up need not; how many records."""
        for record in self.store.records():
            with self._lock:
                older = self._records.get(record.case)
                if older is None or older.at <= record.at:
                    self._records[record.case] = record
                self._note_outputs(record)
        seconds = self.store.load_seconds()
        for header in headers:
            with contextlib.suppress(OSError):  # a file that has gone is told elsewhere
                if (identity := model_identity(header)) in seconds:
                    self._load_seconds.setdefault(_first_file(header), seconds[identity])
        return len(self._records)

    def load_seconds(self, header: Header) -> float | None:
        """What the last load of this model took; None where that is not known."""
        return self._load_seconds.get(_first_file(header))

    def remember_load_seconds(self, header: Header, seconds: float) -> None:
        """Keep what a load of this model took, here and in the store."""
        self._load_seconds[_first_file(header)] = seconds
        with contextlib.suppress(OSError):
            self.store.put_load_seconds(model_identity(header), seconds)

    def use_engine(self, engine: Engine) -> EngineMark | None:
        """From now on this llama.cpp counts; what the store should be told if it is another one."""
        mark = mark_of(engine)
        if mark == self._mark:
            return None
        self._mark = mark
        return mark

    def use_last_engine(self) -> None:
        """As :meth:`use_engine`, with the one that the proxy used last, as it stands there now."""
        mark = self.store.engine()
        build = None if mark is None else build_now(mark)
        self._mark = None if build is None else EngineMark(build)

    def case(self, load: Load, said: MemoryEstimate, gpus: Sequence[Gpu]) -> Case | None:
        """The key of a load; None while no llama.cpp is known, or where a file cannot be read.

        ``said`` is the analytic estimate on ``gpus``, which are in device order.
        """
        if self.build is None or len(said.devices) != len(gpus):
            return None
        try:
            return Case(
                model=model_identity(load.header),
                options=options_text(said, load.options, load.extra_arguments),
                kinds=tuple(map(gpu_kind, gpus)),
                layers=tuple(device.layers for device in said.devices),
                build=self.build,
            )
        except (OSError, LlamaGpuError):
            return None

    def find(self, case: Case) -> Record | None:
        """What is known of exactly this case."""
        return self._records.get(case)

    def most_excess_bytes(self, load: Load, present: Sequence[Gpu]) -> int | None:
        """By how much a device took most more than estimated, over all layouts of this load on such GPUs.

        Negative where every device took less; None where nothing is known.
        """
        if not self._records:
            return None
        # Any layout will do: only what the options come to is taken from it.
        asked = self.case(load, _core.estimate(load.header, **{**load.options, "devices": 0}), ())
        if asked is None:
            return None
        there = Counter(map(gpu_kind, present))
        with self._lock:
            alike = [
                record
                for known, record in self._records.items()
                if (known.model, known.options, known.build) == (asked.model, asked.options, asked.build)
                and Counter(known.kinds) <= there
            ]
        return max(
            (
                best.total_bytes - said.total_bytes
                for record in alike
                if record.best is not record.analytic
                for best, said in zip(record.best.devices, record.analytic.devices, strict=True)
            ),
            default=None,
        )

    def remember(
        self,
        case: Case,
        name: str,
        path: Path,
        said: MemoryEstimate,
        *,
        taken: Taken | None = None,
        projected: MemoryEstimate | None = None,
    ) -> Record:
        """Add what a load took, or what was projected, here and in the store."""
        record = Record(
            case,
            name=name,
            path=str(path),
            analytic=said,
            projected=projected,
            taken=taken,
            at=time.time(),
            loads=int(taken is not None),
        )
        self._add(record)
        self.store.put(record)
        return record

    def _add(self, record: Record) -> None:
        with self._lock:
            older = self._records.get(record.case)
            self._records[record.case] = older.joined(record) if older else record
            self._note_outputs(record)

    def _note_outputs(self, record: Record) -> None:
        """What a load says of its build; nothing where the slots fill a whole batch."""
        outputs = record.taken.max_outputs if record.taken else None
        told = self._slots_alone.get(record.case.build)
        if outputs is None or (told and told[0] > record.at):
            return
        with contextlib.suppress(ValueError, KeyError, TypeError):  # another version of llama-gpu wrote it
            options = json.loads(record.case.options)
            if options["parallel"] < options["batch"]:
                self._slots_alone[record.case.build] = (record.at, outputs <= options["parallel"])


def _first_file(header: Header) -> str:
    """Where a model lies: told without asking the file system, unlike its identity."""
    return header.shards[0].path
