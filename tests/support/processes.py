"""Waiting for processes that are not our children."""

import os
import select

GONE_SECONDS = 5.0


def has_ended(pid: int) -> bool:
    """Whether the process ends within five seconds; it may have ended already."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], GONE_SECONDS)[0])
    finally:
        os.close(handle)
