"""Every setting with its default and its meaning. No file is read here.

The keys of ``server``, ``server_pool`` and ``gpu`` that Llama-Smart-Proxy's files carry
keep their names and their meaning, units included (its timeouts are seconds).
"""

from __future__ import annotations

import ipaddress
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from llama_gpu.memory.store import default_file

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]
BuiltInStrategy = Literal["single-gpu-preferred", "distribute", "pack"]
CpuPolicy = Literal["never", "partial", "allow"]


def _switch(on: str, off: str) -> BeforeValidator:
    """YAML reads a bare on, off, yes or no as a boolean; this gives the word back."""
    return BeforeValidator(lambda value: (on if value else off) if isinstance(value, bool) else value)


_one_or_many = BeforeValidator(lambda value: [value] if isinstance(value, str | int | Path) else value)
_all_is_none = BeforeValidator(lambda value: None if value == "all" else value)

Texts = Annotated[tuple[str, ...], _one_or_many]
# From a variable an index comes as text.
GpuName = Annotated[
    int | str, BeforeValidator(lambda name: int(name) if isinstance(name, str) and name.isdecimal() else name)
]
GpuNames = Annotated[tuple[GpuName, ...], _one_or_many]
Layers = Annotated[NonNegativeInt | None, _all_is_none]
Port = Annotated[int, Field(ge=1, le=65535)]
HeadroomBytes = Annotated[ByteSize, Field(ge=0)]
DEFAULT_HEADROOM = ByteSize(256 * 1024 * 1024)


def _known_strategy(name: str) -> str:
    built_in = get_args(BuiltInStrategy)
    if name in built_in or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return name
    raise PydanticCustomError("strategy", f"should be {', '.join(built_in)} or module:Class")


Strategy = Annotated[str, AfterValidator(_known_strategy)]


class _Settings(BaseModel):
    # The texts under the fields are their descriptions: they reach the reference in the
    # README and the JSON schema.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DegradeStep(_Settings):
    """What a model gives up in one step: some of its options, each with less of it."""

    context_length: PositiveInt | None = None
    """A shorter context: the longest that fits, of at least so many tokens."""
    cache_type_k: CacheType | None = None
    """Cached keys of fewer bits."""
    cache_type_v: CacheType | None = None
    """Cached values of fewer bits; a quantised type needs flash attention."""
    parallel: PositiveInt | None = None
    """Fewer slots."""
    micro_batch: PositiveInt | None = None
    """A smaller physical batch."""
    cpu_moe_layers: PositiveInt | Literal["all"] | None = None
    """Experts of more layers on the CPU."""
    kv_offload: Literal[False] | None = None
    """The cache in host memory."""
    mmproj_offload: Literal[False] | None = None
    """The projector in host memory."""
    cache_ram_bytes: Annotated[ByteSize, Field(ge=0)] | None = None
    """A smaller cache for the prompts of earlier conversations."""

    @property
    def changes(self) -> dict[str, Any]:
        """The options that it changes, by name."""
        return {name: getattr(self, name) for name in sorted(self.model_fields_set)}

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not any(value is not None for value in self.changes.values()):
            raise ValueError("should name at least one option, such as {context_length: 4096}")
        return self


Degradation = Annotated[
    Annotated[DegradeStep, Tag("options")] | Annotated[Literal["partial", "cpu"], Tag("word")],
    Discriminator(lambda step: "options" if isinstance(step, dict | DegradeStep) else "word"),
]


class ModelOptions(_Settings):
    """How a model is loaded and kept. The defaults are llama-server's where it has one."""

    context_length: NonNegativeInt = 8192
    """Tokens of context, for all slots together (llama-server's -c); 0 = trained length."""
    parallel: PositiveInt = 4
    """Slots: requests that one server answers at the same time."""
    kv_unified: bool = True
    """The slots share one cache; false gives each an equal part of the context."""
    batch: PositiveInt = 2048
    """Logical batch, in tokens."""
    micro_batch: PositiveInt = 512
    """Physical batch, in tokens; it costs compute memory."""
    flash_attention: Annotated[Literal["auto", "on", "off"], _switch("on", "off")] = "auto"
    """auto, on or off."""
    cache_type_k: CacheType = "f16"
    """Type of the cached keys: f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0 or q5_1."""
    cache_type_v: CacheType = "f16"
    """Type of the cached values; a quantised one needs flash attention."""
    gpu_layers: Layers = None
    """Layers on the GPU, the output layer counts; unset or all = every layer, 0 = CPU only."""
    cpu_moe_layers: NonNegativeInt | Literal["all"] = 0
    """How many layers keep their experts on the CPU, or all."""
    kv_offload: bool = True
    """true keeps the cache on the GPU, false in host memory."""
    swa_full: bool = False
    """Full-size cache for sliding-window layers."""
    mmproj_offload: bool = True
    """true keeps the projector on the GPU, false in host memory."""
    cache_ram_bytes: Annotated[ByteSize, Field(ge=0)] | None = None
    """Host memory for prompts of earlier conversations; unset = 1GiB, less on a small host, 0 = none."""
    threads: PositiveInt | None = None
    """CPU threads; unset leaves the choice to the engine."""
    mmproj: Annotated[
        Literal["auto", "none"] | Path, Field(union_mode="left_to_right"), _switch("auto", "none")
    ] = "auto"
    """A projector file; auto takes the one beside the model, none takes none."""
    draft: Path | None = None
    """A draft model's file, for speculative decoding."""
    embeddings: bool | None = None
    """Serve embeddings; unset = as the model's header says."""
    pinned: bool = False
    """Loaded at start and never evicted."""
    priority: int = 0
    """The higher one is loaded first and leaves last; a lower one waits rather than make it leave."""
    min_resident_seconds: NonNegativeFloat | None = None
    """Seconds after a load in which no other model makes it leave; unset = as long as the load took,
    at most 10."""
    replicas: PositiveInt = 1
    """Servers of it side by side, each on GPUs of its own, where room is free: nobody leaves for a second."""
    max_replicas: PositiveInt | None = None
    """Up to so many while requests queue for every slot of one more; the first to leave when others need
    room. Unset = replicas."""
    cpu: CpuPolicy | None = None
    """When no GPU fits: never, partial or allow the CPU; unset = as gpu.cpu_fallback says."""
    partial: bool = False
    """May leave some layers on the CPU when no GPU fits them all."""
    degrade: tuple[Degradation, ...] = ()
    """What it gives up, one after the other, when it fits nowhere: see What a model may give up."""
    degrade_at_once: bool = False
    """true: gives it up rather than wait for a model that is busy."""
    gpus: GpuNames | None = None
    """The GPUs it may use, by UUID or index; unset = any."""
    max_gpus: PositiveInt | None = None
    """At most this many GPUs; unset = any number."""
    aliases: Annotated[Texts, Field(validation_alias=AliasChoices("aliases", "alias"))] = ()
    """Other names that requests may use."""
    extra_arguments: tuple[str, ...] = ()
    """Flags handed to llama-server as they are."""
    ttl_seconds: PositiveFloat | None = None
    """Unloaded after so many idle seconds; unset = never."""
    start_timeout_seconds: PositiveFloat | None = None
    """Seconds that a start may take; unset = server_pool.health_timeout."""

    @property
    def most_replicas(self) -> int:
        """Servers of it at most."""
        return max(self.replicas, self.max_replicas or 1)

    @model_validator(mode="after")
    def _never_is_never(self) -> Self:
        words = [step for step in self.degrade if isinstance(step, str)]
        if self.cpu == "never" and words:
            raise ValueError(f"should not have {words[0]} in degrade, because cpu is never")
        return self


class ServerSettings(_Settings):
    """The endpoint that clients talk to."""

    host: str = "127.0.0.1"
    """Address to listen on; any but loopback wants api_keys."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Port to listen on; 0 takes any free one."""
    api_keys: Annotated[Texts, Field(repr=False)] = ()
    """Keys of which every request must carry one as its bearer token; none = no check."""

    @property
    def is_open(self) -> bool:
        """Whether others than this machine can reach the endpoint without a key."""
        return not is_loopback(self.host) and not self.api_keys


class ServerPoolSettings(_Settings):
    """The llama.cpp servers behind the endpoint."""

    size: PositiveInt | None = None
    """How many servers may run at once; unset = as memory allows, 4 on a CPU whose memory cannot be read."""
    host: str = "127.0.0.1"
    """Loopback address of the servers; they never listen on another."""
    port_start: Port | None = None
    """The servers' ports count up from here; unset = any free port."""
    gpu_layers: Layers = None
    """gpu_layers of every model that has none of its own; 99 has always meant all."""
    request_timeout: PositiveFloat = 600
    """Seconds to wait for an answer to begin, and for each next piece of a stream."""
    health_timeout: PositiveFloat = 600
    """Seconds that a server may take until it is healthy."""
    queue_size: PositiveInt = 256
    """Requests that may wait for one model to load; more are told to come back (429)."""
    queue_timeout: PositiveFloat = 600
    """Seconds that a request may wait for its model to load, then 503."""
    starvation_timeout: PositiveFloat = 30
    """Seconds until a model that busy ones or higher priorities keep out gets its turn: they take no new
    requests, end those they have, and leave."""
    stop_timeout: PositiveFloat = 10
    """Seconds between asking a server to end and killing it."""
    drain_timeout: NonNegativeFloat = 30
    """Seconds that running answers get when the proxy is told to end."""

    @property
    def bind_host(self) -> str:
        """The loopback address that servers listen on, whatever ``host`` says."""
        return self.host if is_loopback(self.host) and self.host != "localhost" else "127.0.0.1"


class GpuSettings(_Settings):
    """Which GPUs are used, and how models are laid on them."""

    enabled: bool = True
    """false serves everything on the CPU."""
    enable_gpu_monitoring: bool = True
    """false reads no GPU, and so serves everything on the CPU, too."""
    monitoring_interval: PositiveFloat = 5.0
    """Seconds between two readings."""
    allocation_strategy: Strategy = "single-gpu-preferred"
    """single-gpu-preferred: the GPU that fits best, several only when one is not enough;
    distribute: the emptiest GPU; pack: the fullest that still fits; module:Class: your own."""
    gpu_allocation_strategy: Strategy | None = None
    """The same; wins over allocation_strategy."""
    cpu_fallback: bool | None = None
    """true: a model that fits no GPU runs on the CPU; unset: only where there is no GPU;
    false: never, not even there."""
    headroom_bytes: HeadroomBytes | dict[GpuName, HeadroomBytes] = DEFAULT_HEADROOM
    """Memory left free on every GPU, such as 268435456 or 256MiB; or, by UUID or index, on some, and on
    the others what default says, or 256MiB: {0: 2GiB, default: 512MiB}."""
    allowed: GpuNames | None = None
    """The GPUs that may be used at all, by UUID or index; unset = every GPU."""

    @property
    def strategy(self) -> str:
        """The strategy that holds: ``gpu_allocation_strategy`` wins."""
        return self.gpu_allocation_strategy or self.allocation_strategy

    @property
    def built_in_strategy(self) -> BuiltInStrategy:
        """The strategy as the core knows it; for one of a user's own, the default that it chooses from."""
        strategy: Any = self.strategy
        return strategy if strategy in get_args(BuiltInStrategy) else "single-gpu-preferred"

    def headroom(self, more_bytes: int = 0) -> dict[str, Any]:
        """``headroom_bytes`` and ``headroom_by_gpu`` for ``Policy``, each by so much more (or less)."""
        given = self.headroom_bytes
        by_gpu = dict(given) if isinstance(given, dict) else {}
        common = by_gpu.pop("default", DEFAULT_HEADROOM) if isinstance(given, dict) else given
        return {
            "headroom_bytes": max(0, int(common) + more_bytes),
            "headroom_by_gpu": {name: max(0, int(size) + more_bytes) for name, size in by_gpu.items()},
        }

    def headroom_on(self, index: int, uuid: str) -> int:
        """Bytes left free on one GPU; of what is said by index and by UUID, the more."""
        headroom = self.headroom()
        own = [size for name, size in headroom["headroom_by_gpu"].items() if name in {index, uuid}]
        return int(max(own, default=headroom["headroom_bytes"]))

    @property
    def cpu_policy(self) -> CpuPolicy:
        """What a model that fits no GPU may do, unless its own ``cpu`` says otherwise."""
        return "allow" if self.cpu_fallback else "never"

    @property
    def off_reason(self) -> str | None:
        """Why no GPU is looked at, in words; None where they are."""
        if not self.enabled:
            return "GPU support is switched off (gpu.enabled: false)"
        if not self.enable_gpu_monitoring:
            return "GPU monitoring is switched off (gpu.enable_gpu_monitoring: false)"
        return None

    @property
    def serves_without_gpu(self) -> bool:
        """Whether models run on the CPU where no GPU is usable."""
        return not self.enabled or self.cpu_fallback is not False


class EngineSettings(_Settings):
    """The llama.cpp that does the work."""

    kind: Literal["auto", "llama-server", "embedded"] = "auto"
    """auto: llama-server where there is one, else the embedded engine."""
    path: Path | None = None
    """The llama-server program; unset = the one on PATH."""


class MemorySettings(_Settings):
    """The host's memory, and what is remembered of the memory that loads took."""

    file: Path | None = None
    """Where it is remembered; unset = memory.sqlite3 in the user's folder for caches."""
    projection: bool = True
    """Ask llama.cpp what the models will take, where its llama-fit-params stands beside llama-server."""

    host_headroom_bytes: Annotated[ByteSize, Field(ge=0)] = ByteSize(512 * 1024 * 1024)
    """Host memory left free, such as 512MiB."""
    host_limit_bytes: Annotated[ByteSize, Field(ge=0)] | None = None
    """Host memory that all servers together may take; unset = what is available."""

    @property
    def path(self) -> Path | None:
        """The file that holds; None where this user has no folder for one."""
        return self.file or default_file()


class LogSettings(_Settings):
    """What is written to the standard error stream."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """debug, info, warning or error."""
    format: Literal["console", "json"] = "console"
    """console for people, json for programs."""


class Config(_Settings):
    """The whole configuration. Immutable: a change makes another one."""

    models_dirs: Annotated[
        tuple[Path, ...],
        _one_or_many,
        Field(min_length=1, validation_alias=AliasChoices("models_dirs", "models_dir")),
    ] = (Path("models"),)
    """Folders searched for *.gguf files; in a file, relative to that file."""
    defaults: ModelOptions = ModelOptions()
    """Options of every model."""
    models: dict[str, ModelOptions] = {}
    """Options by model id; * and ? match, later ones win, the exact id wins over all."""
    server: ServerSettings = ServerSettings()
    """The endpoint that clients talk to."""
    server_pool: ServerPoolSettings = ServerPoolSettings()
    """The llama.cpp servers behind the endpoint."""
    gpu: GpuSettings = GpuSettings()
    """Which GPUs are used, and how models are laid on them."""
    engine: EngineSettings = EngineSettings()
    """The llama.cpp that does the work."""
    memory: MemorySettings = MemorySettings()
    """The host's memory, and what is remembered of the memory that loads took."""
    log: LogSettings = LogSettings()
    """What is written to the standard error stream."""

    _notes: tuple[str, ...] = PrivateAttr(default=())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What its owner should hear once, at start, in sentences."""
        found = list(self._notes)
        if self.server.is_open:
            found.append(
                f"server.host {self.server.host} lets other machines in and there is no key: "
                "anybody who reaches this port can use the models. "
                "Set server.api_keys, or listen on 127.0.0.1."
            )
        if not is_loopback(self.server_pool.host):
            found.append(
                f"server_pool.host {self.server_pool.host} is not used: "
                "llama.cpp servers listen on loopback only."
            )
        return tuple(found)

    def patterns_for(self, model_id: str) -> tuple[str, ...]:
        """The keys of ``models`` that speak of this model, weakest first."""
        name = model_id.lower()
        matching = [key for key in self.models if key.lower() != name and fnmatchcase(name, key.lower())]
        return (*matching, *(key for key in self.models if key.lower() == name))

    def options_for(self, model_id: str) -> ModelOptions:
        """The options of one model: ``defaults``, then every matching key of ``models``.

        What is left to other sections (``cpu``, ``gpu_layers``, ``start_timeout_seconds``)
        is filled in from them, so that the answer stands alone.
        """
        chosen: dict[str, Any] = {
            "cpu": self.gpu.cpu_policy,
            "gpu_layers": self.server_pool.gpu_layers,
            "start_timeout_seconds": self.server_pool.health_timeout,
        }
        for options in (self.defaults, *(self.models[key] for key in self.patterns_for(model_id))):
            chosen |= {name: getattr(options, name) for name in options.model_fields_set}
            if options.cpu == "never":
                chosen["degrade"] = tuple(s for s in chosen.get("degrade", ()) if isinstance(s, DegradeStep))
        return ModelOptions().model_copy(update=chosen)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
