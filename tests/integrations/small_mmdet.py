"""Small MMDetection detectors built from configs, a batch for them, and their gradients by name."""

from __future__ import annotations

import copy
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor, nn

CLASSES = 3
SIZE = 64
FAMILIES = ("retinanet", "ssd", "fovea", "faster_rcnn")
# Each head of this package with the stock one that it derives from.
STOCK = {
    "IoUBalancedRetinaHead": "RetinaHead",
    "IoUBalancedSSDHead": "SSDHead",
    "IoUBalancedFoveaHead": "FoveaHead",
    "IoUBalancedRPNHead": "RPNHead",
    "IoUBalancedShared2FCBBoxHead": "Shared2FCBBoxHead",
}
FOCAL = {"use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.3}
STDS = (0.1, 0.1, 0.2, 0.2)


def coder(stds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> dict:
    return {"type": "DeltaXYWHBBoxCoder", "target_means": (0.0,) * 4, "target_stds": stds}


def losses(balanced: bool, kind: str, smooth_l1: dict, exponents: tuple[float, float]) -> dict:
    """loss_cls and loss_bbox, this package's or mmdet's with the same numbers."""
    eta, lambda_ = exponents
    cls = {"focal": FOCAL, "softmax": {"use_sigmoid": False}, "bce": {"use_sigmoid": True}}[kind]
    names = {"focal": "FocalLoss", "softmax": "CrossEntropyLoss", "bce": "CrossEntropyLoss"}
    if not balanced:
        return {"loss_cls": {"type": names[kind], **cls}, "loss_bbox": {"type": "SmoothL1Loss", **smooth_l1}}
    return {
        "loss_cls": {"type": f"IoUBalanced{names[kind]}", "eta": eta, **cls},
        "loss_bbox": {"type": "IoUBalancedSmoothL1Loss", "lambda_": lambda_, **smooth_l1},
    }


def anchors(strides: list[int]) -> dict:
    return {
        "type": "AnchorGenerator",
        "octave_base_scale": 2,
        "scales_per_octave": 1,
        "ratios": [0.5, 1.0, 2.0],
        "strides": strides,
    }


def assigner(high: float = 0.5, low: float = 0.4, smallest: float = 0.0) -> dict:
    return {
        "type": "MaxIoUAssigner",
        "pos_iou_thr": high,
        "neg_iou_thr": low,
        "min_pos_iou": smallest,
        "ignore_iof_thr": 0.5,
    }


def sampler(count: int, with_gt: bool) -> dict:
    return {
        "type": "RandomSampler",
        "num": count,
        "pos_fraction": 0.5,
        "neg_pos_ub": -1,
        "add_gt_as_proposals": with_gt,
    }


def fpn() -> dict:
    return {
        "backbone": {
            "type": "ResNet",
            "depth": 18,
            "base_channels": 8,
            "stem_channels": 8,
            "num_stages": 4,
            "out_indices": (1, 2, 3),
            "norm_cfg": {"type": "BN"},
        },
        "neck": {"type": "FPN", "in_channels": [16, 32, 64], "out_channels": 16, "num_outs": 3},
    }


def config(family: str, balanced: bool, exponents: tuple[float, float] = (1.5, 1.5), **head: Any) -> dict:
    """A detector's config; `head` goes into its detection head."""
    prefix = "IoUBalanced" if balanced else ""
    preprocessor = {"type": "DetDataPreprocessor", "mean": [0.0] * 3, "std": [1.0] * 3, "pad_size_divisor": 32}
    nms = {"score_thr": 0.05, "nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 5, "nms_pre": 50}
    dense_train = {"assigner": assigner(), "allowed_border": 4, "pos_weight": -1, "debug": False}
    if family == "retinanet":
        options = losses(balanced, "focal", {"beta": 0.11, "loss_weight": 2.0}, exponents)
        retina = {
            "type": f"{prefix}RetinaHead",
            "num_classes": CLASSES,
            "in_channels": 16,
            "stacked_convs": 1,
            "feat_channels": 16,
            "anchor_generator": anchors([8, 16, 32]),
            "bbox_coder": coder(),
            **options,
        }
        return {
            "type": "RetinaNet",
            "data_preprocessor": preprocessor,
            **fpn(),
            "bbox_head": {**retina, **head},
            "train_cfg": dense_train,
            "test_cfg": nms,
        }
    if family == "fovea":
        options = losses(balanced, "focal", {"beta": 0.11, "loss_weight": 2.0}, exponents)
        fovea = {
            "type": f"{prefix}FoveaHead",
            "num_classes": CLASSES,
            "in_channels": 16,
            "stacked_convs": 1,
            "feat_channels": 16,
            "strides": [8, 16, 32],
            "base_edge_list": [12, 24, 48],
            "scale_ranges": ((1, 24), (12, 48), (24, 128)),
            "sigma": 0.4,
            "with_deform": False,
            **options,
        }
        return {
            "type": "FOVEA",
            "data_preprocessor": preprocessor,
            **fpn(),
            "bbox_head": {**fovea, **head},
            "train_cfg": {},
            "test_cfg": nms,
        }
    if family == "ssd":
        eta, lambda_ = exponents
        ssd = {
            "type": f"{prefix}SSDHead",
            "num_classes": CLASSES,
            "in_channels": [16, 16, 16],
            "anchor_generator": {
                "type": "SSDAnchorGenerator",
                "scale_major": False,
                "input_size": SIZE,
                "strides": [8, 16, 32],
                "ratios": ([2], [2], [2]),
                "min_sizes": [12, 24, 40],
                "max_sizes": [24, 40, 56],
            },
            "bbox_coder": coder(STDS),
        }
        if balanced:
            ssd |= {"loss_cls": {"type": "IoUBalancedCrossEntropyLoss", "eta": eta}}
            ssd |= {"loss_bbox": {"type": "IoUBalancedSmoothL1Loss", "beta": 1.0, "lambda_": lambda_}}
        train = {
            **dense_train,
            "assigner": {**assigner(0.5, 0.5), "gt_max_assign_all": False},
            "sampler": {"type": "PseudoSampler"},
            "allowed_border": -1,
            "smoothl1_beta": 1.0,
            "neg_pos_ratio": 3,
        }
        return {
            "type": "SingleStageDetector",
            "data_preprocessor": preprocessor,
            **fpn(),
            "bbox_head": {**ssd, **head},
            "train_cfg": train,
            "test_cfg": nms,
        }
    assert family == "faster_rcnn"
    proposals = {"nms_pre": 100, "max_per_img": 60, "nms": {"type": "nms", "iou_threshold": 0.7}, "min_bbox_size": 0}
    rpn_train = {
        "assigner": assigner(0.6, 0.3, 0.3),
        "sampler": {
            "type": "RandomSampler",
            "num": 48,
            "pos_fraction": 0.5,
            "neg_pos_ub": -1,
            "add_gt_as_proposals": False,
        },
        "allowed_border": -1,
        "pos_weight": -1,
    }
    rcnn_train = {
        "assigner": {**assigner(0.5, 0.5, 0.5), "match_low_quality": False},
        "sampler": {
            "type": "RandomSampler",
            "num": 32,
            "pos_fraction": 0.5,
            "neg_pos_ub": -1,
            "add_gt_as_proposals": True,
        },
        "pos_weight": -1,
    }
    box_head = {
        "type": f"{prefix}Shared2FCBBoxHead",
        "in_channels": 16,
        "fc_out_channels": 32,
        "roi_feat_size": 5,
        "num_classes": CLASSES,
        "bbox_coder": coder(STDS),
        "reg_class_agnostic": False,
        **losses(balanced, "softmax", {"beta": 1.0, "loss_weight": 2.4}, exponents),
    }
    roi_layer = {"type": "RoIAlign", "output_size": 5, "sampling_ratio": 2, "use_torchvision": True}
    return {
        "type": "FasterRCNN",
        "data_preprocessor": preprocessor,
        **fpn(),
        "rpn_head": {
            "type": f"{prefix}RPNHead",
            "in_channels": 16,
            "feat_channels": 16,
            "anchor_generator": anchors([8, 16, 32]),
            "bbox_coder": coder(),
            **losses(balanced, "bce", {"beta": 1 / 9}, exponents),
        },
        "roi_head": {
            "type": "StandardRoIHead",
            "bbox_roi_extractor": {
                "type": "SingleRoIExtractor",
                "roi_layer": roi_layer,
                "out_channels": 16,
                "featmap_strides": [8, 16, 32],
            },
            "bbox_head": {**box_head, **head},
        },
        "train_cfg": {
            "rpn": rpn_train,
            "rpn_proposal": proposals,
            "rcnn": rcnn_train,
        },
        "test_cfg": {
            "rpn": proposals,
            "rcnn": {"score_thr": 0.05, "nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 5},
        },
    }


def make(family: str, balanced: bool, exponents: tuple[float, float] = (1.5, 1.5), **head: Any) -> nn.Module:
    """A detector whose weights depend on the family only; regression outputs large enough for IoUs between 0 and 1."""
    torch.manual_seed(0)
    model = MODELS.build(ConfigDict(config(family, balanced, exponents, **head)))
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "bn" not in name and p.ndim > 1:
            fan_in = p[0].numel()
            std = (2.0 / fan_in) ** 0.5
            if "reg" in name:
                std *= 0.1
            p.data.normal_(0.0, std, generator=generator)
    return model.train()


def batch(
    *, empty: bool = True, ignored: bool = True, seed: int = 1, images: int = 3
) -> tuple[Tensor, list[DetDataSample]]:
    """Images (N, 3, SIZE, SIZE) and their samples, the last without boxes if `empty`, the first with an ignored region
    if `ignored`.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(images, 3, SIZE, SIZE, generator=generator)
    samples = []
    for number in range(images):
        count = 0 if empty and number == images - 1 else 2 + number
        corner = 36 * torch.rand(count, 2, generator=generator)
        boxes = torch.cat([corner, corner + 10 + 18 * torch.rand(count, 2, generator=generator)], dim=1)
        sample = DetDataSample(
            metainfo={"img_shape": (SIZE, SIZE), "pad_shape": (SIZE, SIZE), "ori_shape": (SIZE, SIZE)}
        )
        sample.set_metainfo({"batch_input_shape": (SIZE, SIZE), "scale_factor": (1.0, 1.0)})
        sample.gt_instances = InstanceData(
            bboxes=boxes, labels=torch.randint(0, CLASSES, (count,), generator=generator)
        )
        region = torch.tensor([[2.0, 2.0, 30.0, 30.0]])[: int(ignored and number == 0)]
        sample.ignored_instances = InstanceData(bboxes=region, labels=torch.zeros(len(region), dtype=torch.long))
        samples.append(sample)
    return inputs, samples


def step(model: nn.Module, inputs: Tensor, samples: list[DetDataSample]):
    """Losses by name (lists over levels summed, as mmdet does) and gradients by parameter of a training forward."""
    model.zero_grad()
    torch.manual_seed(7)
    parts = model.loss(inputs, copy.deepcopy(samples))
    total, logs = model.parse_losses(parts)
    total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in logs.items() if "loss" in name}, gradients
