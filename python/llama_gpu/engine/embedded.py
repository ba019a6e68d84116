"""llama.cpp's HTTP server in this process, from the ``xllamacpp`` package.

The only module that imports ``xllamacpp``. It holds the interpreter's lock while it loads, so nothing
else can be done in this process meanwhile; a signal that keeps its default action still ends it.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import xllamacpp

__all__ = ["common_params", "device_lines", "serve"]

FLASH_ATTENTION = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}
LOAD_MODES = {"mmap+mlock": "MMAP_MLOCK", "dio": "DIRECT_IO"}

# common/common.h LLM_FFN_EXPS_REGEX and llm_ffn_block_regex
EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"


def serve(arguments: argparse.Namespace) -> Any:
    """Load the model and serve it in threads of its own; returns when it answers requests.

    The server ends with the process: destroying the object would wait for every open stream.

    Raises:
        RuntimeError: The model cannot be loaded or the port is taken; llama.cpp has logged why.
        ValueError: A value that the engine does not accept.
    """
    return xllamacpp.Server(common_params(arguments))


def device_lines() -> list[str]:
    """The devices it can offload to, one line each as ``llama-server --list-devices`` prints them."""
    mib = 1024 * 1024
    return [
        f"  {device['name']}: {device['description']} "
        f"({device['memory_total'] // mib} MiB, {device['memory_free'] // mib} MiB free)"
        for device in xllamacpp.get_device_info()
        if device["type"].name.endswith("GPU")
    ]


def common_params(arguments: argparse.Namespace) -> xllamacpp.CommonParams:
    """Parsed flags as llama.cpp's own parameters (``common/arg.cpp`` does the same for llama-server)."""
    params = xllamacpp.CommonParams()
    params.model.path = arguments.model
    params.mmproj.path = arguments.mmproj
    params.mmproj_use_gpu = not arguments.no_mmproj_offload
    params.lora_adapters = [_adapter(path) for path in arguments.lora]
    if arguments.alias:
        params.model_alias = {arguments.alias}
    _listen(params, arguments)
    _memory(params, arguments)
    _devices(params, arguments)
    _work(params, arguments)
    _draft(params, arguments)
    return params


def _listen(params: xllamacpp.CommonParams, arguments: argparse.Namespace) -> None:
    params.hostnames = [arguments.host]
    params.port = arguments.port
    key = arguments.api_key or os.environ.get("LLAMA_API_KEY", "")
    params.api_keys = [key] if key else []
    params.n_threads_http = arguments.threads_http
    params.endpoint_metrics = arguments.metrics
    params.endpoint_slots = arguments.slots
    params.endpoint_props = arguments.props
    params.verbosity = arguments.verbosity
    params.ui = arguments.ui
    params.offline = arguments.offline


def _memory(params: xllamacpp.CommonParams, arguments: argparse.Namespace) -> None:
    params.n_ctx = arguments.ctx_size
    params.n_parallel = arguments.parallel
    params.n_batch = arguments.batch_size
    params.n_ubatch = arguments.ubatch_size
    params.kv_unified = arguments.kv_unified
    params.flash_attn_type = _member(
        xllamacpp.llama_flash_attn_type, "LLAMA_FLASH_ATTN_TYPE", FLASH_ATTENTION[arguments.flash_attn]
    )
    params.cache_type_k = _member(xllamacpp.ggml_type, "GGML_TYPE", arguments.cache_type_k)
    params.cache_type_v = _member(xllamacpp.ggml_type, "GGML_TYPE", arguments.cache_type_v)
    params.swa_full = arguments.swa_full
    params.cache_ram_mib = arguments.cache_ram
    params.n_ctx_checkpoints = arguments.ctx_checkpoints
    mode = LOAD_MODES.get(arguments.load_mode, arguments.load_mode)
    params.load_mode = _member(xllamacpp.llama_load_mode, "LLAMA_LOAD_MODE", mode)


def _devices(params: xllamacpp.CommonParams, arguments: argparse.Namespace) -> None:
    params.n_gpu_layers = arguments.gpu_layers
    params.split_mode = _member(xllamacpp.llama_split_mode, "LLAMA_SPLIT_MODE", arguments.split_mode)
    room = len(params.tensor_split)
    params.tensor_split = (arguments.tensor_split + [0.0] * room)[:room]
    params.main_gpu = arguments.main_gpu
    params.no_kv_offload = arguments.no_kv_offload
    params.no_extra_bufts = arguments.no_repack
    params.no_host = arguments.no_host
    params.fit_params = arguments.fit == "on"
    overrides = [arguments.override_tensor] if arguments.override_tensor else []
    if arguments.cpu_moe:
        overrides.append(f"{EXPERTS}=CPU")
    overrides += [rf"blk\.{layer}{EXPERTS}=CPU" for layer in range(arguments.n_cpu_moe)]
    if overrides:
        params.tensor_buft_overrides = ",".join(overrides)


def _work(params: xllamacpp.CommonParams, arguments: argparse.Namespace) -> None:
    params.cpuparams.n_threads = arguments.threads
    params.cpuparams_batch.n_threads = arguments.threads_batch
    params.embedding = arguments.embeddings or arguments.rerank
    pooling = "rank" if arguments.rerank else arguments.pooling
    if pooling:
        params.pooling_type = _member(xllamacpp.llama_pooling_type, "LLAMA_POOLING_TYPE", pooling)
    params.chat_template = arguments.chat_template
    params.use_jinja = arguments.jinja
    params.reasoning_format = _member(
        xllamacpp.common_reasoning_format,
        "COMMON_REASONING_FORMAT",
        arguments.reasoning_format.replace("-", "_"),
    )
    params.n_cache_reuse = arguments.cache_reuse
    params.warmup = arguments.warmup


def _draft(params: xllamacpp.CommonParams, arguments: argparse.Namespace) -> None:
    params.speculative.draft.mparams.path = arguments.model_draft
    params.speculative.draft.n_gpu_layers = arguments.gpu_layers_draft
    names = [name for names in arguments.spec_type for name in names.split(",")]
    if names:
        params.speculative.types = [
            _member(xllamacpp.common_speculative_type, "COMMON_SPECULATIVE_TYPE", name.replace("-", "_"))
            for name in names
        ]


def _member(enumeration: Any, prefix: str, name: str) -> Any:
    return getattr(enumeration, f"{prefix}_{name.upper()}")


def _adapter(path: str) -> Any:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path = path
    adapter.scale = 1.0
    return adapter
