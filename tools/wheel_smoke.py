"""What an installed wheel must do under whatever Python and torch are there: run by tools/wheel_matrix.py in each.

    python -I tools/wheel_smoke.py     in an environment with torch, numpy and the wheel; nothing else is needed

Prints one line of JSON last: the versions found and the names of the checks that passed. Any failure is a traceback.
"""

from __future__ import annotations

import json
import pickle
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

import ioubal_kernels as ik
from ioubal_kernels import ops, testing

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_installed() -> None:
    """The package is the installed one, and its CPU library is loaded."""
    home = Path(ik.__file__).resolve()
    places = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    assert any(home.is_relative_to(place) for place in places), f"{home} does not lie in {sorted(map(str, places))}"
    assert ops.available("cpu"), ops.load_error("cpu")
    assert ik.available_backends()[0] == "cpu", ik.available_backends()


def check_detection_loss() -> None:
    """The fused loss and its gradients are the float64 reference's, in every dtype and layout."""
    for dtype in DTYPES:
        for layout in testing.LAYOUTS:
            inputs = testing.detection_inputs(seed=3, layout=layout, dtype=dtype).requiring_grad()
            wide = inputs.double().requiring_grad()
            got = ik.iou_balanced_detection_loss(*inputs.arguments(), backend="cpu")
            want = ik.iou_balanced_detection_loss(*wide.arguments(), backend="reference")
            assert int(got.num_positives) == int(want.num_positives) > 0
            for part in ("classification", "localization"):
                testing.assert_close_budget(getattr(got, part), getattr(want, part), dtype, "loss", what=part)
            (got.classification + got.localization).backward()
            (want.classification + want.localization).backward()
            for head, oracle in zip(inputs.heads(), wide.heads(), strict=True):
                testing.assert_close_budget(head.grad, oracle.grad, dtype, what=f"gradient, {layout}")


def check_flat_losses() -> None:
    for softmax in (False, True):
        loss = ik.iou_balanced_cross_entropy if softmax else ik.iou_balanced_sigmoid_focal_loss
        inputs = testing.classification_inputs(seed=4, softmax=softmax)
        x, wide = inputs.logits.requires_grad_(), inputs.logits.detach().double().requires_grad_()
        loss(x, inputs.labels, inputs.iou, backend="cpu").backward()
        loss(wide, inputs.labels, inputs.iou.double(), backend="reference").backward()
        # An element of the softmax's gradient is a difference of two numbers of the size of a row's largest element.
        floor = wide.grad.abs().amax(-1, keepdim=True) if softmax else testing.FLOOR
        testing.assert_close_budget(x.grad, wide.grad, torch.float32, floor=floor, what=loss.__name__)
    pred, target = testing.delta_inputs(seed=4)
    x, wide = pred.requires_grad_(), pred.detach().double().requires_grad_()
    ik.iou_balanced_smooth_l1_loss(x, target, backend="cpu").backward()
    ik.iou_balanced_smooth_l1_loss(wide, target.double(), backend="reference").backward()
    floor = wide.grad.abs().amax(-1, keepdim=True)
    testing.assert_close_budget(x.grad, wide.grad, torch.float32, floor=floor, what="smooth L1")


def check_matching() -> None:
    inputs = testing.detection_inputs(seed=5, levels=((16, 16), (8, 8)))
    got = ik.match_anchors(inputs.anchors, inputs.gt_boxes, backend="cpu")
    assert torch.equal(got, ik.match_anchors(inputs.anchors, inputs.gt_boxes, backend="reference"))
    assert bool((got >= 0).any()) and bool((got == ik.BACKGROUND).any())


def check_compile() -> None:
    """This torch traces the ops: without a graph break, with the eager gradients."""
    inputs = testing.detection_inputs(seed=6, layout="nchw").padded()
    eager, compiled = inputs.requiring_grad(), inputs.requiring_grad()
    module = ik.RetinaNetLoss(eta=1.5, lambda_=1.5)
    module = pickle.loads(pickle.dumps(module))

    def total(logits: list, deltas: list) -> torch.Tensor:
        out = module(logits, deltas, inputs.anchors, inputs.gt_boxes, inputs.gt_labels)
        return out.classification + out.localization

    total(eager.cls_logits, eager.bbox_deltas).backward()
    torch.compile(total, fullgraph=True, backend="aot_eager")(compiled.cls_logits, compiled.bbox_deltas).backward()
    for a, b in zip(compiled.heads(), eager.heads(), strict=True):
        assert torch.equal(a.grad, b.grad)


def check_doctor() -> None:
    """The console script runs on the base install and calls the library loaded."""
    program = Path(sys.executable).with_name("ioubal")
    shown = subprocess.run([str(program), "doctor"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert next(line for line in lines if line[:1] == ["torch"])[1] == torch.__version__, shown.stdout
    assert ["cpu", "available"] in lines, shown.stdout


CHECKS = (check_installed, check_detection_loss, check_flat_losses, check_matching, check_compile, check_doctor)


def main() -> None:
    for check in CHECKS:
        check()
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ioubal_kernels": ik.__version__,
        "cpu_isa": int(torch.ops.ioubal.cpu_isa(-1)),
        "checks": [check.__name__.removeprefix("check_") for check in CHECKS],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
