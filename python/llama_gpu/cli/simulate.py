"""``llama-gpu simulate``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from cyclopts import Parameter

from llama_gpu.catalog import Catalog, scan
from llama_gpu.cli.made_up_models import write_made_up_models
from llama_gpu.cli.plan import imagined
from llama_gpu.cli.show import print_json, print_table
from llama_gpu.config import Config, load_config
from llama_gpu.errors import ConfigError
from llama_gpu.simulation.load import Request, ZipfLoad, read_trace
from llama_gpu.simulation.outcome import Outcome
from llama_gpu.simulation.servers import Timing
from llama_gpu.simulation.strategies import BASELINES, OURS, Name, Situation, play_strategy


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ZipfFlags:
    """The load where there is no trace."""

    zipf: float = 1.0
    """The model at place k is asked for in proportion to 1 / k to this power (default: 1)."""
    requests: int = 20_000
    """How many requests (default: 20000)."""
    rate: float = 0.1
    """Requests a second, on average (default: 0.1)."""
    duration: float = 8.0
    """Seconds that an answer takes, on average (default: 8)."""
    shuffle_every: float | None = None
    """Seconds after which other models are the popular ones (default: never)."""
    made_up: int = 40
    """How many models are made up where no folder is given (default: 40)."""
    seed: int = 1
    """Another seed makes other models and other requests (default: 1)."""


def simulate(
    trace: Path | None = None,
    *,
    load: ZipfFlags = ZipfFlags(),
    models: tuple[Path, ...] = (),
    gpu: Annotated[tuple[str, ...], Parameter(name="--gpu")] = ("24GiB",) * 4,
    strategy: Annotated[tuple[Name, ...], Parameter(name="--strategy")] = (*OURS, *BASELINES),
    load_speed: float = 2.0,
    config: Path | None = None,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Play requests through the scheduler under a simulated clock: what is loaded, who waits, who leaves.

    The decisions are those of llama-gpu serve; servers, GPUs and time are simulated. Beside the three
    allocation strategies stand two simpler ways: by-count lets the longest idle of at most so many models
    leave (the number is the largest that never exceeds the memory), one-at-a-time swaps.

    Parameters
    ----------
    trace
        Requests as JSON lines with time_seconds, model and duration_seconds; without it, a Zipf load.
    models
        Folders of *.gguf files (default: those of the configuration, else made-up ones of usual sizes).
    gpu
        The memory of a GPU; may be given several times (default: four of 24GiB).
    strategy
        What to play; may be given several times (default: all).
    load_speed
        Gigabytes of a file that are loaded in a second (default: 2).
    config
        A YAML, TOML or JSON file, as for llama-gpu serve.
    plot
        Draw loads and memory over time into this file, such as simulation.svg (needs matplotlib).
    json
        Print one JSON document: sizes in bytes, times in seconds.
    """
    settings = load_config(config, {"models_dirs": list(models) or None})
    requests = None if trace is None else _read(trace)
    if models or config is not None:
        catalog = scan(settings.models_dirs, settings)
        if requests is not None:
            requests = [request._replace(model=catalog.find(request.model).id) for request in requests]
    else:
        asked_for = sorted({request.model for request in requests or ()})
        catalog = _made_up(len(asked_for) or load.made_up, load.seed, settings)
        if requests is not None:
            ids = dict(zip(asked_for, (entry.id for entry in catalog.models), strict=True))
            requests = [request._replace(model=ids[request.model]) for request in requests]
    gpus = imagined(gpu)
    timing = Timing(bytes_per_second=_positive("load_speed", load_speed) * 1e9)
    situation = Situation(settings, catalog, gpus.gpus, timing)
    played = _zipf(load, catalog) if requests is None else requests
    outcomes = [play_strategy(name, situation, played) for name in strategy]
    if plot is not None:
        from llama_gpu.cli.simulation_chart import draw  # noqa: PLC0415 - matplotlib is an extra

        draw(plot, outcomes)
    if json:
        print_json(
            {
                "gpus": [{"uuid": gpu.uuid, "total_bytes": gpu.total_bytes} for gpu in gpus],
                "models": [{"id": entry.id, "file_bytes": entry.file_bytes} for entry in catalog.models],
                "strategies": [_fields(outcome) for outcome in outcomes],
            }
        )
        return
    hours = outcomes[0].seconds / 3600
    print_table(
        ("Strategy", ">Loads", ">Loaded", ">Evicted", *_WAITED, ">Refused", ">GPUs in use"),
        map(_row, outcomes),
        title=f"{outcomes[0].requests} requests in {hours:.1f} hours, {len(catalog.models)} models, "
        f"{len(gpus)} GPUs; waiting in seconds",
    )


_WAITED = (">Waited", ">p50", ">p95", ">p99", ">Longest")


def _read(trace: Path) -> list[Request]:
    with trace.open(encoding="utf-8") as lines:
        requests = read_trace(lines, str(trace))
    if not requests:
        raise ConfigError(f"{trace}: there is no request in it", key="trace", source=str(trace))
    return requests


def _zipf(load: ZipfFlags, catalog: Catalog) -> ZipfLoad:
    if not catalog.models:
        raise ConfigError("there is no model to ask for", key="models", source="the command line")
    if load.zipf < 0:
        raise ConfigError("--zipf should be 0 or more", key="zipf", source="the command line")
    return ZipfLoad(
        models=[entry.id for entry in catalog.models],
        requests=int(_positive("requests", load.requests)),
        exponent=load.zipf,
        rate=_positive("rate", load.rate),
        duration_seconds=_positive("duration", load.duration),
        seed=load.seed,
        shuffle_seconds=load.shuffle_every and _positive("shuffle_every", load.shuffle_every),
    )


def _positive(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        flag = f"--{name.replace('_', '-')}"
        raise ConfigError(f"{flag} should be more than 0", key=name, source="the command line")
    return value


def _made_up(count: int, seed: int, settings: Config) -> Catalog:
    """Their headers are read; the files can go."""
    with TemporaryDirectory(prefix="llama-gpu-") as folder:
        write_made_up_models(Path(folder), int(_positive("made_up", count)), seed)
        return scan([Path(folder)], settings)


def _row(outcome: Outcome) -> tuple[object, ...]:
    waiting, means = outcome.waiting, _means(outcome).values()
    return (
        outcome.strategy,
        outcome.loads,
        f"{outcome.loaded_bytes / 1e12:.2f} TB",
        outcome.evictions,
        *(f"{seconds:.2f}" for seconds in asdict(waiting).values()),
        sum(outcome.refused.values()),
        f"{sum(means) / len(means):.0%}",
    )


def _fields(outcome: Outcome) -> dict[str, Any]:
    return {
        "strategy": outcome.strategy,
        "requests": outcome.requests,
        "answered": outcome.answered,
        "refused": dict(outcome.refused),
        "loads": outcome.loads,
        "loaded_bytes": outcome.loaded_bytes,
        "evictions": outcome.evictions,
        "left": dict(outcome.left),
        "seconds": outcome.seconds,
        "waiting_seconds": asdict(outcome.waiting),
        "mean_occupied_fraction": _means(outcome),
    }


def _means(outcome: Outcome) -> dict[str, float]:
    return outcome.occupancy.mean(outcome.seconds)
