"""The Rust core of llama-gpu.

Values are frozen, comparable by value and picklable. Sizes are bytes. Functions that
read a file or ask the driver let go of the interpreter while they wait; the others
take microseconds and do not.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self, final

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
    GPUs and says why in ``error``. ``LLAMA_GPU_NVML_LIBRARY`` names a library to load in place
    of the driver's ``libnvidia-ml.so.1``.
    """
