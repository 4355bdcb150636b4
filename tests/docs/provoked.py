"""Mistakes that raise the messages of docs/troubleshooting.md whose text is put together while the program runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.detection.config import parse_assignment
from ioubal_kernels.detection.presets import preset


def sigmoid(rows: int = 8, classes: int = 80, **changed: Any) -> None:
    values = {
        "logits": torch.zeros(rows, classes),
        "labels": torch.full((rows,), -1),
        "iou": torch.zeros(rows),
        **changed,
    }
    ik.iou_balanced_sigmoid_focal_loss(**values)


def detection(inputs: testing.DetectionInputs | None = None, **options: Any) -> ik.DetectionLoss:
    inputs = testing.detection_inputs(0) if inputs is None else inputs
    return ik.iou_balanced_detection_loss(*inputs.arguments(), **options)


def with_label(value: int) -> torch.Tensor:
    labels = torch.full((8,), -1)
    labels[3] = value
    return labels


def matched_too_far() -> None:
    inputs = testing.detection_inputs(0)
    inputs.matched_idxs[0, 0] = 7
    detection(inputs)


def label_too_large() -> None:
    inputs = testing.detection_inputs(0)
    image, row = (inputs.matched_idxs >= 0).nonzero()[0].tolist()
    inputs.gt_labels[image][inputs.matched_idxs[image, row]] = 3
    detection(inputs)


def fewer_anchors() -> None:
    inputs = testing.detection_inputs(0)
    inputs.anchors = inputs.anchors[:50]
    detection(inputs)


def too_few_channels() -> None:
    inputs = testing.detection_inputs(0, layout="nchw")
    inputs.cls_logits[0] = inputs.cls_logits[0][:, :5]
    detection(inputs)


def heads_of_two_kinds() -> None:
    inputs = testing.detection_inputs(0, layout="nchw")
    inputs.cls_logits = testing.detection_inputs(0).cls_logits
    detection(inputs)


def double_backward() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    loss = ik.iou_balanced_binary_cross_entropy(x, torch.tensor([0, -1]), torch.ones(2), backend="cpu")
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    gradient.sum().backward()


def functional_transform() -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        return ik.iou_balanced_binary_cross_entropy(x, torch.tensor([0, -1]), torch.ones(2), backend="cpu")

    torch.func.grad(loss)(torch.zeros(2, 3))


def two_backwards_in_place() -> None:
    inputs = testing.detection_inputs(0).requiring_grad()
    loss = detection(inputs, inplace=True, backend="cpu")
    loss.classification.backward(retain_graph=True)
    loss.classification.backward()


def in_place_with_strides() -> None:
    x = torch.zeros(80, 8, requires_grad=True).t()
    sigmoid(logits=x, inplace=True, backend="cpu")


def no_positives_to_calibrate() -> None:
    ik.calibrate_w_loc([(torch.zeros(0, 4), torch.zeros(0, 4))])


def not_torchvision() -> None:
    ik.integrations.torchvision.convert(torch.nn.Linear(2, 2))


def nan_box() -> None:
    boxes = [torch.tensor([[0.0, 0, 4, 4], [1, 1, float("nan"), 4]])]
    ik.match_anchors(torch.zeros(3, 4), boxes)


def set_option(text: str) -> Callable[[], None]:
    return lambda: preset("retinanet_tiny").set(*parse_assignment(text))


# The text of each stands on the page word for word.
PROVOKED: list[Callable[[], None]] = [
    lambda: sigmoid(labels=with_label(80)),
    lambda: sigmoid(labels=torch.zeros(5, dtype=torch.int64)),
    lambda: sigmoid(labels=torch.zeros(8)),
    lambda: sigmoid(iou=0.5),
    lambda: sigmoid(eta=-0.5),
    lambda: sigmoid(reduction="avg"),
    lambda: sigmoid(reduction="sum", avg_factor=8.0),
    lambda: sigmoid(avg_factor=0),
    lambda: sigmoid(scope_ids=torch.zeros(8, dtype=torch.int64)),
    lambda: sigmoid(process_group="world"),
    lambda: sigmoid(backend="cuda"),
    lambda: sigmoid(logits=torch.zeros(8, 80, dtype=torch.float64), backend="gpu"),
    lambda: detection(normalizer_scope="level"),
    lambda: detection(normalizer_scope="images"),
    matched_too_far,
    label_too_large,
    fewer_anchors,
    too_few_channels,
    heads_of_two_kinds,
    double_backward,
    functional_transform,
    two_backwards_in_place,
    in_place_with_strides,
    no_positives_to_calibrate,
    not_torchvision,
    nan_box,
    lambda: ik.IoUBalancedLoss(lambda_loc=1.5),
    lambda: ik.match_anchors(torch.zeros(3, 4), [torch.zeros(1, 4)], high=0.3),
    set_option("train.batchsize=4"),
    set_option("train.batch_size=0"),
    set_option("loss.w_loc=fast"),
]


def raised(mistake: Callable[[], None]) -> str:
    """The first line of what a mistake raises."""
    try:
        mistake()
    except Exception as error:
        return str(error)
    raise AssertionError(f"nothing was raised by {mistake}")


def on_page(page: Path) -> list[str]:
    """The messages that a page quotes: its blocks of text, a message each."""
    from doc_pages import blocks

    return [block.text.strip() for block in blocks(page, "text")]
