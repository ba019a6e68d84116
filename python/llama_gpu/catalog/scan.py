"""From folders to a catalogue: read the headers, name the models, pair the projectors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from llama_gpu import Header, read_header
from llama_gpu.catalog.discover import FoundFile, find_files
from llama_gpu.catalog.projectors import GgufFile, pair
from llama_gpu.catalog.values import Catalog, ModelEntry
from llama_gpu.config import Config
from llama_gpu.errors import LlamaGpuError

# llama.cpp's encoders have no text to answer with (llama_model_has_decoder in src/llama-model.cpp
# and the architectures without a cache in llama_model::create_memory).
_ENCODERS = frozenset({
    "bert", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llama-embed",
    "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "t5encoder",
})  # fmt: skip
_POOLING_NONE, _POOLING_RANK = 0, 4  # enum llama_pooling_type in include/llama.h
_NOT_MODELS = {
    "adapter": "a LoRA adapter",
    "imatrix": "an importance matrix",
    "controlvector": "a control vector",
}


def scan(folders: Iterable[Path], config: Config) -> Catalog:
    """Finds the models in ``folders``, each of which may also be a single ``*.gguf`` file.

    Folders are searched to the bottom, hidden ones left out, links followed; the shards
    of a split model are one model. A file that cannot be used becomes an entry with the
    reason in ``error`` and stops nobody else.

    Raises:
        ConfigError: a folder does not exist or cannot be listed.
    """
    folders = list(folders)
    warnings: list[str] = []
    found = find_files(folders, warnings)
    with ThreadPoolExecutor(max_workers=8) as pool:
        headers = dict(zip(found, pool.map(_read, found), strict=True))
    files = {
        item: GgufFile(item.path, header) for item, header in headers.items() if isinstance(header, Header)
    }
    projectors = [file for file in files.values() if file.is_projector]
    projectors_in = _by_folder(projectors)
    models_in = _by_folder(file for file in files.values() if not file.is_projector)
    models = [item for item in found if item not in files or not files[item].is_projector]

    if not found:
        warnings.append(f"no *.gguf files in {', '.join(map(str, folders))}")
    entries: list[ModelEntry] = []
    for item, model_id in _ids(models).items():
        header = headers[item]
        if isinstance(header, str):
            entry = ModelEntry(
                id=model_id,
                path=item.path,
                file_bytes=item.file_bytes,
                options=config.options_for(model_id),
                error=header,
                created=item.created,
            )
        else:
            entry = _entry(item, model_id, header, config)
            near = projectors_in.get(item.path.parent)
            if near and entry.error is None and entry.options.mmproj == "auto":
                mmproj, warning = pair(files[item], models_in[item.path.parent], near)
                entry = replace(entry, mmproj=mmproj)
                warnings += [warning] if warning else []
        entries.append(entry)
    entries.sort(key=lambda entry: entry.id.lower())
    warnings += [
        f"models.{pattern} in the configuration matches no model"
        for pattern in config.models
        if not any(pattern in config.patterns_for(entry.id) for entry in entries)
    ]
    entries = _settle_aliases(entries, warnings)
    return Catalog(
        entries=tuple(entries),
        projectors=tuple(file.path for file in projectors),
        warnings=tuple(warnings),
    )


def _read(item: FoundFile) -> Header | str:
    try:
        return read_header(item.path)
    except FileNotFoundError as error:
        if item.path.is_symlink():
            return f"{item.path}: a link to {item.path.readlink()}, which is not there"
        return str(error)
    except (LlamaGpuError, OSError) as error:
        return str(error)


def _entry(item: FoundFile, model_id: str, header: Header, config: Config) -> ModelEntry:
    options = config.options_for(model_id)
    pooling = header.metadata.get(f"{header.architecture}.pooling_type", _POOLING_NONE)
    by_header = header.architecture in _ENCODERS or pooling != _POOLING_NONE
    return ModelEntry(
        id=model_id,
        path=item.path,
        file_bytes=header.file_bytes,
        options=options,
        header=header,
        error=_unusable(item.path, header, (options.mmproj, options.draft)),
        aliases=options.aliases,
        mmproj=options.mmproj if isinstance(options.mmproj, Path) else None,
        embedding=by_header if options.embeddings is None else options.embeddings,
        reranking=pooling == _POOLING_RANK,
        created=item.created,
    )


def _unusable(path: Path, header: Header, companions: Sequence[object]) -> str | None:
    kind = header.metadata.get("general.type")
    if kind in _NOT_MODELS:
        return f"{path}: {_NOT_MODELS[kind]}, not a model"
    if header.architecture is None:
        return f"{path}: no general.architecture, so not a model"
    if not header.tensors:
        return f"{path}: no tensors, a vocabulary only"
    missing = [str(file) for file in companions if isinstance(file, Path) and not file.is_file()]
    return f"{path}: its options name {', '.join(missing)}, which is not there" if missing else None


def _by_folder(files: Iterable[GgufFile]) -> dict[Path, list[GgufFile]]:
    folders: dict[Path, list[GgufFile]] = {}
    for file in files:
        folders.setdefault(file.path.parent, []).append(file)
    return folders


def _ids(found: Sequence[FoundFile]) -> dict[FoundFile, str]:
    """The file's name; where two are the same, the folder before it, as far up as it takes."""
    in_place = Counter((item.path.parent, item.stem.lower()) for item in found)
    # m.gguf beside m-00001-of-00002.gguf: no folder tells them apart.
    names = {
        item: item.stem if in_place[item.path.parent, item.stem.lower()] == 1 else item.path.name
        for item in found
    }
    ids = dict(names)
    for depth in range(1, max((len(item.path.absolute().parts) for item in found), default=0)):
        uses = Counter(model_id.lower() for model_id in ids.values())
        clashing = [item for item, model_id in ids.items() if uses[model_id.lower()] > 1]
        for item in clashing:
            ids[item] = "/".join((*item.path.absolute().parts[1:-1][-depth:], names[item]))
    return ids


def _settle_aliases(entries: Sequence[ModelEntry], warnings: list[str]) -> list[ModelEntry]:
    """Drops aliases that another model has as its id or took before, and says so."""
    owners = {entry.id.lower(): entry.id for entry in entries}
    settled = []
    for entry in entries:
        kept = []
        for alias in entry.aliases:
            owner = owners.setdefault(alias.lower(), entry.id)
            if owner == entry.id:
                kept.append(alias)
            else:
                warnings.append(f"the alias {alias} of {entry.id} is already the name of {owner}")
        settled.append(replace(entry, aliases=tuple(kept)))
    return settled
