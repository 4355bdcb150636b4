"""A tiny dataset and a configuration that trains ten steps of it within seconds."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")

from ioubal_kernels.detection import checkpoint
from ioubal_kernels.detection.config import Config
from ioubal_kernels.detection.data import make_synthetic
from ioubal_kernels.detection.presets import preset


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """16 training and 6 validation images of 64 px, 3 classes."""
    return make_synthetic(
        tmp_path_factory.mktemp("tiny") / "set", train=16, val=6, size=64, classes=3, seed=1, workers=1
    )


@pytest.fixture
def tiny_config(tiny_data: str) -> Callable[..., Config]:
    """`tiny_config(**{"train.iterations": 5})`: ten steps of four images of 64 px unless told otherwise."""

    def make(**changes: object) -> Config:
        config = preset("retinanet_tiny")
        values: dict[str, object] = {
            "data.path": tiny_data, "data.image_size": [64, 64], "data.workers": 0, "train.iterations": 10,
            "train.batch_size": 4, "train.log_every": 1, "train.checkpoint_every": 4, "train.eval_every": 0,
            "train.amp": "off", "train.device": "cpu", "loss.calibration_batches": 2,
        }  # fmt: skip
        for key, value in {**values, **changes}.items():
            config.set(key, value)
        config.validate()
        return config

    return make


class FullDisk:
    """A file on a disk that is full after `limit` bytes."""

    def __init__(self, file, limit):
        self.file, self.left = file, limit

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()

    def write(self, data):
        self.left -= memoryview(data).nbytes
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """`with full_disk(limit): ...`: no binary file that is written has room for more than `limit` bytes."""

    @contextmanager
    def limited(limit: int) -> Iterator[None]:
        def opened(path, mode="r", **options):
            file = open(path, mode, **options)
            return FullDisk(file, limit) if mode == "wb" else file

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "open", opened, raising=False)
            yield

    return limited


@pytest.fixture
def ioubal(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`code, out, err = ioubal("train", ...)`: the program in this process."""
    from ioubal_kernels.cli import main

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call
