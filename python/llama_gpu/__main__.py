"""``llama-gpu`` and ``python -m llama_gpu``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    try:
        from llama_gpu.cli import run  # noqa: PLC0415 - the base package has no command line
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("llama_gpu"):
            raise
        sys.exit(f"llama-gpu's commands need {error.name}: pip install 'llama-gpu[serve]'")
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
