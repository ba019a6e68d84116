"""What the charts share: needs the extra ``plot``."""

from __future__ import annotations

from pathlib import Path

from llama_gpu.errors import ConfigError

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise ConfigError(
        "a chart needs matplotlib: pip install 'llama-gpu[plot]'", key="plot", source="the command line"
    ) from error

__all__ = ["new_figure", "save"]


def new_figure() -> Figure:
    """An empty figure that no window shows."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, file: Path) -> None:
    """Write ``file`` in the format its ending says.

    Raises:
        ConfigError: no such format.
        OSError: the file cannot be written.
    """
    try:
        figure.savefig(file)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}", key="plot", source="the command line") from error
