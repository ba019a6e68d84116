"""State changes: what is told, in which order, and what a slow listener costs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llama_gpu import Gpu
from llama_gpu.api.events import stream
from llama_gpu.events import Dropped, Listener, StateChanges
from llama_gpu.residents import Assignment, LeavesFor, Resident, ResidentState

GPU = Gpu(index=0, uuid="GPU-a", total_bytes=100, free_bytes=100)
LOST = GPU.replace(health="lost", health_reason="it fell off the bus")


def resident(state: ResidentState, **fields: Any) -> Resident:
    return Resident("ant", state, Assignment("single", ("GPU-a",), (0,), {"GPU-a": 10}), since=0.0, **fields)


async def heard(changes: StateChanges) -> list[tuple[str, str, str | None, str | None]]:
    """What is told up to the end: kind, state, previous state, reason."""
    told = []
    with changes.listen() as listener:
        changes.close()
        while change := await listener.next():
            told.append(change)
    return [(change.kind, change.state, change.previous, change.reason) for change in told]


async def told_while(*steps: Any) -> list[tuple[str, str, str | None]]:
    """Kind, state and previous state of all that is told while the steps are compared one by one."""
    changes = StateChanges()
    told = []
    with changes.listen() as listener:
        for gpus, residents in steps:
            changes.compare(gpus, residents, 1.0)
        changes.close()
        while change := await listener.next():
            assert not isinstance(change, Dropped)
            told.append((change.kind, change.state, change.previous))
    return told


def test_a_gpu_is_assigned_while_a_model_is_on_it_and_in_error_while_it_is_lost() -> None:
    here = {"ant": resident(ResidentState.MAKING_ROOM)}
    told = asyncio.run(
        told_while(([GPU], {}), ([GPU], here), ([GPU], {}), ([LOST], {}), ([LOST], {}), ([GPU], {}))
    )
    assert told == [
        ("gpu", "available", None),
        ("gpu", "assigned", "available"),
        ("gpu", "available", "assigned"),
        ("gpu", "error", "available"),
        ("gpu", "available", "error"),
    ]


def test_a_server_on_a_lost_gpu_is_in_error_then_gone_then_starts_anew() -> None:
    first, second = resident(ResidentState.READY), resident(ResidentState.LOADING)

    async def body() -> list[tuple[str, str, str | None]]:
        changes = StateChanges()
        told = []
        with changes.listen() as listener:
            changes.compare([], {"ant": first}, 1.0)
            first.state, first.leaves_for = ResidentState.STOPPING, LeavesFor.GPU_LOST
            changes.compare([], {"ant": first}, 2.0)
            changes.compare([], {"ant": second}, 3.0)
            changes.close()
            while change := await listener.next():
                assert not isinstance(change, Dropped)
                told.append((change.kind, change.state, change.previous))
        return told

    assert asyncio.run(body()) == [
        ("server", "running", None),
        ("server", "error", "running"),
        ("server", "stopped", "error"),
        ("server", "starting", None),
    ]


def test_a_server_that_fails_is_told_as_an_error_with_its_reason() -> None:
    async def body() -> list[str | None]:
        changes = StateChanges()
        with changes.listen() as listener:
            changes.compare([], {"ant": resident(ResidentState.LOADING)}, 1.0)
            changes.server_failed("ant", "exit code 3")
            changes.compare([], {}, 2.0)
            await listener.next()
            change = await listener.next()
            assert change is not None
            assert not isinstance(change, Dropped)
            return [change.state, change.reason]

    assert asyncio.run(body()) == ["error", "exit code 3"]


def test_a_gpu_that_is_no_longer_listed_is_in_error() -> None:
    assert asyncio.run(told_while(([GPU], {}), ([], {})))[-1] == ("gpu", "error", "available")


def test_who_comes_late_hears_the_present_states_first() -> None:
    async def body() -> list[tuple[str, str, str | None, str | None]]:
        changes = StateChanges()
        changes.compare([GPU], {}, 1.0)
        changes.compare([LOST], {}, 2.0)
        return await heard(changes)

    assert asyncio.run(body()) == [("gpu", "error", None, "it fell off the bus")]


def test_a_slow_listener_loses_the_oldest_changes_and_is_told_how_many() -> None:
    async def body() -> None:
        changes = StateChanges()
        with changes.listen(limit=3) as listener:
            for number in range(5):
                changes.compare([GPU if number % 2 else LOST], {}, float(number))
            assert await listener.next() == Dropped(count=2)
            kept = [await listener.next() for _ in range(3)]
            assert [change.time for change in kept if change and change.kind == "gpu"] == [2.0, 3.0, 4.0]

    asyncio.run(body())


def test_a_listener_that_leaves_is_forgotten() -> None:
    changes = StateChanges()
    with changes.listen():
        assert len(changes._listeners) == 1
    assert not changes._listeners


@pytest.mark.parametrize("quiet", [True, False])
def test_the_stream_carries_events_and_comments_while_nothing_happens(quiet: bool) -> None:
    async def body() -> list[str]:
        listener = Listener(8)
        pieces = stream(listener, heartbeat_seconds=0.001)
        texts = [await anext(pieces)]
        if quiet:
            texts.append(await anext(pieces))
        changes = StateChanges()
        changes.compare([LOST], {}, 1.5)
        with changes.listen() as source:
            change = await source.next()
            assert change is not None
            assert not isinstance(change, Dropped)
            listener.tell(change)
        listener.close()
        texts += [piece async for piece in pieces]
        return texts

    texts = asyncio.run(body())
    assert all(text.endswith("\n\n") for text in texts)
    assert texts[-1].startswith('event: gpu\ndata: {"kind":"gpu","id":0,"uuid":"GPU-a","state":"error"')
    assert all(text.startswith(":") for text in texts[:-1])
    assert len(texts) == 3 if quiet else 2
