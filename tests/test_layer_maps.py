"""The layers of split models are where llama.cpp's own log says that it puts them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import llama_gpu as lg
from llama_gpu.launch import plan_dry_run
from support import ground_truth, layer_maps

if TYPE_CHECKING:
    from support.layer_maps import LayerMap

CPU = -1


@pytest.fixture(scope="module")
def maps() -> list[LayerMap]:
    """Every map that the project carries."""
    return layer_maps.load()


@pytest.fixture(scope="module")
def headers(maps: list[LayerMap], tmp_path_factory: pytest.TempPathFactory) -> dict[str, lg.Header]:
    """The models of the maps."""
    folder = tmp_path_factory.mktemp("models")
    models = {item.model for item in maps}
    return {model: lg.read_header(ground_truth.write_model(model, folder)) for model in models}


def layers_said(header: lg.Header, gpu_layers: int, tensor_split: tuple[float, ...]) -> list[int]:
    """Layers on the host, then on each device, as ``estimate`` deals them out."""
    said = lg.estimate(
        header,
        devices=len(tensor_split),
        gpu_layers=gpu_layers,
        tensor_split=tensor_split,
        backend="generic",
        **layer_maps.OPTIONS,
    )
    return [said.host.layers, *(device.layers for device in said.devices)]


def test_llama_cpp_deals_layers_out_as_estimated(maps: list[LayerMap], headers: dict[str, lg.Header]) -> None:
    assert len({item.model for item in maps}) >= 80
    for item in maps:
        on_cpu = sum(count for device, count in item.layers if device == CPU)
        said = layers_said(headers[item.model], item.gpu_layers, item.tensor_split)
        assert said == [on_cpu, *item.device_layers], item


def test_llama_cpp_keeps_the_first_layers_on_the_cpu_and_the_others_in_the_order_of_the_devices(
    maps: list[LayerMap],
) -> None:
    for item in maps:
        order = [device for device, _ in item.layers]
        assert order == sorted(set(order)), item


def test_a_placement_says_of_its_split_what_llama_cpp_makes_of_it(
    maps: list[LayerMap], headers: dict[str, lg.Header]
) -> None:
    for item in maps:
        header = headers[item.model]
        placement = layer_maps.place(header, item.gpu_bytes)
        _, *on_devices = layers_said(header, placement.gpu_layers, placement.tensor_split)
        assert [device.layers for device in placement.devices] == on_devices, item
        if (placement.gpu_layers, placement.tensor_split) == (item.gpu_layers, item.tensor_split):
            assert on_devices == item.device_layers, item


def test_the_flags_spell_the_split_as_llama_cpp_was_asked(maps: list[LayerMap]) -> None:
    for item in maps:
        uuids = [f"GPU-{number}" for number in range(len(item.tensor_split))]
        run = plan_dry_run(
            "tool",
            model_path="m",
            gpu_uuids=uuids,
            gpu_layers=item.gpu_layers,
            tensor_split=item.tensor_split,
        )
        assert run is not None
        flags = dict(zip(run.argv, run.argv[1:], strict=False))
        assert flags["-ngl"] == str(item.gpu_layers)
        if len(uuids) > 1:
            assert flags["-ts"] == ",".join(map(str, item.tensor_split))
