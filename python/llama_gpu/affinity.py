"""Which of several servers of one model answers: the one that holds the conversation, or the least loaded.

llama.cpp keeps the prompt of every slot in its cache; a conversation that goes on elsewhere is read
again from its beginning. Nothing here knows servers, only their names and loads.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

__all__ = ["Affinity", "conversation_in"]

MOST_CONVERSATIONS = 4096
BEGINNING = 2048
"""Characters of a text that tell conversations apart; a picture's data may be megabytes."""


class Affinity:
    """Remembers where the last ``MOST_CONVERSATIONS`` conversations were answered."""

    def __init__(self) -> None:
        self._last: OrderedDict[tuple[str, str], str] = OrderedDict()

    def choose(self, model: str, conversation: str | None, loads: Mapping[str, int], slots: int) -> str:
        """One of the servers in ``loads``, which has the requests that each answers now.

        ``slots`` is how many requests a server answers at the same time.
        """
        least = min(loads, key=loads.__getitem__)
        if conversation is None:
            return least
        last = self._last.pop((model, conversation), least)
        stays = last in loads and not _clearly_more(loads[last], loads[least], slots)
        self._last[model, conversation] = chosen = last if stays else least
        if len(self._last) > MOST_CONVERSATIONS:
            self._last.popitem(last=False)
        return chosen


def _clearly_more(load: int, least: int, slots: int) -> bool:
    """A cache is not worth waiting for: neither for a slot while another has one, nor in a longer queue."""
    return load >= slots and (least < slots or load > least + 1)


def conversation_in(body: bytes) -> str | None:
    """A name for the conversation that a request's JSON goes on with; None where it has none.

    It is made from the client's ``prompt_cache_key``, else from the beginning, which every later request of
    the conversation repeats: all up to the first message of the user, or the head of the prompt.
    """
    try:
        request = json.loads(body)
    except ValueError:  # a form, or nothing
        return None
    if not isinstance(request, dict):
        return None
    key, messages = request.get("prompt_cache_key"), request.get("messages")
    if messages is None:
        messages = request.get("prompt", request.get("input"))
    if isinstance(key, str) and key:
        beginning: Any = ["key", key]
    elif not messages or not isinstance(messages, str | list):
        return None
    else:
        beginning = [_beginning(request.get(name)) for name in ("system", "instructions")]
        beginning.append(_beginning(_up_to_the_user(messages)))
    text = json.dumps(beginning, sort_keys=True, default=str)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _up_to_the_user(messages: str | Sequence[Any]) -> str | Sequence[Any]:
    if isinstance(messages, str):
        return messages
    for place, message in enumerate(messages):
        if isinstance(message, Mapping) and message.get("role") == "user":
            return messages[: place + 1]
    return messages


def _beginning(value: Any) -> Any:
    """``value`` with long texts and lists cut."""
    if isinstance(value, str):
        return value[:BEGINNING]
    if isinstance(value, Mapping):
        return {str(key): _beginning(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_beginning(part) for part in value[:BEGINNING]]
    return value
