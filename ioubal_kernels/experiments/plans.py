"""What `ioubal reproduce` would train: presets, the data sets they need, one job for each training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..detection.architectures import MODELS
from ..detection.config import Config
from ..detection.data import load_pair
from ..detection.errors import UsageError
from .grid import TABLES, Arm, Row, Table, full_rows, tiny_rows
from .options import check_options

PRESET_NAMES = ("cpu", "gpu", "paper")

# Images for training and evaluation of the paper's data sets, for plans made before the data is at hand.
NOMINAL_IMAGES = {"coco": (118_287, 5_000), "voc": (16_551, 4_952), "cityscapes": (2_975, 500)}
FULL_NAMES = {"coco": "COCO 2017", "voc": "Pascal VOC 2007 + 2012", "cityscapes": "Cityscapes"}

# ImageNet weights of each backbone, by the beginning of the files' names.
BACKBONE_FILES = {
    "r18": "resnet18-",
    "r50": "resnet50-",
    "r101": "resnet101-",
    "x101_32x4d": "resnext101_32x4d-",
    "vgg16": "vgg16_features-",
}


@dataclass(frozen=True)
class SyntheticSet:
    """The arguments of `make_synthetic`."""

    train: int
    val: int
    size: int
    classes: int = 4


@dataclass(frozen=True)
class Block:
    """Trainings on one data set.

    Attributes:
        name: in folders.
        title: in words.
        data: a folder, a set to make, or None where the user must name a folder.
        images: for training and evaluation.
        seeds: how many, 0 ..
        rows: with their configurations, the arms' changes not yet applied.
    """

    name: str
    title: str
    data: Path | SyntheticSet | None
    images: tuple[int, int]
    seeds: int
    rows: tuple[tuple[Row, Config], ...]


@dataclass(frozen=True)
class Job:
    """One training."""

    block: str
    row: str
    arm: str
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        """Of its run, relative to the reproduction's."""
        return Path("runs", self.block, self.row, self.arm, f"seed-{self.seed}")

    @property
    def label(self) -> str:
        return f"{self.row} {self.arm} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """All trainings of a reproduction."""

    table: str
    preset: str
    blocks: tuple[Block, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> Table:
        return TABLES[self.table]

    def jobs(self) -> list[Job]:
        """Every training. All arms of a seed come before the next seed: what is finished can be compared."""
        return [
            Job(block.name, row.name, arm.name, seed, _job_config(config, arm, seed, self.options))
            for block in self.blocks
            for seed in range(block.seeds)
            for row, config in block.rows
            for arm in row.arms
        ]


def _job_config(config: Config, arm: Arm, seed: int, options: Mapping[str, Any]) -> Config:
    result = config.copy()
    result.set_by_hand(options.items())
    arm.apply(result)  # last: the baseline stays one whatever exponents are given
    result.set("train.seed", seed)
    result.validate()
    return result


# The recipe for the synthetic set that the project's first figures were measured with: batch 16, 600 steps, mirroring.
_SYNTHETIC = {
    "data.image_size": (128, 128),
    "data.vflip": 0.0,
    "data.zoom": 0.0,
    "data.jitter": 0.0,
    "train.iterations": 600,
    "train.batch_size": 16,
    "train.eval_every": 200,
    "train.checkpoint_every": 200,
    "inference.batch_size": 25,
}
_SYNTHETIC_256 = {
    **_SYNTHETIC,
    "data.image_size": (256, 256),
    "train.epochs": 10.0,
    "train.batch_size": 32,
    "train.eval_every": 0,
    "train.checkpoint_every": 500,
}
_PHOTOGRAPHS = {"train.eval_every": 250, "train.checkpoint_every": 250}


def _with(rows: Iterable[tuple[Row, Config]], changes: Mapping[str, Any]) -> tuple[tuple[Row, Config], ...]:
    changed = []
    for row, config in rows:
        own = config.copy()
        for key, value in changes.items():
            own.set(key, value)
        changed.append((row, own))
    return tuple(changed)


def make_plan(
    table: str,
    preset: str = "cpu",
    *,
    data: str | None = None,
    seeds: int | None = None,
    rows: Iterable[str] | None = None,
    arms: Iterable[str] | None = None,
    backbones: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """The trainings of one of the paper's tables.

    Args:
        table: "table1" .. "table7".
        preset: "cpu": detectors on the tiny backbone and the synthetic set, 3 seeds, minutes a training; "gpu": the
            same detectors on photographs (`data`, meant for BCCD) with 20 seeds and on a larger synthetic set with 8;
            "paper": the paper's detectors, schedules and scales on `data`.
        data: a data set's folder; with "cpu" it replaces the synthetic set.
        seeds: instead of the preset's number.
        rows, arms: names, to train these alone. An arm stays where its row's first arm does: they are compared.
        backbones: a folder with ImageNet weights under their usual names (docs/detectors.md), for "paper".
        options: configuration values over all trainings, by dotted key; an arm's own values go first.

    Raises:
        UsageError: a name that does not exist, no arm, a number of seeds below 1, no weights for a backbone, an option
            without effect.
        DataError: the data set cannot be read.
    """
    if table not in TABLES:
        raise UsageError(f"reproduce: expected one of {', '.join(TABLES)}, got {table!r}")
    if preset not in PRESET_NAMES:
        raise UsageError(f"--preset: expected one of {', '.join(PRESET_NAMES)}, got {preset!r}")
    if seeds is not None and seeds < 1:
        raise UsageError(f"--seeds: expected at least 1, got {seeds}")
    if backbones is not None and preset != "paper":
        raise UsageError(
            f"--backbones: its detectors alone start from such files: expected --preset paper, got {preset!r}"
        )
    spec = TABLES[table]
    blocks = _blocks(spec, preset, data, seeds)
    if backbones is not None:
        blocks = [replace(b, rows=_with_backbones(b.rows, backbones)) for b in blocks]
    if rows is not None or arms is not None:
        blocks = [replace(b, rows=_chosen(b.rows, rows, arms)) for b in blocks]
    plan = Plan(table, preset, tuple(blocks), dict(options or {}))
    owned = {"train.seed": "--seeds says how many", "data.path": "--data names it"}
    check_options(plan.options, [job.config for job in plan.jobs()], owned)
    return plan


def _blocks(spec: Table, preset: str, data: str | None, seeds: int | None) -> list[Block]:
    if preset == "paper":
        images = _images(data) if data else NOMINAL_IMAGES[spec.data]
        return [_block(spec.data, FULL_NAMES[spec.data], data, images, seeds or 1, full_rows(spec), {})]
    tiny = tiny_rows(spec)
    own = [] if data is None else [_block("data", Path(data).name, data, _images(data), seeds or 3, tiny, _PHOTOGRAPHS)]
    if preset == "cpu":
        small = SyntheticSet(1500, 300, 128)
        return own or [_block("synthetic", "synthetic, 128 px", small, (1500, 300), seeds or 3, tiny, _SYNTHETIC)]
    large = SyntheticSet(10_000, 2_000, 256)
    photographs = [replace(b, seeds=seeds or 20) for b in own]
    rendered = _block("synthetic", "synthetic, 256 px", large, (10_000, 2_000), seeds or 8, tiny, _SYNTHETIC_256)
    return [*photographs, rendered]


def _block(
    name: str,
    title: str,
    data: str | SyntheticSet | None,
    images: tuple[int, int],
    seeds: int,
    rows: Iterable[tuple[Row, Config]],
    changes: Mapping[str, Any],
) -> Block:
    place = Path(data) if isinstance(data, str) else data
    return Block(name, title, place, images, seeds, _with(rows, changes))


def _images(data: str) -> tuple[int, int]:
    pair = load_pair(data, check_files=False)
    if pair.evaluation is None:
        raise UsageError(f"--data {data}: has no split to evaluate on, so arms cannot be compared")
    return len(pair.training), len(pair.evaluation)


def _chosen(
    rows: tuple[tuple[Row, Config], ...], names: Iterable[str] | None, arms: Iterable[str] | None
) -> tuple[tuple[Row, Config], ...]:
    known = [row.name for row, _ in rows]
    if names is not None and not names:
        raise UsageError(f"--rows: expected of {', '.join(known)}, got none")
    for name in names or ():
        if name not in known:
            raise UsageError(f"--rows: expected of {', '.join(known)}, got {name!r}")
    possible = list(dict.fromkeys(arm.name for row, _ in rows for arm in row.arms))
    if arms is not None and not arms:
        raise UsageError(f"--arms: expected of {', '.join(possible)}, got none")
    for name in arms or ():
        if name not in possible:
            raise UsageError(f"--arms: expected of {', '.join(possible)}, got {name!r}")
    kept = set(arms) if arms is not None else set(possible)
    return tuple(
        (Row(row.name, row.label, tuple(a for a in row.arms if a.name in kept or a is row.arms[0])), config)
        for row, config in rows
        if names is None or row.name in names
    )


def _with_backbones(rows: tuple[tuple[Row, Config], ...], folder: str) -> tuple[tuple[Row, Config], ...]:
    place = Path(folder)
    if not place.is_dir():
        raise UsageError(f"--backbones: {folder} is not a folder")
    changed = []
    for row, config in rows:
        beginning = BACKBONE_FILES[MODELS[config.model.name].backbone]
        files = sorted(place.glob(f"{beginning}*.pth"))
        if len(files) != 1:
            found = ", ".join(f.name for f in files) or "none"
            raise UsageError(f"--backbones {folder}: expected one file {beginning}*.pth for {row.label}, found {found}")
        changed += _with([(row, config)], {"model.backbone_file": str(files[0])})
    return tuple(changed)
