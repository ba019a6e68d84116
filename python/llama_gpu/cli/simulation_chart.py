"""The chart of ``llama-gpu simulate``: needs the extra ``plot``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama_gpu.cli.figure import new_figure, save
from llama_gpu.simulation.outcome import Outcome

STEPS = 240
COLOURS = ("#76b900", "#0984e3", "#6c5ce7", "#7f8fa6", "#d63031")


def draw(file: Path, outcomes: Sequence[Outcome]) -> None:
    """Write ``file`` in the format its ending says.

    Raises:
        ConfigError: no such format.
        OSError: the file cannot be written.
    """
    figure = new_figure()
    held, loads = figure.subplots(2, 1, sharex=True)
    for outcome, colour in zip(outcomes, COLOURS, strict=False):
        edges = [outcome.seconds * step / STEPS for step in range(STEPS + 1)]
        hours = [edge / 3600 for edge in edges]
        gpus = outcome.occupancy.over(edges)
        percent = [100 * sum(row) / len(gpus) for row in zip(*gpus, strict=True)]
        held.stairs(percent, hours, baseline=None, color=colour, label=outcome.strategy)
        at = [time / 3600 for time in outcome.loads_at]
        loads.plot(at, range(1, len(at) + 1), color=colour, label=f"{outcome.strategy}: {len(at)}")
    held.set(ylabel="GPU memory held, %", ylim=(0, 105), title=f"{outcomes[0].requests} requests")
    held.legend()
    loads.set(xlabel="hours", ylabel="loads so far", ylim=(0, None))
    loads.legend()
    save(figure, file)
