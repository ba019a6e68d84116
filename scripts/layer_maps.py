"""Ask a llama.cpp build on which device it puts every layer of models that `place` has split.

    scripts/layer_maps.py --build LLAMA_CPP/build [--write COMMIT] [MODEL ...]

The build needs `cmake -DGGML_RPC=ON` and the targets llama-fit-params and ggml-rpc-server. The devices are
RPC servers on loopback, so that no GPU is needed. Each model whose header the project carries is placed on
unequal GPUs, two to four of them and two that are too small; llama.cpp's dry run gets the flags that
`plan_dry_run` spells for that, and its log (`load_tensors: layer … assigned to device …`, llama-model.cpp)
is held against the placement. `--write` keeps the maps as test data.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "scripts"))

from ground_truth import start_device  # noqa: E402

import llama_gpu as lg  # noqa: E402
from llama_gpu.errors import DoesNotFitError  # noqa: E402
from llama_gpu.launch import plan_dry_run  # noqa: E402
from support import ground_truth, layer_maps  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Of what the model takes on one GPU; the last are too small for all of it.
BOXES = ((0.45, 0.75), (0.5, 0.3, 0.4), (0.28, 0.2, 0.36, 0.26), (0.2, 0.35))
BUFFERS = 1.25
CPU = -1
# Its log is written by a thread that the program's end may overtake.
ATTEMPTS = 5
ASSIGNED = re.compile(r"load_tensors: layer +(\d+) assigned to device (?:CPU|RPC(\d+))\b")


def placements(header: lg.Header) -> Iterator[tuple[tuple[int, ...], lg.Placement]]:
    """How `place` lays the model on each of the boxes, where it takes several GPUs or a part of one."""
    alone = lg.estimate(header, backend="generic", **layer_maps.OPTIONS).devices[0]
    layers = alone.weights_bytes + alone.context_bytes
    for box in BOXES:
        gpu_bytes = tuple(int(layers * share + BUFFERS * alone.compute_bytes) for share in box)
        try:
            placement = layer_maps.place(header, gpu_bytes)
        except DoesNotFitError:
            continue
        if placement.mode in {"multi", "partial"}:
            yield gpu_bytes, placement


def ask(build: Path, addresses: Sequence[str], path: Path, placement: lg.Placement) -> list[int] | None:
    """The device of every layer in order, -1 for the CPU; None where its log does not tell."""
    uuids = [device.uuid for device in placement.devices]
    run = plan_dry_run(
        build / "bin" / "llama-fit-params",
        model_path=path,
        gpu_uuids=uuids,
        gpu_layers=placement.gpu_layers,
        tensor_split=placement.tensor_split,
        **layer_maps.OPTIONS,
    )
    assert run is not None
    command = [*run.argv, "--rpc", ",".join(addresses[: len(uuids)]), "-lv", "5"]
    count = placement.gpu_layers + placement.estimate.host.layers
    for _ in range(ATTEMPTS):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = dict(ASSIGNED.findall(done.stdout + done.stderr))
        if len(found) == count:
            return [int(found[str(number)] or CPU) for number in range(count)]
    return None


def main() -> int:
    """Ask, compare, and write if told to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", type=Path, required=True, help="llama.cpp's build folder")
    parser.add_argument("--write", metavar="COMMIT", help="keep the maps, as those of this llama.cpp")
    parser.add_argument("models", nargs="*", help="only these models")
    chosen = parser.parse_args()
    build = chosen.build.resolve()

    maps: list[layer_maps.LayerMap] = []
    wrong = silent = 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        addresses = [start_device(build, stack) for _ in range(max(map(len, BOXES)))]
        for model in chosen.models or ground_truth.model_names():
            path = ground_truth.write_model(model, folder)
            for gpu_bytes, placement in placements(lg.read_header(path)):
                layers = ask(build, addresses, path, placement)
                if layers is None:
                    silent += 1
                    print(f"{model}: llama.cpp does not tell", file=sys.stderr)
                    continue
                runs = tuple((on, len(list(same))) for on, same in itertools.groupby(layers))
                split = tuple(int(share) for share in placement.tensor_split)
                item = layer_maps.LayerMap(model, gpu_bytes, placement.gpu_layers, split, runs)
                maps.append(item)
                said = [device.layers for device in placement.devices]
                equal = item.device_layers == said
                wrong += not equal
                print(f"{model}: {'as placed' if equal else f'NOT {said}'}: {runs}", file=sys.stderr)
            path.unlink()
    print(f"{len(maps)} splits of {len({item.model for item in maps})} models, {wrong} not as placed")
    if silent:
        print(f"of {silent} more llama.cpp does not tell")
    if chosen.write:
        layer_maps.write(chosen.write, maps)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
