"""Finding model files on disk: which there are, and which of them are one model's shards."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_gpu.errors import ConfigError

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class FoundFile:
    """A file, or the shards of one model under the path of the first that is there."""

    path: Path
    stem: str
    """The file's name without its suffix and shard number."""
    file_bytes: int
    created: int
    """When it, or its youngest shard, was last written, in seconds since 1970."""


def find_files(folders: Iterable[Path], warnings: list[str]) -> list[FoundFile]:
    """All ``*.gguf`` files in ``folders``, by path; a folder may also be such a file.

    What lies deeper and cannot be listed is left out, with a line in ``warnings``.

    Raises:
        ConfigError: a folder does not exist or cannot be listed.
    """
    seen: set[tuple[int, int]] = set()
    found: dict[Path, FoundFile] = {}
    for folder in folders:
        for file in _shards_as_one(_walk(folder, seen, warnings)):
            found.setdefault(file.path, file)
    return sorted(found.values())


def _walk(folder: Path, seen: set[tuple[int, int]], warnings: list[str]) -> Iterator[Path]:
    if folder.is_file():
        if not _is_gguf(folder.name):
            raise _refused(folder, "neither a folder nor a .gguf file")
        yield folder
        return
    errors: list[OSError] = []
    for here, folders, files in os.walk(folder, onerror=errors.append, followlinks=True):
        place = Path(here)
        status = place.stat()
        # A link may lead back up, and one folder may lie in another that is searched too.
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (place / name for name in sorted(files) if _is_gguf(name))
    for error in errors:
        reason = "no such folder" if isinstance(error, FileNotFoundError) else str(error.strerror)
        if error.filename == os.fspath(folder):
            raise _refused(folder, reason) from error
        warnings.append(f"{error.filename}: {reason}")


def _refused(folder: Path, reason: str) -> ConfigError:
    return ConfigError(f"{folder}: {reason}", key="models_dirs", source=str(folder))


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf") and not name.startswith(".")


def _shards_as_one(paths: Iterable[Path]) -> Iterator[FoundFile]:
    shards: dict[tuple[Path, str, str], list[Path]] = {}
    for path in paths:
        if shard := _SHARD.fullmatch(path.stem):
            shards.setdefault((path.parent, shard["stem"], shard["count"]), []).append(path)
        else:
            yield _found([path], path.stem)
    for (_, stem, _), parts in shards.items():
        yield _found(parts, stem)


def _found(parts: list[Path], stem: str) -> FoundFile:
    sizes, times = [0], [0]
    for part in parts:
        try:
            status = part.stat()
        except OSError:  # a dangling link: reading its header says so
            continue
        sizes.append(status.st_size)
        times.append(int(status.st_mtime))
    return FoundFile(min(parts), stem, sum(sizes), max(times))
