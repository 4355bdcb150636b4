"""The modules: same results as the functions, keyword arguments kept through pickle, deepcopy and printing."""

import copy
import io
import pickle

import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels import testing

MODULES = [
    ik.IoUBalancedLoss,
    ik.IoUBalancedSigmoidFocalLoss,
    ik.IoUBalancedBinaryCrossEntropy,
    ik.IoUBalancedCrossEntropy,
    ik.IoUBalancedSmoothL1Loss,
]


def arguments(module: type) -> tuple:
    if module is ik.IoUBalancedLoss:
        return testing.detection_inputs(0).arguments()
    if module is ik.IoUBalancedSmoothL1Loss:
        return testing.delta_inputs(0)
    c = testing.classification_inputs(0, softmax=module is ik.IoUBalancedCrossEntropy)
    return c.logits, c.labels, c.iou


def losses(result: torch.Tensor | ik.DetectionLoss) -> list[float]:
    return [t.item() for t in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("module", MODULES)
def test_equals_the_function_and_survives_copies(module: type, backend: str) -> None:
    keywords = {"eps": 1e-3, "backend": backend, "avg_factor": 7.0}
    loss = module(**keywords)
    want = losses(module._function(*arguments(module), **keywords))
    buffer = io.BytesIO()
    torch.save(loss, buffer)
    buffer.seek(0)
    for other in (
        loss,
        copy.deepcopy(loss),
        pickle.loads(pickle.dumps(loss)),
        torch.load(buffer, weights_only=False),
    ):
        assert losses(other(*arguments(module))) == want
        assert other.state_dict() == {}
        assert other.keywords == loss.keywords


@pytest.mark.parametrize("module", MODULES)
def test_call_overrides(module: type) -> None:
    loss = module(avg_factor=7.0, backend="reference")
    seven, one = losses(loss(*arguments(module)))[0], losses(loss(*arguments(module), avg_factor=1.0))[0]
    assert one == pytest.approx(7 * seven)


def test_repr_shows_what_was_changed() -> None:
    assert repr(ik.IoUBalancedLoss()) == "IoUBalancedLoss()"
    text = repr(ik.IoUBalancedLoss(eta=1.0, process_group="world"))
    assert text == "IoUBalancedLoss(eta=1.0, process_group='world')"


def test_world_is_resolved_at_the_call() -> None:
    loss = pickle.loads(pickle.dumps(ik.IoUBalancedSigmoidFocalLoss(process_group="world")))
    assert loss.keywords["process_group"] == "world"
    with pytest.raises(ValueError, match="init_process_group"):
        loss(*arguments(ik.IoUBalancedSigmoidFocalLoss))


def test_weight_and_scopes_are_arguments_of_the_call() -> None:
    c = testing.classification_inputs(0)
    loss = ik.IoUBalancedSigmoidFocalLoss(num_scopes=3, backend="reference")
    got = loss(c.logits, c.labels, c.iou, weight=c.weight, scope_ids=c.scope_ids)
    want = ik.iou_balanced_sigmoid_focal_loss(
        c.logits, c.labels, c.iou, weight=c.weight, scope_ids=c.scope_ids, num_scopes=3, backend="reference"
    )
    assert got == want


def test_drop_in_for_torchs_smooth_l1(backend: str) -> None:
    pred, target = testing.delta_inputs(1)
    loss = ik.IoUBalancedSmoothL1Loss(lambda_=0.0, beta=1.0, reduction="sum", backend=backend)
    torch.testing.assert_close(loss(pred, target), torch.nn.SmoothL1Loss(reduction="sum")(pred, target))
