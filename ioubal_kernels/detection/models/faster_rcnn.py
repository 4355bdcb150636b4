"""Faster R-CNN with class-agnostic boxes, as the paper trains it: torchvision's model with another box predictor."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FasterRCNN, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from .retinanet import make_anchor_generator


class ClassAgnosticPredictor(nn.Module):
    """Scores (M, num_classes) and one box per RoI, given to every class: deltas (M, 4 * num_classes).

    torchvision's loss and post-processing pick the deltas of a class and so work as they are.

    Args:
        in_channels: features of a RoI.
        num_classes: K + 1, the background is class 0.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4)
        # The classic detectors' initialisation: a linear layer's default starts with boxes that are shifted at random.
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        features = features.flatten(start_dim=1)
        return self.cls_score(features), self.bbox_pred(features).repeat(1, self.cls_score.out_features)


def class_specific_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict for torchvision's own FastRCNNPredictor: the one box's weights, repeated for every class."""
    classes = state["roi_heads.box_predictor.cls_score.weight"].shape[0]
    result = dict(state)
    for name in ("weight", "bias"):
        key = f"roi_heads.box_predictor.bbox_pred.{name}"
        result[key] = state[key].repeat(classes, *[1] * (state[key].ndim - 1))
    return result


def faster_rcnn(
    backbone: nn.Module,
    num_classes: int,
    strides: tuple[int, ...],
    anchor_scale: float,
    *,
    levels: tuple[str, ...],
    hidden: int = 1024,
    rois: int = 512,
    proposals: tuple[int, int] = (2000, 1000),
) -> FasterRCNN:
    """torchvision's Faster R-CNN.

    Args:
        backbone: module giving an ordered dict of maps; has `out_channels`.
        num_classes: K + 1, the background is class 0.
        strides: of all levels, which the proposals come from.
        anchor_scale: the anchors' edge in units of their level's stride (the paper's detectors: 8).
        levels: names of the maps that RoIs are cut from (all but a pooled last one).
        hidden: width of the two layers of the box head.
        rois: RoIs an image that the box head is trained on.
        proposals: of an image, before and after NMS alike, in training and in testing.
    """
    pooling = MultiScaleRoIAlign(featmap_names=list(levels), output_size=7, sampling_ratio=2)
    train, test = proposals
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=make_anchor_generator(strides, anchor_scale, octaves=(1.0,)),
        rpn_pre_nms_top_n_train=train,
        rpn_post_nms_top_n_train=train,
        rpn_pre_nms_top_n_test=test,
        rpn_post_nms_top_n_test=test,
        box_roi_pool=pooling,
        box_head=TwoMLPHead(backbone.out_channels * 7 * 7, hidden),
        box_predictor=ClassAgnosticPredictor(hidden, num_classes),
        box_batch_size_per_image=rois,
    )
