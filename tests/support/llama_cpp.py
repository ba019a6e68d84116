"""A llama.cpp build of the user's, named by an environment variable: ``LLAMA_GPU_LLAMA_CPP_BIN=FOLDER``.

The folder holds the programs ``llama-server`` and ``llama-fit-params``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

VARIABLE = "LLAMA_GPU_LLAMA_CPP_BIN"


def program(name: str) -> Path | None:
    """A program of the build, or None where none is named."""
    folder = os.environ.get(VARIABLE)
    found = shutil.which(name, path=folder) if folder else None
    return Path(found) if found else None


def missing(name: str) -> str:
    """Why there is no such program."""
    folder = os.environ.get(VARIABLE)
    return f"no {name} in {folder}" if folder else f"{VARIABLE} names no llama.cpp build with {name}"
