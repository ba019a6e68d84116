"""Which of several places a model takes: strategies by name, and those of a user's own.

A name is ``single-gpu-preferred``, ``distribute`` or ``pack``, which the core knows, or ``module:Class``, a
:class:`Strategy` that Python can import. A strategy chooses; whether its choice holds the model is
decided by the core, as for all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, get_args, runtime_checkable

from llama_gpu import Alternative, Explanation
from llama_gpu.config import BuiltInStrategy
from llama_gpu.errors import ConfigError, ServerError

__all__ = ["Strategy", "chosen_place", "load_strategy"]

BUILT_IN: tuple[str, ...] = get_args(BuiltInStrategy)
SETTING = "gpu.allocation_strategy"


@runtime_checkable
class Strategy(Protocol):
    """What ``gpu.allocation_strategy: "module:Class"`` names; made once, without arguments."""

    def choose(self, model: str, places: Sequence[Alternative]) -> Alternative:
        """One of ``places``, for ``model``.

        All of them hold the model, and all belong to the first step of the usual order at which any does: one
        GPU, several (as few as can be), one or several from which others must leave. ``devices`` has the
        GPUs with their layers and bytes, ``free_bytes_by_gpu`` what they have for it, ``evict`` who would
        leave. The first is the one that ``single-gpu-preferred`` would take.
        """
        ...


def load_strategy(name: str) -> Strategy | None:
    """The strategy of that name; None for those that the core knows.

    Raises:
        ConfigError: no such module or class, or it has no ``choose``; the setting is named.
    """
    if name in BUILT_IN:
        return None
    module, _, attribute = name.partition(":")
    try:
        made = getattr(import_module(module), attribute)
        strategy = made() if isinstance(made, type) else made
    except Exception as error:
        why = f"{SETTING} = {name!r} cannot be loaded: {error!r}; the module must be importable (PYTHONPATH)"
        raise ConfigError(why, key=SETTING) from error
    if not isinstance(strategy, Strategy):
        why = f"{SETTING} = {name!r} has no method choose(model, places)"
        raise ConfigError(why, key=SETTING)
    return strategy


def chosen_place(strategy: Strategy, name: str, model: str, found: Explanation) -> list[str] | None:
    """The GPUs, by UUID, that a strategy chooses for a model; None where there is nothing to choose.

    Raises:
        ServerError: the strategy raised, or answered what is none of the places; the setting is named.
    """
    places = [one for one in found.alternatives if one.devices and one.outcome in {"taken", "fits"}]
    if not places or places[0].step == "partial":
        return None
    places.sort(key=lambda one: one.outcome != "taken")
    try:
        chosen = strategy.choose(model, tuple(places))
    except Exception as error:
        raise ServerError(f"{SETTING} {name!r} failed for {model!r}: {error!r}", model=model) from error
    if chosen not in places:
        said = f"{SETTING} {name!r} answered {chosen!r} for {model!r}: it must be one of the places"
        raise ServerError(said, model=model)
    return [device.uuid for device in chosen.devices]
