"""From a file, the environment and flags to one ``Config``, or to an error that says where."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from llama_gpu.config.settings import Config
from llama_gpu.config.source import KeyPath, Origins, read_file
from llama_gpu.errors import ConfigError

ENVIRONMENT_PREFIX = "LLAMA_GPU_"

# What Llama-Smart-Proxy's files may carry beyond the settings shared with it.
_FOREIGN: Mapping[KeyPath, str] = {
    ("backend",): "the engine is always llama.cpp; see engine.kind",
    ("ollama",): "the engine is always llama.cpp; see engine.kind",
    ("agents",): "there are no agents here",
    ("simulation",): "there is no simulation here",
    ("gpu", "kv_offload"): "set defaults.kv_offload; true means the cache is on the GPU",
    ("gpu", "cache_type_k"): "set defaults.cache_type_k",
    ("gpu", "cache_type_v"): "set defaults.cache_type_v",
    ("gpu", "repack"): "set defaults.extra_arguments",
    ("gpu", "no_host"): "set defaults.extra_arguments",
    ("gpu", "activation_overhead_factor"): "estimates need no such factor",
    ("models", "*", "repo"): "models are files in models_dirs",
    ("models", "*", "variant"): "models are files in models_dirs",
}
_FOREIGN_BACKENDS = {None, "llama.cpp"}


def load_config(
    path: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
) -> Config:
    """Reads the configuration.

    Args:
        path: a YAML, TOML or JSON file. Without one, the defaults hold.
        overrides: settings from the command line by dotted key, such as
            ``{"server.port": 8000}``; a value of None is no override.
        environment: variables, ``os.environ`` by default. Every key of ``server``,
            ``server_pool``, ``gpu``, ``engine``, ``memory`` and ``log`` has one, such as
            ``LLAMA_GPU_SERVER_PORT``, and so has ``models_dirs`` (separated as in PATH).

    Raises:
        ConfigError: an unknown key (with the nearest known one), a value that does not
            fit (with what was expected), a missing file; with the file and line, the
            flag or the variable it came from.
    """
    origins = Origins()
    data: dict[str, Any] = {}
    notes: list[str] = []
    if path is not None:
        file = Path(path)
        data = read_file(file, origins)
        notes += _drop_foreign(data, origins)
        _anchor_paths(data, file.parent)
    for key, value, origin in _from_environment(os.environ if environment is None else environment):
        _put(data, key, value, origins, origin)
    for name, value in (overrides or {}).items():
        if value is not None:
            _put(data, tuple(name.split(".")), value, origins, "the command line")
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise _explained(error, data, origins) from None
    config._notes = tuple(notes)  # noqa: SLF001 - notes are not a setting, so they are not a field
    return config


def environment_names() -> dict[str, KeyPath]:
    """Each variable that is understood, with the setting it sets."""
    names: dict[str, KeyPath] = {f"{ENVIRONMENT_PREFIX}MODELS_DIRS": ("models_dirs",)}
    for section in ("server", "server_pool", "gpu", "engine", "memory", "log"):
        model = _model_of(Config.model_fields[section])
        for key in model.model_fields if model else ():
            names[f"{ENVIRONMENT_PREFIX}{section}_{key}".upper()] = (section, key)
    return names


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[KeyPath, Any, str]]:
    lists = {("models_dirs",): os.pathsep, ("server", "api_keys"): ",", ("gpu", "allowed"): ","}
    for name, key in environment_names().items():
        if text := environment.get(name):
            yield key, text.split(lists[key]) if key in lists else text, name


def _put(data: dict[str, Any], key: KeyPath, value: Any, origins: Origins, origin: str) -> None:
    table = data
    for part in key[:-1]:
        inner = table.get(part)
        if not isinstance(inner, dict):
            inner = table[part] = {}
        table = inner
    if key == ("models_dirs",):
        table.pop("models_dir", None)
    table[key[-1]] = value
    origins.set(key, origin)


def _drop_foreign(data: dict[str, Any], origins: Origins) -> Iterator[str]:
    backend = data.get("backend")
    if backend not in _FOREIGN_BACKENDS:
        message = f"{origins.of(('backend',))}: backend = {backend!r}: only llama.cpp is served"
        raise ConfigError(message, key="backend", source=origins.of(("backend",)))
    for pattern, advice in _FOREIGN.items():
        for path in list(_matching(data, pattern)):
            table: Any = data
            for part in path[:-1]:
                table = table[part]
            del table[path[-1]]
            yield f"{origins.of(path)}: {'.'.join(path)} has no meaning here: {advice}."


def _matching(data: Any, pattern: KeyPath, path: KeyPath = ()) -> Iterator[KeyPath]:
    if not pattern:
        yield path
    elif isinstance(data, dict):
        for key in list(data) if pattern[0] == "*" else [pattern[0]]:
            if key in data:
                yield from _matching(data[key], pattern[1:], (*path, key))


def _anchor_paths(data: dict[str, Any], folder: Path) -> None:
    """Makes paths in a file relative to that file: it means the same from every folder."""
    places: list[tuple[Any, str]] = [(data, "models_dir"), (data, "models_dirs")]
    places.append((data.get("memory"), "file"))
    models = data.get("models")
    for options in (data.get("defaults"), *(models.values() if isinstance(models, dict) else ())):
        places += [(options, "mmproj"), (options, "draft")]
    for table, key in places:
        value = table.get(key) if isinstance(table, dict) else None
        if isinstance(value, str) and value not in {"auto", "none", "off"}:
            table[key] = str(folder / Path(value).expanduser())
        elif isinstance(value, list):
            table[key] = [str(folder / Path(v).expanduser()) if isinstance(v, str) else v for v in value]
    engine = data.get("engine")
    # A bare name is looked up on PATH.
    if isinstance(engine, dict) and isinstance(program := engine.get("path"), str) and os.sep in program:
        engine["path"] = str(folder / Path(program).expanduser())


def _explained(error: ValidationError, data: dict[str, Any], origins: Origins) -> ConfigError:
    problems: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        problems.setdefault(_path_in(data, detail["loc"]), []).append(detail)
    sentences = [f"{origins.of(path)}: {_problem(path, details)}" for path, details in problems.items()]
    first = next(iter(problems))
    return ConfigError("\n".join(sentences), key=".".join(first), source=origins.of(first))


def _path_in(data: Any, location: tuple[int | str, ...]) -> KeyPath:
    """The part of pydantic's location that the owner wrote; the rest names types of a union."""
    path: list[str] = []
    for part in location:
        try:
            data = data[part]
        except (LookupError, TypeError):
            if isinstance(data, dict):
                continue
            break
        path.append(str(part))
    return tuple(path) or (str(location[0]),)


def _problem(path: KeyPath, details: list[ErrorDetails]) -> str:
    name = ".".join(path)
    if details[0]["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        close = get_close_matches(path[-1], known, n=1, cutoff=0.6) or [
            other for other in _all_keys(Config) if other.rpartition(".")[2] == path[-1]
        ]
        nearest = (*path[:-1], close[0]) if close and close[0] in known else close[:1]
        hint = f'; did you mean "{".".join(nearest)}"?' if nearest else f"; known here: {', '.join(known)}"
        return f'unknown key "{name}"{hint}'
    expected = dict.fromkeys(
        detail["msg"]
        .replace("Input should be", "should be", 1)
        .replace("valid dictionary", "table")
        .removeprefix("Value error, ")
        for detail in details
    )
    return f"{name} = {details[0]['input']!r} {' or '.join(expected)}"


def _known_keys(path: KeyPath) -> list[str]:
    model: type[BaseModel] | None = Config
    skip = False
    for part in path:
        if skip:  # the model id in models.<id>
            skip = False
        elif model and part in model.model_fields:
            field = model.model_fields[part]
            skip = getattr(field.annotation, "__origin__", None) is dict
            model = _model_of(field)
    return sorted(model.model_fields) if model else []


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for key, field in model.model_fields.items():
        inner = _model_of(field)
        if inner and key != "models":
            yield from _all_keys(inner, f"{prefix}{key}.")
        else:
            yield prefix + key


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    return next(_models_in(field.annotation), None)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)
