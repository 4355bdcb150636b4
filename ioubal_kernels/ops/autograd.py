"""What the losses' autograd Functions share.

The gradient is written in the forward, for the expected grad_output. The context hands its buffer out once: the first
backward takes it (and corrects it if grad_output is not the expected one), any later backward computes a fresh one.
Under torch.compile the forward only reads and the backward computes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..validation import has_storage, is_transformed
from .library import op

_NO_FORWARD_MODE = "forward-mode AD is not supported by the fused kernels; use backend='reference'"
_NO_TRANSFORM = "torch.func transforms are not supported by the fused kernels; use backend='reference'"
_NO_EXPORT = (
    "torch.export keeps no gradient of the fused kernels; export the network without its loss, export under"
    " torch.no_grad(), or use backend='reference'"
)
_NO_DOUBLE_BACKWARD = "double backward is not supported by the fused kernels; use backend='reference'"
# Private in torch, so allowed to disappear: torch's own error takes over then.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


class _RefuseDoubleBackward(torch.autograd.Function):
    """Identity on a gradient whose own backward raises: a double backward is loud, never silently zero."""

    @staticmethod
    def forward(ctx: Any, name: str, grad: Tensor, *inputs: Tensor) -> Tensor:
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(f"{ctx.name}: {_NO_DOUBLE_BACKWARD}")


def guard_double_backward(
    name: str, grads: list[Tensor | None], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients themselves, or, when this backward is recorded (create_graph), wrapped to refuse the next one:
    towards the inputs, and towards the grad_output that each is proportional to (a loss's learned weight).
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grads
    return [
        None if g is None else _RefuseDoubleBackward.apply(name, g, x, grad_output)
        for g, x, grad_output in zip(grads, inputs, grad_outputs, strict=True)
    ]


def _refuse_export(name: str, inputs: Sequence[Tensor]) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise NotImplementedError(f"{name}: {_NO_EXPORT}")


def refuse_transforms(name: str, *inputs: Tensor, constants: Sequence[Tensor | None] = ()) -> None:
    """Raises NotImplementedError for an input that carries a tangent or belongs to a torch.func transform, and for one
    to be differentiated while torch.export traces: the exported program would silently leave its gradient out.
    ``constants`` carry no tangent that would matter.

    (A ``jvp`` on the Function would do for the first, but Dynamo refuses to trace one.)
    """
    if torch.compiler.is_compiling():
        if not torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting():
            _refuse_export(name, inputs)
        return
    if torch._C._are_functorch_transforms_active() and any(map(is_transformed, (*inputs, *constants))):
        raise NotImplementedError(f"{name}: {_NO_TRANSFORM}")
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(f"{name}: {_NO_FORWARD_MODE}")


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``, for inputs that `refuse_transforms` has let pass: without torch.func's part, 9 us of a call.

    (Function.apply asks what torch.func needs of it and then calls its base class, which records the node.)
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)


# empty_strided takes half of torch.empty's time, which parses a tuple of sizes slowly.


def scalars(dtypes: Sequence[torch.dtype], device: torch.device) -> tuple[Tensor, ...]:
    """Uninitialised 0-d tensors."""
    return tuple([torch.empty_strided((), (), dtype=dtype, device=device) for dtype in dtypes])


def sums_buffer(num_scopes: int, device: torch.device) -> Tensor:
    """The uninitialised tensor of sums of csrc/common/sums.h."""
    return torch.empty_strided((1 + num_scopes, 4), (4, 1), dtype=torch.float64, device=device)


def _empty_in_phase(x: Tensor) -> Tensor:
    """Memory like a dense x that begins as far into 16 bytes, so that a pass over both goes by vectors."""
    if torch.compiler.is_compiling() or not has_storage(x) or x.data_ptr() % 16 == 0:
        return torch.empty_like(x)
    before = x.data_ptr() % 16 // x.element_size()
    return x.new_empty(x.numel() + before).as_strided(x.shape, x.stride(), before)


def gradient_buffers(
    inputs: Sequence[Tensor], wanted: bool, inplace: bool = False, in_phase: bool = False
) -> list[Tensor]:
    """Buffers for the gradients of dense inputs, in their own layout: fresh ones, the inputs' storage, or none.

    ``in_phase``: of logits for the GPU kernels. On a CPU stores that are aligned are worth more, and the kernels set
    the deltas' gradient to 0 by aligned vectors.
    """
    if not wanted:
        return []
    if inplace:
        for x in inputs:
            torch.autograd.graph.increment_version(x)  # whoever else saved the logits must not trust them any more
        return [x.detach() for x in inputs]
    return [_empty_in_phase(x) if in_phase else torch.empty_like(x) for x in inputs]


def take_buffers(
    ctx: Any, inputs: Sequence[Tensor], name: str = "buffers", in_phase: bool = False
) -> tuple[list[Tensor], bool]:
    """The context's gradient buffers `name`, forgotten by it, and whether they are filled; later, fresh ones."""
    buffers = None if torch.compiler.is_compiling() else _handed_out(ctx, name)
    return (buffers, True) if buffers else (gradient_buffers(inputs, True, in_phase=in_phase), False)


def _handed_out(ctx: Any, name: str) -> list[Tensor] | None:
    """The context's buffers, for the first who asks: backwards of one graph may run in several threads."""
    return vars(ctx).pop(name, None)


Layout = tuple[tuple[int, ...], int]


def layouts_of(inputs: Sequence[Tensor]) -> list[Layout]:
    """Strides of dense inputs and how far into 16 bytes they begin; nothing under torch.compile, which keeps both."""
    if torch.compiler.is_compiling() or not all(map(has_storage, inputs)):
        return []
    return [(x.stride(), x.data_ptr() % 16) for x in inputs]


def laid_out(inputs: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Tensor]:
    """Saved inputs as they lay in the forward, whose buffers and workspace follow that. They may lie elsewhere where a
    hook on saved tensors kept them (torch.autograd.graph.save_on_cpu, for instance); then a copy is made.
    """
    found = list(inputs)
    addressed = not torch.compiler.is_compiling()  # compiled autograd has no addresses
    for i, (strides, phase) in enumerate(layouts):
        x = found[i]
        if (addressed and x.data_ptr() % 16 != phase) or x.stride() != strides:
            before = phase // x.element_size()
            found[i] = x.new_empty(x.numel() + before).as_strided(x.shape, strides, before).copy_(x)
    return found


def has_values(x: Tensor) -> bool:
    """Whether values may be read on the host: a CPU tensor, neither compiled nor traced (FakeTensor, make_fx)."""
    return x.is_cpu and has_storage(x) and not torch.compiler.is_compiling() and _dispatch_modes() == 0


def fills_checked(backend: str, process_group: Any, x: Tensor) -> bool:
    """Whether one op checks the values and fills: on the CPU, unless processes add up their sums in between."""
    return backend == "cpu" and process_group is None and has_values(x)


def raise_for(check: Callable[[], None]) -> NoReturn:
    """The error for a value that the op found out of range."""
    check()
    raise RuntimeError("a label or index was out of range and no longer is: it was changed during the call")


def is_expected(backend: str, grad_output: Tensor, grad_scale_tensor: Tensor | None, grad_scale: float) -> bool:
    """Whether a buffer filled for the expected grad_output is right as it is, where the host can tell. Elsewhere the
    backward op looks for itself.
    """
    if backend != "cpu" or not has_values(grad_output):
        return False
    return grad_output.item() == (grad_scale if grad_scale_tensor is None else grad_scale_tensor.item())


def rescale_inplace(
    name: str, ctx: Any, backend: str, grad_output: Tensor, grad_scale_tensor: Tensor | None, grad_scale: float
) -> list[Tensor]:
    """The backward of ``inplace=True``: the logits are gone, so the one buffer is scaled where it lies, if need be."""
    if torch.is_grad_enabled():  # create_graph: the buffer has no path to the logits that a guard could sit on
        raise NotImplementedError(f"{name}: {_NO_DOUBLE_BACKWARD}, without inplace=True")
    buffers = _handed_out(ctx, "buffers")
    if not buffers:
        raise RuntimeError(
            f"{name}: inplace=True allows one backward only: the gradient was written over the logits' storage and has"
            " been handed out; use inplace=False to call backward again"
        )
    # .data: the version was already raised when the logits were overwritten
    op("rescale", backend)([b.data for b in buffers], grad_output.detach(), grad_scale_tensor, grad_scale)
    return buffers


def tensor_or_number(value: Any) -> tuple[Tensor | None, float]:
    """A scalar argument as an op takes it: (contiguous float64 tensor, unused number) or (None, number; 0: none)."""
    if value is None:
        return None, 0.0
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64).contiguous(), 0.0
    return None, float(value)


def expected_grad_output(grad_scale: float | Tensor, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    """grad_scale as an op takes it, rounded to the losses' dtype: so is the grad_output that it must equal."""
    if isinstance(grad_scale, Tensor):
        return tensor_or_number(grad_scale.detach().to(dtype))
    # Compiled, nothing is prepared for it; 1.0 is what it nearly always is.
    if torch.compiler.is_compiling() or grad_scale == 1.0 or dtype == torch.float64:
        return None, float(grad_scale)
    return None, ctypes.c_float(grad_scale).value


def is_dense(x: Tensor) -> bool:
    """Whether the kernels can read x as it lies in memory: contiguous, or a channels_last map."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def check_inplace(name: str, logits: list[Tensor], grad_scale: float | Tensor) -> None:
    """ValueError for what in-place gradients cannot serve: logits that are not dense or share memory, a
    grad_scale of 0.
    """
    for x in logits:
        if not is_dense(x):
            raise ValueError(
                f"{name}: inplace=True needs logits that are contiguous (or channels_last maps),"
                f" got shape {tuple(x.shape)} with strides {x.stride()}"
            )
    if not torch.compiler.is_compiling() and all(map(has_storage, logits)):
        ends = 0
        for first, last in sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in logits if x.numel()):
            if first < ends:
                raise ValueError(f"{name}: inplace=True needs levels that share no memory: each has its own gradient")
            ends = last
    if not isinstance(grad_scale, Tensor) or has_values(grad_scale):
        value = float(grad_scale)
        if not math.isfinite(value) or abs(value) < torch.finfo(torch.float32).tiny:
            raise ValueError(
                f"{name}: inplace=True needs a grad_scale that is finite and != 0, got {value}: the gradient could not"
                " be scaled back"
            )
