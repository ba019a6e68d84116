"""``llama-gpu plan``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from pydantic import ByteSize, TypeAdapter, ValidationError

from llama_gpu import GpuSnapshot, snapshot_gpus
from llama_gpu.budget import Claim
from llama_gpu.catalog import Catalog, ModelEntry, scan
from llama_gpu.cli.show import print_json, print_lines, print_table, size
from llama_gpu.config import Config, load_config
from llama_gpu.errors import ConfigError
from llama_gpu.host import host_memory
from llama_gpu.memory.known import KnownMemory
from llama_gpu.memory.store import store_at
from llama_gpu.placing import Placing
from llama_gpu.planning import PlanAnswer, PlannedModel, Planning, State, imagined_gpus
from llama_gpu.residents import ResidentView

LIVE = "live"


def plan(
    *models: Path,
    config: Path | None = None,
    gpus: Annotated[tuple[str, ...], Parameter(name=("--gpus", "--gpu"))] = (LIVE,),
    running: Annotated[tuple[str, ...], Parameter(name="--running")] = (),
    why: bool = False,
    json: bool = False,
) -> None:
    """Show where models would go, who would leave for them, and which can stand together. Nothing is loaded.

    Pinned models come first, then higher priorities, then larger files. Each is asked about on its own;
    the column Together says where it stands when all are to be resident and nobody leaves.

    Parameters
    ----------
    models
        Folders to search for *.gguf files, or such files (default: models).
    config
        A YAML, TOML or JSON file, as for llama-gpu serve.
    gpus
        live, for the GPUs of this machine, or the sizes of empty ones to plan for in their place, such as
        24GiB,24GiB,80GiB.
    running
        Models that are loaded and idle, such as qwen3-8b,big@0+1; with @, the GPUs that they are on.
    why
        Show every alternative and why it was not taken; it is shown when one model is asked about.
    json
        Print one JSON document, sizes in bytes; it has the alternatives.
    """
    settings = load_config(config, {"models_dirs": list(models) or None})
    catalog = scan(settings.models_dirs, settings)
    known = KnownMemory(store_at(settings.memory.path))
    if known.read(()):
        known.use_last_engine()
    state = _state(settings, catalog, known, _listed(gpus), _listed(running))
    asked = sorted(catalog.models, key=_order)
    answer = Planning(settings, catalog.find, known, state).answer(asked)
    if json:
        broken = [{"id": entry.id, "reason": entry.error} for entry in catalog.broken]
        print_json({**answer.model_dump(), "broken": broken})
        return
    _print(answer, why=why or len(asked) == 1)
    print_lines(*(f"broken: {entry.error}" for entry in catalog.broken), *catalog.warnings)


def _print(answer: PlanAnswer, *, why: bool) -> None:
    if not answer.gpus:
        print_lines(f"No GPU ({answer.error or 'switched off, or none listed'}): everything runs on the CPU.")
    columns = ("Model", ">File", "Where", ">Layers", ">On GPUs", ">On host", "Leaves", "Together", "Why")
    print_table(columns, (_row(model) for model in answer.models))
    if answer.pinned_problem:
        print_lines(answer.pinned_problem)
    for model in answer.models if why else ():
        rows: list[tuple[str, str, str]] = [(one.step, one.outcome, one.reason) for one in model.alternatives]
        rows += [("", "stays", f"{server}: {reason}") for server, reason in model.staying.items()]
        if rows:
            print_table(("Step", "Outcome", "Why"), rows, title=model.id)
    help_ = ((m.id, m.refusal.smallest_change) for m in answer.models if m.refusal)
    print_lines(*(f"{model} would fit with {change}" for model, change in help_ if change))


def _row(model: PlannedModel) -> tuple[object, ...]:
    place, file = model.placement, size(model.file_bytes)
    together = None if model.together is None else _gpus(model.together)
    if place is None:
        problem = model.refusal.message if model.refusal else model.problem
        return model.id, file, "nowhere", None, None, None, None, together, problem
    where = {"partial": f"{_gpus(place.gpu_indices)} and CPU", "cpu": "CPU"}.get(
        place.mode, _gpus(place.gpu_indices)
    )
    layers = " + ".join(map(str, place.layers)) or None
    on_gpus = size(sum(place.bytes_by_gpu.values())) if place.bytes_by_gpu else None
    leaves = ", ".join(place.evict) or None
    return model.id, file, where, layers, on_gpus, size(place.host_bytes), leaves, together, place.reason


def _gpus(indices: Sequence[int]) -> str:
    return "GPU " + " + ".join(map(str, indices))


def _listed(values: Iterable[str]) -> list[str]:
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def _order(model: ModelEntry) -> tuple[bool, int, int]:
    return not model.options.pinned, -model.options.priority, -model.file_bytes


def _state(
    settings: Config, catalog: Catalog, known: KnownMemory, gpus: Sequence[str], running: Sequence[str]
) -> State:
    live = list(gpus) in ([], [LIVE])
    here = GpuSnapshot() if not live or not settings.gpu.enabled else snapshot_gpus()
    snapshot = here if live else imagined(gpus, "--gpus")
    placing = Placing(settings, catalog.find, known)
    views: list[ResidentView] = []
    claims: list[Claim] = []
    for model, bytes_by_gpu in _running(placing, catalog, snapshot, running, claims, live=live):
        priority = model.options.priority
        pinned = model.options.pinned
        view = ResidentView(model.id, model.id, bytes_by_gpu, pinned, 0.0, None, priority, stays=pinned)
        views.append(view)
        claims.append(Claim(bytes_by_gpu, settled=live))

    def seen_by(asked: str) -> tuple[list[ResidentView], list[Claim]]:
        others = [place for place, view in enumerate(views) if view.model != asked]
        return [views[place] for place in others], [claims[place] for place in others]

    # GPUs that are imagined are in a machine that is not known.
    host = host_memory() if live else None
    return State(snapshot, seen_by, claims, frozenset(view.model for view in views), host)


def _running(
    placing: Placing,
    catalog: Catalog,
    snapshot: GpuSnapshot,
    running: Sequence[str],
    claims: Sequence[Claim],
    *,
    live: bool,
) -> Iterator[tuple[ModelEntry, dict[str, int]]]:
    """Each model that runs, with its bytes: where it says, or where it would go beside those before it.

    What runs on the live GPUs is in use there already: how much that is follows from an empty one.
    """
    for item in running:
        name, _, where = item.partition("@")
        model = catalog.find(name)
        there = [gpu for gpu in snapshot if not where or str(gpu.index) in where.split("+")]
        if where and len(there) != len(where.split("+")):
            raise ConfigError(
                f"--running {item}: there is no GPU {where}; there are "
                f"{', '.join(str(gpu.index) for gpu in snapshot) or 'none'}",
                key="running",
                source="the command line",
            )
        if live:
            there = [gpu.replace(free_bytes=gpu.total_bytes) for gpu in there]
        placing.snapshot = GpuSnapshot(there)
        found = placing(model.id, (), () if live else tuple(claims))
        yield model, dict(found.bytes_by_gpu)


def imagined(sizes: Sequence[str], flag: str = "--gpu") -> GpuSnapshot:
    """GPUs with that much memory, all of it free, as ``flag`` gave them.

    Raises:
        ConfigError: not a size.
    """
    read = TypeAdapter(ByteSize)
    try:
        return imagined_gpus([int(read.validate_python(text)) for text in sizes])
    except ValidationError as error:
        live = "live, or " if flag == "--gpus" else ""
        message = f"{flag} {','.join(sizes)}: should be {live}sizes such as 24GiB,80GiB"
        raise ConfigError(message, key=flag.lstrip("-"), source="the command line") from error
