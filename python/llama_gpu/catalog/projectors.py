"""Which projector belongs to which model. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_gpu import Header

_QUANTIZATION = re.compile(
    r"(?:^|[-._])(?:ud-)?(?:i?q\d\w*|tq\d\w*|mxfp4\w*|nvfp4\w*|bf16|fp?16|f32)(?=$|[-._])"
)
_WORDS = re.compile(r"[a-z0-9]+")
# What publishers put beside the model's own name, or in its place.
_NOISE = {"mmproj", "model", "projector", "vision", "clip"}
# Of one projector in several precisions: the one llama.cpp's converters write by default.
_PRECISIONS = ("f16", "bf16", "q8_0", "f32")


@dataclass(frozen=True)
class GgufFile:
    """A readable file: the path and what its header says."""

    path: Path
    header: Header

    @property
    def is_projector(self) -> bool:
        """Whether it is a projector (``mmproj``), by its header or else by its name."""
        return (
            self.header.architecture == "clip"
            or self.header.metadata.get("general.type") == "mmproj"
            or self.path.name.lower().startswith("mmproj")
        )


def pair(
    model: GgufFile, beside: Sequence[GgufFile], projectors: Sequence[GgufFile]
) -> tuple[Path | None, str | None]:
    """The projector in the model's folder that is the model's own, and a warning if none is surely.

    Args:
        model: the model.
        beside: the models of its folder, itself included.
        projectors: the projectors of its folder.
    """
    fitting = [file for file in projectors if _sizes_agree(model.header, file.header)]
    named = [file for file in fitting if (words := _own_words(file.path)) and words <= _words(model.path)]
    if named:
        longest = max(len(_own_words(file.path)) for file in named)
        chosen = [file for file in named if len(_own_words(file.path)) == longest]
    elif len({_base(file.path) for file in beside}) == 1:
        chosen = [file for file in fitting if not _own_words(file.path)] or fitting
    else:
        chosen = []
    if not chosen:
        if any(not _own_words(file.path) for file in fitting):
            return (
                None,
                f"{model.path}: a projector lies beside it, but beside other models too; set its mmproj",
            )
        return None, None
    if len({frozenset(_own_words(file.path)) for file in chosen}) > 1:
        names = ", ".join(sorted(file.path.name for file in chosen))
        return None, f"{model.path}: several projectors could be its own ({names}); set its mmproj"
    return min(chosen, key=lambda file: (_precision(file.path), file.path.name)).path, None


def _sizes_agree(model: Header, projector: Header) -> bool:
    """A projector writes into the model's embedding space (``clip.*.projection_dim``)."""
    wide = model.metadata.get(f"{model.architecture}.embedding_length")
    keys = ("clip.vision.projection_dim", "clip.audio.projection_dim")
    given = [value for key in keys if (value := projector.metadata.get(key)) is not None]
    return wide is None or not given or wide in given


def _base(path: Path) -> str:
    return _QUANTIZATION.sub("", path.stem.lower())


def _words(path: Path) -> set[str]:
    return set(_WORDS.findall(_base(path)))


def _own_words(path: Path) -> set[str]:
    return _words(path) - _NOISE


def _precision(path: Path) -> int:
    name = path.stem.lower()
    # bf16 contains f16, so the longer word is looked for first.
    found: Iterable[str] = sorted((word for word in _PRECISIONS if word in name), key=len, reverse=True)
    return next((_PRECISIONS.index(word) for word in found), len(_PRECISIONS))
