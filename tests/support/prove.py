"""Very many random events against the scheduler: ``python -m support.prove [OPERATIONS] [SEED]``.

Each round is a machine of another shape. A failure names the seed of its round: give it as SEED to see
it again.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from support.scheduler_world import World, headers

ROUND_OPERATIONS = 400
WEIGHTS = {
    "request": 10,
    "request_ends": 9,
    "load_goes_on": 6,
    "stop_ends": 4,
    "time_passes": 6,
    "crash": 1,
    "others_change": 1,
    "gpu_fails": 1,
    "unload": 1,
}


def one_round(models: dict[str, object], seed: int) -> World:
    """A machine of the shape that ``seed`` gives, until everything on it has ended."""
    generator = random.Random(seed)
    world = World(models, generator.getrandbits(256))  # type: ignore[arg-type]
    for name in generator.choices(list(WEIGHTS), list(WEIGHTS.values()), k=ROUND_OPERATIONS):
        pick = generator.uniform(0, 15) if name == "time_passes" else generator.randrange(10_000)
        getattr(world, name)(pick)
    world.finish()
    return world


def main(operations: int = 1_000_000, first_seed: int = 1) -> None:
    began, done, seed = time.monotonic(), 0, first_seed
    happened: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        models = headers(Path(folder))
        while done < operations:
            try:
                world = one_round(models, seed)
            except BaseException:
                print(f"seed {seed} fails", file=sys.stderr)
                raise
            done += world.operations
            happened += world.happened
            seed += 1
    seconds = time.monotonic() - began
    print(f"{done} operations on {seed - first_seed} machines in {seconds:.0f} s, no promise broken")
    print(", ".join(f"{count} {name}" for name, count in happened.most_common()))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
