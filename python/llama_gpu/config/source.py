"""Reading a configuration file, and remembering where each value stood.

``Origins`` answers "where does ``server.port`` come from" with a file and its line, a
flag or a variable; messages about settings are built from it.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llama_gpu.errors import ConfigError

KeyPath = tuple[str, ...]

_PART = r"""(?:[\w-]+|"[^"]*"|'[^']*')"""
_TOML_PART = re.compile(_PART)
_TOML_TABLE = re.compile(rf"^\s*\[+\s*(?P<name>{_PART}(?:\s*\.\s*{_PART})*)\s*\]+\s*(?:#.*)?$")
_TOML_KEY = re.compile(rf"^\s*(?P<name>{_PART}(?:\s*\.\s*{_PART})*)\s*=")


class Origins:
    """Where each setting was given."""

    def __init__(self) -> None:
        self._by_path: dict[KeyPath, str] = {}

    def set(self, path: KeyPath, origin: str) -> None:
        """Remembers that ``path`` was given at ``origin``; the last word counts."""
        self._by_path[path] = origin

    def of(self, path: KeyPath) -> str:
        """The origin of ``path`` or of the nearest section around it."""
        for length in range(len(path), -1, -1):
            if origin := self._by_path.get(path[:length]):
                return origin
        return "the configuration"


def read_file(path: Path, origins: Origins) -> dict[str, Any]:
    """The settings in a YAML, TOML or JSON file, told apart by suffix.

    Raises:
        ConfigError: no such file, another suffix, a syntax error (with its line), a key
            given twice, or something that is not a table of settings.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file", source=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}", source=str(path)) from error

    origins.set((), str(path))
    data, found = _parse(text, path)
    if data is None:
        return {}
    if not isinstance(data, dict):
        message = f"{path}: should be a table of settings, not {type(data).__name__}"
        raise ConfigError(message, source=str(path))
    seen: dict[KeyPath, int] = {}
    for key, line in found:
        if key in seen:
            name = ".".join(key)
            message = f"{path}, line {line}: {name} is given twice, first in line {seen[key]}"
            raise ConfigError(message, key=name, source=str(path))
        seen[key] = line
        origins.set(key, f"{path}, line {line}")
    return data


def _parse(text: str, path: Path) -> tuple[Any, Iterator[tuple[KeyPath, int]]]:
    """What the text says, and the line of each key in it."""
    suffix = path.suffix.lower()
    try:
        if suffix in {".yaml", ".yml"}:
            return yaml.safe_load(text), _yaml_lines(text)
        if suffix == ".json":
            # JSON is YAML but for tabs, and a raw tab cannot stand in a JSON string.
            return json.loads(text), _yaml_lines(text.replace("\t", " "))
        if suffix == ".toml":
            return tomllib.loads(text), _toml_lines(text)
    except (yaml.YAMLError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {_syntax(error)}", source=str(path)) from error
    raise ConfigError(f"{path}: a configuration file ends in .yaml, .yml, .toml or .json", source=str(path))


def _syntax(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error)


def _yaml_lines(text: str) -> Iterator[tuple[KeyPath, int]]:
    yield from _node_lines(yaml.compose(text, Loader=yaml.SafeLoader), ())


def _node_lines(node: yaml.Node | None, path: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, str(key.value))
            yield inner, key.start_mark.line + 1
            yield from _node_lines(value, inner)


def _toml_lines(text: str) -> Iterator[tuple[KeyPath, int]]:
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _TOML_TABLE.match(line):
            table = _toml_parts(header["name"])
            lines.setdefault(table, number)
        elif key := _TOML_KEY.match(line):
            lines.setdefault((*table, *_toml_parts(key["name"])), number)
    yield from lines.items()


def _toml_parts(name: str) -> KeyPath:
    return tuple(part.strip("\"'") for part in _TOML_PART.findall(name))
