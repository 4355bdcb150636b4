"""The shared inputs and the error budget do what they say; above all, the budget can fail."""

import math

import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels import testing

F64 = torch.float64


@pytest.mark.parametrize(
    ("dtype", "kind", "factor", "passes"),
    [
        (torch.float32, "gradient", 7e-6, True),
        (torch.float32, "gradient", 9e-6, False),
        (torch.float32, "loss", 0.9e-6, True),
        (torch.float32, "loss", 1.1e-6, False),
        (torch.bfloat16, "gradient", 2.0**-8.5, True),
        (torch.bfloat16, "gradient", 2.0**-7.5, False),
        (torch.float16, "gradient", 2.0**-10.5, True),
        (torch.float16, "gradient", 2.0**-9.5, False),
        (torch.float64, "gradient", 0.9e-10, True),
        (torch.float64, "loss", 1.1e-10, False),
    ],
)
def test_budget(dtype: torch.dtype, kind: str, factor: float, passes: bool) -> None:
    want = torch.tensor([1.0, -3.0, 100.0], dtype=F64)
    got = want.clone()
    got[1] *= 1 + factor
    if passes:
        testing.assert_close_budget(got, want, dtype, kind)
        return
    with pytest.raises(AssertionError, match="flat index 1: got -3.0.* expected -3.0"):
        testing.assert_close_budget(got, want, dtype, kind, what="case")


SPECIAL = [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (math.inf, -math.inf), (0.0, 1e-20)]


@pytest.mark.parametrize(("got", "want"), SPECIAL)
def test_budget_on_special_values(got: float, want: float) -> None:
    same = torch.tensor([math.nan, math.inf, -math.inf, 0.0], dtype=F64)
    testing.assert_close_budget(same.float(), same, torch.float32)
    with pytest.raises(AssertionError):
        testing.assert_close_budget(torch.tensor([got]), torch.tensor([want], dtype=F64), torch.float32)


def test_budget_floor_subnormals_overflow_and_shape() -> None:
    tiny = torch.tensor([1e-31], dtype=F64)
    testing.assert_close_budget(tiny * (1 + 5e-5), tiny, torch.float32)
    testing.assert_close_budget(torch.tensor([1.0 + 1e-4]), torch.ones(1, dtype=F64), torch.float32, floor=100.0)
    step = 2.0**-24
    testing.assert_close_budget(torch.tensor([step]), torch.tensor([1.9 * step], dtype=F64), torch.float16)
    testing.assert_close_budget(torch.tensor([math.inf]), torch.tensor([70000.0], dtype=F64), torch.float16)
    with pytest.raises(AssertionError):
        testing.assert_close_budget(torch.tensor([math.inf]), torch.tensor([60000.0], dtype=F64), torch.float16)
    with pytest.raises(AssertionError, match=r"shape \(1,\) instead of \(2,\)"):
        testing.assert_close_budget(torch.zeros(1), torch.zeros(2, dtype=F64), torch.float32)


def test_detection_inputs_are_the_same_in_every_layout_and_dtype() -> None:
    flat = testing.detection_inputs(3)
    for layout in testing.LAYOUTS[1:]:
        other = testing.detection_inputs(3, layout=layout)
        assert torch.equal(testing.from_levels(other.cls_logits, 2), flat.cls_logits)
        assert torch.equal(testing.from_levels(other.bbox_deltas, 2), flat.bbox_deltas)
        expected = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert all(m.is_contiguous(memory_format=expected) for m in other.cls_logits)
        assert [m.stride() for m in other.requiring_grad().heads()] == [m.stride() for m in other.heads()]
    half = testing.detection_inputs(3, dtype=torch.bfloat16)
    assert torch.equal(half.cls_logits, flat.cls_logits.bfloat16())
    assert torch.equal(half.anchors, flat.anchors)
    assert torch.equal(half.double().cls_logits, half.cls_logits.double())
    padded = testing.detection_inputs(3, gt="padded")
    assert padded.gt_boxes.shape[:2] == padded.gt_labels.shape
    assert (padded.gt_labels == -1).any()


@pytest.mark.parametrize("box_coder", ["delta", "fovea"])
def test_detection_inputs_have_useful_positives(box_coder: str) -> None:
    d = testing.detection_inputs(4, levels=((20, 20),), box_coder=box_coder)
    loss = ik.iou_balanced_detection_loss(*d.arguments(), box_coder=box_coder, backend="reference")
    assert loss.num_positives.item() == int((d.matched_idxs >= 0).sum()) > 100
    assert 0.3 < loss.mean_iou.item() < 0.9
    assert (d.matched_idxs == -1).any()
    assert (d.matched_idxs == -2).any()


def test_other_memory_has_the_same_values() -> None:
    t = torch.arange(12.0).reshape(3, 4)
    views = dict(testing.same_values_other_memory(t))
    assert all(torch.equal(v, t) for v in views.values())
    assert views["offset3"].storage_offset() == 3
    assert not views["strided"].is_contiguous()
    assert not views["transposed"].is_contiguous()
