"""Checkpoints that survive a kill, a full disk and a flipped byte.

A checkpoint is two files: `step-00000500.pt` and its manifest `step-00000500.json` with size and SHA-256. Both are
written beside their final name, flushed to the disk and renamed, the manifest last: a checkpoint without a valid
manifest does not exist, and nothing ever writes into a file that does. torch itself loads a file with a flipped byte
without a word, hence the digest. Files hold tensors, numbers, strings, lists and dicts only and are read with
`weights_only=True`, always.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import OutputError, UsageError

FORMAT_VERSION = 1
KEPT = 2
_NAME = re.compile(r"step-(\d{8,})\.pt")


class CorruptCheckpoint(UsageError):
    """A checkpoint whose bytes are not those that were written."""


class _HashingWriter:
    """A file object that digests what passes through it, so that the file need not be read back."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.size += view.nbytes
        self.file.write(view)
        return view.nbytes

    def flush(self) -> None:
        self.file.flush()


def atomic_write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replace `path` by what `write(file)` produces, or leave it exactly as it was.

    Raises:
        OutputError: naming the path, when the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write` of UTF-8 text."""
    atomic_write(path, lambda file: file.write(text.encode()))


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; Windows cannot open folders and needs no such thing."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, kept: int = KEPT) -> Path:
    """Write the checkpoint of `step` into `folder`, then remove all but the newest `kept`.

    Args:
        folder: RUN/checkpoints; made if missing.
        step: optimisation steps done.
        state: nested dicts and lists of tensors, numbers and strings.

    Raises:
        OutputError: nothing was changed; earlier checkpoints are intact.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {folder}: {error.strerror or error}") from error
    path = folder / f"step-{step:08d}.pt"
    manifest: dict[str, Any] = {"format": FORMAT_VERSION, "file": path.name, "step": step}

    def write(file: BinaryIO) -> None:
        writer = _HashingWriter(file)
        # The writer object, not the path: on a full disk torch's own file writing dies with an obscure internal
        # message.
        torch.save({"format": FORMAT_VERSION, **state}, writer)
        manifest.update(bytes=writer.size, sha256=writer.digest.hexdigest())

    # A manifest of the same step (an interrupted run that is repeated) must not vouch for the file while it is
    # replaced.
    with contextlib.suppress(FileNotFoundError):
        path.with_suffix(".json").unlink()
    atomic_torch_write(path, write)
    atomic_write_text(path.with_suffix(".json"), json.dumps(manifest, indent=1) + "\n")
    prune_checkpoints(folder, kept)
    return path


def atomic_torch_write(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """`atomic_write` with torch.save, which may wrap the file's OSError in a RuntimeError of its own.

    Raises:
        OutputError: as `atomic_write`.
    """
    try:
        atomic_write(path, write)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise OutputError(f"cannot write {path}: {getattr(cause, 'strerror', None) or cause}") from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files with a manifest, newest first; whether they are intact is not looked at."""
    if not folder.is_dir():
        return []
    found = [
        (int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and p.with_suffix(".json").is_file()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def prune_checkpoints(folder: Path, kept: int = KEPT) -> None:
    """Remove all but the newest `kept` checkpoints and what killed processes left behind; failing is harmless."""
    keep = list_checkpoints(folder)[:kept]
    names = {p.name for p in keep} | {p.with_suffix(".json").name for p in keep}
    for path in folder.iterdir():
        ours = path.name.startswith("step-") and path.suffix in (".pt", ".json")
        leftover = path.name.startswith(".step-") and path.suffix == ".tmp"
        if (ours and path.name not in names) or leftover:
            with contextlib.suppress(OSError):
                path.unlink()


def load_checkpoint(path: Path, *, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read one checkpoint after checking its digest.

    Raises:
        CorruptCheckpoint: the file is missing, truncated, changed, has no manifest or is not one of ours.
    """
    manifest_path = path.with_suffix(".json")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        expected_size, expected_digest = int(manifest["bytes"]), str(manifest["sha256"])
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"{path}: its manifest {manifest_path.name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"{path}: its manifest {manifest_path.name} cannot be read: {error}") from error
    if manifest.get("format") != FORMAT_VERSION:
        raise CorruptCheckpoint(
            f"{path}: format {manifest.get('format')!r}, this version reads format {FORMAT_VERSION}"
        )
    try:
        size = path.stat().st_size
        if size != expected_size:
            raise CorruptCheckpoint(f"{path}: {size} bytes, its manifest says {expected_size}")
        with open(path, "rb") as file:
            digest = _digest(file)
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: cannot be read: {error.strerror or error}") from error
    if digest != expected_digest:
        raise CorruptCheckpoint(f"{path}: SHA-256 {digest[:12]}..., its manifest says {expected_digest[:12]}...")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CorruptCheckpoint(f"{path}: torch.load(weights_only=True) refuses it: {first_line}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT_VERSION:
        raise CorruptCheckpoint(f"{path}: not a checkpoint of this trainer")
    return state


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def load_newest_checkpoint(folder: Path, *, device: str | torch.device = "cpu") -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint of a folder, or None where there are none; warns of every corrupt one passed over.

    Raises:
        CorruptCheckpoint: there are checkpoints, and none of them is intact.
    """
    problems = []
    for path in list_checkpoints(folder):
        try:
            state = load_checkpoint(path, device=device)
        except CorruptCheckpoint as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"corrupt checkpoint passed over: {problem}; continuing from {path.name}", stacklevel=2)
        return path, state
    if problems:
        raise CorruptCheckpoint("no intact checkpoint: " + "; ".join(problems))
    return None


def find_checkpoint(
    target: str | os.PathLike[str], *, device: str | torch.device = "cpu"
) -> tuple[Path, dict[str, Any]]:
    """Resolve what a user calls a model: a run's folder (its newest intact checkpoint) or one checkpoint file."""
    path = Path(target)
    if path.is_dir():
        folder = path if path.name == "checkpoints" else path / "checkpoints"
        found = load_newest_checkpoint(folder, device=device)
        if found is None:
            raise UsageError(f"{path} holds no checkpoints (expected {folder}/step-*.pt)")
        return found
    if path.is_file():
        if path.suffix != ".pt":
            raise UsageError(f"{path} is no checkpoint: those are RUN/checkpoints/step-*.pt")
        return path, load_checkpoint(path, device=device)
    raise UsageError(f"{path} is neither a run's folder nor a checkpoint file")
