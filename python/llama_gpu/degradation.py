"""What a model gives up, and in which order, when it fits nowhere as it was configured.

Pure: the configured steps in, a ladder of option sets out. Each rung has all that the rungs before it
gave up, and one step more. Whether a rung fits is somebody else's question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

__all__ = ["GivenUp", "Rung", "given_up", "ladder", "longest_context"]

CONTEXT_STEP = 256
"""llama.cpp pads the context of a slot to this many tokens (``GGML_PAD``, llama-context.cpp)."""

CpuUse = Literal["never", "partial", "allow"]

_CPU_USES: tuple[CpuUse, ...] = ("never", "partial", "allow")
_BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5}
"""Bits per element of a cache type (ggml-common.h); the rest have 4.5."""

T = TypeVar("T")


@dataclass(frozen=True)
class GivenUp:
    """One thing that a model does without. ``kind`` is the option's name, ``partial`` or ``cpu``."""

    kind: str
    text: str


@dataclass(frozen=True)
class Rung:
    """Options that differ from the configured ones, and how much of the CPU may be used with them.

    ``shortest_context`` is set where the context may be any length from there to the configured one;
    ``changes`` then has the shortest.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    cpu: CpuUse = "never"
    shortest_context: int | None = None


def ladder(
    options: Mapping[str, Any],
    steps: Iterable[Mapping[str, Any] | Literal["partial", "cpu"]],
    *,
    cpu: CpuUse = "never",
    allowed: Callable[[Mapping[str, Any]], bool] = lambda _changes: True,
) -> Iterator[Rung]:
    """The rungs in the order in which they are tried; the first one gives up nothing.

    Args:
        options: those configured, by name; ``context_length`` is not 0.
        steps: what is given up, in this order: tables of options, or how much of the CPU is used.
        cpu: how much of the CPU the policy allows once the steps are spent.
        allowed: whether llama.cpp takes the model with these changes; a step that it refuses is left out.

    A step leaves out what would be no less than before: a context of 4096 for a model that has 2048.
    """
    rung = Rung()
    yield rung
    for step in (*steps, *({"partial": ("partial",), "allow": ("cpu",)}.get(cpu, ()))):
        following = _with(rung, options, step)
        if following != rung and allowed(following.changes):
            rung = following
            yield rung


def _with(rung: Rung, options: Mapping[str, Any], step: Mapping[str, Any] | str) -> Rung:
    if isinstance(step, str):
        wider: CpuUse = "partial" if step == "partial" else "allow"
        cpu = max(rung.cpu, wider, key=_CPU_USES.index)
        return Rung(rung.changes, cpu, rung.shortest_context)
    now = {**options, **rung.changes}
    less = {name: value for name, value in step.items() if name in now and _is_less(name, value, now[name])}
    return Rung({**rung.changes, **less}, rung.cpu, less.get("context_length", rung.shortest_context))


def _is_less(name: str, value: Any, now: Any) -> bool:
    """Whether this value of an option takes less of a GPU's memory than the present one."""
    match name:
        case "cache_type_k" | "cache_type_v":
            return _BITS.get(value, 4.5) < _BITS.get(now, 4.5)
        case "cpu_moe_layers":
            return bool(now != "all" and (value == "all" or value > now))
        case _:  # a number, or a switch that is turned off
            return bool(value < now)


def longest_context(
    shortest: int, configured: int, step: int, attempt: Callable[[int], T | None], found: T
) -> T:
    """What ``attempt`` finds for the longest context that it finds anything for.

    ``found`` is its answer for ``shortest``, which fits; between there and ``configured`` multiples of
    ``step`` are tried, by halves: a context fits where a longer one does.
    """
    if (all_of_it := attempt(configured)) is not None:
        return all_of_it
    fits, fails = shortest // step, -(-configured // step)
    while fails - fits > 1:
        middle = (fits + fails) // 2
        answer = attempt(middle * step)
        if answer is None:
            fails = middle
        else:
            fits, found = middle, answer
    return found


def given_up(
    configured: Mapping[str, Any], held: Mapping[str, Any], cpu_layers: int = 0, all_layers: int = 0
) -> tuple[GivenUp, ...]:
    """How ``held`` differs from the options configured, and how many layers are on the CPU unasked."""
    found = [
        GivenUp(name, f"{name} {_word(configured[name])} -> {_word(value)}")
        for name, value in held.items()
        if value != configured[name]
    ]
    if cpu_layers and cpu_layers == all_layers:
        found.append(GivenUp("cpu", "all layers on the CPU"))
    elif cpu_layers:
        found.append(GivenUp("partial", f"{cpu_layers} of {all_layers} layers on the CPU"))
    return tuple(found)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
