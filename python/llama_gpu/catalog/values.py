"""The catalogue's values, and finding a model by the name that a request uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from llama_gpu import Header
from llama_gpu.config import ModelOptions
from llama_gpu.errors import UnknownModelError


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One model. ``path`` is its file, or its first shard; sizes are bytes."""

    id: str
    path: Path
    file_bytes: int
    options: ModelOptions
    header: Header | None = None
    error: str | None = None
    """Why the model cannot be served, in words; None for one that can."""
    aliases: tuple[str, ...] = ()
    mmproj: Path | None = None
    embedding: bool = False
    """Whether it answers with embeddings, as its header or its options say."""
    reranking: bool = False
    """Whether it ranks documents."""
    created: int = 0
    """When the file was last written, in seconds since 1970."""


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """All models, by id, broken ones included; what was found beside them; what to say of it."""

    entries: tuple[ModelEntry, ...] = ()
    projectors: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def models(self) -> tuple[ModelEntry, ...]:
        """The models that can be served."""
        return tuple(entry for entry in self.entries if entry.error is None)

    @property
    def broken(self) -> tuple[ModelEntry, ...]:
        """The models that cannot be served, each with its ``error``."""
        return tuple(entry for entry in self.entries if entry.error is not None)

    @cached_property
    def _by_name(self) -> dict[str, ModelEntry]:
        # From the weakest claim on a name to the strongest: a later one wins.
        names: dict[str, ModelEntry] = {}
        for entry in reversed(self.entries):
            names |= dict.fromkeys((entry.path.name.lower(), f"{entry.id.lower()}.gguf"), entry)
        for fold in (str.lower, str):
            for entry in reversed(self.entries):
                names |= dict.fromkeys(map(fold, entry.aliases), entry)
            for entry in reversed(self.entries):
                names[fold(entry.id)] = entry
        return names

    def find(self, name: str) -> ModelEntry:
        """The model that a request calls ``name``: its id, an alias, or its file's name.

        Upper and lower case are told apart only where two names differ in nothing else.
        The entry may be a broken one: look at ``error``.

        Raises:
            UnknownModelError: no such model; with the nearest names and all that are known.
        """
        entry = self._by_name.get(name) or self._by_name.get(name.lower())
        if entry is not None:
            return entry
        known = [entry.id for entry in self.models]
        close = get_close_matches(name.lower(), list(self._by_name), n=3, cutoff=0.5)
        close += [other for other in self._by_name if name and other.endswith(f"/{name.lower()}")]
        nearest = dict.fromkeys(self._by_name[other].id for other in close)
        if nearest:
            hint = f"did you mean {' or '.join(nearest)}?"
        elif known:
            hint = f"there are {', '.join(known[:10])}{', …' if len(known) > 10 else ''}"  # noqa: PLR2004
        else:
            hint = "there are no models"
        raise UnknownModelError(f"no model is called {name!r}; {hint}", model=name, known_models=known)
