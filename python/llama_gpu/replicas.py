"""Several servers of one model: how many are wanted, which of them are extra, how they are called."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from llama_gpu.residents import Resident, ResidentState
from llama_gpu.rules import Rules

__all__ = ["extra_servers", "free_id", "in_service", "wants_another"]


def in_service(residents: Iterable[Resident]) -> dict[str, list[Resident]]:
    """By model, its servers that load or take requests, the oldest first."""
    serve = (ResidentState.LOADING, ResidentState.READY)
    found: dict[str, list[Resident]] = {}
    for resident in residents:
        if resident.state in serve and not resident.draining:
            found.setdefault(resident.model, []).append(resident)
    return found


def wants_another(servers: Sequence[Resident], waiting: int, rules: Rules) -> bool:
    """Whether one more server is asked for, or would be filled by the requests that are there."""
    if len(servers) < rules.replicas:
        return True
    requests = waiting + sum(len(server.active) for server in servers)
    return len(servers) < rules.max_replicas and requests >= rules.slots * (len(servers) + 1)


def extra_servers(servers: Sequence[Resident], rules: Rules) -> Sequence[Resident]:
    """Those beyond what is asked for: the first to leave when others need room."""
    return servers[rules.replicas :]


def free_id(model: str, taken: Collection[str]) -> str:
    """``model``, ``model#2``, …: the first that no server has."""
    number, name = 1, model
    while name in taken:
        number += 1
        name = f"{model}#{number}"
    return name
