"""Every error that llama-gpu raises, from Python and from Rust.

LlamaGpuError
├── ModelFileError                      a model file cannot be used           .path
│   ├── InvalidGgufError (ValueError)   the file is not the GGUF it claims    .offset .reason
│   └── UnsupportedModelError           a valid file that cannot be estimated .architecture
├── GpuError
│   └── NvmlUnavailableError            no driver library, or it fails        .reason
├── DoesNotFitError                     .required_bytes .free_bytes_by_gpu .smallest_change .short_by_bytes
├── ConfigError (ValueError)            .key .source
└── ServerError                         a llama.cpp server                    .model
    ├── StartTimeoutError
    ├── ServerExitedError               .exit_code .last_log_lines
    ├── QueueFullError                  .retry_after_seconds
    └── UnknownModelError (LookupError) .known_models

A missing or unreadable file is Python's own ``FileNotFoundError`` or ``OSError``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = [
    "ConfigError",
    "DoesNotFitError",
    "GpuError",
    "InvalidGgufError",
    "LlamaGpuError",
    "ModelFileError",
    "NvmlUnavailableError",
    "QueueFullError",
    "ServerError",
    "ServerExitedError",
    "StartTimeoutError",
    "UnknownModelError",
    "UnsupportedModelError",
]


class LlamaGpuError(Exception):
    """The root: catch this to catch everything that llama-gpu raises on purpose."""


class ModelFileError(LlamaGpuError):
    """A model file cannot be used. ``path`` names it."""

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class InvalidGgufError(ModelFileError, ValueError):
    """The file breaks the GGUF format.

    ``offset`` is the byte at which it breaks, ``reason`` a short stable name such as
    ``"truncated"`` or ``"duplicate_key"`` that programs can compare.
    """

    def __init__(self, message: str, *, path: str = "", offset: int = 0, reason: str = "") -> None:
        super().__init__(message, path=path)
        self.offset = offset
        self.reason = reason


class UnsupportedModelError(ModelFileError):
    """A valid GGUF file that is not a model whose memory can be estimated."""

    def __init__(self, message: str, *, path: str = "", architecture: str | None = None) -> None:
        super().__init__(message, path=path)
        self.architecture = architecture


class GpuError(LlamaGpuError):
    """A GPU or its driver does not answer as it should."""


class NvmlUnavailableError(GpuError):
    """NVML cannot be used; ``reason`` says why in words."""

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


class DoesNotFitError(LlamaGpuError):
    """A model does not fit where its policy allows it to go.

    ``required_bytes`` is what the closest attempt needed over all its GPUs,
    ``free_bytes_by_gpu`` what each allowed GPU (by UUID) could have given, and
    ``smallest_change`` the least change that would make it fit, in words. ``short_by_bytes`` is
    how much more was needed than there is. Where it is host memory that is short, ``"host"``
    stands among the GPUs, and the other figures are of that.

    ``degradations_tried`` has a sentence for each declared degradation that did not help either.
    """

    def __init__(
        self,
        message: str,
        *,
        required_bytes: int = 0,
        free_bytes_by_gpu: Mapping[str, int] | None = None,
        smallest_change: str | None = None,
        short_by_bytes: int = 0,
        degradations_tried: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.required_bytes = required_bytes
        self.short_by_bytes = short_by_bytes
        self.degradations_tried = tuple(degradations_tried)
        self.free_bytes_by_gpu = dict(free_bytes_by_gpu or {})
        self.smallest_change = smallest_change

    def having_tried(self, degradations: Sequence[str]) -> DoesNotFitError:
        """The same, with what was given up in vain, each on top of those before it."""
        if not degradations:
            return self
        return DoesNotFitError(
            f"{self}. Given up in vain, one after the other: {'; '.join(degradations)}",
            required_bytes=self.required_bytes,
            free_bytes_by_gpu=self.free_bytes_by_gpu,
            smallest_change=self.smallest_change,
            short_by_bytes=self.short_by_bytes,
            degradations_tried=degradations,
        )


class ConfigError(LlamaGpuError, ValueError):
    """A setting is wrong: ``key`` (dotted path) in ``source`` (a file, a flag, the environment)."""

    def __init__(self, message: str, *, key: str = "", source: str = "") -> None:
        super().__init__(message)
        self.key = key
        self.source = source


class ServerError(LlamaGpuError):
    """A llama.cpp server, or the wish for one, failed. ``model`` is the model's id.

    ``retry_after_seconds`` is when to try again, None where nobody can tell.
    """

    def __init__(self, message: str, *, model: str = "", retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.model = model
        self.retry_after_seconds = retry_after_seconds


class StartTimeoutError(ServerError):
    """A server did not become healthy before its deadline."""


class ServerExitedError(ServerError):
    """A server ended by itself. ``exit_code`` is negative for a signal."""

    def __init__(
        self,
        message: str,
        *,
        model: str = "",
        exit_code: int | None = None,
        last_log_lines: Sequence[str] = (),
    ) -> None:
        super().__init__(message, model=model)
        self.exit_code = exit_code
        self.last_log_lines = tuple(last_log_lines)


class QueueFullError(ServerError):
    """Too many requests already wait for this model; try again after ``retry_after_seconds``."""

    def __init__(self, message: str, *, model: str = "", retry_after_seconds: float = 1.0) -> None:
        super().__init__(message, model=model, retry_after_seconds=retry_after_seconds)


class UnknownModelError(ServerError, LookupError):
    """No model of that id; ``known_models`` lists the ids there are."""

    def __init__(self, message: str, *, model: str = "", known_models: Sequence[str] = ()) -> None:
        super().__init__(message, model=model)
        self.known_models = tuple(known_models)
