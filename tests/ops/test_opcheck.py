"""torch.library.opcheck on every op: schema, fake, autograd registration, AOT dispatch; at least ten samples each."""

import pytest
import torch

from ioubal_kernels import testing, testing_matching
from ioubal_kernels.ops.library import SCHEMAS, op

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
W = [1.0, 1.0, 2.0, 2.0]


def sums(scopes=1):
    return torch.zeros(1 + scopes, 4, dtype=torch.float64)


def flat_samples(name):
    for i in range(10):
        dtype, rows = DTYPES[i % 4], (0, 1, 5, 33)[i // 3]
        softmax = name == "cross_entropy"
        inputs = testing.classification_inputs(seed=i, rows=rows, classes=3 + i, softmax=softmax, dtype=dtype)
        weight = inputs.weight if i % 2 else None
        scope_ids, scopes = (inputs.scope_ids, inputs.num_scopes) if i % 3 == 0 else (None, 1)
        avg = torch.tensor(3.0) if i % 4 == 1 else None
        if name == "smooth_l1":
            pred, target = testing.delta_inputs(seed=i, rows=rows, dtype=dtype)
            head = (pred, target, torch.rand(rows) if i % 2 else None, weight, scope_ids, scopes)
            parameters, loss_parameters = (1.5, 0.11, W, i % 2 == 0), (2.0, 0.0)
        else:
            head = (inputs.logits, inputs.labels, inputs.iou, weight, scope_ids, scopes)
            parameters = (1.5, 0.25, 2.0) if name == "focal" else (0, 1.5)
            loss_parameters = (0.0,)
        scaling = (avg, 0.0, 1.0, torch.tensor(2.0) if i % 5 == 0 else None, 1.0)
        x = head[0]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        loss = torch.empty((), dtype=wide)
        grads = [torch.empty_like(x)] if i % 3 else []
        each = torch.empty_like(x) if name == "focal" else torch.empty(x.shape[0], dtype=wide)
        request = False if name == "focal" else None
        yield f"{name}_sums", (*head, *parameters, sums(scopes), [])
        yield f"{name}_fill", (*head, *parameters, *loss_parameters, *scaling, True, sums(scopes), loss, grads, [])
        backward = (False, sums(scopes), torch.tensor(2.0, dtype=wide), torch.empty_like(x), [])
        yield f"{name}_backward", (*head, *parameters, *loss_parameters, *scaling, *backward)
        yield f"{name}_elementwise", (*head, *parameters, *loss_parameters, request, True, sums(scopes), each, [])


def detection_samples():
    for i in range(10):
        inputs = testing.detection_inputs(seed=i, dtype=DTYPES[i % 4], layout=testing.LAYOUTS[i % 3])
        inputs = inputs.padded() if i % 2 else inputs
        as_list = lambda t: [t] if isinstance(t, torch.Tensor) else list(t)  # noqa: E731
        logits, deltas = as_list(inputs.cls_logits), as_list(inputs.bbox_deltas)
        scope = i % 3
        scopes = (1, len(inputs.level_sizes), 2)[scope]
        head = (
            *(logits, deltas, inputs.anchors, inputs.matched_idxs, as_list(inputs.gt_boxes), as_list(inputs.gt_labels)),
            *(inputs.level_sizes, scope, 1.5, 0.25, 2.0, 1.5, 0.11, i % 2, W),
        )
        wide = torch.float64 if DTYPES[i % 4] == torch.float64 else torch.float32
        loss = (
            0.0,
            3.0,
            i % 2 == 0,
            1.0,
            torch.tensor([2.0, 3.0]) if i % 4 == 0 else None,
            0.0,
            None,
            4.0,
            1.0,
            None,
            1.0,
        )
        outputs = [
            torch.empty((), dtype=wide),
            torch.empty((), dtype=wide),
            torch.empty((), dtype=torch.int64),
            torch.empty(()),
        ]
        grad_logits, grad_deltas = [torch.empty_like(t) for t in logits], [torch.empty_like(t) for t in deltas]
        buffers = (grad_logits, grad_deltas) if i % 3 else ([], [])
        yield "detection_sums", (*head, sums(scopes), [])
        yield "detection_fill", (*head, *loss, True, sums(scopes), outputs, *buffers, [])
        seed = torch.ones((), dtype=wide)
        yield "detection_backward", (*head, *loss, False, sums(scopes), seed, 2 * seed, grad_logits, grad_deltas, [])


def box_samples():
    for i in range(10):
        dtype = DTYPES[i % 4]
        pred, target = testing.delta_inputs(seed=i, rows=(0, 1, 7, 30)[i // 3], dtype=dtype)
        corner = torch.tensor([0.0, 0.0, 5.0, 5.0], dtype=dtype)
        boxes, anchors = corner + pred, corner + target
        out = torch.empty(pred.shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        yield "decode_boxes", (pred, anchors, W, i % 2, out)
        yield "decode_boxes_backward", (torch.ones_like(out), pred, anchors, W, i % 2, torch.empty_like(pred))
        yield "rescale", ([pred.clone(), target.clone()], torch.tensor(2.0), None, float(i + 1))
        yield "encode_boxes", (boxes, anchors, W, i % 2, out)
        yield "paired_box_iou", (boxes, anchors, out[:, 0].contiguous())
        yield "delta_iou", (pred, target, W, i % 2, out[:, 0].contiguous())


def matching_samples():
    for i in range(10):
        case = testing_matching.matching_case(i, DTYPES[i % 4])
        anchors = case.anchors.nan_to_num()
        boxes = [testing_matching.padded_boxes(case.gt_boxes)] if i % 2 else case.gt_boxes
        labels = [torch.arange(b.numel() // 4).reshape(b.shape[:-1]) % 3 - 1 for b in boxes] if i % 3 else []
        images, index = len(case.gt_boxes), (torch.int32, torch.int64)[i // 2 % 2]
        flags = (case.options["allow_low_quality"], case.options["force_best"])
        out = torch.empty(images, anchors.shape[-2], dtype=index)
        yield "match_anchors", (anchors, boxes, labels, 0.5, 0.4, *flags, out, [])
        levels = ([4, 2], [5, i % 3], [16, 32], [1.0, 8.0], [64.0, 1e4])
        cells = torch.empty(images, 20 + 2 * (i % 3), dtype=index)
        yield "match_fovea", (boxes, labels, *levels, 0.4, cells)


def samples():
    found = {}
    generators = [flat_samples(name) for name in ("focal", "cross_entropy", "smooth_l1")]
    for generator in (*generators, detection_samples(), box_samples(), matching_samples()):
        for name, arguments in generator:
            found.setdefault(name, []).append(arguments)
    return found


SAMPLES = samples()


def test_every_op_has_samples():
    declared = {schema.split(".")[0] for schema in SCHEMAS}
    assert set(SAMPLES) == declared and all(len(rows) >= 10 for rows in SAMPLES.values())


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_opcheck(name):
    for arguments in SAMPLES[name]:
        results = torch.library.opcheck(op(name, "cpu"), arguments)
        assert set(results.values()) == {"SUCCESS"} and len(results) == 4
