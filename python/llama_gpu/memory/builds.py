"""What is known of a llama.cpp by its build number, before it has loaded anything."""

from __future__ import annotations

import re

__all__ = ["keeps_logits_of_slots_alone"]

# llama.cpp's server reserves logits for its slots alone since shortly before build 9464. A fork counts its
# own commits too, so that its number may come early.
FIRST = 10_000
NEWEST = 11549
"""The newest one that was seen to do so; of a newer one its first load tells."""

NUMBER = re.compile(
    r"llama-server (?:(?P<old>\d+) \(|\S+ \(build (?P<new>\d+),)|embedded xllamacpp \d+\.\d+\.(?P<wheel>\d+)$"
)


def keeps_logits_of_slots_alone(build: str) -> bool:
    """Whether a server of this build, as it stands in a key, is known to (``server_output_limits``)."""
    found = NUMBER.match(build)
    return found is not None and FIRST <= int(found[found.lastgroup or 0]) <= NEWEST
