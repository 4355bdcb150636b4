"""Every bad input raises the documented type, and the message names operation, argument, expected and got.

A case is a valid call with one argument replaced: (argument, bad value, exception, texts the message must contain).
"""

import math
from typing import Any

import numpy as np
import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels import testing

NAN, INF = math.nan, math.inf
SPARSE = torch.zeros(64, 5).to_sparse()
NESTED = torch.nested.nested_tensor([torch.zeros(2, 5), torch.zeros(3, 5)])
META = torch.device("meta")


def flat_arguments() -> dict[str, Any]:
    c = testing.classification_inputs(0, 64, 5)
    return {"logits": c.logits, "labels": c.labels, "iou": c.iou}


def softmax_arguments() -> dict[str, Any]:
    c = testing.classification_inputs(0, 64, 5, softmax=True)
    return {"logits": c.logits, "labels": c.labels, "iou": c.iou}


def box_arguments() -> dict[str, Any]:
    pred, target = testing.delta_inputs(0, 8)
    return {"pred_deltas": pred, "target_deltas": target, "iou": torch.rand(8)}


def detection_arguments(**options: Any) -> dict[str, Any]:
    names = ("cls_logits", "bbox_deltas", "anchors", "matched_idxs", "gt_boxes", "gt_labels")
    return dict(zip(names, testing.detection_inputs(0, **options).arguments(), strict=True))


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def labels_with(value: int, dtype: torch.dtype = torch.int64, at: int = 17, base: Any = None) -> torch.Tensor:
    labels = flat_arguments()["labels"].to(dtype) if base is None else base.clone()
    labels.view(-1)[at] = value
    return labels


def matched_with(value: int, image: int, row: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    matched = detection_arguments()["matched_idxs"].to(dtype)
    matched[image, row] = value
    return matched


CLASSIFICATION = [
    ("logits", None, TypeError, ["floating-point tensor", "None"]),
    ("logits", [[1.0]], TypeError, ["list"]),
    ("logits", np.zeros((64, 5), np.float32), TypeError, ["numpy.ndarray"]),
    ("logits", torch.zeros(64, 5, dtype=torch.int64), TypeError, ["float32", "torch.int64"]),
    ("logits", torch.zeros(64, 5, dtype=torch.complex64), TypeError, ["complex64"]),
    ("logits", torch.zeros(64, 5, dtype=torch.bool), TypeError, ["torch.bool"]),
    ("logits", SPARSE, TypeError, ["sparse"]),
    ("logits", NESTED, TypeError, ["nested"]),
    ("logits", torch.quantize_per_tensor(torch.zeros(64, 5), 0.1, 0, torch.qint8), TypeError, ["qint8"]),
    ("logits", torch.zeros(64, 5).to_mkldnn(), TypeError, ["mkldnn"]),
    ("logits", torch.tensor(1.0), ValueError, ["(..., K)", "()"]),
    ("logits", torch.zeros(64, 0), ValueError, ["K >= 1", "(64, 0)"]),
    ("labels", None, TypeError, ["int32 or int64"]),
    ("labels", [0] * 64, TypeError, ["list of length 64"]),
    ("labels", torch.zeros(64), TypeError, ["int32, int64", "torch.float32"]),
    ("labels", torch.zeros(64, dtype=torch.bool), TypeError, ["torch.bool"]),
    ("labels", torch.zeros(64, dtype=torch.uint8), TypeError, ["torch.uint8"]),
    ("labels", torch.zeros(64, dtype=torch.int16), TypeError, ["torch.int16"]),
    ("labels", torch.zeros(63, dtype=torch.int64), ValueError, ["(64,)", "(63,)", "broadcast"]),
    ("labels", torch.zeros(1, dtype=torch.int64), ValueError, ["(64,)", "(1,)"]),
    ("labels", torch.zeros(64, 1, dtype=torch.int64), ValueError, ["(64,)", "(64, 1)"]),
    ("labels", torch.zeros(64, dtype=torch.int64, device=META), ValueError, ["cpu", "meta"]),
    ("labels", labels_with(5), ValueError, ["0 to 4", "got 5", "labels[17]", "(64,)", "torch.int64"]),
    ("labels", labels_with(99, at=3), ValueError, ["got 99", "labels[3]"]),
    ("labels", labels_with(2**31 - 1, torch.int32), ValueError, ["got 2147483647", "labels[17]"]),
    ("iou", torch.zeros(64, dtype=torch.int64), TypeError, ["torch.int64"]),
    ("iou", 0.5, TypeError, ["0.5 (float)"]),
    ("iou", torch.zeros(64, 5), ValueError, ["(64,)", "(64, 5)"]),
    ("iou", torch.zeros(64, device=META), ValueError, ["meta"]),
    ("weight", torch.zeros(64, 5), ValueError, ["(64,)", "(64, 5)"]),
    ("weight", torch.zeros(64, dtype=torch.int32), TypeError, ["torch.int32"]),
    ("weight", 2.0, TypeError, ["2.0 (float)"]),
    ("eta", -0.5, ValueError, ["at least 0", "-0.5"]),
    ("eta", NAN, ValueError, ["nan"]),
    ("eta", INF, ValueError, ["finite", "inf"]),
    ("eta", "1.5", TypeError, ["number", "'1.5' (str)"]),
    ("eta", True, TypeError, ["number"]),
    ("eta", torch.tensor(1.5), TypeError, ["number", "tensor"]),
    ("eps", -1e-6, ValueError, ["at least 0"]),
    ("reduction", "avg", ValueError, ["'mean', 'sum', 'none'", "'avg'"]),
    ("reduction", "meen", ValueError, ["did you mean 'mean'"]),
    ("reduction", None, TypeError, ["None"]),
    ("avg_factor", 0.0, ValueError, ["positive", "0.0"]),
    ("avg_factor", -2, ValueError, ["positive", "-2"]),
    ("avg_factor", NAN, ValueError, ["nan"]),
    ("avg_factor", torch.tensor(0.0), ValueError, ["positive"]),
    ("avg_factor", torch.tensor(NAN), ValueError, ["positive"]),
    ("avg_factor", torch.ones(2), ValueError, ["0-d", "(2,)"]),
    ("avg_factor", torch.tensor(True), TypeError, ["torch.bool"]),
    ("avg_factor", torch.tensor(1.0, device=META), ValueError, ["cpu", "meta"]),
    ("avg_factor", "3", TypeError, ["'3' (str)"]),
    ("num_scopes", 3, ValueError, ["None without scope_ids", "3"]),
    ("scope_ids", torch.zeros(64, dtype=torch.int64), ValueError, ["num_scopes", "given with scope_ids"]),
    ("grad_scale", NAN, ValueError, ["finite", "nan"]),
    ("grad_scale", "1", TypeError, ["number"]),
    ("grad_scale", torch.ones(2), ValueError, ["()", "(2,)"]),
    ("grad_scale", torch.tensor(1), TypeError, ["torch.int64"]),
    ("process_group", "everyone", ValueError, ["'world'", "'everyone'"]),
    ("process_group", "world", ValueError, ["init_process_group"]),
    ("process_group", 3, TypeError, ["process group", "int"]),
]
SIGMOID_ONLY = [
    ("alpha", 1.5, ValueError, ["between 0 and 1", "1.5"]),
    ("alpha", -1, ValueError, ["between 0 and 1", "-1"]),
    ("alpha", NAN, ValueError, ["nan"]),
    ("alpha", "0.25", TypeError, ["number"]),
    ("gamma", -1.0, ValueError, ["at least 0"]),
    ("gamma", NAN, ValueError, ["nan"]),
    ("gamma", None, TypeError, ["number", "None"]),
    ("inplace", 1, TypeError, ["True or False"]),
    ("labels", labels_with(-3), ValueError, ["-2 (ignored)", "got -3", "labels[17]"]),
    ("labels", labels_with(-(2**31), torch.int32), ValueError, ["got -2147483648"]),
]
SOFTMAX_ONLY = [
    ("background_index", -1, ValueError, ["at least 0", "-1"]),
    ("background_index", 5, ValueError, ["5 columns", "5"]),
    ("background_index", 1.0, TypeError, ["int", "1.0"]),
    ("background_index", "last", TypeError, ["int"]),
]
SMOOTH_L1 = [
    ("pred_deltas", None, TypeError, ["floating-point"]),
    ("pred_deltas", np.zeros((8, 4)), TypeError, ["ndarray"]),
    ("pred_deltas", torch.zeros(8, 4, dtype=torch.int32), TypeError, ["torch.int32"]),
    ("pred_deltas", torch.zeros(8, 5), ValueError, ["(P, 4)", "(8, 5)"]),
    ("pred_deltas", torch.zeros(2, 4, 4), ValueError, ["(P, 4)", "(2, 4, 4)"]),
    ("target_deltas", torch.zeros(1, 4), ValueError, ["(8, 4)", "(1, 4)"]),
    ("target_deltas", torch.zeros(8, 4, device=META), ValueError, ["meta"]),
    ("target_deltas", torch.zeros(8, 4, dtype=torch.int64), TypeError, ["torch.int64"]),
    ("iou", torch.zeros(8, 1), ValueError, ["(8,)", "(8, 1)"]),
    ("iou", torch.zeros(8, dtype=torch.bool), TypeError, ["torch.bool"]),
    ("weight", torch.zeros(8, 1), ValueError, ["(8,) or (8, 4)", "(8, 1)"]),
    ("weight", torch.zeros(4), ValueError, ["(8,) or (8, 4)", "(4,)"]),
    ("lambda_", -1.0, ValueError, ["at least 0"]),
    ("lambda_", "1", TypeError, ["number"]),
    ("beta", -0.1, ValueError, ["at least 0", "-0.1"]),
    ("beta", NAN, ValueError, ["nan"]),
    ("w_loc", -1, ValueError, ["at least 0"]),
    ("w_loc", "auto", TypeError, ["number", "'auto'"]),
    ("eps", NAN, ValueError, ["nan"]),
    ("normalize", 1, TypeError, ["True or False"]),
    ("box_weights", (1.0, 1.0, 1.0), ValueError, ["four", "length 3"]),
    ("box_weights", 1.0, TypeError, ["tuple of four"]),
    ("box_weights", (1.0, 1.0, 0.0, 1.0), ValueError, ["box_weights[2]", "positive"]),
    ("box_weights", (1.0, -1.0, 1.0, 1.0), ValueError, ["box_weights[1]", "positive", "-1.0"]),
    ("box_weights", (1.0, 1.0, "1", 1.0), TypeError, ["box_weights[2]"]),
    ("reduction", "sums", ValueError, ["did you mean 'sum'"]),
    ("avg_factor", 0, ValueError, ["positive"]),
    ("scope_ids", torch.zeros(8, dtype=torch.int64), ValueError, ["num_scopes"]),
    ("backend", "fast", ValueError, ["'reference'", "'fast'"]),
]
DETECTION = [
    ("cls_logits", None, TypeError, ["(N, R, K)", "None"]),
    ("cls_logits", np.zeros((2, 52, 3)), TypeError, ["ndarray"]),
    ("cls_logits", torch.zeros(52, 3), ValueError, ["(N, R, K)", "(52, 3)"]),
    ("cls_logits", torch.zeros(2, 52, 0), ValueError, ["K >= 1", "(2, 52, 0)"]),
    ("cls_logits", torch.zeros(2, 52, 3, dtype=torch.int64), TypeError, ["torch.int64"]),
    ("cls_logits", [torch.zeros(2, 6, 4, 5)], TypeError, ["bbox_deltas", "list"]),
    ("bbox_deltas", [torch.zeros(2, 8, 4, 5)], TypeError, ["(N, R, 4)", "list of length 1"]),
    ("bbox_deltas", torch.zeros(2, 52, 5), ValueError, ["(2, 52, 4)", "(2, 52, 5)"]),
    ("bbox_deltas", torch.zeros(1, 52, 4), ValueError, ["(2, 52, 4)", "(1, 52, 4)"]),
    ("bbox_deltas", torch.zeros(2, 52, 4, device=META), ValueError, ["meta"]),
    ("anchors", torch.zeros(51, 4), ValueError, ["(52, 4) or (2, 52, 4)", "(51, 4)"]),
    ("anchors", torch.zeros(1, 52, 4), ValueError, ["(2, 52, 4)", "(1, 52, 4)"]),
    ("anchors", torch.zeros(52, 4, dtype=torch.int64), TypeError, ["torch.int64"]),
    ("anchors", [torch.zeros(52, 4)], TypeError, ["list"]),
    ("anchors", torch.zeros(52, 4, device=META), ValueError, ["meta"]),
    ("matched_idxs", torch.zeros(2, 52), TypeError, ["int32, int64", "torch.float32"]),
    ("matched_idxs", torch.zeros(2, 51, dtype=torch.int64), ValueError, ["(2, 52)", "(2, 51)"]),
    ("matched_idxs", torch.zeros(52, dtype=torch.int64), ValueError, ["(2, 52)", "(52,)"]),
    ("matched_idxs", [torch.zeros(52, dtype=torch.int64)] * 2, TypeError, ["list of length 2"]),
    ("matched_idxs", matched_with(-3, 1, 7), ValueError, ["got -3", "matched_idxs[1, 7]"]),
    ("matched_idxs", matched_with(99, 0, 3), ValueError, ["got 99", "matched_idxs[0, 3]", "image 0 has"]),
    ("matched_idxs", matched_with(2**31, 0, 3), ValueError, ["got 2147483648"]),
    ("matched_idxs", matched_with(2**31 - 1, 1, 51, torch.int32), ValueError, ["matched_idxs[1, 51]"]),
    ("matched_idxs", matched_with(-(2**31), 1, 0, torch.int32), ValueError, ["got -2147483648"]),
    ("gt_boxes", None, TypeError, ["list of tensors", "None"]),
    ("gt_boxes", [torch.zeros(2, 4)], ValueError, ["2 images", "length 1"]),
    ("gt_boxes", [torch.zeros(2, 5), torch.zeros(2, 4)], ValueError, ["gt_boxes[0]", "(G_i, 4)", "(2, 5)"]),
    ("gt_boxes", [np.zeros((2, 4)), torch.zeros(2, 4)], TypeError, ["gt_boxes[0]", "ndarray"]),
    ("gt_boxes", [NESTED, torch.zeros(2, 4)], TypeError, ["gt_boxes[0]", "nested"]),
    ("gt_boxes", torch.zeros(2, 3, 4), TypeError, ["gt_labels", "padded"]),
    ("gt_boxes", torch.zeros(1, 3, 4), ValueError, ["(2, G, 4)", "(1, 3, 4)"]),
    ("gt_labels", None, TypeError, ["list", "None"]),
    ("gt_labels", torch.zeros(2, 3, dtype=torch.int64), TypeError, ["because gt_boxes is a list"]),
    ("gt_labels", [torch.zeros(9, dtype=torch.int64)] * 2, ValueError, ["gt_labels[0]", "(9,)"]),
    ("eta", -1.0, ValueError, ["at least 0"]),
    ("lambda_", NAN, ValueError, ["nan"]),
    ("w_loc", -0.1, ValueError, ["at least 0"]),
    ("alpha", 2.0, ValueError, ["between 0 and 1"]),
    ("gamma", -2.0, ValueError, ["at least 0"]),
    ("beta", -1.0, ValueError, ["at least 0"]),
    ("box_coder", "fova", ValueError, ["'delta', 'fovea'", "did you mean 'fovea'"]),
    ("box_coder", 1, TypeError, ["'delta', 'fovea'", "1 (int)"]),
    ("box_weights", [1, 2, 3], ValueError, ["four"]),
    ("normalize_loc", "yes", TypeError, ["True or False"]),
    ("normalizer_scope", "images", ValueError, ["'batch', 'level', 'image'", "did you mean 'image'"]),
    ("normalizer_scope", "level", ValueError, ["anchors_per_level", "flat"]),
    ("anchors_per_level", [40, 11], ValueError, ["52 anchors", "[40, 11]", "51"]),
    ("anchors_per_level", [60, -8], ValueError, ["anchors_per_level[1]", "at least 0"]),
    ("anchors_per_level", [26.0, 26.0], TypeError, ["anchors_per_level[0]", "int"]),
    ("anchors_per_level", 52, TypeError, ["list of ints"]),
    ("eps", -1.0, ValueError, ["at least 0"]),
    ("cls_weight", "2", TypeError, ["number"]),
    ("cls_weight", -1.0, ValueError, ["at least 0"]),
    ("avg_factor", 0, ValueError, ["positive"]),
    ("avg_factor", (1.0, 2.0, 3.0), ValueError, ["pair", "length 3"]),
    ("avg_factor", (1.0, -2.0), ValueError, ["avg_factor[1]", "-2.0"]),
    ("avg_factor", torch.ones(3), ValueError, ["(2,)", "(3,)"]),
    ("avg_factor", torch.tensor([1.0, 0.0]), ValueError, ["positive"]),
    ("grad_scale", INF, ValueError, ["finite"]),
    ("process_group", "world", ValueError, ["init_process_group"]),
    ("inplace", "yes", TypeError, ["True or False"]),
    ("backend", "cuda", ValueError, ["takes cuda tensors", "cpu"]),
    ("backend", "refrence", ValueError, ["did you mean 'reference'"]),
    ("backend", 7, TypeError, ["string or None"]),
]
LEVEL_MAPS = [
    ("cls_logits", [], ValueError, ["at least one level"]),
    ("cls_logits", [zeros(2, 6, 4, 5)] * 3, ValueError, ["bbox_deltas", "3 levels", "length 2"]),
    ("cls_logits", [zeros(2, 6, 4, 5), zeros(2, 6, 2)], ValueError, ["cls_logits[1]", "(N, A*K, H, W)"]),
    ("cls_logits", [zeros(2, 6, 4, 5), zeros(2, 7, 2, 3)], ValueError, ["cls_logits[1]", "A = 2"]),
    ("cls_logits", [zeros(2, 6, 4, 5), zeros(2, 8, 2, 3)], ValueError, ["cls_logits[1]", "6 channels", "K = 3"]),
    ("cls_logits", [zeros(2, 6, 4, 5), zeros(3, 6, 2, 3)], ValueError, ["bbox_deltas[1]", "(3, A*4, 2, 3)"]),
    ("cls_logits", [zeros(2, 6, 4, 5), None], TypeError, ["cls_logits[1]", "None"]),
    (
        "cls_logits",
        [zeros(2, 6, 4, 5), torch.zeros(2, 6, 2, 3, dtype=torch.float16)],
        TypeError,
        ["cls_logits[1]", "torch.float32", "torch.float16"],
    ),
    ("bbox_deltas", [zeros(2, 8, 4, 5), zeros(2, 6, 2, 3)], ValueError, ["bbox_deltas[1]", "A*4", "(2, 6, 2, 3)"]),
    ("bbox_deltas", [zeros(2, 8, 4, 5), zeros(2, 8, 3, 2)], ValueError, ["bbox_deltas[1]", "match cls_logits[1]"]),
    ("bbox_deltas", zeros(2, 52, 4), TypeError, ["list because cls_logits is a list"]),
    ("anchors_per_level", [26, 26], ValueError, ["level maps' [40, 12]", "[26, 26]"]),
    ("matched_idxs", torch.zeros(2, 51, dtype=torch.int64), ValueError, ["(2, 52)"]),
]
PADDED = [
    ("gt_labels", None, TypeError, ["padded tensor (N, G)"]),
    ("gt_labels", torch.zeros(2, 2, dtype=torch.int64), ValueError, ["to match gt_boxes"]),
    ("gt_labels", torch.zeros(2, 7), TypeError, ["torch.float32"]),
    ("gt_boxes", torch.zeros(2, 7, 5), ValueError, ["(2, G, 4)"]),
    ("matched_idxs", matched_with(6, 1, 2), ValueError, ["got 6", "matched_idxs[1, 2]", "image 1 has"]),
]
BOXES = [
    ("decode_boxes", ("deltas", "anchors")),
    ("encode_boxes", ("boxes", "anchors")),
    ("paired_box_iou", ("boxes1", "boxes2")),
    ("delta_iou", ("pred_deltas", "target_deltas")),
]
BOX_BAD = [
    (None, TypeError, ["floating-point"]),
    ([1, 2, 3, 4], TypeError, ["list"]),
    (torch.zeros(3, 4, dtype=torch.int64), TypeError, ["torch.int64"]),
    (torch.zeros(3, 5), ValueError, ["(3, 5)"]),
    (torch.tensor(1.0), ValueError, ["()"]),
    (torch.zeros(1, 4), ValueError, ["(1, 4)"]),
    (torch.zeros(3, 4, device=META), ValueError, ["meta"]),
]


def case_id(case: Any) -> str | None:
    if isinstance(case, tuple) and len(case) == 4:
        return f"{case[0]}-{'-'.join(case[3])}".replace(" ", "_")[:60]
    return None


def check(function: Any, arguments: dict[str, Any], case: tuple, backend: str) -> None:
    name, bad, kind, texts = case
    with pytest.raises(kind) as caught:
        function(**({"backend": backend} | arguments | {name: bad}))
    message = str(caught.value)
    assert type(caught.value) is kind
    assert message.startswith(f"{function.__name__}: ")
    # Two arguments that do not fit together are reported on the second one, which the first text then names.
    named = texts[0].split("[")[0]
    assert (named if named in arguments else name) in message
    missing = [text for text in texts if text not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize("case", CLASSIFICATION + SIGMOID_ONLY, ids=case_id)
def test_sigmoid(case: tuple, backend: str) -> None:
    check(ik.iou_balanced_sigmoid_focal_loss, flat_arguments(), case, backend)


@pytest.mark.parametrize("case", CLASSIFICATION, ids=case_id)
def test_binary_cross_entropy(case: tuple, backend: str) -> None:
    check(ik.iou_balanced_binary_cross_entropy, flat_arguments(), case, backend)


@pytest.mark.parametrize("case", CLASSIFICATION + SOFTMAX_ONLY, ids=case_id)
def test_softmax(case: tuple, backend: str) -> None:
    check(ik.iou_balanced_cross_entropy, softmax_arguments(), case, backend)


@pytest.mark.parametrize("case", SMOOTH_L1, ids=case_id)
def test_smooth_l1(case: tuple, backend: str) -> None:
    check(ik.iou_balanced_smooth_l1_loss, box_arguments(), case, backend)


@pytest.mark.parametrize("case", DETECTION, ids=case_id)
def test_detection(case: tuple, backend: str) -> None:
    check(ik.iou_balanced_detection_loss, detection_arguments(), case, backend)


@pytest.mark.parametrize("case", LEVEL_MAPS, ids=case_id)
def test_level_maps(case: tuple, backend: str) -> None:
    check(ik.iou_balanced_detection_loss, detection_arguments(layout="nchw"), case, backend)


@pytest.mark.parametrize("case", PADDED, ids=case_id)
def test_padded_boxes(case: tuple, backend: str) -> None:
    check(ik.iou_balanced_detection_loss, detection_arguments(gt="padded"), case, backend)


@pytest.mark.parametrize("bad", BOX_BAD, ids=lambda b: "-".join(b[2]))
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(("function", "names"), BOXES)
def test_boxes(function: str, names: tuple, position: int, bad: tuple, backend: str) -> None:
    value, kind, texts = bad
    arguments = [torch.rand(3, 4), torch.rand(3, 4)]
    arguments[position] = value
    with pytest.raises(kind) as caught:
        getattr(ik, function)(*arguments, backend=backend)
    message = str(caught.value)
    assert function in message
    # A valid first argument of another shape or device is reported on the second one.
    swapped = position == 0 and texts[0] in ("(1, 4)", "meta")
    assert names[1 if swapped else position] in message
    if not swapped:
        assert all(text in message for text in texts), message


@pytest.mark.parametrize("function", ["decode_boxes", "encode_boxes", "delta_iou"])
@pytest.mark.parametrize(
    ("name", "bad", "kind"),
    [
        ("weights", (1, 1, 1), ValueError),
        ("weights", (1, 1, 1, -1), ValueError),
        ("weights", 2.0, TypeError),
        ("box_coder", "xyxy", ValueError),
    ],
)
def test_box_options(function: str, name: str, bad: Any, kind: type, backend: str) -> None:
    with pytest.raises(kind, match=f"{function}: {name}"):
        getattr(ik, function)(torch.rand(3, 4), torch.rand(3, 4), **{name: bad}, backend=backend)


def test_a17_index_valid_for_another_image_only(backend: str) -> None:
    d = testing.detection_inputs(0)
    boxes, labels = [d.gt_boxes[0][:1], d.gt_boxes[0]], [d.gt_labels[0][:1], d.gt_labels[0]]
    assert len(boxes[1]) > 1
    matched = torch.full_like(d.matched_idxs, -1)
    matched[1, 4] = 1
    ik.iou_balanced_detection_loss(d.cls_logits, d.bbox_deltas, d.anchors, matched, boxes, labels, backend=backend)
    matched[0, 6] = 1
    with pytest.raises(ValueError, match=r"got 1 at matched_idxs\[0, 6\].*image 0 has 1 boxes"):
        ik.iou_balanced_detection_loss(d.cls_logits, d.bbox_deltas, d.anchors, matched, boxes, labels, backend=backend)


@pytest.mark.parametrize("label", [-1, 3, 99])
def test_gt_label_outside_the_classes(label: int, backend: str) -> None:
    d = testing.detection_inputs(0)
    n, r = (d.matched_idxs >= 0).nonzero()[0].tolist()
    g = int(d.matched_idxs[n, r])
    d.gt_labels[n][g] = label
    text = rf"gt_labels must be classes from 0 to 2 .* got {label} at gt_labels\[{n}\]\[{g}\]"
    with pytest.raises(ValueError, match=text):
        ik.iou_balanced_detection_loss(*d.arguments(), backend=backend)


@pytest.mark.parametrize("ids", [-1, 3])
def test_scope_ids_outside(ids: int, backend: str) -> None:
    c = testing.classification_inputs(0, (4, 6))
    c.scope_ids[2, 5] = ids
    text = rf"scope_ids must be scopes from 0 to num_scopes - 1 = 2, got {ids} at scope_ids\[2, 5\]"
    with pytest.raises(ValueError, match=text):
        ik.iou_balanced_sigmoid_focal_loss(
            c.logits, c.labels, c.iou, scope_ids=c.scope_ids, num_scopes=3, backend=backend
        )


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_avg_factor_belongs_to_mean(reduction: str, backend: str) -> None:
    with pytest.raises(ValueError, match="avg_factor must be None unless reduction is 'mean'"):
        ik.iou_balanced_sigmoid_focal_loss(**flat_arguments(), reduction=reduction, avg_factor=2.0, backend=backend)


def test_inplace_refuses_expanded_logits(backend: str) -> None:
    c = flat_arguments() | {"logits": torch.zeros(64, 1).expand(64, 5)}
    with pytest.raises(ValueError, match="logits .*inplace=True"):
        ik.iou_balanced_sigmoid_focal_loss(**c, inplace=True, backend=backend)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: ik.analysis.bounded_iou("x"), TypeError, "bounded_iou: d"),
        (lambda: ik.analysis.bounded_iou(torch.zeros(2, dtype=torch.int64)), TypeError, "bounded_iou: d"),
        (lambda: ik.analysis.bounded_iou(0.1, "centre"), ValueError, "did you mean 'center'"),
        (lambda: ik.analysis.bounded_iou(0.1, ratio=0.0), ValueError, "ratio must be positive"),
        (lambda: ik.analysis.gradient_norm(0.1, lambda_=-1.0), ValueError, "gradient_norm: lambda_"),
        (lambda: ik.analysis.gradient_norm(0.1, beta=NAN), ValueError, "gradient_norm: beta"),
        (lambda: ik.calibrate_w_loc([]), ValueError, "calibrate_w_loc: pairs.*0 pairs"),
        (lambda: ik.calibrate_w_loc(None), TypeError, "calibrate_w_loc: pairs must be pairs .*None"),
        (lambda: ik.calibrate_w_loc(torch.zeros(2, 2, 4)), TypeError, "calibrate_w_loc: pairs must be pairs"),
        (lambda: ik.calibrate_w_loc([(torch.ones(2, 4), torch.ones(3, 4))]), ValueError, r"pairs\[0\] target_deltas"),
        (lambda: ik.calibrate_w_loc([(torch.ones(2, 5), torch.ones(2, 5))]), ValueError, r"pairs\[0\] pred_deltas"),
        (lambda: ik.calibrate_w_loc([(torch.ones(2, 4, device=META),) * 2]), ValueError, "with values"),
        (lambda: ik.calibrate_w_loc([torch.zeros(2, 4)]), TypeError, r"calibrate_w_loc: pairs\[0\]"),
        (lambda: ik.calibrate_w_loc([(torch.zeros(2, 4), None)]), TypeError, r"pairs\[0\] target_deltas"),
        (lambda: ik.calibrate_w_loc([(torch.ones(2, 4), torch.ones(2, 4))]), ValueError, "2 rows.*balanced loss 0"),
        (lambda: ik.calibrate_w_loc([(torch.full((1, 4), NAN), torch.ones(1, 4))]), ValueError, "nan"),
        (lambda: ik.calibrate_w_loc([], lambda_=-1), ValueError, "calibrate_w_loc: lambda_"),
        (lambda: ik.calibrate_w_loc([], lambda_=10**400), ValueError, "calibrate_w_loc: lambda_ must be finite"),
        (lambda: ik.IoUBalancedLoss(etaa=1.0), TypeError, "IoUBalancedLoss: .*'etaa'.*eta"),
    ],
)
def test_helpers(call: Any, kind: type, text: str) -> None:
    with pytest.raises(kind, match=text):
        call()


def test_bad_check_mode(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("IOUBAL_CHECK", "yes")
    with pytest.raises(ValueError, match="IOUBAL_CHECK must be one of 'auto', '0', '1', got 'yes'"):
        ik.iou_balanced_sigmoid_focal_loss(**flat_arguments(), backend=backend)


def test_nothing_is_changed_by_a_refused_call(backend: str) -> None:
    arguments = flat_arguments()
    before = {name: (t.clone(), t._version) for name, t in arguments.items()}
    with pytest.raises(ValueError, match="labels"):
        ik.iou_balanced_sigmoid_focal_loss(**(arguments | {"labels": labels_with(5)}), inplace=True, backend=backend)
    for name, (value, version) in before.items():
        assert torch.equal(arguments[name], value)
        assert arguments[name]._version == version
