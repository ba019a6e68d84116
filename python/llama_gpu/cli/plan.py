"""``llama-gpu plan``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import ByteSize, TypeAdapter, ValidationError

from llama_gpu import Gpu, GpuSnapshot, snapshot_gpus
from llama_gpu.budget import Claim, HostMemory
from llama_gpu.catalog import Catalog, ModelEntry, scan
from llama_gpu.cli.show import print_json, print_lines, print_table, size
from llama_gpu.config import Config, load_config
from llama_gpu.errors import ConfigError, DoesNotFitError, LlamaGpuError
from llama_gpu.host import host_memory
from llama_gpu.memory.known import KnownMemory
from llama_gpu.memory.store import store_at
from llama_gpu.placing import Placing
from llama_gpu.residents import Assignment
from llama_gpu.supervisor import CPU_POOL_SIZE


@dataclass(frozen=True)
class Planned:
    """Where one model would go, given those that were planned before it."""

    model: ModelEntry
    assignment: Assignment | None = None
    problem: str | None = None
    """Why it goes nowhere."""
    fits_alone: bool = True
    """Whether it would have a place if the others were not there."""


def plan(
    *models: Path,
    config: Path | None = None,
    gpu: Annotated[tuple[str, ...], Parameter(name="--gpu")] = (),
    json: bool = False,
) -> None:
    """Show which models can be on the GPUs together, and where. Nothing is loaded.

    Pinned models come first, then higher priorities, then larger files; each takes its place
    beside those before it. What must wait for another to leave is said.

    Parameters
    ----------
    models
        Folders to search for *.gguf files, or such files (default: models).
    config
        A YAML, TOML or JSON file, as for llama-gpu serve.
    gpu
        The free memory of a GPU to plan for, such as 24GiB, in place of this machine's; may
        be given several times.
    json
        Print one JSON document, sizes in bytes.
    """
    settings = load_config(config, {"models_dirs": list(models) or None})
    catalog = scan(settings.models_dirs, settings)
    snapshot = imagined(gpu) if gpu else snapshot_gpus() if settings.gpu.enabled else GpuSnapshot()
    host = None if gpu else host_memory()  # GPUs that are imagined are in a machine that is not known
    planned = list(plan_models(catalog, snapshot, settings, host))
    if json:
        print_json(
            {
                "gpus": [
                    {"index": gpu.index, "uuid": gpu.uuid, "free_bytes": gpu.free_bytes} for gpu in snapshot
                ],
                "error": snapshot.error,
                "models": [_fields(item) for item in planned],
                "broken": [{"id": entry.id, "reason": entry.error} for entry in catalog.broken],
            }
        )
        return
    if not len(snapshot):
        print_lines(
            f"No GPU ({snapshot.error or 'switched off, or none listed'}): everything runs on the CPU."
        )
    print_table(
        ("Model", ">File", "Where", ">Layers", ">On GPUs", ">On host", "Why"),
        (_row(item) for item in planned),
    )
    print_lines(*(f"broken: {entry.error}" for entry in catalog.broken), *catalog.warnings)


def imagined(sizes: Sequence[str]) -> GpuSnapshot:
    """GPUs with that much free memory.

    Raises:
        ConfigError: not a size.
    """
    read = TypeAdapter(ByteSize)
    try:
        free = [int(read.validate_python(text)) for text in sizes]
    except ValidationError as error:
        message = f"--gpu {' '.join(sizes)}: should be sizes such as 24GiB"
        raise ConfigError(message, key="gpu", source="the command line") from error
    return GpuSnapshot(
        [Gpu(index=index, total_bytes=count, free_bytes=count) for index, count in enumerate(free)]
    )


def plan_models(
    catalog: Catalog, snapshot: GpuSnapshot, settings: Config, host: HostMemory | None = None
) -> Iterator[Planned]:
    """Asks the proxy's own question for one model after the other, each beside those before it."""
    known = KnownMemory(store_at(settings.memory.path))
    if known.read(()):
        known.use_last_engine()
    placing = Placing(settings, catalog.find, known, host=lambda: host)
    claims: list[Claim] = []
    free = {gpu.uuid: gpu.free_bytes or 0 for gpu in snapshot}
    slots = settings.server_pool.size or (len(catalog.models) if len(snapshot) or host else CPU_POOL_SIZE)
    for model in sorted(catalog.models, key=_order):
        if slots == 0:
            yield Planned(model, problem="as many servers run as server_pool.size allows")
            continue
        placing.snapshot = _with_free(snapshot, free)
        try:
            assignment = placing(model.id, (), claims)
        except DoesNotFitError as error:
            placing.snapshot = snapshot
            yield Planned(model, problem=str(error), fits_alone=_fits(placing, model))
        except LlamaGpuError as error:
            yield Planned(model, problem=str(error), fits_alone=False)
        else:
            slots -= 1
            claims.append(Claim(host_bytes=assignment.host_bytes, server=model.id))
            for uuid, count in assignment.bytes_by_gpu.items():
                free[uuid] -= count
            yield Planned(model, assignment)


def _order(model: ModelEntry) -> tuple[bool, int, int]:
    return not model.options.pinned, -model.options.priority, -model.file_bytes


def _with_free(snapshot: GpuSnapshot, free: dict[str, int]) -> GpuSnapshot:
    gpus = [
        gpu.replace(free_bytes=max(free[gpu.uuid], 0)) if gpu.free_bytes is not None else gpu
        for gpu in snapshot
    ]
    return GpuSnapshot(gpus, driver_version=snapshot.driver_version, error=snapshot.error)


def _fits(placing: Placing, model: ModelEntry) -> bool:
    try:
        placing(model.id, (), ())
    except LlamaGpuError:
        return False
    return True


def _row(item: Planned) -> tuple[object, ...]:
    assignment = item.assignment
    file = size(item.model.file_bytes)
    if assignment is None:
        return item.model.id, file, "waits" if item.fits_alone else "nowhere", None, None, None, item.problem
    gpus = "GPU " + " + ".join(map(str, assignment.gpu_indices))
    where = {"partial": f"{gpus} and CPU", "cpu": "CPU"}.get(assignment.mode, gpus)
    layers = " + ".join(map(str, assignment.layers)) or None
    on_gpus = size(sum(assignment.bytes_by_gpu.values())) if assignment.bytes_by_gpu else None
    return item.model.id, file, where, layers, on_gpus, size(assignment.host_bytes), assignment.reason


def _fields(item: Planned) -> dict[str, Any]:
    assignment = asdict(item.assignment) if item.assignment else None
    if assignment:
        del assignment["estimate"]  # what it takes stands in bytes_by_gpu
    return {
        "id": item.model.id,
        "file_bytes": item.model.file_bytes,
        "placement": assignment,
        "problem": item.problem,
        "fits_alone": item.fits_alone,
    }
