"""The file in which records outlive a process: SQLite, safe with several processes.

Every call opens the file, does one thing and closes it, so any thread may call. Nothing here
raises because of the file: a corrupt one is set aside and begun anew, one that cannot be read or written
(a full disk, a folder without permission) is done without; either is told once, as a warning.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from llama_gpu.memory.case import Case
from llama_gpu.memory.record import (
    Record,
    estimate_from_json,
    estimate_to_json,
    taken_from_json,
    taken_to_json,
)

__all__ = ["FILE_VARIABLE", "EngineMark", "MemoryStore", "default_file", "store_at"]

FILE_VARIABLE = "LLAMA_GPU_MEMORY_FILE"
BUSY_SECONDS = 5.0
MOST_RECORDS = 5000

# Another layout gets other names, so that two versions of llama-gpu can share the file.
SCHEMA = """
CREATE TABLE IF NOT EXISTS record_1 (
    model TEXT, options TEXT, kinds TEXT, layers TEXT, build TEXT,
    name TEXT, path TEXT, analytic TEXT, projected TEXT, taken TEXT, at REAL, loads INTEGER,
    PRIMARY KEY (model, options, kinds, layers, build)
);
CREATE TABLE IF NOT EXISTS load_1 (model TEXT PRIMARY KEY, seconds REAL, at REAL);
CREATE TABLE IF NOT EXISTS engine_1 (
    one INTEGER PRIMARY KEY CHECK (one = 1), build TEXT, program TEXT, size INTEGER, modified_ns INTEGER
);
"""
COLUMNS = "model, options, kinds, layers, build, name, path, analytic, projected, taken, at, loads"
PUT = f"""
INSERT INTO record_1 ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET
    name = excluded.name, path = excluded.path, analytic = excluded.analytic,
    projected = COALESCE(excluded.projected, projected), taken = COALESCE(excluded.taken, taken),
    at = excluded.at, loads = loads + excluded.loads
"""  # noqa: S608 - no part of it comes from outside
FORGET = """
DELETE FROM record_1 WHERE rowid IN (SELECT rowid FROM record_1 ORDER BY at DESC LIMIT -1 OFFSET ?)
"""

FORGET_LOADS = """
DELETE FROM load_1 WHERE model IN (SELECT model FROM load_1 ORDER BY at DESC LIMIT -1 OFFSET ?)
"""

_log = logging.getLogger("llama_gpu")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class EngineMark:
    """Which llama.cpp the proxy used last. ``program`` is empty for the embedded one."""

    build: str
    program: str = ""
    size: int = 0
    modified_ns: int = 0


def default_file() -> Path | None:
    """``LLAMA_GPU_MEMORY_FILE``, else the platform's folder for caches; None where there is none."""
    if told := os.environ.get(FILE_VARIABLE):
        return Path(told)
    try:
        if sys.platform == "win32":
            folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            folder = Path.home() / "Library" / "Caches"
        else:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # this user has no home
        return None
    return folder / "llama-gpu" / "memory.sqlite3"


class MemoryStore:
    """The records in one file; None keeps none."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._told: set[str] = set()

    def records(self) -> list[Record]:
        """Every record, the newest first."""
        return self._work(lambda db: list(_read(db, "ORDER BY at DESC")), [], write=False)

    def find(self, model: str, options: str, build: str) -> list[Record]:
        """The records of one model with these options and this llama.cpp, the newest first."""
        where = "WHERE model = ? AND options = ? AND build = ? ORDER BY at DESC"
        return self._work(lambda db: list(_read(db, where, model, options, build)), [], write=False)

    def put(self, record: Record) -> None:
        """Remember; tiers that ``record`` does not know stay as they were."""
        case = record.case
        values = (
            case.model,
            case.options,
            json.dumps(case.kinds),
            json.dumps(case.layers),
            case.build,
            record.name,
            record.path,
            estimate_to_json(record.analytic),
            record.projected and estimate_to_json(record.projected),
            record.taken and taken_to_json(record.taken),
            record.at,
            record.loads,
        )

        def work(db: sqlite3.Connection) -> None:
            db.execute(PUT, values)
            db.execute(FORGET, (MOST_RECORDS,))

        self._work(work, None, write=True)

    def load_seconds(self) -> dict[str, float]:
        """What the last load of each model took, by the identity of its file."""
        rows = "SELECT model, seconds FROM load_1"
        return self._work(lambda db: dict(db.execute(rows).fetchall()), {}, write=False)

    def put_load_seconds(self, model: str, seconds: float) -> None:
        """Remember what the last load of a model took; ``model`` is the identity of its file."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("INSERT OR REPLACE INTO load_1 VALUES (?, ?, ?)", (model, seconds, time.time()))
            db.execute(FORGET_LOADS, (MOST_RECORDS,))

        self._work(work, None, write=True)

    def engine(self) -> EngineMark | None:
        """The llama.cpp that the proxy used last."""

        def work(db: sqlite3.Connection) -> EngineMark | None:
            row = db.execute("SELECT build, program, size, modified_ns FROM engine_1").fetchone()
            return EngineMark(*row) if row else None

        return self._work(work, None, write=False)

    def set_engine(self, mark: EngineMark) -> None:
        """Remember which llama.cpp is in use."""
        values = (mark.build, mark.program, mark.size, mark.modified_ns)
        self._work(
            lambda db: db.execute("INSERT OR REPLACE INTO engine_1 VALUES (1, ?, ?, ?, ?)", values),
            None,
            write=True,
        )

    def _work(self, work: Callable[[sqlite3.Connection], _T], otherwise: _T, *, write: bool) -> _T:
        if self.path is None or not (write or self.path.exists()):
            return otherwise
        for first in (True, False):
            try:
                with closing(self._connect(self.path, write=write)) as db, db:
                    return work(db)
            except sqlite3.Error as error:
                if first and _is_corrupt(error) and self._set_aside(self.path):
                    continue
                self._warn(f"{self.path} cannot be {'written' if write else 'read'}: {error}")
            except OSError as error:
                self._warn(f"{self.path} cannot be written: {error.strerror or error}")
            break
        return otherwise

    def _connect(self, path: Path, *, write: bool) -> sqlite3.Connection:
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
        uri = f"file:{quote(str(path.absolute()))}?mode={'rwc' if write else 'rw'}"
        db = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)
        try:
            if write or not _has_tables(db):
                with contextlib.suppress(sqlite3.OperationalError):  # another process is about to do the same
                    db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = NORMAL")
                db.executescript(SCHEMA)
        except BaseException:
            db.close()
            raise
        return db

    def _set_aside(self, path: Path) -> bool:
        """Rename a corrupt file, unless another process has done so already; True to try again."""
        try:
            seen = path.stat().st_ino
            with _lock(path.with_name(f"{path.name}.lock")):
                if path.exists() and path.stat().st_ino == seen:
                    aside = path.with_name(f"{path.name}.corrupt-{time.time_ns()}")
                    path.rename(aside)
                    for suffix in ("-wal", "-shm"):  # they belong to the corrupt one
                        path.with_name(path.name + suffix).unlink(missing_ok=True)
                    self._warn(f"{path} is corrupt: set aside as {aside.name} and begun anew")
        except OSError as error:
            self._warn(f"{path} is corrupt and cannot be set aside: {error.strerror or error}")
            return False
        return True

    def _warn(self, text: str) -> None:
        kind = "corrupt" if " is corrupt" in text else "unusable"
        if kind not in self._told:
            self._told.add(kind)
            _log.warning(f"measured memory: {text}")


@lru_cache(maxsize=8)
def store_at(path: Path | None) -> MemoryStore:
    """The store of a file, the same object each time, so that a warning comes once."""
    return MemoryStore(path)


def _has_tables(db: sqlite3.Connection) -> bool:
    names = db.execute("SELECT count(*) FROM sqlite_master WHERE name IN ('record_1', 'engine_1', 'load_1')")
    return bool(names.fetchone()[0] == 3)  # noqa: PLR2004


def _is_corrupt(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def _read(db: sqlite3.Connection, where: str, *values: Any) -> Iterator[Record]:
    for row in db.execute(f"SELECT {COLUMNS} FROM record_1 {where}", values):  # noqa: S608
        # A record that cannot be read is one that is not known.
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            model, options, kinds, layers, build, name, path, analytic, projected, taken, at, loads = row
            yield Record(
                Case(model, options, tuple(json.loads(kinds)), tuple(json.loads(layers)), build),
                name,
                path,
                estimate_from_json(analytic),
                projected and estimate_from_json(projected),
                taken and taken_from_json(taken),
                at,
                loads,
            )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    import fcntl  # noqa: PLC0415 - not on every platform

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
