"""The configuration of a training run: typed sections, named presets, strict reading.

A file is YAML with the sections below; a key that does not exist, a value of another type or out of range is an error
that names the key, what was expected, what was got and, for an unknown key, the nearest existing one. Nothing in a
file is ever executed.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .architectures import MODEL_NAMES, MODELS
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
    """The detector and what it starts from."""

    name: str = option("retinanet_tiny", str, choices=MODEL_NAMES, doc="architecture")
    anchor_scale: float | str = option(
        "auto",
        float,
        low=0.25,
        high=64,
        words=("auto",),
        doc="smallest anchor edge (FoveaBox: base edge) in strides; auto: the paper's, for tiny models by the boxes",
    )
    ssd_smallest: int = option(15, int, choices=(10, 15, 20), doc="SSD300, SSD512: second default box, % of the image")
    norm: str = option(
        "auto",
        str,
        choices=("auto", "batch", "group", "frozen", "sync"),
        doc="of the backbone; auto: frozen with a backbone file, as init_from has it, else batch; sync: over all GPUs",
    )
    backbone_file: str | None = option(None, str, optional=True, doc="ImageNet weights (.pth) to start from")
    backbone_sha256: str | None = option(None, str, optional=True, doc="its SHA-256; null: as the file's name says")
    init_from: str | None = option(
        None, str, optional=True, doc="run or checkpoint to start from; a head for other classes is new"
    )
    from_scratch: bool = option(False, bool, doc="accept a full-size detector without weights to start from")

    @property
    def built_norm(self) -> str:
        """`norm` without "auto". With "frozen" the backbone's statistics, stem and first stage stay as the pretrained
        weights have them.
        """
        return self.norm if self.norm != "auto" else "batch" if self.backbone_file is None else "frozen"


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
    beta: float = option(1 / 9, float, low=0, doc="smooth L1 threshold (of the RPN always 1/9)")
    normalize_loc: bool = option(False, bool, doc="Eq. 7 instead of Eq. 6")
    normalizer_scope: str = option("batch", str, choices=("batch", "level", "image"), doc="what Eq. 4's sums run over")
    eps: float = option(0.0, float, low=0, doc="added to the normaliser's denominator")
    cls_weight: float = option(1.0, float, low=0, doc="factor of the classification loss")
    rpn: bool = option(False, bool, doc="Faster R-CNN: the same IoU weights for the proposals' losses")
    rpn_w_loc: float | str = option("auto", float, above=0, words=("auto",), doc="w_loc of the proposals, with rpn")
    backend: str = option("auto", str, choices=("auto", "cpu", "cuda", "triton", "reference"), doc="which kernels")

    def label(self) -> str:
        """baseline, cls, loc or both."""
        return LOSS_NAMES[bool(self.eta) + 2 * bool(self.lambda_)]


@dataclass
class OptimConfig(Checked):
    """Optimiser and learning rate."""

    name: str = option("adamw", str, choices=("adamw", "sgd"), doc="optimiser")
    lr: float = option(3e-3, float, above=0, high=100, doc="learning rate after the warm-up")
    base_batch: int | None = option(
        None, int, low=1, optional=True, doc="images a step that lr is meant for: scaled linearly to what a step has"
    )
    weight_decay: float = option(0.05, float, low=0, high=10, doc="see decay_all")
    decay_all: bool = option(False, bool, doc="weight decay on norms and biases, too")
    momentum: float = option(0.9, float, low=0, high=1, doc="sgd only")
    warmup: float = option(0.15, float, low=0, high=1, doc="linear warm-up, as a share of the run")
    warmup_steps: int | None = option(None, int, low=0, optional=True, doc="the same in steps; null: by warmup")
    warmup_start: float = option(0.0, float, low=0, high=1, doc="share of lr that the warm-up starts from")
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
    epochs: float | None = option(
        None, float, above=0, high=1e6, optional=True, doc="passes over the data instead of iterations"
    )
    batch_size: int = option(8, int, low=1, high=65536, doc="images at a time in each process")
    accumulate: int = option(1, int, low=1, high=65536, doc="batches whose gradients are averaged to one step")
    seed: int = option(0, int, low=0, high=2**31 - 1, doc="of initialisation, order and augmentation")
    device: str = option("auto", str, doc="auto, cpu, cuda, cuda:N; under torchrun each process takes its own GPU")
    amp: str = option("auto", str, choices=("auto", "off", "bf16"), doc="auto: bfloat16 where the hardware has it")
    channels_last: bool = option(True, bool, doc="memory format of the convolutions")
    compile: bool = option(False, bool, doc="torch.compile the backbone")
    ema: float = option(0.99, float, low=0, high=0.999999, doc="decay of the evaluated weights, 0: the trained ones")
    nan_policy: str = option(
        "stop", str, doc="stop, or skip:N to leave out up to N batches with a NaN loss or gradient"
    )
    log_every: int = option(10, int, low=1, doc="steps between lines of log.jsonl")
    watch_every: int = option(50, int, low=0, doc="steps between measurements of Eq. 4's and 7's normalisers, 0: none")
    tensorboard: bool = option(False, bool, doc="write the same figures for TensorBoard to RUN/tensorboard")
    checkpoint_every: int = option(100, int, low=1, doc="steps between checkpoints")
    eval_every: int = option(250, int, low=0, doc="steps between evaluations, 0: only at the end")
    timeout: float = option(600.0, float, low=1, doc="seconds that processes of one training wait for each other")


@dataclass
class InferenceConfig(Checked):
    """From raw outputs to detections."""

    batch_size: int = option(16, int, low=1, high=65536, doc="images at a time")
    score_threshold: float = option(0.02, float, low=0, high=1, doc="smallest score")
    candidates: int = option(
        400, int, low=1, high=1_000_000, doc="best that enter NMS: of a level, an SSD class, or proposals of an image"
    )
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
        self._validate_model()
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

    def _validate_model(self) -> None:
        model = self.model
        architecture = MODELS[model.name]
        if architecture.backbone == "tiny" and model.backbone_file is not None:
            raise UsageError(f"model.backbone_file: {model.name} has no backbone that files exist for")
        if architecture.backbone == "tiny" and model.norm == "frozen":
            raise UsageError(f"model.norm: {model.name} is always trained as a whole, got frozen")
        if model.backbone_sha256 is not None and model.backbone_file is None:
            raise UsageError("model.backbone_sha256: given without model.backbone_file")
        if architecture.family == "ssd" and self.data.image_size is None:
            raise UsageError(f"data.image_size: {model.name} needs a fixed size (height, width), got null")
        if architecture.family in ("ssd", "faster_rcnn") and self.loss.normalizer_scope == "level":
            raise UsageError(
                f"loss.normalizer_scope: {model.name}'s losses are not by level: expected batch or image, got level"
            )
        if architecture.backbone == "vgg16":
            edge = 512 if model.name.startswith("ssd512") else 300
            smallest = (10, 15) if edge == 512 else (15, 20)
            if model.ssd_smallest not in smallest:
                raise UsageError(
                    f"model.ssd_smallest: {model.name} has {smallest[0]} (COCO) and {smallest[1]} (VOC), "
                    f"got {model.ssd_smallest}"
                )
            if model.norm in ("group", "sync", "frozen"):
                raise UsageError(f"model.norm: VGG16 has no normalisation, got {model.norm}")

    def require_start(self) -> None:
        """A full-size detector starts from weights, or says that it does not: months of GPU time hang on that.

        Raises:
            UsageError: neither a backbone file nor a checkpoint is named, and from_scratch is not set.
        """
        model = self.model
        start = model.backbone_file or model.init_from or model.from_scratch
        if MODELS[model.name].backbone != "tiny" and not start:
            raise UsageError(
                f"model.backbone_file: {model.name} starts from ImageNet weights: name the file with "
                "--set model.backbone_file=FILE.pth (docs/detectors.md lists files), or a checkpoint with --init-from, "
                "or train it with --from-scratch"
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

    def set_by_hand(self, changes: Iterable[tuple[str, Any]]) -> None:
        """Values by dotted key, as --set has them. Eq. 7 has no w_loc: where it is switched on, the factor that the
        configuration had for Eq. 6 becomes 1, unless another is given as well.
        """
        changes, before = list(changes), self.loss.normalize_loc
        for key, value in changes:
            self.set(key, value)
        if self.loss.normalize_loc and not before:
            given = {key for key, _ in changes}
            for name in ("w_loc", "rpn_w_loc"):
                if f"loss.{name}" not in given and getattr(self.loss, name) != "auto":
                    setattr(self.loss, name, 1.0)

    def set_loss(self, name: str) -> None:
        """Switch the IoU weights: "baseline", "cls", "loc" or "both"."""
        if name not in LOSS_NAMES:
            raise UsageError(f"loss: expected one of {', '.join(LOSS_NAMES)}, got {name!r}")
        defaults = LossConfig()
        self.loss.eta = (self.loss.eta or defaults.eta) if name in ("cls", "both") else 0.0
        if name in ("loc", "both"):
            if self.loss.lambda_ == 0:  # a baseline's configuration, whose factors are those of no weights
                self.loss.lambda_ = defaults.lambda_
                if self.loss.w_loc == 1.0:
                    self.loss.w_loc = defaults.w_loc
                if self.loss.rpn_w_loc == 1.0:
                    self.loss.rpn_w_loc = defaults.rpn_w_loc
        else:
            self.loss.lambda_, self.loss.w_loc, self.loss.rpn_w_loc = 0.0, 1.0, 1.0

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

    def copy(self) -> Config:
        """The same values; setting one's leaves the other's."""
        copied = Config()
        copied.update(self.to_dict(), "copy")
        return copied

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

    def to_documented_yaml(self) -> str:
        """The same text with what every key means beside it."""
        import yaml

        lines = []
        for (name, values), section in zip(self.to_dict().items(), dataclasses.fields(self), strict=True):
            lines.append(f"{name}:")
            for key, rules in zip(values, dataclasses.fields(getattr(self, section.name)), strict=True):
                value = yaml.safe_dump(values[key], allow_unicode=True, default_flow_style=True, width=1000)
                text = f"{key}: {value.removesuffix(_END_OF_SCALAR).strip()}"
                lines.append(f"  {text:<34}  # {rules.metadata['doc']}")
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True, allow_nan=False)


_END_OF_SCALAR = "...\n"  # which YAML puts after a scalar by itself


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
    near = near or difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    return f"unknown key {key!r}{hint} (all keys: ioubal configs retinanet_tiny)"


def parse_nan_policy(text: str) -> int:
    """How many batches may be skipped: 0 for "stop", N for "skip:N"."""
    if text == "stop":
        return 0
    word, _, number = text.partition(":")
    if word == "skip" and number.isdigit() and int(number) > 0:
        return int(number)
    raise UsageError(f"train.nan_policy: expected stop or skip:N with N >= 1, got {text!r}")


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


# What may differ between the two halves of a run without changing the result; inference.batch_size not always.
NEUTRAL_KEYS = frozenset(
    "data.path data.workers data.cache data.timeout train.log_every train.watch_every train.checkpoint_every "
    "train.eval_every inference.batch_size".split()
)


def config_diff(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> list[str]:
    """Lines `key: old -> new` for every key that matters to the result."""
    neutral = NEUTRAL_KEYS
    if any(config.get("data", {}).get("image_size") is None for config in (old, new)):
        # Images are padded to the largest of their batch, and the padding reaches the network.
        neutral = neutral - {"inference.batch_size"}
    keys = {f"{s}.{k}" for d in (old, new) for s, values in d.items() for k in values} - neutral

    def get(config: dict, key: str) -> Any:
        section, _, name = key.partition(".")
        return config.get(section, {}).get(name)

    return [f"{k}: {get(old, k)!r} -> {get(new, k)!r}" for k in sorted(keys) if get(old, k) != get(new, k)]
