"""What works under torch's compilers and tracers: rows of the table in docs/transforms.md, see test_transforms.py."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import transform_cases
from torch import Tensor, nn
from transform_cases import NAMES, assert_same, each_loss, make

import ioubal_kernels as ik
from ioubal_kernels import backends

ROWS, row = transform_cases.table()
NO_INDUCTOR = pytest.mark.skipif(" " in torch.__file__, reason="inductor cannot link to a torch in a path with a space")


@row("torch.compile(fullgraph=True)", "works")
@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=[NO_INDUCTOR, pytest.mark.slow])))
@each_loss
def test_compile(name: str, backend: str) -> None:
    torch._dynamo.reset()
    case = make(name)
    leaves = case.fresh()
    value = torch.compile(case.loss, fullgraph=True, backend=backend)(*leaves, *case.rest)
    assert_same(value, torch.autograd.grad(value, leaves), case)


@row("torch.compile(dynamic=True)", "works")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "retinanet" else name for name in NAMES]
)
def test_compile_with_changing_sizes(name: str) -> None:
    """One compilation serves all sizes, from the first call of a process on."""
    torch._dynamo.reset()
    backends._chosen.clear()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(make(name).loss, fullgraph=True, dynamic=True, backend=counter)
    for number, rows in enumerate((30, 17, 41, 17, 30)):
        sized = make(name, rows=rows)
        leaves = sized.fresh()
        before = counter.frame_count
        value = compiled(*leaves, *sized.rest)
        assert_same(value, torch.autograd.grad(value, leaves), sized)
        assert (counter.frame_count > before) == (number == 0), f"{name} of {rows} rows"


@row("use_backend around a compiled function", "is not looked at")
def test_compiled_functions_keep_their_backend() -> None:
    torch._dynamo.reset()
    case = make("focal")
    compiled = torch.compile(case.loss, fullgraph=True, backend="eager")
    fused = compiled(*case.fresh(), *case.rest)
    with ik.use_backend("reference"):
        again = compiled(*case.fresh(), *case.rest)
        torch._dynamo.reset()
        reference = torch.compile(case.loss, fullgraph=True, backend="eager")(*case.fresh(), *case.rest)
    assert again.grad_fn.name() == fused.grad_fn.name() != reference.grad_fn.name()


@row("torch.compile, a number that changes", "works")
def test_compile_with_a_number_that_changes() -> None:
    """A Python number is a part of the program, for each value a new one; a 0-d tensor is an input."""
    torch._dynamo.reset()
    case = make("focal")
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    plain = case.of_leaves(*case.fresh())

    def loss(x: Tensor, grad_scale: float | Tensor, eta: float) -> Tensor:
        labels, iou = case.rest
        return ik.iou_balanced_sigmoid_focal_loss(x, labels, iou, grad_scale=grad_scale, eta=eta)

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for count, number in enumerate((1.5, 1.25, 1.0), 1):
        assert torch.isfinite(compiled(*case.fresh(), 1.0, number))
        assert counter.frame_count == count
    for number in (1.0, 2.0, 3.0):
        assert torch.equal(compiled(*case.fresh(), torch.tensor(number), 1.5), plain)
    assert counter.frame_count == 4


@row("compiled autograd", "works")
@each_loss
def test_compiled_autograd(name: str) -> None:
    torch._dynamo.reset()
    case = make(name)
    leaves = case.fresh()
    value = case.of_leaves(*leaves)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        value.backward()
    assert_same(value, [x.grad for x in leaves], case)


class Exported(nn.Module):
    def __init__(self, case: transform_cases.Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.case.loss(*tensors)


@row("torch.export", "raises NotImplementedError")
@each_loss
def test_export(name: str) -> None:
    """A program that silently leaves a gradient out is refused when it is made."""
    case = make(name)
    with pytest.raises(NotImplementedError, match="iou_balanced_.*: torch.export keeps no gradient"):
        torch.export.export(Exported(case), (*case.fresh(), *case.rest))


@row("torch.export under torch.no_grad()", "works")
@each_loss
def test_export_of_the_value(name: str) -> None:
    """The program has the op and its value."""
    case = make(name)
    leaves = case.fresh()
    with torch.no_grad():
        program = torch.export.export(Exported(case), (*leaves, *case.rest))
    assert any("ioubal" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*leaves, *case.rest), case.eager()[0], rtol=5e-7, atol=0.0)


@row('torch.export, backend="reference"', "works")
@each_loss
def test_export_of_the_reference(name: str) -> None:
    case = make(name, backend="reference")
    leaves = case.fresh()
    value = torch.export.export(Exported(case), (*leaves, *case.rest)).module()(*leaves, *case.rest)
    assert_same(value, torch.autograd.grad(value, leaves), case, exact=False)


@row("torch.jit.trace", "raises RuntimeError")
@each_loss
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace(name: str) -> None:
    case = make(name)
    with pytest.raises(RuntimeError, match=r"unsupported output type: int, from operator: ioubal::|unordered_map::at"):
        torch.jit.trace(case.loss, (*case.fresh(), *case.rest), check_trace=False)


@row("torch.jit.script", "raises NotSupportedError")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("module", (ik.IoUBalancedLoss, ik.RetinaNetLoss, ik.IoUBalancedSigmoidFocalLoss))
def test_jit_script(module: type[nn.Module]) -> None:
    with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only arguments with defaults"):
        torch.jit.script(module())


@row("CUDA graphs", "works")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; `make gpu-check` has more of it")
@each_loss
def test_cuda_graph(name: str) -> None:
    """Captured forward and backward, replayed on other data."""
    first, second = make(name), make(name, seed=2)
    leaves = tuple(x.cuda().detach().requires_grad_() for x in first.leaves)
    rest = tuple(x.cuda() for x in first.rest)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(first.loss(*leaves, *rest), leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = first.loss(*leaves, *rest)
        gradients = torch.autograd.grad(value, leaves)
    with torch.no_grad():
        for mine, other in zip((*leaves, *rest), (*second.leaves, *second.rest)):
            mine.copy_(other)
    graph.replay()
    fresh = tuple(x.detach().clone().requires_grad_() for x in leaves)
    want = first.loss(*fresh, *rest)
    assert torch.equal(value, want)
    for got, expected in zip(gradients, torch.autograd.grad(want, fresh)):
        assert torch.equal(got, expected)
