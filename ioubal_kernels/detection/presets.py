"""Named configurations: recipes for small sets from scratch, and the paper's rows with its schedules and settings.

`tableN_DETECTOR` is a detector of the paper's Table N; `--loss` chooses the arm (baseline, cls, loc, both). The same
name with `_tiny` is the same detector, with the row's loss, on a backbone that trains within minutes on a CPU.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from .architectures import MODELS
from .config import Config, read_yaml
from .errors import UsageError

Changes = dict[str, dict[str, Any]]


def merge(*changes: Changes) -> Changes:
    """One nested mapping of several; the later one wins."""
    result: Changes = {}
    for each in changes:
        for section, values in each.items():
            result[section] = {**result.get(section, {}), **values}
    return result


# What the paper's toolbox (MMDetection of 2019) does with every detector: SGD, 500 warm-up steps from a third of the
# rate, linear scaling with the batch, weight decay on everything, no averaging of weights, mirroring alone.
_SGD: Changes = {
    "data": {"image_size": None, "vflip": 0.0, "zoom": 0.0, "jitter": 0.0},
    "optim": {
        "name": "sgd", "lr": 0.01, "base_batch": 16, "weight_decay": 1e-4, "decay_all": True, "warmup_steps": 500,
        "warmup_start": 1 / 3, "schedule": "multistep", "milestones": [8 / 12, 11 / 12], "clip": 35.0,
    },
    "train": {"epochs": 12.0, "batch_size": 2, "ema": 0.0, "checkpoint_every": 1000, "eval_every": 0, "log_every": 50},
    "inference": {"score_threshold": 0.05, "candidates": 1000, "nms_threshold": 0.5, "batch_size": 1},
}  # fmt: skip
_SCALE_800: Changes = {"data": {"short_side": 800, "long_side": 1333}}
_SCALE_600: Changes = {"data": {"short_side": 600, "long_side": 1000}}

# What a detector's losses need, small or large.
_FAMILY: dict[str, Changes] = {
    "retinanet": {"loss": {"beta": 0.11}},
    "foveabox": {"loss": {"alpha": 0.4, "gamma": 1.5, "beta": 0.11}},
    "ssd": {
        "loss": {"beta": 1.0, "normalizer_scope": "image"},
        "inference": {"score_threshold": 0.02, "nms_threshold": 0.45, "max_detections": 200},
    },
    "faster_rcnn": {"loss": {"beta": 1.0}},
}
_SSD: Changes = {
    "data": {
        "zoom_out": 0.5, "iou_crop": 1.0, "photometric": 0.5, "mean": [0.48235, 0.45882, 0.40784],
        "std": [1 / 255, 1 / 255, 1 / 255],
    },
    "optim": {"lr": 2e-3, "base_batch": 64, "weight_decay": 5e-4, "milestones": [80 / 120, 110 / 120], "clip": 0.0},
    "train": {"epochs": 120.0, "batch_size": 8},
    "inference": {"candidates": 400, "batch_size": 8},
}  # fmt: skip
_SSD_VOC: Changes = {"optim": {"lr": 1e-3, "milestones": [160 / 240, 200 / 240]}, "train": {"epochs": 240.0}}
_FASTER_RCNN: Changes = {"optim": {"lr": 0.02}, "loss": {"eta": 1.3, "w_loc": 2.4}}
_RETINANET_VOC: Changes = merge(_SCALE_600, {"optim": {"lr": 0.0075, "base_batch": 12}})
_CITYSCAPES: Changes = {
    "data": {"short_side": 1024, "long_side": 2048, "short_side_range": [800, 1024]},
    "optim": {"milestones": [7 / 8]},
    "train": {"epochs": 64.0, "batch_size": 1},
}


def _full(name: str, *changes: Changes) -> Changes:
    family = MODELS[name].family
    extra = _SSD if family == "ssd" else _FASTER_RCNN if family == "faster_rcnn" else {}
    edge = {"ssd300_vgg16": 300, "ssd512_vgg16": 512}.get(name)
    size: Changes = {"data": {"image_size": [edge, edge]}, "model": {"ssd_smallest": 15 if edge == 300 else 10}}
    return merge(_SGD, _FAMILY[family], extra, {"model": {"name": name}}, size if edge else {}, *changes)


def _w_loc(value: float) -> Changes:
    return {"loss": {"w_loc": value}}


def _rows() -> dict[str, tuple[str, Changes]]:
    """The paper's rows. w_loc is given where the authors published it, and measured on the data elsewhere."""
    coco, voc, city = "COCO", "Pascal VOC 07+12", "Cityscapes"
    retinanets = ("r18_fpn", 0), ("r50_fpn", 3.049), ("r101_fpn", 2.878), ("x101_32x4d_fpn", 0)
    rows: dict[str, tuple[str, Changes]] = {}

    def add(table: int, name: str, data: str, *changes: Changes) -> None:
        short = name.replace("_fpn", "").replace("_32x4d", "").replace("_vgg16", "")
        rows[f"table{table}_{short}"] = f"{name}, {data}", _full(name, *changes)

    for table, bodies in ((1, retinanets[1:]), (4, retinanets)):
        for body, w_loc in bodies:
            add(table, f"retinanet_{body}", coco, _SCALE_800, _w_loc(w_loc) if w_loc else {})
    for name in ("ssd300_vgg16", "ssd512_vgg16"):
        add(1, name, coco)
        add(5, name, voc, _SSD_VOC, {"model": {"ssd_smallest": 20 if name == "ssd300_vgg16" else 15}})
    for name in ("foveabox_r50_fpn", "faster_rcnn_r50_fpn", "faster_rcnn_r101_fpn"):
        add(1, name, coco, _SCALE_800)
    add(2, "retinanet_r50_fpn", f"{coco}; Table 3 as well", _SCALE_600, _w_loc(3.049))
    for body, w_loc in ("r50_fpn", 2.34), ("r101_fpn", 2.369), ("x101_32x4d_fpn", 0):
        add(5, f"retinanet_{body}", voc, _RETINANET_VOC, _w_loc(w_loc) if w_loc else {})
    for body, w_loc in retinanets[1:3]:
        add(6, f"retinanet_{body}", f"{city}, from a COCO checkpoint", _CITYSCAPES, _w_loc(w_loc))
    add(7, "faster_rcnn_r50_fpn", coco, _SCALE_600)
    return dict(sorted(rows.items()))


def _tiny(name: str, row: Changes | None = None) -> Changes:
    """The tiny sibling of a row: its exponents on the recipe for small sets."""
    exponents = {k: v for k, v in (row or {}).get("loss", {}).items() if k in ("eta", "lambda_")}
    family = MODELS[name].family
    # The recipe for small sets keeps torchvision's 1/9 instead of 0.11, which it was measured with.
    losses = {} if family == "retinanet" else _FAMILY[family]
    proposals: Changes = {"inference": {"candidates": 100}} if family == "faster_rcnn" else {}
    return merge(losses, proposals, {"model": {"name": MODELS[name].tiny}, "loss": exponents})


def _presets() -> dict[str, tuple[str, Changes]]:
    presets: dict[str, tuple[str, Changes]] = {
        "retinanet_tiny": ("default: 1 M parameters, from scratch, minutes on a CPU", _tiny("retinanet_tiny")),
        "foveabox_tiny": ("FoveaBox on the same backbone", _tiny("foveabox_tiny")),
        "ssd_tiny": ("SSD on the same backbone", _tiny("ssd_tiny")),
        "faster_rcnn_tiny": ("Faster R-CNN on the same backbone", _tiny("faster_rcnn_tiny")),
        "demo": (
            "what `ioubal demo` trains on the synthetic set",
            {
                "data": {"image_size": [128, 128], "vflip": 0.0, "zoom": 0.0, "jitter": 0.0},
                "train": {"iterations": 440, "batch_size": 8, "eval_every": 220, "checkpoint_every": 220},
                "inference": {"batch_size": 25},
            },
        ),
    }
    for name, architecture in MODELS.items():
        if architecture.backbone != "tiny":
            scale = {} if architecture.family == "ssd" else _SCALE_800
            presets[name] = (
                "the paper's schedule, for data of your own",
                _full(name, scale, {"loss": {"w_loc": "auto"}}),
            )
    for row, (text, changes) in _rows().items():
        presets[row] = text, changes
        tiny = MODELS[changes["model"]["name"]].tiny
        presets[f"{row}_tiny"] = f"{tiny}, the row's exponents", _tiny(tiny, changes)
    return presets


PRESETS = _presets()


def preset(name: str) -> Config:
    """A fresh configuration by name."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"the nearest is {near[0]!r} (all: ioubal configs)" if near else "`ioubal configs` lists them"
        raise UsageError(f"unknown configuration {name!r}; {hint}")
    config = Config()
    config.update(PRESETS[name][1], f"preset {name}")
    config.validate()
    return config


def _names_a_file(name_or_file: str) -> bool:
    looks_like_file = name_or_file.endswith((".yaml", ".yml")) or "/" in name_or_file or "\\" in name_or_file
    return looks_like_file and name_or_file not in PRESETS


def recipe_of(name_or_file: str, config: Config) -> str:
    """The family whose loss, optimiser and inference `config`, loaded from there, has: a file that leaves keys of these
    out has the defaults', whatever model it names.
    """
    if _names_a_file(name_or_file):
        given, defaults = read_yaml(Path(name_or_file)), Config()
        sections = {name: keys for name, keys in defaults.to_dict().items() if name in ("loss", "optim", "inference")}
        if any(keys.keys() - (given.get(name) or {}).keys() for name, keys in sections.items()):
            config = defaults
    return MODELS[config.model.name].family


def load_config(name_or_file: str) -> Config:
    """A preset by name, or a YAML file: its keys over the defaults."""
    if not _names_a_file(name_or_file):
        return preset(name_or_file)
    config = Config()
    config.update(read_yaml(Path(name_or_file)), name_or_file)
    config.validate()
    return config
