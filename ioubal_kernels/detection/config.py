"""The configuration of a training run: typed sections, named presets, strict reading.

A file is YAML with the sections below; a key that does not exist, a value of another type or out of range is an error
that names the key, what was expected, what was got and, for an unknown key, the nearest existing one. Nothing in a
file is ever executed.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config_schema import Checked, check_value, option
from .errors import UsageError

MAX_FILE_BYTES = 1_000_000
MAX_DEPTH = 20
LOSS_NAMES = ("baseline", "cls", "loc", "both")


@dataclass
class DataConfig(Checked):
    """Where the images are and how they become network input."""

    path: str | None = option(None, str, optional=True, doc="the dataset's folder")
    format: str = option("auto", str, choices=("auto", "coco", "voc", "cityscapes"), doc="annotation format")
    train_split: str | None = option(None, str, optional=True, doc="null: found from what is on disk")
    eval_split: str | None = option(None, str, optional=True, doc="null: found from what is on disk")
    image_size: tuple[int, int] | None = option(
        (192, 256), int, length=2, low=32, high=8192, optional=True, doc="height, width; null: by short_side, long_side"
    )
    keep_ratio: bool = option(False, bool, doc="with image_size: fit inside and pad instead of stretching")
    short_side: int = option(800, int, low=32, high=8192, doc="with image_size null")
    long_side: int = option(1333, int, low=32, high=8192, doc="with image_size null")
    short_side_range: tuple[int, int] | None = option(
        None, int, length=2, low=32, high=8192, optional=True, doc="training: short side drawn from low .. high"
    )
    mean: tuple[float, float, float] = option(
        (0.485, 0.456, 0.406), float, length=3, low=0, high=1, doc="of RGB in [0, 1]; pixels become (x - mean) / std"
    )
    std: tuple[float, float, float] = option((0.229, 0.224, 0.225), float, length=3, above=0, doc="of RGB in [0, 1]")
    zoom_out: float = option(0.0, float, low=0, high=1, doc="SSD: probability of a canvas 1 to 4 times as large")
    iou_crop: float = option(0.0, float, low=0, high=1, doc="SSD: probability of a crop by IoU with a box")
    photometric: float = option(0.0, float, low=0, high=1, doc="SSD: probability of each distortion of the colours")
    hflip: float = option(0.5, float, low=0, high=1, doc="probability of mirroring left to right")
    vflip: float = option(0.5, float, low=0, high=1, doc="probability of mirroring upside down")
    zoom: float = option(0.25, float, low=0, high=0.9, doc="scale jitter: a factor in [1 - zoom, 1 + zoom]")
    jitter: float = option(0.1, float, low=0, high=0.9, doc="brightness, contrast, saturation jitter")
    min_visible: float = option(0.3, float, low=0, high=1, doc="a cropped box stays if this share of it is left")
    workers: int | str = option(
        "auto", int, low=0, high=256, words=("auto",), doc="loader processes; auto: by the CPU's cores"
    )
    cache: str = option(
        "auto", str, choices=("auto", "none", "ram"), doc="decoded images in memory; auto: if <= 512 MiB"
    )
    on_bad_image: str = option("raise", str, choices=("raise", "skip"), doc="skip replaces an unreadable image")
    bad_image_limit: float = option(0.001, float, low=0, high=1, doc="largest share of images skipped")
    allow_symlinks: bool = option(False, bool, doc="image files may be links to outside the dataset")
    timeout: float = option(120.0, float, low=1, doc="seconds to wait for a loader process")


@dataclass
class ModelConfig(Checked):
    """The detector."""

    name: str = option(
        "retinanet_tiny", str, choices=("retinanet_tiny", "retinanet_r18_fpn", "retinanet_r50_fpn"), doc="architecture"
    )
    anchor_scale: float | str = option(
        "auto", float, low=0.25, high=64, words=("auto",), doc="smallest anchor edge in strides; auto: from the boxes"
    )
    backbone_file: str | None = option(None, str, optional=True, doc="ResNet state dict to start from")
    backbone_sha256: str | None = option(None, str, optional=True, doc="its SHA-256")


@dataclass
class LossConfig(Checked):
    """The loss; eta = lambda_ = 0 and w_loc = 1 is the baseline."""

    eta: float = option(1.5, float, low=0, high=100, doc="IoU exponent of the classification weight, 0: off")
    lambda_: float = option(1.5, float, low=0, high=100, doc="IoU exponent of the localisation weight, 0: off")
    w_loc: float | str = option(
        "auto",
        float,
        above=0,
        words=("auto",),
        doc="localisation factor; auto: keeps the first batches' loss unchanged",
    )
    calibration_batches: int = option(8, int, low=1, high=10_000, doc="batches that w_loc: auto looks at")
    alpha: float = option(0.25, float, low=0, high=1, doc="focal loss")
    gamma: float = option(2.0, float, low=0, high=100, doc="focal loss")
    beta: float = option(1 / 9, float, low=0, doc="smooth L1 threshold")
    normalize_loc: bool = option(False, bool, doc="Eq. 7 instead of Eq. 6")
    normalizer_scope: str = option("batch", str, choices=("batch", "level", "image"), doc="what Eq. 4's sums run over")
    eps: float = option(0.0, float, low=0, doc="added to the normaliser's denominator")
    cls_weight: float = option(1.0, float, low=0, doc="factor of the classification loss")
    backend: str = option("auto", str, choices=("auto", "cpu", "cuda", "triton", "reference"), doc="which kernels")

    def label(self) -> str:
        """baseline, cls, loc or both."""
        return LOSS_NAMES[bool(self.eta) + 2 * bool(self.lambda_)]


@dataclass
class OptimConfig(Checked):
    """Optimiser and learning rate."""

    name: str = option("adamw", str, choices=("adamw", "sgd"), doc="optimiser")
    lr: float = option(3e-3, float, above=0, high=100, doc="learning rate after the warm-up")
    weight_decay: float = option(0.05, float, low=0, high=10, doc="not on norms and biases")
    momentum: float = option(0.9, float, low=0, high=1, doc="sgd only")
    warmup: float = option(0.15, float, low=0, high=1, doc="linear warm-up, as a share of the run")
    schedule: str = option("cosine", str, choices=("cosine", "multistep", "constant"), doc="after the warm-up")
    milestones: tuple[float, ...] = option(
        (2 / 3, 11 / 12), float, length=None, low=0, high=1, doc="multistep: shares of the run, rising"
    )
    gamma: float = option(0.1, float, above=0, high=1, doc="multistep: factor at each milestone")
    clip: float = option(5.0, float, low=0, doc="largest gradient norm, 0: no clipping")


@dataclass
class TrainConfig(Checked):
    """Length, precision, and what is written when."""

    iterations: int = option(500, int, low=1, high=100_000_000, doc="optimisation steps")
    batch_size: int = option(8, int, low=1, high=65536, doc="images a step")
    seed: int = option(0, int, low=0, high=2**31 - 1, doc="of initialisation, order and augmentation")
    device: str = option("auto", str, doc="auto, cpu, cuda, cuda:N")
    amp: str = option("auto", str, choices=("auto", "off", "bf16"), doc="auto: bfloat16 where the hardware has it")
    channels_last: bool = option(True, bool, doc="memory format of the convolutions")
    ema: float = option(0.99, float, low=0, high=0.999999, doc="decay of the evaluated weights, 0: the trained ones")
    nan_policy: str = option(
        "stop", str, doc="stop, or skip:N to leave out up to N batches with a NaN loss or gradient"
    )
    log_every: int = option(10, int, low=1, doc="steps between lines of log.jsonl")
    checkpoint_every: int = option(100, int, low=1, doc="steps between checkpoints")
    eval_every: int = option(250, int, low=0, doc="steps between evaluations, 0: only at the end")


@dataclass
class InferenceConfig(Checked):
    """From raw outputs to detections."""

    batch_size: int = option(16, int, low=1, high=65536, doc="images at a time")
    score_threshold: float = option(0.02, float, low=0, high=1, doc="smallest score")
    candidates: int = option(400, int, low=1, high=1_000_000, doc="best of an image that enter NMS")
    nms_threshold: float = option(0.5, float, low=0, high=1, doc="IoU above which the weaker box goes")
    max_detections: int = option(100, int, low=1, high=100_000, doc="best of an image that stay")


@dataclass
class Config(Checked):
    """Everything that decides a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    def validate(self) -> None:
        """Conditions between keys; single values were checked when they were set."""
        milestones = self.optim.milestones
        if any(a >= b for a, b in zip(milestones, milestones[1:], strict=False)):
            raise UsageError(f"optim.milestones: expected rising shares of the run, got {list(milestones)}")
        parse_nan_policy(self.train.nan_policy)
        if self.model.backbone_file is not None and self.model.name == "retinanet_tiny":
            raise UsageError(
                "model.backbone_file: retinanet_tiny has no ResNet to load; choose retinanet_r18_fpn or _r50_fpn"
            )
        if self.model.backbone_sha256 is not None and self.model.backbone_file is None:
            raise UsageError("model.backbone_sha256: given without model.backbone_file")
        if self.data.image_size is None and self.data.long_side < self.data.short_side:
            raise UsageError(
                f"data.long_side: expected at least data.short_side = {self.data.short_side}, got {self.data.long_side}"
            )

        drawn = self.data.short_side_range
        if drawn is not None and self.data.image_size is not None:
            raise UsageError(
                f"data.short_side_range: expected null with data.image_size = {list(self.data.image_size)}, "
                f"got {list(drawn)}"
            )
        if drawn is not None and not drawn[0] <= drawn[1] <= self.data.long_side:
            raise UsageError(
                f"data.short_side_range: expected low <= high <= data.long_side = {self.data.long_side}, "
                f"got {list(drawn)}"
            )

    def set(self, key: str, value: Any) -> None:
        """Set one value by its dotted key, checking name, type and range."""
        section_name, _, name = key.partition(".")
        sections = {f.name for f in dataclasses.fields(self)}
        if section_name not in sections or not name:
            raise UsageError(unknown_key(key))
        section = getattr(self, section_name)
        known = {f.name: f for f in dataclasses.fields(section)}
        if name not in known:
            raise UsageError(unknown_key(key))
        setattr(section, name, check_value(key, value, known[name]))

    def set_loss(self, name: str) -> None:
        """Switch the IoU weights: "baseline", "cls", "loc" or "both"."""
        if name not in LOSS_NAMES:
            raise UsageError(f"loss: expected one of {', '.join(LOSS_NAMES)}, got {name!r}")
        defaults = LossConfig()
        self.loss.eta = (self.loss.eta or defaults.eta) if name in ("cls", "both") else 0.0
        if name in ("loc", "both"):
            self.loss.lambda_ = self.loss.lambda_ or defaults.lambda_
        else:
            self.loss.lambda_, self.loss.w_loc = 0.0, 1.0

    def update(self, mapping: Any, source: str) -> None:
        """Overwrite values by a nested mapping, as a YAML file holds them."""
        if not isinstance(mapping, dict):
            raise UsageError(f"{source}: expected a mapping of sections, got {type(mapping).__name__}")
        for section, values in mapping.items():
            if not isinstance(section, str) or section not in {f.name for f in dataclasses.fields(self)}:
                raise UsageError(f"{source}: {unknown_key(str(section))}")
            if not isinstance(values, dict):
                raise UsageError(f"{source}: {section}: expected a mapping, got {type(values).__name__}")
            for name, value in values.items():
                try:
                    self.set(f"{section}.{name}", value)
                except UsageError as error:
                    raise UsageError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested plain values; tuples as lists."""
        plain = dataclasses.asdict(self)
        return {
            s: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()} for s, values in plain.items()
        }

    def to_yaml(self) -> str:
        """The text of RUN/config.yaml; reading it gives an equal configuration."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True, allow_nan=False)


# The default is the recipe for small datasets trained from scratch on a CPU. The ResNets follow the paper's RetinaNet.
_RESNET = {
    "data": {"image_size": None, "vflip": 0.0, "zoom": 0.0, "jitter": 0.0},
    "optim": {"name": "sgd", "lr": 0.01, "weight_decay": 1e-4, "warmup": 0.02, "schedule": "multistep", "clip": 35.0},
    "train": {"iterations": 90_000, "batch_size": 16, "ema": 0.0, "checkpoint_every": 1000, "eval_every": 7500},
    "inference": {"score_threshold": 0.05, "candidates": 1000, "batch_size": 8},
}
PRESETS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "retinanet_tiny": ("default: 1 M parameters, from scratch, minutes on a CPU", {}),
    "retinanet_r18_fpn": ("ResNet-18 FPN, the paper's schedule", {**_RESNET, "model": {"name": "retinanet_r18_fpn"}}),
    "retinanet_r50_fpn": ("ResNet-50 FPN, the paper's schedule", {**_RESNET, "model": {"name": "retinanet_r50_fpn"}}),
    "demo": (
        "what `ioubal demo` trains on the synthetic set",
        {
            "data": {"image_size": [128, 128], "vflip": 0.0, "zoom": 0.0, "jitter": 0.0},
            "train": {"iterations": 440, "batch_size": 8, "eval_every": 220, "checkpoint_every": 220},
            "inference": {"batch_size": 25},
        },
    ),
}


def all_keys() -> list[str]:
    """Every dotted key."""
    config = Config()
    return [
        f"{s.name}.{f.name}" for s in dataclasses.fields(config) for f in dataclasses.fields(getattr(config, s.name))
    ]


def unknown_key(key: str) -> str:
    """The message for a key that does not exist, with the nearest one that does."""
    keys = all_keys()
    by_leaf = {k.split(".", 1)[1]: k for k in keys}
    leaf = key.rpartition(".")[2]
    # The whole key first; then its last part, because a forgotten or wrong section is the commonest slip.
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    near = near or [by_leaf[m] for m in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.6)]
    near = near or difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    return f"unknown key {key!r}; the nearest is {near[0]!r} (all keys: ioubal configs retinanet_tiny)"


def parse_nan_policy(text: str) -> int:
    """How many batches may be skipped: 0 for "stop", N for "skip:N"."""
    if text == "stop":
        return 0
    word, _, number = text.partition(":")
    if word == "skip" and number.isdigit() and int(number) > 0:
        return int(number)
    raise UsageError(f"train.nan_policy: expected stop or skip:N with N >= 1, got {text!r}")


def preset(name: str) -> Config:
    """A fresh configuration by name."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)
        raise UsageError(f"unknown configuration {name!r}; the nearest is {near[0]!r} (all: {', '.join(PRESETS)})")
    config = Config()
    config.update(PRESETS[name][1], f"preset {name}")
    config.validate()
    return config


def load_config(name_or_file: str) -> Config:
    """A preset by name, or a YAML file: its keys over the defaults."""
    looks_like_file = name_or_file.endswith((".yaml", ".yml")) or "/" in name_or_file or "\\" in name_or_file
    if name_or_file in PRESETS or not looks_like_file:
        return preset(name_or_file)
    config = Config()
    config.update(read_yaml(Path(name_or_file)), name_or_file)
    config.validate()
    return config


def read_yaml(path: Path) -> Any:
    """A YAML file by `yaml.safe_load`; larger than 1 MB, with anchors and aliases, or not UTF-8 is refused."""
    import yaml

    opening = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken, yaml.BlockSequenceStartToken)
    opening += (yaml.BlockMappingStartToken,)
    closing = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
    try:
        if not path.is_file():
            raise UsageError(f"config: {path} is not a file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_FILE_BYTES}")
        text = path.read_text(encoding="utf-8")
        depth = 0
        for token in yaml.scan(text):
            line = token.start_mark.line + 1
            if isinstance(token, (yaml.AnchorToken, yaml.AliasToken)):
                raise UsageError(
                    f"{path}: line {line}: anchors and aliases are not accepted (a few lines can expand to gigabytes)"
                )
            depth += isinstance(token, opening) - isinstance(token, closing)
            if depth > MAX_DEPTH:  # the scanner's time grows with the square of the depth
                raise UsageError(f"{path}: line {line}: nested deeper than {MAX_DEPTH} levels")
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark else ""
        raise UsageError(f"{path}:{where} not plain YAML: {getattr(error, 'problem', None) or error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config: cannot read {path}: {error}") from error


def parse_assignment(text: str) -> tuple[str, Any]:
    """`section.key=value` of --set; the value is YAML."""
    import yaml

    key, separator, raw = text.partition("=")
    if not separator or not key.strip():
        raise UsageError(f"--set: expected section.key=value, got {text!r}")
    try:
        return key.strip(), yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {key.strip()}: {raw!r} is not a YAML value") from error


# What may differ between the two halves of a run without changing a single bit of the result.
NEUTRAL_KEYS = frozenset(
    "data.path data.workers data.cache data.timeout train.log_every train.checkpoint_every train.eval_every "
    "inference.batch_size".split()
)


def config_diff(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> list[str]:
    """Lines `key: old -> new` for every key that matters to the result."""
    keys = {f"{s}.{k}" for d in (old, new) for s, values in d.items() for k in values} - NEUTRAL_KEYS

    def get(config: dict, key: str) -> Any:
        section, _, name = key.partition(".")
        return config.get(section, {}).get(name)

    return [f"{k}: {get(old, k)!r} -> {get(new, k)!r}" for k in sorted(keys) if get(old, k) != get(new, k)]
