"""Checkpoints under faults: whatever happens while one is written, an intact one is found, nothing corrupt loaded."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time

import pytest
import torch

from ioubal_kernels.detection import checkpoint
from ioubal_kernels.detection.checkpoint import (
    CorruptCheckpoint,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    save_checkpoint,
)
from ioubal_kernels.detection.errors import OutputError, UsageError


def state(step: int) -> dict:
    return {"step": step, "weights": torch.full((1000,), float(step)), "names": ["a", "b"], "nested": {"x": [1, 2.5]}}


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path / "checkpoints", step, state(step))
    return tmp_path / "checkpoints"


def test_what_is_saved_is_loaded(folder):
    path, loaded = load_newest_checkpoint(folder)
    assert path.name == "step-00000002.pt"
    assert torch.equal(loaded["weights"], state(2)["weights"])
    assert loaded["names"] == ["a", "b"]
    assert loaded["nested"] == {"x": [1, 2.5]}


def test_the_last_two_are_kept_and_leftovers_go(folder):
    (folder / ".step-00000002.pt.123.tmp").write_bytes(b"half")
    (folder / "step-00000009.pt").write_bytes(b"killed before its manifest")
    (folder / "notes.txt").write_text("mine")
    save_checkpoint(folder, 3, state(3))
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "step-00000002.pt", "step-00000002.json", "step-00000003.pt", "step-00000003.json", "notes.txt",
    }  # fmt: skip


def corrupt_truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def corrupt_empty(path):
    os.truncate(path, 0)


def corrupt_flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def corrupt_remove(path):
    path.unlink()


def corrupt_manifest(path):
    path.with_suffix(".json").write_text('{"format": 1, "by')


def corrupt_digest(path):
    manifest = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**manifest, "sha256": "0" * 64}))


def future_format(path):
    manifest = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**manifest, "format": 99}))


FAULTS = [corrupt_truncate, corrupt_empty, corrupt_flip, corrupt_manifest, corrupt_digest, future_format]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_corrupt_checkpoint_is_passed_over_with_a_warning(folder, fault):
    fault(folder / "step-00000002.pt")
    with pytest.raises(CorruptCheckpoint, match=r"step-00000002\.pt"):
        load_checkpoint(folder / "step-00000002.pt")
    with pytest.warns(
        UserWarning, match=r"corrupt checkpoint passed over: .*step-00000002.*continuing from step-00000001"
    ):
        path, loaded = load_newest_checkpoint(folder)
    assert path.name == "step-00000001.pt"
    assert loaded["step"] == 1


def test_every_single_flipped_byte_is_noticed(folder):
    path = folder / "step-00000002.pt"
    original = path.read_bytes()
    for position in random.Random(0).sample(range(len(original)), 60):
        changed = bytearray(original)
        changed[position] ^= 0x10
        path.write_bytes(changed)
        with pytest.raises(CorruptCheckpoint):
            load_checkpoint(path)
    path.write_bytes(original)
    assert load_checkpoint(path)["step"] == 2


def test_all_corrupt_is_an_error_none_at_all_is_not(folder, tmp_path):
    corrupt_flip(folder / "step-00000001.pt")
    corrupt_truncate(folder / "step-00000002.pt")
    with pytest.raises(CorruptCheckpoint, match=r"no intact checkpoint: .*step-00000002.*step-00000001"):
        load_newest_checkpoint(folder)
    assert load_newest_checkpoint(tmp_path / "empty") is None


def test_a_pickle_is_never_executed(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = folder / "step-00000002.pt"
    torch.save({"format": 1, "step": Evil()}, path)
    data = path.read_bytes()
    import hashlib

    manifest = {"format": 1, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptCheckpoint, match="weights_only=True"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.6, 0.999])
def test_a_full_disk_leaves_the_earlier_checkpoints(folder, full_disk, share):
    limit = int(share * (folder / "step-00000002.pt").stat().st_size)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with full_disk(limit), pytest.raises(OutputError, match=r"cannot write .*step-00000003.*No space left"):
        save_checkpoint(folder, 3, state(3))
    after = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert {k: v for k, v in after.items() if not k.startswith("step-00000003")} == before
    assert load_newest_checkpoint(folder)[1]["step"] == 2


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_io_error_anywhere_leaves_the_earlier_checkpoints(folder, monkeypatch, call, count):
    real, calls = getattr(os, call), []

    def failing(*args):
        calls.append(1)
        if len(calls) == count:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, call, failing)
        try:
            save_checkpoint(folder, 3, state(3))
        except OutputError as error:
            assert "Input/output error" in str(error)
        else:
            assert len(calls) < count
    assert load_newest_checkpoint(folder)[1]["step"] in (2, 3)
    assert not list(folder.glob(".*.tmp"))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot make"):
        save_checkpoint(tmp_path / "file" / "checkpoints", 1, state(1))


def test_killed_between_file_and_manifest(folder):
    """What a kill leaves: a complete .pt without its manifest does not exist for the reader."""
    save_checkpoint(folder, 3, state(3))
    (folder / "step-00000003.json").unlink()
    assert [p.name for p in list_checkpoints(folder)] == ["step-00000002.pt"]
    assert load_newest_checkpoint(folder)[1]["step"] == 2


def test_a_run_folder_or_a_file_is_found(folder):
    assert find_checkpoint(folder.parent)[1]["step"] == 2
    assert find_checkpoint(folder / "step-00000001.pt")[1]["step"] == 1
    with pytest.raises(UsageError, match="neither a run's folder nor a checkpoint file"):
        find_checkpoint(folder / "nothing.pt")
    (folder.parent / "other").mkdir()
    with pytest.raises(UsageError, match="holds no checkpoints"):
        find_checkpoint(folder.parent / "other")


def save_without_a_pause(folder, step: int) -> None:
    """The body of a forked process that is killed."""
    torch.set_num_threads(1)  # the parent's OpenMP threads do not exist here
    while True:
        step += 1
        save_checkpoint(folder, step, {"step": step, "weights": torch.full((400_000,), float(step))})


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigkill_at_random_moments_never_loses_a_checkpoint(tmp_path):
    """Fifty kills while saving without a pause: the newest intact checkpoint never goes back."""
    folder, rng, newest = tmp_path / "checkpoints", random.Random(0), 0
    for _ in range(50):
        child = os.fork()
        if child == 0:
            try:
                save_without_a_pause(folder, newest)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.05, 0.4))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        found = load_newest_checkpoint(folder)
        if found is not None:
            _, loaded = found
            assert loaded["step"] >= newest
            assert torch.equal(loaded["weights"], torch.full((400_000,), float(loaded["step"])))
            newest = loaded["step"]
    assert newest > 50
