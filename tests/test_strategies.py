"""``gpu.allocation_strategy``: by name, or a class of the user's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import llama_gpu as lg
from llama_gpu.catalog import Catalog, scan
from llama_gpu.config import load_config
from llama_gpu.errors import ConfigError, DoesNotFitError, ServerError
from llama_gpu.placing import Placing
from llama_gpu.residents import ResidentView
from llama_gpu.strategies import Strategy
from support.gguf_builder import write_sparse

GIB = 1 << 30

MODULE = """
class Last:
    def choose(self, model, places):
        return max(places, key=lambda place: [device.index for device in place.devices])

class Raises:
    def choose(self, model, places):
        raise RuntimeError("no idea")

class Elsewhere:
    def choose(self, model, places):
        return "GPU-0"

class First:
    seen = []

    def choose(self, model, places):
        self.seen.append([place.reason for place in places])
        return places[0]

class Wordless:
    pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_strategies.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_strategies"
    sys.modules.pop("own_strategies", None)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """Some 2 GiB."""
    write_sparse(tmp_path / "models" / "model.gguf", layers=8, vocabulary=1000)
    return scan((tmp_path / "models",), load_config(None, {}))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()


def gpus(*free: float) -> lg.GpuSnapshot:
    return lg.GpuSnapshot(
        [
            lg.Gpu(index=index, total_bytes=24 * GIB, free_bytes=int(gib * GIB))
            for index, gib in enumerate(free)
        ]
    )


def placing(catalog: Catalog, strategy: str, snapshot: lg.GpuSnapshot) -> Placing:
    placing = Placing(load_config(None, {"gpu.allocation_strategy": strategy}), catalog.find)
    placing.snapshot = snapshot
    return placing


@pytest.mark.parametrize(("strategy", "taken"), [("single-gpu-preferred", 1), ("distribute", 0), ("pack", 1)])
def test_the_strategies_by_name_take_another_gpu_each(catalog: Catalog, strategy: str, taken: int) -> None:
    found = placing(catalog, strategy, gpus(24, 4, 12))("model", (), ())
    assert found.gpu_indices == (taken,)


def test_a_strategy_of_ones_own_chooses_among_the_places_that_hold_the_model(
    catalog: Catalog, module: str
) -> None:
    found = placing(catalog, f"{module}:Last", gpus(24, 24, 1))("model", (), ())
    assert found.gpu_indices == (1,), "GPU 2 is too small to be chosen"
    several = placing(catalog, f"{module}:Last", gpus(1.5, 1.5, 1.5))("model", (), ())
    assert several.gpu_indices == (1, 2)


def test_the_first_place_is_the_one_that_the_default_would_take(catalog: Catalog, module: str) -> None:
    found = placing(catalog, f"{module}:First", gpus(24, 4, 12))("model", (), ())
    assert found.gpu_indices == (1,)
    assert sys.modules[module].First.seen[-1][0] == "GPU 1 alone: has room and suits best"


def test_who_leaves_is_decided_with_the_place(catalog: Catalog, module: str) -> None:
    residents = [
        ResidentView(
            name, name, {f"GPU-{index}": 20 * GIB}, busy=False, idle_seconds=1, reload_seconds=index + 1
        )
        for index, name in enumerate(("cheap", "dear"))
    ]
    place = placing(catalog, f"{module}:Last", gpus(0.5, 0.5))
    assert place("model", residents, ()).evict == ("dear",)
    with pytest.raises(DoesNotFitError):
        place("model", (), ())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Raises", "failed for 'model': RuntimeError('no idea')"),
        ("Elsewhere", "answered 'GPU-0' for 'model': it must be one of the places"),
    ],
)
def test_a_strategy_that_raises_or_answers_nonsense_fails_its_model_and_is_named(
    catalog: Catalog, module: str, name: str, said: str
) -> None:
    place = placing(catalog, f"{module}:{name}", gpus(24))
    with pytest.raises(ServerError) as caught:
        place("model", (), ())
    assert str(caught.value) == f"gpu.allocation_strategy '{module}:{name}' {said}"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere:Strategy", "ModuleNotFoundError"),
        ("own_strategies:Missing", "has no attribute 'Missing'"),
        ("own_strategies:Wordless", "has no method choose(model, places)"),
    ],
)
def test_a_strategy_that_cannot_be_loaded_is_a_wrong_setting(
    catalog: Catalog, module: str, name: str, said: str
) -> None:
    assert module
    with pytest.raises(ConfigError, match=r"gpu\.allocation_strategy = ") as caught:
        placing(catalog, name, gpus(24))
    assert said in str(caught.value)
    assert caught.value.key == "gpu.allocation_strategy"


def test_an_unknown_name_lists_the_choices() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"gpu.allocation_strategy": "emptiest"})
    assert "should be single-gpu-preferred, distribute, pack or module:Class" in str(caught.value)
    assert caught.value.key == "gpu.allocation_strategy"


def test_the_protocol_is_one_that_can_be_typed_against() -> None:
    class Own:
        def choose(self, model: str, places: Sequence[lg.Alternative]) -> lg.Alternative:
            return places[len(model) % len(places)]

    own: Strategy = Own()
    assert isinstance(own, Strategy)


def test_headroom_may_be_given_by_gpu(catalog: Catalog) -> None:
    config = load_config(None, {"gpu.headroom_bytes": {"0": "23GiB", "default": "1GiB"}})
    place = Placing(config, catalog.find)
    place.snapshot = gpus(24, 24)
    assert place("model", (), ()).gpu_indices == (1,)
    with pytest.raises(ConfigError, match="headroom_bytes"):
        load_config(None, {"gpu.headroom_bytes": {"0": "much"}})


def test_a_planned_place_is_taken_as_long_as_nobody_has_to_leave_for_it(catalog: Catalog) -> None:
    place = placing(catalog, "single-gpu-preferred", gpus(4, 24))
    place.planned = {"model": ("GPU-1",)}
    assert place("model", (), ()).gpu_indices == (1,)
    place.snapshot = gpus(4, 0.5)
    idle = ResidentView("idle", "idle", {"GPU-1": 20 * GIB}, busy=False, idle_seconds=1, reload_seconds=1)
    assert place("model", [idle], ()).gpu_indices == (0,)
