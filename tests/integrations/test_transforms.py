"""What works under torch's transforms and what raises: each row of the table in docs/transforms.md is a test here."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import transform_cases
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from transform_cases import assert_same, each_loss, make, refused

import ioubal_kernels as ik

DOCS = Path(__file__).parents[2] / "docs" / "transforms.md"
DENSE = ("detection", "retinanet")
ROWS, row = transform_cases.table()


# ---------------------------------------------------------------------------------------------- autograd


@row("activation checkpointing, use_reentrant=False", "works")
@each_loss
def test_checkpoint(name: str) -> None:
    case = make(name)
    leaves = case.fresh()
    value = checkpoint(case.of_leaves, *leaves, use_reentrant=False)
    assert_same(value, torch.autograd.grad(value, leaves), case)


@row("activation checkpointing, use_reentrant=True", "works")
@each_loss
def test_reentrant_checkpoint(name: str) -> None:
    case = make(name)
    leaves = case.fresh()
    value = checkpoint(case.of_leaves, *leaves, use_reentrant=True)
    value.backward()
    assert_same(value, [x.grad for x in leaves], case)


@row("saved_tensors_hooks, save_on_cpu", "works")
@each_loss
def test_saved_tensors_hooks(name: str) -> None:
    """What comes back may have other strides, as from ``save_on_cpu(pin_memory=True)``."""
    case = make(name)
    for unpacked in (Tensor.clone, Tensor.contiguous, lambda x: x.to(memory_format=torch.channels_last)):
        leaves, packed = case.fresh(), []

        def unpack(x: Tensor, change: Callable[[Tensor], Tensor] = unpacked) -> Tensor:
            return change(x.detach()) if x.ndim == 4 else x.detach().clone()

        def pack(x: Tensor, packed: list[Tensor] = packed) -> Tensor:
            packed.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            value = case.of_leaves(*leaves)
        assert packed
        gradients = torch.autograd.grad(value, leaves, torch.tensor(2.0))
        assert_same(value, [g / 2 for g in gradients], case)


@row("double backward", "raises NotImplementedError")
@each_loss
def test_double_backward(name: str) -> None:
    case = make(name)
    leaves = case.fresh()
    gradients = torch.autograd.grad(case.of_leaves(*leaves), leaves, create_graph=True)
    with refused(name, "double backward is"):
        sum(g.square().sum() for g in gradients).backward()


@row("double backward towards a weight of the loss", "raises NotImplementedError")
@each_loss
def test_double_backward_towards_a_weight(name: str) -> None:
    """The gradients are proportional to grad_output, which may depend on what is learned, as in GradNorm: no second
    backward goes that way, either. `torch.autograd.functional.jvp` takes it with no other in sight.
    """
    case = make(name)
    leaves = case.fresh()
    weight = torch.tensor(2.0, requires_grad=True)
    gradients = torch.autograd.grad(weight * case.of_leaves(*leaves), leaves, create_graph=True)
    with refused(name, "double backward is"):
        torch.autograd.grad(sum(g.norm() for g in gradients), weight)
    with refused(name, "double backward is"):
        torch.autograd.functional.jvp(case.of_leaves, case.leaves, tuple(torch.ones_like(x) for x in case.leaves))


@row('double backward, backend="reference"', "works")
@each_loss
def test_double_backward_of_the_reference(name: str) -> None:
    """Hessian times a direction against central differences of the gradient. With exponents of 0, so that no weight,
    which is a constant for autograd, moves with the inputs.
    """
    case = make(name, backend="reference", dtype=torch.float64, exponent=0.0)
    directions = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape) for x in case.leaves]
    leaves = case.fresh()
    gradients = torch.autograd.grad(case.of_leaves(*leaves), leaves, create_graph=True)
    product = sum((g * d).sum() for g, d in zip(gradients, directions))
    found = torch.autograd.grad(product, leaves)
    assert bool(found[0].abs().sum() > 0)  # of deltas beyond beta smooth L1 has none
    step = 1e-6
    sides = []
    for sign in (step, -step):
        moved = tuple((x + sign * d).requires_grad_() for x, d in zip(case.leaves, directions))
        sides.append(torch.autograd.grad(case.of_leaves(*moved), moved))
    for got, up, down in zip(found, *sides):
        want = (up - down) / (2 * step)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


@row("forward-mode AD", "raises NotImplementedError")
@each_loss
def test_forward_mode(name: str) -> None:
    case = make(name)
    with forward_ad.dual_level(), refused(name, "forward-mode AD is"):
        case.of_leaves(*(forward_ad.make_dual(x, torch.ones_like(x)) for x in case.leaves))


@row('forward-mode AD, backend="reference"', "works")
@each_loss
def test_forward_mode_of_the_reference(name: str) -> None:
    """The derivative along a direction is the gradient's product with it."""
    case = make(name, backend="reference", dtype=torch.float64)
    directions = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape) for x in case.leaves]
    with forward_ad.dual_level():
        value = case.of_leaves(*(forward_ad.make_dual(x, d) for x, d in zip(case.leaves, directions)))
        found = forward_ad.unpack_dual(value).tangent
    want = sum((g * d).sum() for g, d in zip(case.eager()[1], directions))
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


@row("is_grads_batched=True", "raises RuntimeError")
@each_loss
def test_batched_gradients(name: str) -> None:
    case = make(name)
    leaves = case.fresh()
    with pytest.raises(RuntimeError, match="Batching rule not implemented for aten::item"):
        torch.autograd.grad(case.of_leaves(*leaves), leaves, torch.ones(3), is_grads_batched=True)


@row("torch.autocast", "works")
@each_loss
def test_autocast(name: str) -> None:
    """The loss is computed in float32 whatever the region's dtype."""
    case = make(name)
    leaves = case.fresh()
    with torch.autocast("cpu", torch.bfloat16):
        value = case.of_leaves(*leaves)
    assert value.dtype is torch.float32
    assert_same(value, torch.autograd.grad(value, leaves), case)


@row("torch.no_grad, torch.inference_mode", "works")
@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
@each_loss
def test_without_gradients(name: str, mode: Callable) -> None:
    case = make(name)
    with mode():
        value = case.of_leaves(*case.fresh())
    assert not value.requires_grad
    torch.testing.assert_close(value.clone(), case.eager()[0], rtol=5e-7, atol=0.0)


# ---------------------------------------------------------------------------------------------- torch.func

TRANSFORMS = {
    "grad": lambda f, n: torch.func.grad(f, argnums=n),
    "vjp": lambda f, n: lambda *x: torch.func.vjp(f, *x)[1](torch.ones(())),
    "jacrev": lambda f, n: torch.func.jacrev(f, argnums=n),
}


def transformed(transform: str, case: transform_cases.Case) -> tuple[Tensor, ...]:
    positions = tuple(range(len(case.leaves)))
    return TRANSFORMS[transform](case.of_leaves, positions)(*case.leaves)


@row("torch.func.grad, vjp, jacrev", "raises NotImplementedError")
@pytest.mark.parametrize("transform", TRANSFORMS)
@each_loss
def test_func_gradients(name: str, transform: str) -> None:
    with refused(name, "torch.func transforms are"):
        transformed(transform, make(name))


@row('torch.func.grad, vjp, jacrev, backend="reference"', "works")
@pytest.mark.parametrize("transform", TRANSFORMS)
@each_loss
def test_func_gradients_of_the_reference(name: str, transform: str) -> None:
    case = make(name, backend="reference")
    for got, want in zip(transformed(transform, case), case.eager()[1]):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0.0)


@row("torch.func.jvp, jacfwd, hessian", "raises NotImplementedError")
@each_loss
def test_func_forward_mode(name: str) -> None:
    case = make(name)
    with refused(name, "torch.func transforms are"):
        torch.func.jvp(case.of_leaves, case.leaves, case.leaves)
    with refused(name, "torch.func transforms are"):
        torch.func.jacfwd(case.of_leaves)(*case.leaves)
    with refused(name, "torch.func transforms are"):
        torch.func.hessian(case.of_leaves)(*case.leaves)


@row("torch.vmap", "raises NotImplementedError")
@each_loss
def test_vmap(name: str) -> None:
    case = make(name)
    with refused(name, "torch.func transforms are"):
        torch.vmap(case.of_leaves)(*(torch.stack([x, x]) for x in case.leaves))


class Detector(nn.Module):
    """Two convolutions and the loss stage as a part of the module, the smallest whole of a training step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scores, self.offsets = nn.Conv2d(8, 2 * 3, 3, padding=1), nn.Conv2d(8, 2 * 4, 3, padding=1)
        self.loss = ik.RetinaNetLoss(eta=1.5, lambda_=1.5)

    def forward(self, maps: Tensor, anchors: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        out = self.loss([self.scores(maps)], [self.offsets(maps)], anchors, boxes, labels)
        return out.classification + out.localization


def detector_inputs(seed: int = 1, images: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = ik.testing.detection_inputs(seed=seed, images=images, levels=((4, 5),)).padded()
    g = torch.Generator().manual_seed(seed)
    return torch.randn(images, 8, 4, 5, generator=g), inputs.anchors, inputs.gt_boxes, inputs.gt_labels


def parameter_gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    model.zero_grad()
    model(*inputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys() and len(got) == 4
    for name, gradient in want.items():
        assert bool(gradient.abs().sum() > 0) and torch.equal(got[name], gradient), name


@row("torch.func.functional_call", "works")
def test_functional_call() -> None:
    model, inputs = Detector(), detector_inputs()
    want = parameter_gradients(model, inputs)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # the module's own are not used
    value = torch.func.functional_call(model, parameters, inputs)
    got = dict(zip(parameters, torch.autograd.grad(value, tuple(parameters.values()))))
    assert_equal_gradients(got, want)


# ---------------------------------------------------------------------------------------------- modules, threads


@row("pickle, copy.deepcopy, torch.save", "works")
@pytest.mark.parametrize("way", ("pickle", "deepcopy", "save"))
def test_copies_of_modules(way: str) -> None:
    model, inputs = Detector(), detector_inputs()
    model.loss = ik.RetinaNetLoss(eta=2.0, w_loc=3.0, process_group=None, high=0.6)
    want = parameter_gradients(model, inputs)
    if way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert other.loss.keywords == model.loss.keywords and repr(other) == repr(model)
    assert_equal_gradients(parameter_gradients(other, inputs), want)


@row("threads: forward and backward in each", "works")
@each_loss
def test_threads(name: str) -> None:
    """Eight threads at a time, each with data of its own; none sees another's gradient buffer."""
    cases = [make(name, seed=seed) for seed in range(8)]
    want = [case.eager() for case in cases]
    barrier = threading.Barrier(8)

    def work(case: transform_cases.Case) -> list:
        barrier.wait(timeout=60)
        return [case.eager() for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        for results, (value, gradients) in zip(pool.map(work, cases), want):
            for got_value, got in results:
                assert torch.equal(got_value, value)
                assert all(torch.equal(a, b) for a, b in zip(got, gradients))


@row("threads: backward in another thread", "works")
@each_loss
def test_backward_in_another_thread(name: str) -> None:
    case = make(name)
    leaves = case.fresh()
    value = case.of_leaves(*leaves)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(value.backward).result()
    assert_same(value, [x.grad for x in leaves], case)


@row("replicas in threads, as nn.DataParallel has them", "works")
def test_replicas_in_threads() -> None:
    """One module, its parameters shared by threads with a part of the batch each: the parts' losses, added, have the
    gradient of the parts one after another.
    """
    model = Detector()
    parts = [detector_inputs(seed) for seed in range(4)]
    model.zero_grad()
    sum(model(*part) for part in parts).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with ThreadPoolExecutor(4) as pool:
        values = list(pool.map(lambda part: model(*part), parts))
    sum(values).backward()
    for name, p in model.named_parameters():  # their sum's order is the threads'
        torch.testing.assert_close(p.grad, want[name], rtol=1e-5, atol=1e-6 * float(want[name].abs().max()))


# ---------------------------------------------------------------------------------------------- the table


def test_the_table_of_the_docs_is_these_rows() -> None:
    from test_transforms_compile import ROWS as COMPILED
    from test_transforms_processes import ROWS as IN_PROCESSES

    lines = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["what", "result", "notes"]
    found = [(what, result) for what, result, _ in cells[1:]]
    assert len(dict(found)) == len(found)  # no row twice
    assert dict(found) == {**ROWS, **COMPILED, **IN_PROCESSES}
