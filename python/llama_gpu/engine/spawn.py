"""Become another program that the kernel kills when our parent dies.

Run as ``python -I -S spawn.py PARENT_PID COMMAND …``. A server must not outlive the proxy, not even
one ended by ``kill -9``. The request (``prctl(PR_SET_PDEATHSIG)``) survives ``execv``, and asking for it in a
program of its own, rather than between ``fork`` and ``exec`` of the proxy, keeps Python code from running
in a forked child of a process with threads. Imports only the standard library, and little of it.

Linux only: elsewhere the command is run as it is, and a proxy that is killed leaves its servers behind.
The kernel watches the *thread* that spawned us, so servers are spawned from the event loop's thread.
"""

from __future__ import annotations

import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
CANNOT_RUN = 127  # as a shell says it


def end_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when ``parent`` ends."""
    if sys.platform != "linux":
        return
    import ctypes  # noqa: PLC0415 - costs milliseconds that other systems need not pay

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        # The parent died before the request was made: no signal would ever come.
        raise SystemExit(0)


def main(arguments: list[str]) -> None:
    """Bind our life to the parent's, then become the command."""
    parent, *command = arguments
    end_with_parent(int(parent))
    for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored_by_python, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606 - that is what this file is for
    except OSError as error:
        sys.stderr.write(f"cannot run {command[0]}: {error.strerror}\n")
        raise SystemExit(CANNOT_RUN) from error


if __name__ == "__main__":
    main(sys.argv[1:])
