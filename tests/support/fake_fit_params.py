#!/usr/bin/env python3
"""A stand-in for ``llama-fit-params`` that prints what it is told to; standard library only.

Lies as ``llama-fit-params`` beside a server's program. It appends its flags and GPUs to ``MODEL.asked`` as
a line of JSON, waits for somebody to open the FIFO ``MODEL.fit.gate`` for writing if there is one, and
answers ``MODEL.fit.txt``, word for word; without one it ends as the real one does that cannot load a model.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    model = arguments[arguments.index("-m") + 1]
    asked = {"arguments": arguments, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "nice": os.nice(0)}
    with Path(f"{model}.asked").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asked) + "\n")
    gate, answer = Path(f"{model}.fit.gate"), Path(f"{model}.fit.txt")
    if gate.exists():
        gate.open("rb").close()
    sys.stderr.write(
        "llama_fit_params: printing estimated memory in MiB to stdout (device, model, context, compute)\n"
    )
    if not answer.exists():
        sys.stderr.write("terminate called after throwing an instance of 'std::runtime_error'\n")
        return 134
    sys.stdout.write(answer.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
