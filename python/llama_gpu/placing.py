"""Turns the scheduler's question "where does this model go?" into a call of ``lg.place``.

Without a GPU the answer is always "the CPU" and the placement code is not called at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llama_gpu import Gpu, GpuSnapshot, MemoryEstimate, Placement, Policy, Running, place
from llama_gpu.budget import Claim, available_gpus, overdrawn_bytes
from llama_gpu.catalog import ModelEntry
from llama_gpu.config import Config
from llama_gpu.errors import DoesNotFitError, LlamaGpuError, ServerError
from llama_gpu.memory.known import KnownMemory, Load
from llama_gpu.residents import Assignment, ResidentView
from llama_gpu.rules import Limits, Rules

__all__ = ["Placing", "limits_of", "load_of", "memory_options", "rules_of"]

GIB = 1 << 30
PLACING_ROUNDS = 4
"""How often a placement is asked again because what is known of it exceeds the estimate further."""


class Placing:
    """A ``Placer`` over the last snapshot.

    ``entry`` looks a model up in the catalogue; ``known`` has what loads took and llama.cpp projected;
    ``more_claims`` are of processes of ours that are no servers.
    """

    def __init__(
        self,
        config: Config,
        entry: Callable[[str], ModelEntry],
        known: KnownMemory | None = None,
        more_claims: Callable[[], Sequence[Claim]] = tuple,
    ) -> None:
        self._config = config
        self._entry = entry
        self._known = known
        self._more_claims = more_claims
        self.snapshot = GpuSnapshot([])

    @property
    def on_cpu(self) -> bool:
        """True where there is no GPU to place anything on."""
        return not self.snapshot.gpus

    def __call__(
        self, model: str, residents: Sequence[ResidentView], claims: Sequence[Claim], /
    ) -> Assignment:
        """Decide for ``model``.

        Where it is resident already, the answer is for one more of it: all of it on GPUs that it does not
        use yet, or nowhere.

        Raises:
            DoesNotFitError: it fits nowhere that its policy allows.
            LlamaGpuError: its file cannot be used.
        """
        beside = [resident for resident in residents if resident.model == model]
        if self.on_cpu:
            if beside:
                raise DoesNotFitError(f"one more server of {model} needs a GPU of its own: there is none")
            why = self.snapshot.error or "there is no GPU"
            if not self._config.gpu.serves_without_gpu:
                raise DoesNotFitError(f"{model} may not run on the CPU (gpu.cpu_fallback: false): {why}")
            return Assignment("cpu", reason="on the CPU")
        entry = self._entry(model)
        taken = {uuid for resident in beside for uuid in resident.bytes_by_gpu}
        allowed = [gpu for gpu in self._allowed_gpus() if gpu.uuid not in taken]
        claims = (*claims, *self._more_claims())
        gpus = available_gpus(allowed, claims)
        owed = overdrawn_bytes(allowed, claims)
        running = [resident.as_running(owed) for resident in residents]
        try:
            return self._place(entry, gpus, running, whole=bool(beside))
        except LlamaGpuError:
            raise
        except Exception as error:  # a fault of ours must fail this model, not the scheduler
            raise ServerError(f"placing {model!r} failed: {error!r}", model=model) from error

    def _place(
        self, entry: ModelEntry, gpus: Sequence[Gpu], running: Sequence[Running], *, whole: bool = False
    ) -> Assignment:
        """Place by the estimate, kept as far from the edge as the load is known to exceed it.

        ``place`` reckons with the analytic estimate. What is known to be taken beyond it on any device
        is left free there as headroom, and what is known to be taken less is given up of the headroom;
        then the claim is what is known of exactly this layout. Where that exceeds what was
        left, the same is done again with more. ``whole``: on GPUs alone, whatever its policy allows.
        """
        headroom = int(self._config.gpu.headroom_bytes)
        load = load_of(entry) if entry.header and self._known else None
        excess = 0
        if self._known and load:
            excess = max(self._known.most_excess_bytes(load, gpus) or 0, -headroom)
        for _ in range(PLACING_ROUNDS):
            placement = place(
                entry.header or entry.path,
                gpus,
                policy=self._policy(entry, headroom + excess, whole=whole),
                running=running,
                mmproj=entry.mmproj,
                draft=entry.options.draft,
                gpu_layers=entry.options.gpu_layers,
                **memory_options(entry),
            )
            best = self._best(load, placement, gpus) or placement.estimate
            exceeds = max(
                (
                    now.total_bytes - said.total_bytes
                    for now, said in zip(best.devices, placement.estimate.devices, strict=True)
                ),
                default=excess,
            )
            if exceeds <= excess:
                break
            excess = exceeds
        return _assignment(placement, best)

    def _best(self, load: Load | None, placement: Placement, gpus: Sequence[Gpu]) -> MemoryEstimate | None:
        if self._known is None or load is None:
            return None
        by_uuid = {gpu.uuid: gpu for gpu in gpus}
        placed = [by_uuid[device.uuid] for device in placement.devices]
        case = self._known.case(load, placement.estimate, placed)
        record = None if case is None else self._known.find(case)
        return None if record is None else record.best

    def _allowed_gpus(self) -> list[Gpu]:
        allowed = self._config.gpu.allowed
        return [
            gpu
            for gpu in self.snapshot.gpus
            if allowed is None or gpu.uuid in allowed or gpu.index in allowed
        ]

    def _policy(self, entry: ModelEntry, headroom_bytes: int, *, whole: bool) -> Policy:
        options = entry.options
        return Policy(
            strategy=self._config.gpu.strategy,
            headroom_bytes=headroom_bytes,
            max_gpus=options.max_gpus,
            allowed=options.gpus,
            cpu="never" if whole else options.cpu or "never",
            partial=options.partial and not whole,
            priority=options.priority,
        )


def memory_options(entry: ModelEntry) -> dict[str, Any]:
    """The options that decide a model's memory, under the names that ``place`` and the launch plan share.

    A context beyond the trained one costs memory and gives nonsense, so it is cut to that.
    """
    options = entry.options
    trained = entry.header.trained_context_length if entry.header else None
    context = options.context_length
    if trained and context:
        context = min(context, trained if options.kv_unified else trained * options.parallel)
    micro_batch = options.micro_batch
    if entry.embedding:
        # llama-server takes a whole input in one micro batch and refuses longer ones.
        micro_batch = max(micro_batch, options.batch)
    return {
        "context_length": context,
        "parallel": options.parallel,
        "kv_unified": options.kv_unified,
        "batch": options.batch,
        "micro_batch": micro_batch,
        "flash_attention": options.flash_attention,
        "cache_type_k": options.cache_type_k,
        "cache_type_v": options.cache_type_v,
        "cpu_moe_layers": options.cpu_moe_layers,
        "kv_offload": options.kv_offload,
        "swa_full": options.swa_full,
    }


def limits_of(config: Config) -> Limits:
    """What the configuration asks of the scheduler as a whole."""
    pool = config.server_pool
    return Limits(
        pool_size=pool.size,
        queue_size=pool.queue_size,
        wait_seconds=pool.queue_timeout,
        starvation_seconds=pool.starvation_timeout,
    )


def rules_of(entry: ModelEntry, load_seconds: float | None = None) -> Rules:
    """What the entry's options ask of the scheduler; ``load_seconds`` is what an earlier load took."""
    options = entry.options
    return Rules(
        pinned=options.pinned,
        priority=options.priority,
        slots=options.parallel,
        replicas=options.replicas,
        max_replicas=options.most_replicas,
        min_resident_seconds=options.min_resident_seconds,
        idle_seconds_before_unload=options.ttl_seconds,
        load_seconds=load_seconds,
    )


def load_of(entry: ModelEntry) -> Load:
    """What decides the entry's memory, wherever it goes; it must have a header."""
    assert entry.header is not None  # noqa: S101 - callers take only what can be served
    options = {**memory_options(entry), "mmproj": entry.mmproj, "draft": entry.options.draft}
    extra = entry.options.extra_arguments
    if entry.options.embeddings is not None:  # else it follows from the file
        extra = (*extra, f"embeddings={entry.embedding}")
    return Load(entry.header, options, extra)


def _assignment(placement: Placement, best: MemoryEstimate) -> Assignment:
    devices = placement.devices
    known = best is not placement.estimate and devices
    sizes = [memory.total_bytes for memory in best.devices] if known else [d.total_bytes for d in devices]
    told = f"; {best.basis}: {' + '.join(f'{size / GIB:.2f}' for size in sizes)} GiB" if known else ""
    return Assignment(
        mode=placement.mode,
        gpu_uuids=tuple(device.uuid for device in devices),
        gpu_indices=tuple(device.index for device in devices),
        bytes_by_gpu={device.uuid: size for device, size in zip(devices, sizes, strict=True)},
        layers=tuple(device.layers for device in devices),
        gpu_layers=placement.gpu_layers,
        tensor_split=tuple(placement.tensor_split) if placement.tensor_split else None,
        evict=tuple(placement.evict),
        reason=placement.reason + told,
        estimate=placement.estimate,
    )
