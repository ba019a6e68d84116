"""Who asks for which model, and when: a Zipf load, or a log of what was really asked."""

from __future__ import annotations

import json
import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isfinite, log
from typing import NamedTuple

from llama_gpu.errors import ConfigError

__all__ = ["Request", "ZipfLoad", "read_trace"]

SPREAD = 1.0
"""Of the logarithm of a request's duration: 16 of 100 take more than e times the median."""


class Request(NamedTuple):
    """One request: when it comes, for which model, and how long its answer takes once begun."""

    time_seconds: float
    model: str
    duration_seconds: float


@dataclass(frozen=True, kw_only=True)
class ZipfLoad:
    """Requests that come independently of each other; iterating again gives the same ones.

    The model at place k of the popularity order is asked for in proportion to ``1 / k**exponent``;
    the order is drawn by ``seed``, so that popular models are of any size. Arrivals are a Poisson process
    of ``rate`` requests a second, durations are lognormal around ``duration_seconds``, their mean.
    After every ``shuffle_seconds`` the order is drawn anew (None: never).
    """

    models: Sequence[str]
    requests: int
    exponent: float = 1.0
    rate: float = 0.1
    duration_seconds: float = 8.0
    seed: int = 1
    shuffle_seconds: float | None = None

    def __len__(self) -> int:
        """How many requests there are."""
        return self.requests

    def __iter__(self) -> Iterator[Request]:
        """The requests in the order in which they come."""
        draw = random.Random(self.seed)  # noqa: S311 - the same seed must give the same load
        order = sorted(self.models)
        draw.shuffle(order)
        shares = list(accumulate(place**-self.exponent for place in range(1, len(order) + 1)))
        median = log(self.duration_seconds) - SPREAD**2 / 2
        now, shuffled = 0.0, self.shuffle_seconds or float("inf")
        for _ in range(self.requests):
            now += draw.expovariate(self.rate)
            while now >= shuffled:
                draw.shuffle(order)
                shuffled += self.shuffle_seconds or float("inf")
            place = bisect_left(shares, draw.random() * shares[-1])
            yield Request(now, order[place], draw.lognormvariate(median, SPREAD))


def read_trace(lines: Iterable[str], source: str) -> list[Request]:
    """The requests of a log of JSON lines, by time, the first at 0 seconds.

    Each line is an object with ``time_seconds``, ``model`` and ``duration_seconds``; others are not read.

    Raises:
        ConfigError: a line is not such an object; names ``source`` and the line.
    """
    requests = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                requests.append(_request(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                said = f"no field {error}" if isinstance(error, KeyError) else str(error)
                raise ConfigError(
                    f"{source}, line {number}: {said}; each line is to be an object such as "
                    '{"time_seconds": 0.5, "model": "qwen3-8b", "duration_seconds": 4.2}',
                    key="trace",
                    source=source,
                ) from error
    requests.sort(key=lambda request: request.time_seconds)
    first = requests[0].time_seconds if requests else 0.0
    return [request._replace(time_seconds=request.time_seconds - first) for request in requests]


def _request(line: object) -> Request:
    if not isinstance(line, dict):
        raise TypeError("not an object")
    time = float(line["time_seconds"])
    model, duration = line["model"], float(line["duration_seconds"])
    if not isinstance(model, str):
        raise TypeError("model is not a text")
    if not isfinite(time):
        raise ValueError("time_seconds is not a finite number")
    if not (isfinite(duration) and duration >= 0):
        raise ValueError("duration_seconds is not a number from 0 up")
    return Request(time, model, duration)
