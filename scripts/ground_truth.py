"""Ask a llama.cpp build for what it needs, and hold the estimates against it.

    scripts/ground_truth.py --source LLAMA_CPP --build LLAMA_CPP/build [--write] [MODEL ...]

The build needs `cmake -DGGML_RPC=ON` and the targets llama-fit-params and ggml-rpc-server. The devices are
RPC servers on loopback, so that no GPU is needed. Every case that the project carries for the generic backend
is asked again; the table says how far the estimates are from the answers. `--write` puts the answers in place
of the carried ones. Weights on the host depend on this machine's CPU (what it repacks); they are kept as
carried unless `--host` is given.

    scripts/ground_truth.py --source LLAMA_CPP --build LLAMA_CPP/build --unseen 2 [--seed 7] [ARCHITECTURE]

asks about models and options that are not carried: so many random tiny models of every architecture, with
random options.
"""

from __future__ import annotations

import argparse
import json
import lzma
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import unseen  # noqa: E402

from support import accuracy, ground_truth  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_DEVICES = 4
START_SECONDS = 10
# Of each model that is not carried.
CASES_PER_MODEL = 8


def build_tool(name: str, source: Path, build: Path, folder: Path) -> Path:
    """``ground_truth`` prints llama.cpp's projection in bytes, ``tiny_models`` writes models."""
    tool = folder / name
    libraries = build / "bin"
    include = [f"-I{source / part}" for part in ("common", "include", "src", "ggml/include", "vendor")]
    link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lllama-common", "-lllama", "-lggml", "-lggml-base"]
    code = ROOT / "scripts" / f"{name}.cpp"
    subprocess.run(
        ["c++", "-std=c++17", "-O1", "-w", *include, str(code), "-o", str(tool), *link], check=True
    )
    return tool


def free_port() -> int:
    """A port that nobody listens on."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_device(build: Path, stack: ExitStack) -> str:
    """An RPC server that stands for a GPU; its address."""
    port = free_port()
    command = [str(build / "bin" / "ggml-rpc-server"), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(server.wait)
    stack.callback(server.terminate)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return f"127.0.0.1:{port}"
        time.sleep(0.05)
    raise SystemExit(f"{command[0]} does not listen")


def ask(
    tool: Path, addresses: Sequence[str], path: Path, cases: Sequence[ground_truth.Case]
) -> list[dict[str, object]]:
    """What llama.cpp says of each case."""
    lines = []
    for case in cases:
        remote = ["--rpc", ",".join(addresses[: case.devices])] if case.devices else []
        slots = [] if "-np" in case.args.split() else ["-np", "1"]
        lines.append(" ".join(["-m", str(path), *remote, *slots, case.args]))
    asked = subprocess.run(
        [str(tool)],
        input="\n".join(lines) + "\n",
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return [json.loads(line) for line in asked.stdout.splitlines() if line.startswith("{")]


def answered(case: ground_truth.Case, answer: dict[str, object], *, host: bool) -> ground_truth.Case | None:
    """The case with the answer's sizes; ``None`` where llama.cpp refused."""
    if "refused" in answer:
        return None
    names = [*(f"device{number}" for number in range(case.devices)), "host"]
    sizes = [ground_truth.Sizes(**answer[name]) for name in names]  # type: ignore[arg-type]
    if not host:
        sizes[-1] = replace(sizes[-1], weights=case.sizes[-1].weights)
    return replace(case, sizes=tuple(sizes))


def ask_unseen(
    tool: Path, makes_models: Path, addresses: Sequence[str], folder: Path, chosen: argparse.Namespace
) -> list[accuracy.Row]:
    """Random models with random options."""
    rows: list[accuracy.Row] = []
    for path, layers in unseen.make_models(makes_models, folder, chosen.unseen, chosen.seed, chosen.models):
        cases = unseen.cases(path, layers, CASES_PER_MODEL, chosen.seed)
        answers = ask(tool, addresses, path, cases)
        new = [answered(*pair, host=True) for pair in zip(cases, answers, strict=True)]
        rows += accuracy.rows_of(path, [case for case in new if case is not None])
    return rows


def main() -> int:
    """Ask, compare, and write if told to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="llama.cpp's source folder")
    parser.add_argument("--build", type=Path, required=True, help="its build folder")
    parser.add_argument("--write", action="store_true", help="put the answers in place of the carried ones")
    parser.add_argument("--host", action="store_true", help="take this machine's host weights as well")
    parser.add_argument("--unseen", type=int, default=0, help="so many random models of every architecture")
    parser.add_argument("--seed", type=int, default=1, help="of the random models and options")
    parser.add_argument("models", nargs="*", help="only these models, or unseen architectures")
    chosen = parser.parse_args()

    rows: list[accuracy.Row] = []
    table = ground_truth.load()
    refused = 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        parts = (chosen.source.resolve(), chosen.build.resolve(), folder)
        tool = build_tool("ground_truth", *parts)
        addresses = [start_device(chosen.build.resolve(), stack) for _ in range(MAX_DEVICES)]
        if chosen.unseen:
            makes_models = build_tool("tiny_models", *parts)
            rows = ask_unseen(tool, makes_models, addresses, folder, chosen)
        for model in [] if chosen.unseen else chosen.models or ground_truth.model_names():
            path = ground_truth.write_model(model, folder)
            cases = [case for case in ground_truth.cases(model) if case.backend == "generic"]
            answers = ask(tool, addresses, path, cases)
            new = [answered(*pair, host=chosen.host) for pair in zip(cases, answers, strict=True)]
            refused += new.count(None)
            known = [case for case in new if case is not None]
            rows += accuracy.rows_of(path, known)
            other = [case for case in ground_truth.cases(model) if case.backend != "generic"]
            table[model]["cases"] = [ground_truth.as_json(case) for case in [*known, *other]]
            path.unlink()
            print(f"{model}: {len(known)} cases", file=sys.stderr)
    print(accuracy.table(rows))
    if refused:
        print(f"{refused} cases were refused by this llama.cpp")
    for row in rows if chosen.unseen else []:
        if row.compute_error:
            print(row)
    if chosen.write:
        text = json.dumps(table, separators=(",", ":"), sort_keys=True)
        (ground_truth.HERE / "cases.json.xz").write_bytes(lzma.compress(text.encode(), preset=9))
    _, total = accuracy.tallies(rows)
    return int(total.weights != total.rows or total.context != total.rows)


if __name__ == "__main__":
    sys.exit(main())
