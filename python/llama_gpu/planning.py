"""What would be decided, and why, without deciding it: for ``/api/plan`` and ``llama-gpu plan``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from llama_gpu import Alternative, Explanation, Gpu, GpuSnapshot, Policy, Running, explain
from llama_gpu.budget import Claim, HostMemory, available_gpus, overdrawn_bytes
from llama_gpu.catalog import ModelEntry
from llama_gpu.config import Config
from llama_gpu.errors import DoesNotFitError, LlamaGpuError
from llama_gpu.loading import estimate_options, load_of, memory_options, output_options
from llama_gpu.memory.known import KnownMemory
from llama_gpu.placing import Placing
from llama_gpu.residents import Assignment, ResidentView
from llama_gpu.together import plan_together

__all__ = ["PlanAnswer", "PlannedModel", "Planning", "State", "imagined_gpus"]

Bytes = Annotated[int, Field(ge=0)]
Index = Annotated[int, Field(ge=0)]


class PlanGpu(BaseModel):
    """A GPU that was planned for. ``available_bytes``: what may still be claimed, after our promises."""

    index: Index
    uuid: str
    name: str | None
    total_bytes: Bytes | None
    available_bytes: Bytes | None


class PlanDevice(BaseModel):
    """A GPU's part of a model. ``free_bytes``: what it has for it, once those who leave have left."""

    index: Index
    uuid: str
    layers: Index
    required_bytes: Bytes
    free_bytes: Bytes


class PlanAlternative(BaseModel):
    """One way to place a model. ``short_bytes`` are lacking; ``eviction_cost`` in expected microseconds."""

    step: Literal["one", "several", "one-evicting", "several-evicting", "partial", "cpu"]
    outcome: Literal["taken", "fits", "short", "refused"]
    reason: str
    devices: list[PlanDevice]
    short_bytes: Bytes
    evict: list[str]
    eviction_cost: Index


class PlannedPlace(BaseModel):
    """Where a model would go. ``evict``: servers that would leave first; ``degraded``: what it gives up."""

    mode: str
    gpu_indices: list[Index]
    gpu_uuids: list[str]
    layers: list[Index]
    bytes_by_gpu: dict[str, Bytes]
    gpu_layers: Index
    host_bytes: Bytes
    evict: list[str]
    degraded: list[str]
    reason: str


class PlanRefusal(BaseModel):
    """Why a model would go nowhere, what would help, and what it would give up in vain."""

    message: str
    required_bytes: Bytes | None
    free_bytes_by_gpu: dict[str, Bytes]
    short_by_bytes: Bytes
    smallest_change: str | None
    degradations_tried: list[str]


class PlannedModel(BaseModel):
    """One model: a place, a refusal, or a ``problem`` with it.

    ``resident``: it is loaded now, and was planned anew as if it were not. ``together``: its GPUs, where
    all the models of the question stand side by side and nobody leaves; null where there is no room
    then. ``staying``: who may not leave for it, and why.
    """

    id: str
    file_bytes: Bytes
    pinned: bool
    resident: bool
    placement: PlannedPlace | None = None
    refusal: PlanRefusal | None = None
    problem: str | None = None
    alternatives: list[PlanAlternative] = []
    staying: dict[str, str] = {}
    together: list[Index] | None = None
    left_out: str | None = None


class PlanAnswer(BaseModel):
    """``error``: why no GPU can be seen. ``pinned_problem``: why the pinned models cannot stand together."""

    gpus: list[PlanGpu]
    error: str | None
    models: list[PlannedModel]
    pinned_problem: str | None


@dataclass(frozen=True)
class State:
    """What is planned on: GPUs, and for each model who is resident and what has been promised."""

    snapshot: GpuSnapshot
    seen_by: Callable[[str], tuple[Sequence[ResidentView], Sequence[Claim]]] = lambda _model: ((), ())
    claims: Sequence[Claim] = ()
    """All promises, those to the models themselves too."""
    residents: frozenset[str] = frozenset()
    """Models that are loaded."""
    host: HostMemory | None = None
    """None where the host's memory is not to count."""


class Planning:
    """Asks about models on a state. Changes nothing, waits for nothing; takes milliseconds a model."""

    def __init__(
        self,
        config: Config,
        find: Callable[[str], ModelEntry],
        known: KnownMemory | None,
        state: State,
    ) -> None:
        self._config = config
        self._known = known
        self._state = state
        self._placing = Placing(config, find, known, host=lambda: state.host)
        self._placing.snapshot = state.snapshot

    def answer(self, entries: Sequence[ModelEntry]) -> PlanAnswer:
        """Where each model would go, asked alone, and which of them can stand together."""
        state = self._state
        gpus = available_gpus(state.snapshot.gpus, state.claims)
        there = [entry for entry in entries if entry.id not in state.residents]
        together = plan_together(self._config, there, gpus, self._known)
        index = {gpu.uuid: gpu.index for gpu in gpus}
        models = []
        for entry in entries:
            model = self.model(entry)
            if entry.id in together.places:
                model.together = [index[uuid] for uuid in together.places[entry.id]]
            model.left_out = together.left_out.get(entry.id)
            models.append(model)
        return PlanAnswer(
            gpus=[
                PlanGpu(
                    index=gpu.index,
                    uuid=gpu.uuid,
                    name=gpu.name,
                    total_bytes=gpu.total_bytes,
                    available_bytes=gpu.free_bytes,
                )
                for gpu in gpus
            ],
            error=state.snapshot.error,
            models=models,
            pinned_problem=together.problem,
        )

    def model(self, entry: ModelEntry) -> PlannedModel:
        """Where one model would go, and what became of the alternatives."""
        views, claims = self._state.seen_by(entry.id)
        planned = PlannedModel(
            id=entry.id,
            file_bytes=entry.file_bytes,
            pinned=entry.options.pinned,
            resident=entry.id in self._state.residents,
        )
        try:
            planned.placement = _place(self._placing(entry.id, views, claims))
        except DoesNotFitError as error:
            planned.refusal = _refusal(error)
        except LlamaGpuError as error:
            planned.problem = str(error)
        if not self._placing.on_cpu and planned.problem is None:
            explanation = self._explain(entry, views, claims)
            if explanation is not None:
                planned.alternatives = [_alternative(one) for one in explanation.alternatives]
                planned.staying = explanation.staying
        return planned

    def _explain(
        self, entry: ModelEntry, views: Iterable[ResidentView], claims: Sequence[Claim]
    ) -> Explanation | None:
        gpus = available_gpus(self._state.snapshot.gpus, claims)
        settings, options = self._config.gpu, entry.options
        owed = overdrawn_bytes(self._state.snapshot.gpus, claims)
        chosen = memory_options(entry)
        policy = Policy(
            strategy=settings.built_in_strategy,
            max_gpus=options.max_gpus,
            allowed=_allowed_by_both(gpus, settings.allowed, options.gpus),
            cpu=options.cpu or "never",
            partial=options.partial,
            priority=options.priority,
            **settings.headroom(self._excess(entry, gpus)),
        )
        try:
            return explain(
                entry.header or entry.path,
                gpus,
                policy=policy,
                running=[_running(view, owed) for view in views],
                mmproj=entry.mmproj,
                draft=options.draft,
                gpu_layers=options.gpu_layers,
                **estimate_options(chosen),
                **output_options(self._known, entry, chosen),
            )
        except (LlamaGpuError, OSError, ValueError):
            return None  # the placement has said so already

    def _excess(self, entry: ModelEntry, gpus: Sequence[Gpu]) -> int:
        """By how much loads of the model are known to exceed the estimate."""
        if self._known is None or entry.header is None:
            return 0
        return self._known.most_excess_bytes(load_of(entry), gpus) or 0


def imagined_gpus(sizes: Sequence[int]) -> GpuSnapshot:
    """Empty GPUs of so many bytes each."""
    return GpuSnapshot(
        [Gpu(index=index, total_bytes=size, free_bytes=size) for index, size in enumerate(sizes)]
    )


def _allowed_by_both(
    gpus: Sequence[Gpu], machine: Sequence[int | str] | None, model: Sequence[int | str] | None
) -> list[str] | None:
    if machine is None and model is None:
        return None

    def among(names: Sequence[int | str] | None, gpu: Gpu) -> bool:
        return names is None or not {gpu.index, gpu.uuid, gpu.parent_uuid}.isdisjoint(names)

    return [gpu.uuid for gpu in gpus if among(machine, gpu) and among(model, gpu)]


def _running(view: ResidentView, owed_by_gpu: Mapping[str, int]) -> Running:
    """The same as the placer sees it, with why it may not leave."""
    running = view.as_running(owed_by_gpu)
    return Running(
        running.id,
        running.bytes_by_gpu,
        busy=running.busy,
        pinned=view.stays,
        idle_seconds=running.idle_seconds,
        priority=running.priority,
        reload_seconds=running.reload_seconds,
    )


def _place(found: Assignment) -> PlannedPlace:
    return PlannedPlace(
        mode=found.mode,
        gpu_indices=list(found.gpu_indices),
        gpu_uuids=list(found.gpu_uuids),
        layers=list(found.layers),
        bytes_by_gpu=dict(found.bytes_by_gpu),
        gpu_layers=found.gpu_layers,
        host_bytes=found.host_bytes,
        evict=list(found.evict),
        degraded=[one.text for one in found.degraded],
        reason=found.reason,
    )


def _refusal(error: DoesNotFitError) -> PlanRefusal:
    return PlanRefusal(
        message=str(error),
        required_bytes=error.required_bytes,
        free_bytes_by_gpu=dict(error.free_bytes_by_gpu or {}),
        short_by_bytes=error.short_by_bytes,
        smallest_change=error.smallest_change,
        degradations_tried=list(error.degradations_tried),
    )


def _alternative(found: Alternative) -> PlanAlternative:
    free = found.free_bytes_by_gpu
    return PlanAlternative(
        step=found.step,
        outcome=found.outcome,
        reason=found.reason,
        devices=[
            PlanDevice(
                index=device.index,
                uuid=device.uuid,
                layers=device.layers,
                required_bytes=device.total_bytes,
                free_bytes=free[device.uuid],
            )
            for device in found.devices
        ],
        short_bytes=found.short_bytes,
        evict=list(found.evict),
        eviction_cost=found.eviction_cost,
    )
