"""The chart of ``llama-gpu accuracy``: needs the extra ``plot``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama_gpu.cli.figure import new_figure, save
from llama_gpu.memory.shipped import ShippedCase

GIB = 1 << 30
COLOURS = {"cuda": "#76b900", "generic": "#7f8fa6"}


def draw(file: Path, cases: Sequence[ShippedCase], loads: Sequence[tuple[str, int, int]]) -> None:
    """Write ``file`` in the format its ending says; ``loads`` are name, bytes said and bytes taken.

    Raises:
        ConfigError: no such format.
        OSError: the file cannot be written.
    """
    figure = new_figure()
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    groups: list[tuple[str, str, str, list[tuple[int, int]]]] = [
        (
            f"llama.cpp's dry run, {backend} ({sum(case.backend == backend for case in cases)} cases)",
            colour,
            ".",
            [(case.said_bytes, case.taken_bytes) for case in cases if case.backend == backend],
        )
        for backend, colour in COLOURS.items()
    ]
    if loads:
        groups.append((f"loads of this machine ({len(loads)})", "#d63031", "D", [load[1:] for load in loads]))
    for label, colour, marker, pairs in groups:
        known = [(said, taken) for said, taken in pairs if said and taken]
        x = [taken / GIB for _, taken in known]
        above.plot(x, [said / GIB for said, _ in known], marker, color=colour, label=label, alpha=0.7)
        below.plot(
            x, [100 * (said - taken) / taken for said, taken in known], marker, color=colour, alpha=0.7
        )
    above.axline((1, 1), slope=1, color="black", linewidth=0.7)
    above.set(xscale="log", yscale="log", ylabel="estimated, GiB", title="Memory: said against taken")
    above.legend()
    below.axhline(0, color="black", linewidth=0.7)
    below.set(xlabel="taken, GiB", ylabel="error, %")
    save(figure, file)
