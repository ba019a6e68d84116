"""The flags that say how a model is loaded, for the commands that reckon with one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

__all__ = ["EstimateFlags"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EstimateFlags:
    """How the model is loaded."""

    context_length: Annotated[int, Parameter(alias="-c")] = 0
    """Tokens of context for all slots together; 0 is the trained length (default: 0)."""
    parallel: int = 1
    """Slots (default: 1)."""
    kv_unified: bool = False
    """All slots share one cache."""
    batch: int = 2048
    """Logical batch in tokens (default: 2048)."""
    micro_batch: int = 512
    """Physical batch in tokens (default: 512)."""
    max_outputs: int | None = None
    """Tokens of a physical batch whose logits are kept: the slots in newer llama-servers (default: all)."""
    flash_attention: Literal["auto", "on", "off"] = "auto"
    """Flash attention (default: auto)."""
    cache_type_k: str = "f16"
    """Type of the cached keys (default: f16)."""
    cache_type_v: str = "f16"
    """Type of the cached values (default: f16)."""
    gpu_layers: int | None = None
    """Layers on the devices, the output layer counted (default: all)."""
    devices: int = 1
    """How many devices; 0 is the CPU alone (default: 1)."""
    tensor_split: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = ()
    """The devices' proportions (default: equal)."""
    cpu_moe_layers: int | Literal["all"] = 0
    """Layers whose experts stay on the CPU, or all (default: 0)."""
    no_kv_offload: bool = False
    """Keep the cache in host memory."""
    swa_full: bool = False
    """Full-size cache for sliding-window layers."""
    mmproj: Path | None = None
    """A projector that is loaded with the model."""
    no_mmproj_offload: bool = False
    """Keep the projector in host memory."""
    draft: Path | None = None
    """A draft model that is loaded with the model."""
    lora: tuple[Path, ...] = ()
    """LoRA adapters that are loaded with the model; may be given several times."""

    def keywords(self) -> dict[str, Any]:
        """What ``llama_gpu.estimate`` takes."""
        chosen = dict(self.__dict__)
        chosen["kv_offload"] = not chosen.pop("no_kv_offload")
        chosen["mmproj_offload"] = not chosen.pop("no_mmproj_offload")
        chosen["tensor_split"] = list(self.tensor_split) or None
        return chosen
