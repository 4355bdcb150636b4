"""A run's folder: one process at a time, writable before any work is done, and a log of JSON lines."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from .errors import OutputError, UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.json"  # the last thing that a finished run writes
LOG_FILE = "log.jsonl"
LOCK_FILE = ".lock"
CHECKPOINTS = "checkpoints"
_held: set[str] = set()


class RunLock:
    """`with RunLock(folder):` makes sure that no other process writes the same run.

    The lock is the operating system's lock on RUN/.lock and ends with the process that holds it, so that the file of a
    process that was killed is simply taken over. The file names its holder for the error message. Without fcntl a
    living pid decides.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self._file = None

    def __enter__(self) -> RunLock:
        key = str(self.path.resolve())
        if key in _held:  # POSIX record locks do not exclude the same process
            raise UsageError(f"{self.path.parent}: this process is already writing this run")
        try:
            self._file = open(self.path, "a+", encoding="utf-8")
            self._acquire()
            self._file.seek(0)
            self._file.truncate()
            self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            self._file.flush()
        except OSError as error:
            self._close()
            raise OutputError(f"cannot lock {self.path}: {error.strerror or error}") from error
        except UsageError:
            self._close()
            raise
        _held.add(key)
        return self

    def _acquire(self) -> None:
        if fcntl is not None:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except (BlockingIOError, PermissionError):
                pass
        elif not self._holder_lives():
            return
        holder = self._holder()
        raise UsageError(
            f"{self.path.parent}: another process is writing this run (pid {holder.get('pid', '?')} on "
            f"{holder.get('host', '?')}); choose another folder with -o"
        )

    def _holder(self) -> dict[str, Any]:
        self._file.seek(0)
        try:
            holder = json.loads(self._file.read() or "{}")
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def _holder_lives(self) -> bool:
        holder = self._holder()
        if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
            return bool(holder)
        try:
            os.kill(holder["pid"], 0)
        except OSError:
            return False
        return holder["pid"] != os.getpid()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __exit__(self, *exc: object) -> None:
        _held.discard(str(self.path.resolve()))
        # Emptied, not removed: another process may have opened this very file already and be about to lock it.
        with contextlib.suppress(OSError):
            self._file.truncate(0)
        self._close()


def prepare_run_folder(folder: Path) -> None:
    """Make the folder and write, sync and remove a probe file: a full or read-only disk shows before training, not
    after.

    Raises:
        OutputError: with the path and the system's reason.
    """
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(probe, "wb") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink()
        raise OutputError(f"cannot write to the run's folder {folder}: {error.strerror or error}") from error


def holds_run(folder: Path) -> bool:
    """Whether something was trained in this folder before."""
    return any((folder / name).exists() for name in (CONFIG_FILE, LOG_FILE, CHECKPOINTS))


class RunLog:
    """RUN/log.jsonl: one JSON object a line, flushed at once. A failing log disk costs the log, not the training."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG_FILE
        self.failed: str | None = None

    def write(self, event: str, **fields: Any) -> None:
        """Append one record; NaN and infinities become null, which JSON knows."""
        if self.failed is not None:
            return
        record = {"event": event, "time": round(time.time(), 3), **_finite(fields)}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            self.failed = f"cannot write {self.path}: {error.strerror or error}; training goes on without the log"


class NoLog:
    """What a process that is not the first writes to."""

    failed = None

    def write(self, event: str, **fields: Any) -> None:
        """Nothing."""


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a run in order. What a resumed run did again is listed once; a last line cut short is left out."""
    path = folder / LOG_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    records: list[dict[str, Any]] = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("event") == "start":
            records = []
        if record.get("event") == "resume":
            records = [r for r in records if r.get("step", 0) <= record["step"]]
        records.append(record)
    return records


def data_on_record(records: list[dict[str, Any]]) -> dict[str, str | None]:
    """The fingerprints "data" and "eval_data" that a run noted when it began or last went on; those alone that it did
    note (early versions' runs have none).
    """
    noted = [record for record in records if record.get("event") in ("start", "resume")][-1:]
    return {key: record[key] for record in noted for key in ("data", "eval_data") if key in record}


def data_changes(
    old: dict[str, str | None], new: dict[str, str | None], places: tuple[str, str] = ("", "")
) -> list[str]:
    """Lines `what: old -> new` for the fingerprints that both have and that differ. places: where the two sets lie."""

    def shown(digest: str | None, place: str) -> str:
        short = f"{digest[:12]}..." if digest else "none"
        return f"{place} ({short})" if place else short

    return [
        f"{what} data (classes, images, boxes): {shown(old[key], places[0])} -> {shown(new[key], places[1])}"
        for key, what in (("data", "training"), ("eval_data", "evaluation"))
        if key in old and key in new and old[key] != new[key]
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
