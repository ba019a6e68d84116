"""The flags of llama-server that the embedded engine understands, spelled as llama.cpp does.

Nothing here imports the engine: :mod:`llama_gpu.engine.find` lists these flags without it.
"""

from __future__ import annotations

import argparse

__all__ = ["build_parser", "known_flags"]

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
ALL_LAYERS = -2  # common/arg.cpp "--gpu-layers all"


def build_parser() -> argparse.ArgumentParser:
    """The parser; what it does not know it refuses by name."""
    parser = argparse.ArgumentParser(
        prog="python -m llama_gpu.engine",
        description="llama.cpp's HTTP server from the xllamacpp package, with llama-server's flags.",
        allow_abbrev=False,
    )
    _add_model(parser.add_argument_group("model"))
    _add_where(parser.add_argument_group("where it listens"))
    _add_memory(parser.add_argument_group("memory"))
    _add_devices(parser.add_argument_group("devices"))
    _add_work(parser.add_argument_group("work"))
    _add_service(parser.add_argument_group("service"))
    return parser


def known_flags() -> frozenset[str]:
    """Every spelling that the embedded engine accepts."""
    return frozenset(name for action in build_parser()._actions for name in action.option_strings)  # noqa: SLF001


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-m", "--model", default="", metavar="FILE")
    group.add_argument("-a", "--alias", default="")
    group.add_argument("--mmproj", default="", metavar="FILE")
    group.add_argument("--no-mmproj-offload", action="store_true")
    group.add_argument("-md", "--model-draft", "--spec-draft-model", default="", metavar="FILE")
    group.add_argument("--spec-type", action="append", default=[], metavar="TYPE")
    group.add_argument("--lora", action="append", default=[], metavar="FILE")


def _add_where(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", default="127.0.0.1")
    group.add_argument("--port", type=int, default=8080)
    group.add_argument("--api-key", default="", help="default: the variable LLAMA_API_KEY")
    group.add_argument("--threads-http", type=int, default=-1)


def _add_memory(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-c", "--ctx-size", type=int, default=0)
    group.add_argument("-np", "--parallel", type=int, default=1)
    group.add_argument("-b", "--batch-size", type=int, default=2048)
    group.add_argument("-ub", "--ubatch-size", type=int, default=512)
    group.add_argument("-kvu", "--kv-unified", dest="kv_unified", action="store_true")
    group.add_argument("-no-kvu", "--no-kv-unified", dest="kv_unified", action="store_false")
    group.add_argument("-fa", "--flash-attn", choices=("on", "off", "auto"), default="auto")
    group.add_argument("-ctk", "--cache-type-k", choices=CACHE_TYPES, default="f16")
    group.add_argument("-ctv", "--cache-type-v", choices=CACHE_TYPES, default="f16")
    group.add_argument("--swa-full", action="store_true")
    group.add_argument("-cram", "--cache-ram", type=int, default=8192)
    group.add_argument("-ctxcp", "--ctx-checkpoints", type=int, default=32)
    group.add_argument(
        "-lm",
        "--load-mode",
        choices=("auto", "none", "mmap", "mlock", "mmap+mlock", "dio"),
        default="auto",
    )


def _add_devices(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--list-devices", action="store_true", help="print the GPUs it can use, and end")
    group.add_argument("-ngl", "--gpu-layers", "--n-gpu-layers", type=_layers, default=ALL_LAYERS)
    group.add_argument(
        "-ngld", "--gpu-layers-draft", "--n-gpu-layers-draft", type=_layers, default=ALL_LAYERS
    )
    group.add_argument("-sm", "--split-mode", choices=("none", "layer", "row", "tensor"), default="layer")
    group.add_argument("-ts", "--tensor-split", type=_proportions, default=[])
    group.add_argument("-mg", "--main-gpu", type=int, default=0)
    group.add_argument("-ncmoe", "--n-cpu-moe", type=int, default=0)
    group.add_argument("-cmoe", "--cpu-moe", action="store_true")
    group.add_argument("-ot", "--override-tensor", default="")
    group.add_argument("-nkvo", "--no-kv-offload", action="store_true")
    group.add_argument("-nr", "--no-repack", action="store_true")
    group.add_argument("--no-host", action="store_true")
    group.add_argument("-fit", "--fit", choices=("on", "off"), default="off")


def _add_work(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-t", "--threads", type=int, default=-1)
    group.add_argument("-tb", "--threads-batch", type=int, default=-1)
    group.add_argument("--embedding", "--embeddings", dest="embeddings", action="store_true")
    group.add_argument("--pooling", choices=("none", "mean", "cls", "last", "rank"))
    group.add_argument("--rerank", "--reranking", dest="rerank", action="store_true")
    group.add_argument("--chat-template", default="")
    group.add_argument("--jinja", dest="jinja", action="store_true", default=True)
    group.add_argument("--no-jinja", dest="jinja", action="store_false")
    group.add_argument(
        "--reasoning-format", choices=("none", "auto", "deepseek", "deepseek-legacy"), default="deepseek"
    )
    group.add_argument("--cache-reuse", type=int, default=0)
    group.add_argument("--warmup", dest="warmup", action="store_true", default=True)
    group.add_argument("--no-warmup", dest="warmup", action="store_false")


def _add_service(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--metrics", action="store_true")
    group.add_argument("--slots", dest="slots", action="store_true", default=True)
    group.add_argument("--no-slots", dest="slots", action="store_false")
    group.add_argument("--props", action="store_true")
    group.add_argument("-lv", "--verbosity", "--log-verbosity", type=int, default=3)
    group.add_argument("--no-ui", "--no-webui", dest="ui", action="store_false")
    # The package offers no way to turn these off.
    group.add_argument("--log-prefix", action="store_true", help="always on")
    group.add_argument("--log-timestamps", action="store_true", help="always on")
    group.add_argument("--offline", action="store_true")


def _layers(text: str) -> int:
    return {"all": ALL_LAYERS, "auto": -1}.get(text) or int(text)


def _proportions(text: str) -> list[float]:
    return [float(share) for share in text.replace("/", ",").split(",")]
