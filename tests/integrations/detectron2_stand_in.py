"""Detectron2 where it is not installed: what its RetinaNet calls and is called with, written anew for the tests.

It keeps names, argument order, shapes and conventions (background K, ignored -1, the moving average), and has a
RetinaNet with plain PyTorch losses to compare with. It has no backbones: a model is built around given parts.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher as TorchvisionMatcher
from torchvision.ops import box_iou, sigmoid_focal_loss

VERSION = "stand-in"


class CfgNode(dict):
    """A dict with attributes, nested ones included."""

    def __init__(self, values: dict[str, Any] | None = None) -> None:
        super().__init__({k: CfgNode(v) if isinstance(v, dict) else v for k, v in (values or {}).items()})

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def merge_from_file(self, name: str) -> None:
        """Nothing: the stand-in's config is RetinaNet's from the start, and there are no files."""

    def merge_from_list(self, pairs: list[Any]) -> None:
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            *path, last = key.split(".")
            node = functools.reduce(lambda at, name: at[name], path, self)
            if last not in node:
                raise KeyError(f"Non-existent key: {key}")
            node[last] = value


def configurable(init: Any) -> Any:
    """__init__ that takes a config in place of its keywords, through the class's from_config."""

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **keywords: Any) -> None:
        if args and isinstance(args[0], CfgNode):
            keywords = type(self).from_config(*args, **keywords)
            args = ()
        init(self, *args, **keywords)

    return wrapped


class Registry(dict):
    def register(self) -> Any:
        def add(cls: type) -> type:
            assert cls.__name__ not in self
            self[cls.__name__] = cls
            return cls

        return add


META_ARCH_REGISTRY = Registry()


class Boxes:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __len__(self) -> int:
        return len(self.tensor)


class Instances:
    def __init__(self, image_size: tuple[int, int], **fields: Any) -> None:
        self.image_size = image_size
        vars(self).update(fields)

    def __len__(self) -> int:
        return len(self.gt_boxes)


class EventStorage:
    """Scalars by name with the iteration they belong to; float(value) waits for the device, as Detectron2's does."""

    current: list[EventStorage] = []

    def __init__(self, start_iter: int = 0) -> None:
        self.iter = start_iter
        self.scalars: dict[str, tuple[float, int]] = {}

    def put_scalar(self, name: str, value: Any) -> None:
        self.scalars[name] = (float(value), self.iter)

    def latest(self) -> dict[str, tuple[float, int]]:
        return self.scalars

    def __enter__(self) -> EventStorage:
        self.current.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        self.current.pop()


def get_event_storage() -> EventStorage:
    assert EventStorage.current, "get_event_storage() has to be called inside a 'with EventStorage(...)' context!"
    return EventStorage.current[-1]


class Box2BoxTransform:
    def __init__(self, weights: tuple[float, float, float, float]) -> None:
        self.weights = weights

    def get_deltas(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        size, goal = anchors[:, 2:] - anchors[:, :2], boxes[:, 2:] - boxes[:, :2]
        shift = (boxes[:, :2] + boxes[:, 2:] - anchors[:, :2] - anchors[:, 2:]) / 2
        return torch.cat([shift / size, (goal / size).log()], 1) * torch.tensor(self.weights)


class Box2BoxTransformLinear:
    def __init__(self, normalize_by_size: bool = True) -> None:
        self.normalize_by_size = normalize_by_size


class Matcher:
    """Indices of boxes, and labels 1, 0 or -1 (between the thresholds)."""

    def __init__(self, thresholds: list[float], labels: list[int], allow_low_quality_matches: bool) -> None:
        assert labels == [0, -1, 1]
        self.matcher = TorchvisionMatcher(thresholds[1], thresholds[0], allow_low_quality_matches)

    def __call__(self, quality: Tensor) -> tuple[Tensor, Tensor]:
        if quality.numel() == 0:
            return torch.zeros(quality.shape[1], dtype=torch.long), torch.zeros(quality.shape[1], dtype=torch.int8)
        found = self.matcher(quality)
        return found.clamp(min=0), torch.where(found >= 0, 1, torch.where(found == -1, 0, -1)).to(torch.int8)


@META_ARCH_REGISTRY.register()
class RetinaNet(nn.Module):
    @configurable
    def __init__(
        self, *, backbone: Any, head: Any, head_in_features: Any, anchor_generator: Any, box2box_transform: Any,
        anchor_matcher: Any, num_classes: int, focal_loss_alpha: float = 0.25, focal_loss_gamma: float = 2.0,
        smooth_l1_beta: float = 0.0, box_reg_loss_type: str = "smooth_l1", pixel_mean: Any, pixel_std: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone, self.head, self.head_in_features = backbone, head, head_in_features
        self.anchor_generator, self.box2box_transform = anchor_generator, box2box_transform
        self.anchor_matcher, self.num_classes = anchor_matcher, num_classes
        self.focal_loss_alpha, self.focal_loss_gamma = focal_loss_alpha, focal_loss_gamma
        self.smooth_l1_beta, self.box_reg_loss_type = smooth_l1_beta, box_reg_loss_type

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        own = cfg.MODEL.RETINANET
        return {
            "backbone": nn.Identity(),
            "head": nn.Identity(),
            "head_in_features": own.IN_FEATURES,
            "anchor_generator": nn.Identity(),
            "box2box_transform": Box2BoxTransform(own.BBOX_REG_WEIGHTS),
            "anchor_matcher": Matcher(own.IOU_THRESHOLDS, own.IOU_LABELS, True),
            "num_classes": own.NUM_CLASSES,
            "focal_loss_alpha": own.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": own.FOCAL_LOSS_GAMMA,
            "smooth_l1_beta": own.SMOOTH_L1_LOSS_BETA,
            "box_reg_loss_type": own.BBOX_REG_LOSS_TYPE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward_training(self, images: Any, features: Any, predictions: Any, gt_instances: Any) -> dict[str, Tensor]:
        flat = []
        for maps, columns in zip(predictions, (self.num_classes, 4), strict=True):
            split = [m.reshape(m.shape[0], -1, columns, *m.shape[2:]) for m in maps]
            flat.append([m.permute(0, 3, 4, 1, 2).reshape(m.shape[0], -1, columns) for m in split])
        anchors = self.anchor_generator(features)
        labels, boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, flat[0], labels, flat[1], boxes)

    def losses(
        self, anchors: Any, pred_logits: Any, gt_labels: Any, pred_anchor_deltas: Any, gt_boxes: Any
    ) -> dict[str, Tensor]:
        labels = torch.stack(gt_labels)
        positive = (labels >= 0) & (labels != self.num_classes)
        count = positive.sum().item()
        get_event_storage().put_scalar("num_pos_anchors", count / len(labels))
        normalizer = self._ema_update("loss_normalizer", max(count, 1), 100)
        kept = labels >= 0
        logits, deltas = torch.cat(pred_logits, 1)[kept], torch.cat(pred_anchor_deltas, 1)
        one_hot = F.one_hot(labels[kept], self.num_classes + 1)[:, :-1].to(logits.dtype)
        focal = {"alpha": self.focal_loss_alpha, "gamma": self.focal_loss_gamma, "reduction": "sum"}
        flat = torch.cat([level.tensor for level in anchors])
        goals = torch.stack([self.box2box_transform.get_deltas(flat, boxes) for boxes in gt_boxes])
        off = (deltas[positive] - goals[positive]).abs()
        beta = self.smooth_l1_beta
        box = off if beta < 1e-5 else torch.where(off < beta, 0.5 * off**2 / beta, off - 0.5 * beta)
        return {
            "loss_cls": sigmoid_focal_loss(logits, one_hot, **focal) / normalizer,
            "loss_box_reg": box.sum() / normalizer,
        }

    @torch.no_grad()
    def label_anchors(self, anchors: Any, gt_instances: Any) -> tuple[list[Tensor], list[Tensor]]:
        flat = torch.cat([level.tensor for level in anchors])
        all_labels, all_boxes = [], []
        for instances in gt_instances:
            index, kind = self.anchor_matcher(box_iou(instances.gt_boxes.tensor, flat))
            if len(instances):
                labels = instances.gt_classes[index]
                labels[kind == 0], labels[kind == -1] = self.num_classes, -1
                boxes = instances.gt_boxes.tensor[index]
            else:
                labels, boxes = torch.full_like(index, self.num_classes), torch.zeros_like(flat)
            all_labels.append(labels)
            all_boxes.append(boxes)
        return all_labels, all_boxes

    def _ema_update(self, name: str, value: Any, initial_value: float, momentum: float = 0.9) -> Any:
        new = getattr(self, name, initial_value) * momentum + value * (1 - momentum)
        setattr(self, name, new)
        return new


def get_cfg() -> CfgNode:
    own = {
        "NUM_CLASSES": 80, "IN_FEATURES": ["p3", "p4"], "BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
        "IOU_THRESHOLDS": [0.4, 0.5], "IOU_LABELS": [0, -1, 1], "FOCAL_LOSS_ALPHA": 0.25, "FOCAL_LOSS_GAMMA": 2.0,
        "SMOOTH_L1_LOSS_BETA": 0.1, "BBOX_REG_LOSS_TYPE": "smooth_l1",
    }  # fmt: skip
    model = {"META_ARCHITECTURE": "", "DEVICE": "cpu", "PIXEL_MEAN": [0.0] * 3, "PIXEL_STD": [1.0] * 3}
    return CfgNode({"MODEL": {**model, "RETINANET": own}})


def get_config_file(name: str) -> str:
    return name


def build_model(cfg: CfgNode) -> nn.Module:
    return META_ARCH_REGISTRY[cfg.MODEL.META_ARCHITECTURE](cfg)


def install() -> None:
    """Make `import detectron2...` find the above, in this process."""
    homes = {
        "": (),
        ".config": (CfgNode, configurable, get_cfg),
        ".model_zoo": (get_config_file,),
        ".modeling": (build_model,),
        ".modeling.box_regression": (Box2BoxTransform, Box2BoxTransformLinear),
        ".modeling.matcher": (Matcher,),
        ".modeling.meta_arch": (RetinaNet,),
        ".structures": (Boxes, Instances),
        ".utils": (),
        ".utils.events": (EventStorage, get_event_storage),
    }
    for name, members in homes.items():
        module = types.ModuleType(f"detectron2{name}")
        module.__path__ = []
        for member in members:
            setattr(module, member.__name__, member)
        sys.modules[module.__name__] = module
        parent, _, own = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    sys.modules["detectron2"].__version__ = VERSION
    sys.modules["detectron2.modeling.meta_arch"].META_ARCH_REGISTRY = META_ARCH_REGISTRY
