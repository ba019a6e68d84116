"""The command line: one file per command, each loaded when it is called.

What goes wrong is one clear line on standard error: exit code 1, or 2 for a command line
that makes no sense. Answers go to standard output, as tables or with ``--json``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from llama_gpu import __version__
from llama_gpu.errors import LlamaGpuError

__all__ = ["app", "run"]

app = App(
    name="llama-gpu",
    help="Serve a folder of GGUF models through one OpenAI-compatible endpoint, "
    "each on the GPUs where it fits.",
    version=__version__,
    help_format="plaintext",
    default_parameter=Parameter(negative=(), show_default=False),
)
# Said here, too, so that --help need not load every command.
for _order, (_name, _purpose) in enumerate(
    {
        "serve": "Serve models through one OpenAI-compatible endpoint.",
        "plan": "Show which models can be on the GPUs together, and where.",
        "simulate": "Play requests through the scheduler under a simulated clock.",
        "estimate": "Show how much memory a model takes, per device.",
        "accuracy": "Show what was said against what was taken.",
        "inspect": "Show what a GGUF file holds.",
        "gpus": "Show the GPUs and what is free on them.",
        "doctor": "Check that this machine can serve, and say what to do where it cannot.",
    }.items()
):
    app.command(f"llama_gpu.cli.{_name}:{_name}", help=_purpose, sort_key=_order)


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns the exit code."""
    try:
        result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        return _fail(f"{error} See llama-gpu --help.", 2)
    except (LlamaGpuError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader, such as head, has seen enough
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - lives until exit
            return 0
        return _fail(_said(error), 1)
    except KeyboardInterrupt:
        return 130
    return result if isinstance(result, int) else 0


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _fail(message: str, code: int) -> int:
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"llama-gpu: {message.strip()}")
    return code
