"""The Rust core of llama-gpu.

Values are frozen, comparable by value and picklable. Sizes are bytes. Functions that
read a file or ask the driver let go of the interpreter while they wait; the others
take microseconds and do not.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Self, final, overload

from llama_gpu.errors import DoesNotFitError

__all__ = [
    "Alternative",
    "Claim",
    "DeviceMemory",
    "Explanation",
    "Gpu",
    "GpuProcess",
    "GpuSnapshot",
    "Header",
    "Lease",
    "Ledger",
    "MemoryEstimate",
    "Metadata",
    "MetadataArray",
    "Monitor",
    "PlacedDevice",
    "Placement",
    "Plan",
    "Policy",
    "Running",
    "Shard",
    "Tensor",
    "Wanted",
    "__version__",
    "estimate",
    "explain",
    "has_host_pids",
    "place",
    "plan",
    "read_header",
    "snapshot_gpus",
]

__version__: str
"""The version of the package, as in its wheel."""

# --- gpu ---------------------------------------------------------------------

@final
class GpuProcess:
    """A process that runs on a GPU."""

    def __new__(cls, pid: int, used_bytes: int | None = None) -> Self: ...
    @property
    def pid(self) -> int:
        """The process id as the driver knows it: that of the host, not of a container."""

    @property
    def used_bytes(self) -> int | None:
        """Bytes of GPU memory; None where the driver does not tell (WDDM, WSL2, some MIG devices)."""

    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __getnewargs__(self) -> tuple[int, int | None]: ...

@final
class Gpu:
    """One GPU, or one MIG device, as it was read. Sizes are bytes; what is not known is None.

    Can be built by hand; every keyword but ``index`` has a default. ``uuid`` defaults to
    ``"GPU-<index>"`` and ``used_bytes`` to ``total_bytes - free_bytes - reserved_bytes``.

    Raises:
        ValueError: ``free_bytes`` is more than ``total_bytes``, ``utilization`` is over 100, or
            ``health`` is no word of the health contract.
    """

    def __new__(
        cls,
        *,
        index: int,
        uuid: str | None = None,
        name: str | None = None,
        total_bytes: int | None = None,
        free_bytes: int | None = None,
        used_bytes: int | None = None,
        reserved_bytes: int | None = None,
        utilization: int | None = None,
        temperature: int | None = None,
        power_watts: float | None = None,
        compute_capability: tuple[int, int] | None = None,
        processes: Sequence[GpuProcess] | None = None,
        mig: bool | None = None,
        parent_uuid: str | None = None,
        unified: bool = False,
        health: Literal["ok", "degraded", "lost"] = "ok",
        health_reason: str | None = None,
        pci_bus_id: str | None = None,
        nvlink_peers: Sequence[str] | None = None,
    ) -> Self: ...
    @property
    def index(self) -> int:
        """NVML's index (PCI order, not CUDA's), for display. MIG devices carry their physical GPU's."""

    @property
    def uuid(self) -> str:
        """The identity: ``GPU-…`` or ``MIG-…``, as ``CUDA_VISIBLE_DEVICES`` takes it."""

    @property
    def name(self) -> str | None:
        """The product name (``nvmlDeviceGetName``)."""

    @property
    def total_bytes(self) -> int | None:
        """All memory of the device (``nvmlDeviceGetMemoryInfo_v2``, else version 1).

        Where the GPU shares the system's memory: ``MemTotal``, or the control group's limit.
        """

    @property
    def free_bytes(self) -> int | None:
        """Memory that can be allocated now: the number to decide by. ``MemAvailable`` where shared."""

    @property
    def used_bytes(self) -> int | None:
        """Memory allocated by processes; before driver 510, and on WSL2, with the reserved part."""

    @property
    def reserved_bytes(self) -> int | None:
        """Memory the driver keeps for itself, where it tells."""

    @property
    def utilization(self) -> int | None:
        """Share of time in which a kernel ran, 0 to 100 percent (``nvmlDeviceGetUtilizationRates``)."""

    @property
    def temperature(self) -> int | None:
        """Temperature of the die in °C (``nvmlDeviceGetTemperature``)."""

    @property
    def power_watts(self) -> float | None:
        """Power draw in watts (``nvmlDeviceGetPowerUsage``)."""

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """CUDA compute capability as (major, minor)."""

    @property
    def processes(self) -> tuple[GpuProcess, ...] | None:
        """Compute and graphics processes, each once, by pid; None where the driver does not tell."""

    @property
    def mig(self) -> bool:
        """Whether this is a MIG device, a slice of a physical GPU."""

    @property
    def parent_uuid(self) -> str | None:
        """The UUID of the physical GPU that a MIG device is a slice of."""

    @property
    def unified(self) -> bool:
        """Whether its memory is the system's own, and must not be counted beside it."""

    @property
    def health(self) -> Literal["ok", "degraded", "lost"]:
        """``degraded``: usable, but something is wrong. ``lost``: must not be given work."""

    @property
    def health_reason(self) -> str | None:
        """What is wrong and what to do, in words; None when nothing is."""

    @property
    def pci_bus_id(self) -> str | None:
        """The PCI address, as ``00000000:01:00.0``."""

    @property
    def nvlink_peers(self) -> tuple[str, ...]:
        """PCI addresses that its NVLinks lead to: GPUs, or a switch that joins several.

        Empty where there are none or the driver does not tell (``nvmlDeviceGetNvLinkState``,
        ``nvmlDeviceGetNvLinkRemotePciInfo_v2``).
        """

    @property
    def accepts_models(self) -> bool:
        """Whether it can be given a model: it is not lost, and its free memory is known."""

    def fields(self) -> dict[str, Any]:
        """The constructor's keywords with this GPU's values."""

    def replace(self, **changes: Any) -> Gpu:
        """A copy with changed fields, as ``gpu.replace(free_bytes=0)``.

        ``used_bytes`` is derived anew when a size changes and it is not given.

        Raises:
            TypeError: there is no such field.
            ValueError: as the constructor.
        """

    def __eq__(self, other: object, /) -> bool: ...
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...

@final
class GpuSnapshot:
    """All GPUs at one time, or the reason why there are none. Iterates over its GPUs."""

    def __new__(
        cls,
        gpus: Sequence[Gpu] = ...,
        driver_version: str | None = None,
        error: str | None = None,
    ) -> Self: ...
    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs by index; MIG devices stand in place of the GPU they are slices of."""

    @property
    def driver_version(self) -> str | None:
        """The version of the NVIDIA driver."""

    @property
    def error(self) -> str | None:
        """Why the GPUs could not be read, in words with the next step; None when they could.

        Without a driver this is the normal result: no GPUs, and this reason.
        """

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Gpu]: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __getnewargs__(self) -> tuple[tuple[Gpu, ...], str | None, str | None]: ...

def snapshot_gpus() -> GpuSnapshot:
    """Read all GPUs now, through NVML. Lets go of the interpreter.

    Never raises because of the driver: without one, or with a broken one, the snapshot has no
    GPUs and says why in ``error``. A GPU that does not answer is in it as ``lost``; a driver that hangs
    is waited for at most 6 seconds. ``LLAMA_GPU_NVML_LIBRARY`` names a library to load in place of the
    driver's ``libnvidia-ml.so.1``. NVML stays open for 10 seconds after the last call.
    """

def has_host_pids() -> bool:
    """Whether the process ids in a snapshot mean the processes that have them here.

    The driver tells the host's ids. In a container with a pid namespace of its own they mean other
    processes, or none: then memory cannot be attributed by them.
    """

@final
class Monitor:
    """Watches the GPUs in the background, from one thread that owns NVML, until it is closed.

    A GPU that stops answering is ``lost``, keeps its last values, and hides no other; it is back as soon
    as it answers. A driver that cannot be started is tried again, ever more rarely, up to every 5 minutes.
    GPUs that sleep are left asleep. Works on in a forked child. A context manager.

    Args:
        interval_seconds: The time between two readings.
        deadline_seconds: How long the driver may take for one GPU before it counts as hanging.

    Raises:
        ValueError: a time is not above 0.
    """

    def __new__(cls, *, interval_seconds: float = 5.0, deadline_seconds: float = 3.0) -> Self: ...
    def snapshot(self) -> GpuSnapshot:
        """What was read last; never waits for the driver. Before the first reading, ``error`` says so."""

    def refresh(self) -> GpuSnapshot:
        """Read now, also GPUs that sleep. Waits at most twice ``deadline_seconds``, without the interpreter.

        What has not answered by then is as old as ``ages`` says. For decisions that need the free memory
        of this moment.
        """

    @property
    def ages(self) -> dict[str, float]:
        """Seconds since each GPU was read, by UUID; a GPU that never answered is not in it."""

    @property
    def age_seconds(self) -> float | None:
        """Seconds since the last attempt to read all GPUs ended; None before the first."""

    def close(self) -> bool:
        """Stop, and shut NVML down. Lets go of the interpreter.

        Returns:
            False if a call into the driver still hangs after twice ``deadline_seconds``: then its thread
            is left behind and ends when the call does.
        """

    def __enter__(self) -> Self: ...
    def __exit__(self, *_error: object) -> None: ...

# --- gguf --------------------------------------------------------------------

@final
class Header:
    """What the file or files of a model say of it: metadata and tensors, never weights.

    Two headers are equal when all that was read is, the files' sizes and times included.
    A pickle holds the path: unpickling reads the header there and then.
    """

    @property
    def version(self) -> int:
        """The GGUF version, 2 or 3."""

    @property
    def byte_order(self) -> Literal["little", "big"]:
        """The order of the bytes in the file's numbers."""

    @property
    def alignment(self) -> int:
        """Tensors begin at multiples of this many bytes."""

    @property
    def architecture(self) -> str | None:
        """``general.architecture``, such as ``"llama"``."""

    @property
    def metadata(self) -> Metadata:
        """Keys and values; of a split model those of its first file."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of all files, in their order."""

    @property
    def parameter_count(self) -> int:
        """The elements of all tensors."""

    @property
    def quantization(self) -> str | None:
        """The quantisation, such as ``"Q4_K_M"``.

        As ``general.file_type`` names it, else the type that most bytes of the tensors have.
        """

    @property
    def trained_context_length(self) -> int | None:
        """``<architecture>.context_length``, in tokens."""

    @property
    def file_bytes(self) -> int:
        """The size of all files together."""

    @property
    def path(self) -> str:
        """The path that was asked for."""

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files: one, or all of a split model."""

    def __eq__(self, other: object, /) -> bool: ...

@final
class Tensor:
    """What a header says about one tensor."""

    def __new__(
        cls,
        *,
        name: str,
        shape: Sequence[int],
        type: str,  # noqa: A002
        bytes: int,  # noqa: A002
        offset: int,
        shard: int = 0,
    ) -> Self: ...
    @property
    def name(self) -> str:
        """The name, such as ``"blk.0.attn_q.weight"``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements per dimension, the length of a row first, as in the file."""

    @property
    def type(self) -> str:
        """The ggml type, such as ``"Q4_K"``."""

    @property
    def bytes(self) -> int:
        """The bytes of its data, without padding."""

    @property
    def offset(self) -> int:
        """Bytes from the start of its file's data section (``Shard.data_offset``)."""

    @property
    def shard(self) -> int:
        """Which of the header's ``shards`` it lies in."""

    def __eq__(self, other: object, /) -> bool: ...
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...

@final
class Shard:
    """One file of a model."""

    def __new__(cls, *, path: str | PathLike[str], file_bytes: int, data_offset: int) -> Self: ...
    @property
    def path(self) -> str:
        """Where it is."""

    @property
    def file_bytes(self) -> int:
        """Its size."""

    @property
    def data_offset(self) -> int:
        """Where its data section begins, in bytes from the start of the file."""

    def __eq__(self, other: object, /) -> bool: ...
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...

@final
class Metadata(Mapping[str, Any]):
    """A header's metadata: a read-only mapping in the order of the file.

    Values are ``int``, ``float``, ``bool``, ``str`` (``bytes`` for a string that is not UTF-8),
    a ``tuple`` for arrays of up to 4096 numbers, and a ``MetadataArray`` for longer ones and for
    lists of strings. Strings of more than 128 KiB and the elements of a ``MetadataArray`` are
    read from the file when asked for.

    Looking up such a value can raise ``OSError`` or, if the file is no longer the one
    that was read or the value has more than 32 MiB, ``InvalidGgufError``.
    """

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, key: str, /) -> Any: ...
    def get(self, key: str, default: Any = None, /) -> Any: ...
    def __eq__(self, other: object, /) -> bool: ...

@final
class MetadataArray(Sequence[Any]):
    """A list in the metadata, such as the tokens of a vocabulary.

    Its length is known; its elements are read from the file, all at once, when the first is
    asked for. Equal to a list or tuple of equal elements.

    Raises:
        OSError: reading elements, the file is gone or unreadable.
        InvalidGgufError: reading elements, the file is no longer the one whose header was read
            (``reason`` ``"file_changed"``) or the list has more than 32 MiB (``"value_too_large"``).
    """

    @property
    def element_type(self) -> str:
        """The type of its elements, as llama.cpp spells it: such as ``"str"`` or ``"f32"``."""

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int, /) -> Any: ...
    @overload
    def __getitem__(self, index: slice, /) -> list[Any]: ...
    def __eq__(self, other: object, /) -> bool: ...

def read_header(path: str | PathLike[str], *, cached: bool = True) -> Header:
    """Read the header of a GGUF model. Lets go of the interpreter.

    Of a split model (``NAME-00001-of-00003.gguf``) the path of any file will do; all are read.
    A header that was read before is taken from memory as long as size, times and inode of its
    files are the same; ``cached=False`` reads it in any case.

    Raises:
        OSError: a file is missing (``FileNotFoundError``), unreadable (``PermissionError``),
            a folder (``IsADirectoryError``) or no regular file.
        InvalidGgufError: a file breaks the format, is incomplete, or the files of a split model do
            not belong together; ``reason`` and ``offset`` say how and where.
    """

# --- estimate ----------------------------------------------------------------

@final
class DeviceMemory:
    """Memory of one device, or of the host, in bytes."""

    def __new__(
        cls,
        *,
        weights_bytes: int = 0,
        context_bytes: int = 0,
        compute_bytes: int = 0,
        overhead_bytes: int = 0,
        layers: int = 0,
    ) -> Self: ...
    @property
    def weights_bytes(self) -> int:
        """Weights, each tensor padded as the buffer demands."""

    @property
    def context_bytes(self) -> int:
        """KV caches and recurrent states."""

    @property
    def compute_bytes(self) -> int:
        """The compute buffer: what a batch needs while it runs."""

    @property
    def overhead_bytes(self) -> int:
        """What llama.cpp's own sums leave out; 0 with ``backend="generic"``.

        On a device, what the driver takes beside llama.cpp's buffers; on the host, weights that are
        repacked for the CPU.
        """

    @property
    def total_bytes(self) -> int:
        """All of them together."""

    @property
    def layers(self) -> int:
        """Layers here, the output layer counted."""

    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...

@final
class MemoryEstimate:
    """What a model takes with certain options."""

    def __new__(
        cls,
        *,
        devices: Sequence[DeviceMemory],
        host: DeviceMemory,
        basis: Literal["exact", "generic rules", "projected", "measured"],
        context_length: int,
        checkpoint_bytes: int = 0,
    ) -> Self: ...
    @property
    def devices(self) -> tuple[DeviceMemory, ...]:
        """Each device, in device order."""

    @property
    def host(self) -> DeviceMemory:
        """The host's memory."""

    @property
    def basis(self) -> Literal["exact", "generic rules", "projected", "measured"]:
        """Where the numbers come from.

        ``"exact"``: llama.cpp's own rules for this architecture; ``"generic rules"``: a part of them is a
        closed form, or the architecture is unknown; ``"projected"``: llama.cpp's dry run;
        ``"measured"``: a real load.
        """

    @property
    def context_length(self) -> int:
        """Tokens over all slots, as llama.cpp resolves the options."""

    @property
    def checkpoint_bytes(self) -> int:
        """What one context checkpoint of one slot takes in host memory; 0 where llama.cpp makes none.

        A checkpoint is a copy of what cannot be rolled back: the window of sliding layers, the states of
        recurrent ones (``create_checkpoint`` in tools/server/server-context.cpp).
        """

    @property
    def total_device_bytes(self) -> int:
        """All devices together, in bytes."""

    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...

def estimate(
    model: str | PathLike[str] | Header,
    *,
    context_length: int = 0,
    parallel: int = 1,
    kv_unified: bool = False,
    batch: int = 2048,
    micro_batch: int = 512,
    max_outputs: int | None = None,
    flash_attention: Literal["on", "off", "auto"] = "auto",
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    gpu_layers: int | None = None,
    devices: int = 1,
    tensor_split: Sequence[float] | None = None,
    cpu_moe_layers: int | Literal["all"] = 0,
    kv_offload: bool = True,
    swa_full: bool = False,
    mmproj: str | PathLike[str] | Header | None = None,
    mmproj_offload: bool = True,
    draft: str | PathLike[str] | Header | None = None,
    lora: Sequence[str | PathLike[str] | Header] = (),
    backend: Literal["cuda", "generic"] = "cuda",
    compute_capability: tuple[int, int] | None = None,
) -> MemoryEstimate:
    """The analytic tier of ``llama_gpu.estimate``: the memory of a model, per device and on the host.

    From a ``Header``, or a path whose header is in memory, this takes microseconds and keeps the
    interpreter; else the header is read first, which lets go of it.

    The rules are llama.cpp's (commit 0c1e57098): weights from ``llama_model::memory_breakdown``
    (llama-model.cpp), contexts from the constructors in llama-kv-cache*.cpp and
    llama-memory-recurrent.cpp.

    Args:
        model: a GGUF file, or its header.
        context_length: tokens over all slots, as ``-c``; 0 is the trained length.
        parallel: slots, as ``-np``.
        kv_unified: one pool of cells for all slots, as ``-kvu``.
        batch: logical batch in tokens, as ``-b``.
        micro_batch: physical batch in tokens, as ``-ub``.
        max_outputs: tokens of a micro-batch whose logits are kept; ``None`` is all, as in llama.cpp's dry
            run. A llama-server that keeps them for its slots alone has ``parallel`` (``n_outputs_max`` in
            its log).
        flash_attention: as ``-fa``.
        cache_type_k: type of the cached keys, as ``-ctk``.
        cache_type_v: type of the cached values, as ``-ctv``.
        gpu_layers: layers on devices, the output layer counted, as ``-ngl``; ``None`` is all, 0 none.
        devices: how many devices there are; 0 is the CPU alone.
        tensor_split: the devices' proportions, as ``-ts``; ``None`` is equal shares.
        cpu_moe_layers: the first so many layers, or ``"all"``, keep their experts on the CPU.
        kv_offload: ``False`` keeps the cache on the host, as ``-nkvo``.
        swa_full: sliding layers get cells for the whole context, as ``--swa-full``.
        mmproj: a projector that is loaded with the model.
        mmproj_offload: ``False`` keeps the projector on the host, as ``--no-mmproj-offload``.
        draft: a draft model that is loaded with the model.
        lora: LoRA adapters that are loaded with the model.
        backend: whose buffer rules count; ``"generic"`` is llama.cpp alone, without any driver's overhead.
        compute_capability: the devices' CUDA compute capability, for the driver's overhead.

    Raises:
        ValueError: an option is out of range, or llama.cpp refuses it for this model; it is named.
        UnsupportedModelError: the file is valid but no language model.
        OSError: the file cannot be read.
        InvalidGgufError: the file breaks the format.
    """

# --- placement ---------------------------------------------------------------

@final
class Policy:
    """Where a model may go and what must be left there.

    Raises:
        ValueError: an unknown strategy or use of the CPU; the known ones are named.
        TypeError: a GPU in ``allowed`` or ``headroom_by_gpu`` that is neither an index nor a UUID.
    """

    def __new__(
        cls,
        *,
        strategy: Literal["single-gpu-preferred", "distribute", "pack"] = "single-gpu-preferred",
        headroom_bytes: int = 0,
        headroom_by_gpu: dict[int | str, int] | None = None,
        max_gpus: int | None = None,
        allowed: Iterable[int | str] | None = None,
        cpu: Literal["never", "partial", "allow"] = "never",
        partial: bool = False,
        priority: int = 0,
    ) -> Self: ...
    @property
    def strategy(self) -> Literal["single-gpu-preferred", "distribute", "pack"]:
        """Which of several GPUs that would do is taken.

        ``"single-gpu-preferred"`` takes the one with the least left over, ``"distribute"`` the
        emptiest, ``"pack"`` one in use before an empty one.
        """

    @property
    def headroom_bytes(self) -> int:
        """Bytes that must stay free on every GPU that is used."""

    @property
    def headroom_by_gpu(self) -> dict[int | str, int]:
        """The same for single GPUs, by index or UUID, in place of ``headroom_bytes``."""

    @property
    def max_gpus(self) -> int | None:
        """The largest number of GPUs for one model; None for as many as llama.cpp can use (16)."""

    @property
    def allowed(self) -> tuple[int | str, ...] | None:
        """The only GPUs that may be used, by index or UUID; None for all.

        The UUID of a physical GPU names its MIG devices too.
        """

    @property
    def cpu(self) -> Literal["never", "partial", "allow"]:
        """How much of the model may run on the CPU: nothing, some of its layers, or all of it."""

    @property
    def partial(self) -> bool:
        """Whether some layers may stay on the CPU; ``cpu`` of ``"partial"`` or ``"allow"`` says the same."""

    @property
    def priority(self) -> int:
        """The newcomer's priority: models of a higher one are not evicted for it."""

    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...

@final
class Running:
    """A model that holds GPU memory, and what it would cost to lose it."""

    def __new__(
        cls,
        id: str,  # noqa: A002 -- the name is the contract
        bytes_by_gpu: dict[str, int],
        *,
        busy: bool = False,
        pinned: bool = False,
        idle_seconds: float = 0.0,
        priority: int = 0,
        reload_seconds: float | None = None,
        recent_requests: float | None = None,
    ) -> Self: ...
    @property
    def id(self) -> str:
        """Handed back in ``Placement.evict`` when it should leave."""

    @property
    def bytes_by_gpu(self) -> dict[str, int]:
        """The bytes it holds, by GPU UUID: what comes back when it leaves."""

    @property
    def busy(self) -> bool:
        """Whether it answers a request now, or loads. A busy model is never evicted."""

    @property
    def pinned(self) -> bool:
        """Whether it must stay. A pinned model is never evicted."""

    @property
    def idle_seconds(self) -> float:
        """Seconds since its last request ended."""

    @property
    def priority(self) -> int:
        """A newcomer of a lower one does not evict it."""

    @property
    def reload_seconds(self) -> float | None:
        """Seconds that loading it again takes; None is taken from its size, at 2 GB a second."""

    @property
    def recent_requests(self) -> float | None:
        """How often it was asked for lately, older requests counting for less; None counts as once."""

    @property
    def eviction_cost(self) -> int:
        """What evicting it costs, in microseconds of reloading that are to be expected.

        ``reload * 4**priority * recent_requests / (1 + idle / 60)``, the priority held between
        -8 and 8, at least 1. The set that is evicted is the one with the least sum.
        """

    def __eq__(self, other: object, /) -> bool: ...
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...

@final
class PlacedDevice:
    """A GPU that a model is placed on."""

    def __new__(cls, *, uuid: str, index: int, layers: int, total_bytes: int) -> Self: ...
    @property
    def uuid(self) -> str:
        """Its identity, to be handed to the server in this order."""

    @property
    def index(self) -> int:
        """Its index, for display."""

    @property
    def layers(self) -> int:
        """Layers it holds, the output layer counted."""

    @property
    def total_bytes(self) -> int:
        """Everything it will hold for the model."""

    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...

@final
class Placement:
    """Where a model goes, what must leave for it, and why."""

    def __new__(
        cls,
        *,
        mode: Literal["single", "multi", "partial", "cpu"],
        devices: Sequence[PlacedDevice],
        gpu_layers: int,
        tensor_split: Sequence[float],
        evict: Sequence[str],
        estimate: MemoryEstimate,
        reason: str,
    ) -> Self: ...
    @property
    def mode(self) -> Literal["single", "multi", "partial", "cpu"]:
        """All layers on one GPU or on several, some on the CPU, or all there."""

    @property
    def devices(self) -> tuple[PlacedDevice, ...]:
        """The GPUs, in the order in which the server must be given them."""

    @property
    def gpu_layers(self) -> int:
        """Layers on GPUs, the output layer counted (``-ngl``)."""

    @property
    def tensor_split(self) -> tuple[float, ...]:
        """Layers of each GPU as proportions (``-ts``).

        llama.cpp deals them out exactly so (``load_tensors`` in src/llama-model.cpp).
        """

    @property
    def evict(self) -> tuple[str, ...]:
        """Ids of the running models that must leave first, the cheapest to lose first."""

    @property
    def estimate(self) -> MemoryEstimate:
        """What it takes there."""

    @property
    def reason(self) -> str:
        """Why there, in words."""

    def __eq__(self, other: object, /) -> bool: ...
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...

def place(
    model: str | PathLike[str] | Header,
    gpus: GpuSnapshot | Iterable[Gpu],
    *,
    policy: Policy | None = None,
    running: Iterable[Running] = (),
    context_length: int = 0,
    parallel: int = 1,
    kv_unified: bool = False,
    batch: int = 2048,
    micro_batch: int = 512,
    max_outputs: int | None = None,
    flash_attention: Literal["on", "off", "auto"] = "auto",
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    gpu_layers: int | None = None,
    cpu_moe_layers: int | Literal["all"] = 0,
    kv_offload: bool = True,
    swa_full: bool = False,
    mmproj: str | PathLike[str] | Header | None = None,
    mmproj_offload: bool = True,
    draft: str | PathLike[str] | Header | None = None,
    backend: Literal["cuda", "generic"] = "cuda",
) -> Placement:
    """Decide where a model goes, and who leaves for it.

    In this order: one GPU; the fewest GPUs, the layers split by their exact bytes; the same
    once the cheapest set of idle models has left; some layers, then all of them on the CPU,
    where the policy says so. A GPU that is lost, or whose free memory is unknown, is not used; a
    hot or degraded one only where no other has room. A MIG device takes a whole model or nothing.

    ``Gpu.free_bytes`` is what may be claimed now: the bytes of ``running`` are not in it.
    The same question has the same answer; nothing is remembered and nothing changed. From a
    header that has been read it takes microseconds and keeps the interpreter.

    Args:
        model: a GGUF file, or its header.
        gpus: the GPUs there are.
        policy: where it may go; None is ``Policy()``.
        running: the models that hold memory now.
        gpu_layers: place so many layers, the output layer counted, and leave the rest on the CPU.
        context_length: as in ``estimate``, like all the others.
        parallel: see ``estimate``.
        kv_unified: see ``estimate``.
        batch: see ``estimate``.
        micro_batch: see ``estimate``.
        max_outputs: see ``estimate``.
        flash_attention: see ``estimate``.
        cache_type_k: see ``estimate``.
        cache_type_v: see ``estimate``.
        cpu_moe_layers: see ``estimate``.
        kv_offload: see ``estimate``.
        swa_full: see ``estimate``.
        mmproj: see ``estimate``.
        mmproj_offload: see ``estimate``.
        draft: see ``estimate``.
        backend: see ``estimate``.

    Raises:
        DoesNotFitError: it fits nowhere that the policy allows; says by how much, what each GPU could
            give once every idle model has left, and what smallest change would help.
        ValueError: an option is out of range, or llama.cpp refuses it for this model; it is named.
        UnsupportedModelError: the file is valid but no language model.
        OSError: the file cannot be read.
        InvalidGgufError: the file breaks the format.
    """

@final
class Alternative:
    """One way to place a model, and what became of it."""

    @property
    def step(self) -> Literal["one", "several", "one-evicting", "several-evicting", "partial", "cpu"]:
        """The step of ``place``'s order that it belongs to."""

    @property
    def outcome(self) -> Literal["taken", "fits", "short", "refused"]:
        """The model goes there, would fit as well, lacks bytes, or may not go there."""

    @property
    def devices(self) -> tuple[PlacedDevice, ...]:
        """The GPUs with what they would hold; where it is short, in the split that lacks the least."""

    @property
    def free_bytes_by_gpu(self) -> dict[str, int]:
        """What these GPUs have for the model, by UUID, once those who would leave have left."""

    @property
    def short_bytes(self) -> int:
        """How many bytes these GPUs lack, together."""

    @property
    def evict(self) -> tuple[str, ...]:
        """Who would leave, the cheapest to lose first; where it is short, everybody who may."""

    @property
    def eviction_cost(self) -> int:
        """What their leaving would cost, as ``Running.eviction_cost``."""

    @property
    def reason(self) -> str:
        """Why, in words."""

    def __eq__(self, other: object, /) -> bool: ...

@final
class Explanation:
    """Where a model goes, or why nowhere, with what became of the alternatives."""

    @property
    def placement(self) -> Placement | None:
        """What ``place`` answers; None where it raises."""

    @property
    def refusal(self) -> DoesNotFitError | None:
        """What ``place`` raises; None where it answers."""

    @property
    def alternatives(self) -> tuple[Alternative, ...]:
        """Every step of the order up to the one that led there; of thousands of GPUs, some."""

    @property
    def staying(self) -> dict[str, str]:
        """Who runs and may not leave, by id, with the reason in words."""

    def __eq__(self, other: object, /) -> bool: ...

def explain(
    model: str | PathLike[str] | Header,
    gpus: GpuSnapshot | Iterable[Gpu],
    *,
    policy: Policy | None = None,
    running: Iterable[Running] = (),
    **options: Any,
) -> Explanation:
    """Decide as ``place``, and list every step of its order with what became of it.

    It takes milliseconds where ``place`` takes microseconds.

    Args:
        model: a GGUF file, or its header.
        gpus: the GPUs there are.
        policy: where it may go; None is ``Policy()``.
        running: the models that hold memory now.
        options: what ``place`` takes of ``estimate``.

    Raises:
        ValueError: an option is out of range, or llama.cpp refuses it for this model; it is named.
        TypeError: an unknown keyword.
        UnsupportedModelError: the file is valid but no language model.
        OSError: the file cannot be read.
        InvalidGgufError: the file breaks the format.
    """

@final
class Wanted:
    """A model that should be resident, as ``plan`` is asked for it. The header is read here.

    Args:
        model: a GGUF file, or its header.
        id: its name in the plan; None is the file's name without its ending.
        value: what having it is worth, compared with others.
        priority: a step up is worth four times as much.
        pinned: whether the plan must contain it.
        allowed: the only GPUs it may use; None for those of the policy.
        max_gpus: at most so many GPUs; None for those of the policy.
        options: what ``place`` takes of ``estimate``.

    Raises:
        ValueError: ``value`` is negative or not finite, or an option is out of range.
        TypeError: an unknown keyword.
        UnsupportedModelError: the file is valid but no language model.
        OSError: the file cannot be read.
        InvalidGgufError: the file breaks the format.
    """

    def __new__(
        cls,
        model: str | PathLike[str] | Header,
        *,
        id: str | None = None,  # noqa: A002 -- the name is the contract
        value: float = 1.0,
        priority: int = 0,
        pinned: bool = False,
        allowed: Iterable[int | str] | None = None,
        max_gpus: int | None = None,
        **options: Any,
    ) -> Self: ...
    @property
    def id(self) -> str:
        """Its name in the plan."""

    @property
    def value(self) -> float:
        """What having it is worth, compared with others."""

    @property
    def priority(self) -> int:
        """A step up is worth four times as much."""

    @property
    def pinned(self) -> bool:
        """Whether the plan must contain it."""

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...

@final
class Plan:
    """Which models are resident together, and where."""

    @property
    def placements(self) -> dict[str, Placement]:
        """The place of each model that is in, by its id."""

    @property
    def left_out(self) -> dict[str, str]:
        """Why each other model is not in, by its id, in words."""

    @property
    def free_bytes_by_gpu(self) -> dict[str, int]:
        """What stays free on each GPU that may be used, by UUID; the headroom is part of it."""

    def __eq__(self, other: object, /) -> bool: ...

def plan(
    models: Iterable[Wanted], gpus: GpuSnapshot | Iterable[Gpu], *, policy: Policy | None = None
) -> Plan:
    """Find the models that are worth the most together, and the place of each.

    Pinned models are always among them. A model that is too large for any one GPU is split over
    the fewest, and so is one that finds no room on one beside the others. The search is bounded: it
    takes milliseconds and keeps the interpreter, and the plan is not always the best there is.
    ``strategy`` and ``cpu`` of the policy count for models that are split only.

    Raises:
        DoesNotFitError: the pinned models cannot stand together; says which is short of how much, where.
        ValueError: two models have the same id, or an option is refused for a model.
    """

@final
class Ledger:
    """Who has been promised how much memory: reserve, commit, release.

    A snapshot is old as soon as it is taken; the ledger is where the second of two loads that
    were decided at the same instant is told that the memory is gone. Any thread may call any
    method; the lock is held for microseconds.

    Args:
        gpus: the budget of each is its ``free_bytes``; where that is unknown, nothing.
        host_bytes: the budget of ``"host"``, the host's memory; None for no such pool.
    """

    def __new__(cls, gpus: GpuSnapshot | Iterable[Gpu], *, host_bytes: int | None = None) -> Self: ...
    def reserve(self, owner: str, bytes_by_gpu: Mapping[str, int]) -> Lease:
        """Promise all of ``bytes_by_gpu`` to an owner, or nothing.

        Raises:
            DoesNotFitError: a GPU has too little left.
            KeyError: the ledger knows no such GPU.
        """

    def set_budget(self, gpu: str, bytes: int) -> None:  # noqa: A002 -- what it is
        """Set what a GPU has to give, claims included; below what is claimed, nothing is left."""

    def release_owner(self, owner: str) -> int:
        """Release every claim of an owner and say how many they were."""

    @property
    def available_by_gpu(self) -> dict[str, int]:
        """Bytes that each GPU has left."""

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Every claim, the oldest first."""

@final
class Claim:
    """A line of the ledger, as it was when asked for."""

    @property
    def owner(self) -> str:
        """Whose it is."""

    @property
    def bytes_by_gpu(self) -> dict[str, int]:
        """What it holds."""

    @property
    def state(self) -> Literal["reserved", "committed"]:
        """A promise, or a measured fact."""

    def __eq__(self, other: object, /) -> bool: ...

@final
class Lease:
    """A claim in the hands of its owner.

    It ends with ``release``, at the end of a ``with`` block, with ``Ledger.release_owner``, or
    when it is forgotten, whichever is first. Hold it until the memory has really come back.
    """

    @property
    def owner(self) -> str:
        """Whose it is."""

    @property
    def bytes_by_gpu(self) -> dict[str, int]:
        """What it holds now; nothing once released."""

    @property
    def state(self) -> Literal["reserved", "committed", "released"]:
        """What it stands for now."""

    def commit(self, bytes_by_gpu: Mapping[str, int]) -> None:
        """Replace the promise by what was measured.

        A measured fact is never refused: where it is more than the budget, nothing is left for
        others until it ends.

        Raises:
            RuntimeError: the lease has been released.
            KeyError: the ledger knows no such GPU.
        """

    def release(self) -> bool:
        """Give everything back, and say whether there was anything; again changes nothing."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...
