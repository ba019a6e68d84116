"""``python -m llama_gpu.engine``: the embedded engine as a program, in place of ``llama-server``.

Nothing listens before the model is loaded. TERM ends it at once at any time; whoever lets running
answers finish does so before sending it.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from llama_gpu.engine.arguments import build_parser

__all__ = ["main"]

LAST_WORDS_SECONDS = 0.3  # llama.cpp logs in a thread of its own, and says there why it could not load
MISSING = "the embedded engine needs the package xllamacpp: pip install 'llama-gpu[engine]'"


def main(arguments: list[str] | None = None) -> int:
    """Load, serve, and end on TERM or INT; the exit code is 0 then, 1 after a failure, 2 for wrong flags."""
    parser = build_parser()
    settings = parser.parse_args(arguments)
    if not (settings.model or settings.list_devices):
        parser.error("the following arguments are required: -m/--model")
    # A Python handler would run only after the load: with the default action a signal ends that too.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from llama_gpu.engine.embedded import device_lines, serve  # noqa: PLC0415 - tells what is missing
    except ImportError as error:
        sys.stderr.write(f"{MISSING} ({error})\n")
        return 1
    if settings.list_devices:
        sys.stdout.write("\n".join(["Available devices:", *device_lines()]) + "\n")
        return 0
    try:
        server = serve(settings)
    except (RuntimeError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        # llama.cpp's threads may still be running: an orderly end could wait for them for ever.
        time.sleep(LAST_WORDS_SECONDS)
        os._exit(1)
    # The kernel may interrupt one of llama.cpp's threads: only the pipe is sure to wake this one.
    waiting, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    sys.stderr.write(f"embedded engine ready on {server.listening_address}\n")
    sys.stderr.flush()
    while True:
        os.read(waiting, 1)


def _end(_number: int, _frame: object) -> None:
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
