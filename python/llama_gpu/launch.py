"""Turn a placement and a model's options into the command that starts one llama.cpp server.

Pure: values in, a :class:`LaunchPlan` out. This is the only module that knows how llama.cpp
spells its flags (``common/arg.cpp``); both engines, ``llama-server`` and the embedded one,
take the plan as it is. Nothing here starts a process or looks at the machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

__all__ = [
    "DEFAULT_CACHE_RAM_BYTES",
    "UNASSIGNED_PORT",
    "DryRun",
    "Engine",
    "LaunchPlan",
    "host_caches",
    "plan_dry_run",
    "plan_launch",
]

UNASSIGNED_PORT = 0
"""The port of a plan whose server picks a free one when it starts."""

EVERY_LAYER = 999
"""More layers than any model has: understood as "all" by builds that do not know ``-ngl all``."""

MIB = 1024 * 1024
DEFAULT_CACHE_RAM_BYTES = 1024 * MIB

CACHE_RAM = ("--cache-ram", "-cram")
CONTEXT_CHECKPOINTS = ("--ctx-checkpoints", "-ctxcp", "--swa-checkpoints")

INHERITED_OVERRIDES = ("LLAMA_ARG_", "LLAMA_API_KEY", "LLAMA_SERVER_ROUTER_PORT")
"""Variables that llama-server reads as flags: inherited, they would change what was planned."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A program that serves one GGUF model over llama-server's flags and HTTP interface.

    ``command`` is what comes before the flags, ``flags`` the spellings it understands,
    ``version`` its build (``None``: it does not say), ``reason`` why it was chosen.
    """

    kind: Literal["llama-server", "embedded"]
    command: tuple[str, ...]
    flags: frozenset[str] = field(repr=False)
    version: str | None = None
    reason: str = ""

    def knows(self, flag: str) -> bool:
        """Whether this engine accepts ``flag``, spelled exactly so."""
        return flag in self.flags

    def describe(self) -> str:
        """One line for a person: what it is, where, and why it was chosen."""
        what = f"{self.kind} {self.version or '(unknown version)'}"
        where = f", {self.command[0]}" if self.kind == "llama-server" else ""
        return f"{what}{where}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """How to start one server: command line, environment, and where it will be reached.

    ``environment`` holds only what is set on top of the inherited environment
    (:meth:`full_environment` joins them). ``api_key`` travels in the environment, because a
    command line can be read by every user of the machine.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(hash=False)
    host: str
    port: int
    api_key: str = field(repr=False)
    alias: str
    model_path: str
    gpu_uuids: tuple[str, ...] = ()

    @property
    def base_url(self) -> str:
        """``http://host:port``, without a slash at the end."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def on_port(self, port: int) -> LaunchPlan:
        """The same plan on another port."""
        where = self.argv.index("--port") + 1
        argv = (*self.argv[:where], str(port), *self.argv[where + 1 :])
        return replace(self, argv=argv, port=port)

    def full_environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """``inherited`` less the variables that llama-server would obey, plus ours."""
        return _on_top_of(inherited, self.environment)


@dataclass(frozen=True, slots=True)
class DryRun:
    """How to ask llama.cpp what a model takes, without loading it."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(hash=False)

    def full_environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """As :meth:`LaunchPlan.full_environment`."""
        return _on_top_of(inherited, self.environment)


def _on_top_of(inherited: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in inherited.items() if not name.startswith(INHERITED_OVERRIDES)}
    return {**kept, **environment}


def plan_launch(
    *,
    engine: Engine,
    model_path: str | Path,
    alias: str,
    api_key: str,
    gpu_uuids: Sequence[str] = (),
    gpu_layers: int | None = None,
    tensor_split: Sequence[float] = (),
    context_length: int = 0,
    parallel: int = 1,
    kv_unified: bool = False,
    batch: int = 2048,
    micro_batch: int = 512,
    flash_attention: str = "auto",
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    cpu_moe_layers: int | Literal["all"] = 0,
    kv_offload: bool = True,
    swa_full: bool = False,
    mmproj: str | Path | None = None,
    mmproj_offload: bool = True,
    draft: str | Path | None = None,
    embeddings: bool = False,
    pooling: str | None = None,
    threads: int | None = None,
    cache_ram_bytes: int = DEFAULT_CACHE_RAM_BYTES,
    context_checkpoints: int | None = None,
    extra_arguments: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = UNASSIGNED_PORT,
) -> LaunchPlan:
    """Plan one server.

    The options are those of :func:`llama_gpu.estimate`, under the same names, so that what was
    estimated is what is started.

    Args:
        engine: From :func:`llama_gpu.engine.find_engine`.
        model_path: The GGUF file (the first shard of a split one).
        alias: The name the server answers to; clients send it as ``model``.
        api_key: A secret for this server alone.
        gpu_uuids: The GPUs to use, in the order of ``tensor_split``; none means the CPU.
        gpu_layers: How many layers go to the GPUs; the output layer counts. ``None``: all.
        tensor_split: Proportions per GPU; needed only with more than one.
        context_length: Tokens over all slots; 0 takes the trained length.
        parallel: Slots, that is requests answered at once.
        kv_unified: One cache shared by the slots instead of one each.
        batch: Tokens per logical batch.
        micro_batch: Tokens per physical batch. A server with ``embeddings`` takes whole inputs
            in one, so no input may be longer than this.
        flash_attention: ``"on"``, ``"off"`` or ``"auto"``.
        cache_type_k: Type of the K cache, as llama.cpp spells types.
        cache_type_v: Type of the V cache.
        cpu_moe_layers: Expert weights of the first N layers, or of ``"all"``, stay on the host.
        kv_offload: Whether the KV cache lies on the GPU.
        swa_full: Full-size cache for sliding-window layers.
        mmproj: A multimodal projector.
        mmproj_offload: Whether the projector lies on the first GPU.
        draft: A smaller model of the same vocabulary, for speculative decoding; it goes to the same devices.
        embeddings: Whether ``/v1/embeddings`` answers. Chat still does.
        pooling: ``"none"``, ``"mean"``, ``"cls"``, ``"last"`` or ``"rank"``; ``None`` leaves it to the model.
        threads: Threads for generation; ``None`` leaves it to llama.cpp (one per physical core).
        cache_ram_bytes: Host memory for prompts of earlier conversations (llama.cpp's own default is 8 GiB
            for every server, which several servers on one machine do not have).
        context_checkpoints: How many copies of a slot's state are kept in host memory, for models whose state
            cannot be rolled back; ``None`` leaves it to llama.cpp.
        extra_arguments: Appended as they are; the last one of a flag wins in llama.cpp.
        host: Address to listen on.
        port: 0 lets the server pick a free one when it starts.

    Raises:
        ValueError: ``tensor_split`` does not match ``gpu_uuids``.
    """
    if tensor_split and len(tensor_split) != max(len(gpu_uuids), 1):
        raise ValueError(f"tensor_split has {len(tensor_split)} proportions for {len(gpu_uuids)} GPUs")
    argv: list[str] = [*engine.command, "-m", str(model_path), "--alias", alias]
    argv += ["--host", host, "--port", str(port)]
    argv += _placement_flags(engine, gpu_uuids, gpu_layers, tensor_split)
    argv += ["-kvu" if kv_unified else "-no-kvu"]
    argv += _memory_flags(
        context_length=context_length,
        parallel=parallel,
        batch=batch,
        micro_batch=micro_batch,
        flash_attention=flash_attention,
        cache_type_k=cache_type_k,
        cache_type_v=cache_type_v,
        cpu_moe_layers=cpu_moe_layers,
        kv_offload=kv_offload,
        swa_full=swa_full,
        mmproj_offload=mmproj_offload,
    )
    argv += ["--mmproj", str(mmproj)] if mmproj is not None else []
    if draft is not None:
        argv += _draft_flags(engine, draft, on_gpu=bool(gpu_uuids), extra_arguments=extra_arguments)
    argv += ["--embeddings"] if embeddings else []
    argv += ["--pooling", pooling] if pooling is not None else []
    argv += ["-t", str(threads)] if threads is not None else []
    argv += [CACHE_RAM[0], str(cache_ram_bytes // MIB)]
    if context_checkpoints is not None and engine.knows(CONTEXT_CHECKPOINTS[0]):
        argv += [CONTEXT_CHECKPOINTS[0], str(context_checkpoints)]
    argv += _service_flags(engine)
    argv += extra_arguments
    environment = {**_gpus_in_order(gpu_uuids), "LLAMA_API_KEY": api_key}
    return LaunchPlan(
        argv=tuple(argv),
        environment=MappingProxyType(environment),
        host=host,
        port=port,
        api_key=api_key,
        alias=alias,
        model_path=str(model_path),
        gpu_uuids=tuple(gpu_uuids),
    )


def plan_dry_run(
    tool: str | Path,
    *,
    model_path: str | Path,
    gpu_uuids: Sequence[str],
    gpu_layers: int | None = None,
    tensor_split: Sequence[float] = (),
    kv_unified: bool = False,
    parallel: int = 1,
    **options: Any,
) -> DryRun | None:
    """Plan a question to ``llama-fit-params``; the options are those of :func:`plan_launch`.

    None where that program cannot be told: it has no flag for a cache that slots share.
    """
    if kv_unified and parallel > 1:
        return None
    argv = [str(tool), "-m", str(model_path), "--fit", "off", "-fitp", "on"]
    argv += ["-ngl", str(EVERY_LAYER if gpu_layers is None else gpu_layers), "-sm", "layer"]
    argv += _split_flags(gpu_uuids, tensor_split)
    argv += _memory_flags(parallel=parallel, **options)
    return DryRun(tuple(argv), MappingProxyType(_gpus_in_order(gpu_uuids)))


def host_caches(
    cache_ram_bytes: int, context_checkpoints: int | None, extra_arguments: Sequence[str]
) -> tuple[int, int | None]:
    """Bytes of the prompt cache, and checkpoints of a slot, as a server holds them in the end.

    Flags that pass through win over both options; a cache without a limit counts as one of the bytes given.
    """
    said = dict(itertools.pairwise(extra_arguments))
    for flag in (*CACHE_RAM, *CONTEXT_CHECKPOINTS):
        value = said.get(flag, "")
        if value.isdecimal() and flag in CACHE_RAM:
            cache_ram_bytes = int(value) * MIB
        elif value.isdecimal() and context_checkpoints is not None:
            context_checkpoints = int(value)
    return cache_ram_bytes, context_checkpoints


def _gpus_in_order(gpu_uuids: Sequence[str]) -> dict[str, str]:
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(gpu_uuids)}


def _memory_flags(
    *,
    context_length: int = 0,
    parallel: int = 1,
    batch: int = 2048,
    micro_batch: int = 512,
    flash_attention: str = "auto",
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    cpu_moe_layers: int | Literal["all"] = 0,
    kv_offload: bool = True,
    swa_full: bool = False,
    mmproj_offload: bool = True,
) -> list[str]:
    flags = ["-c", str(context_length), "-np", str(parallel)]
    flags += ["-b", str(batch), "-ub", str(micro_batch), "-fa", flash_attention]
    flags += ["-ctk", cache_type_k, "-ctv", cache_type_v]
    flags += _experts_flags(cpu_moe_layers)
    flags += ["-nkvo"] if not kv_offload else []
    flags += ["--no-mmproj-offload"] if not mmproj_offload else []
    return [*flags, "--swa-full"] if swa_full else flags


def _placement_flags(
    engine: Engine, gpu_uuids: Sequence[str], gpu_layers: int | None, tensor_split: Sequence[float]
) -> list[str]:
    # Without this llama.cpp would move what was placed (common/fit.cpp).
    flags = ["--fit", "off"] if engine.knows("--fit") else []
    if not gpu_uuids:
        # Hiding the GPUs alone leaves the backend in; naming no device keeps its context from being made.
        return [*flags, "-ngl", "0", *(["-dev", "none"] if engine.knows("-dev") else [])]
    flags += ["-ngl", str(EVERY_LAYER if gpu_layers is None else gpu_layers), "-sm", "layer"]
    return flags + _split_flags(gpu_uuids, tensor_split)


def _split_flags(gpu_uuids: Sequence[str], tensor_split: Sequence[float]) -> list[str]:
    if len(gpu_uuids) < 2 or not tensor_split:  # noqa: PLR2004
        return []
    return ["-ts", ",".join(_proportion(share) for share in tensor_split)]


def _experts_flags(cpu_moe_layers: int | Literal["all"]) -> list[str]:
    if cpu_moe_layers == "all":
        return ["-cmoe"]
    return ["-ncmoe", str(cpu_moe_layers)] if cpu_moe_layers else []


def _draft_flags(
    engine: Engine, draft: str | Path, *, on_gpu: bool, extra_arguments: Sequence[str]
) -> list[str]:
    flags = ["-md", str(draft), "-ngld", str(EVERY_LAYER if on_gpu else 0)]
    if engine.knows("--spec-type") and "--spec-type" not in extra_arguments:
        # A draft model alone does nothing: common/arg.cpp infers no type from a plain one.
        flags += ["--spec-type", "draft-simple"]
    return flags


def _proportion(share: float) -> str:
    # Rounding to fewer digits could move a layer across the border between two GPUs.
    return str(int(share)) if share == int(share) else repr(float(share))


def _service_flags(engine: Engine) -> list[str]:
    flags = ["--metrics", "--slots"]
    # Buffer sizes are logged at level 4 (common/log.cpp maps libllama's INFO to TRACE).
    flags += ["-lv", "4"]
    # With both, every line says its level in a form that can be told from the text.
    optional = ("--log-prefix", "--log-timestamps", "--offline")
    flags += [flag for flag in optional if engine.knows(flag)]
    interface = next((flag for flag in ("--no-ui", "--no-webui") if engine.knows(flag)), None)
    return [*flags, *([interface] if interface else [])]
