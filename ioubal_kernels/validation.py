"""Argument checks of the public functions. Each check costs a few comparisons; text is built only to raise.

Every message names the operation, the argument, what was expected and what was got. TypeError is for types and dtypes,
ValueError for shapes, devices and values. Nothing is broadcast, nothing is converted silently.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOAT_DTYPES = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))
INDEX_DTYPES = frozenset((torch.int32, torch.int64))
REDUCTIONS = ("mean", "sum", "none")
_CHECK_MODES = ("auto", "0", "1")
_WITH_VALUES = (Tensor, torch.nn.Parameter)
_in_functorch = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", None)  # private, so allowed to disappear
_STRIDED = torch.strided
_INFINITY = math.inf
_LARGEST = sys.float_info.max  # an int may be larger


# ---------------------------------------------------------------------------------------------- messages


def describe(value: object) -> str:
    """What was got, for an error message."""
    if isinstance(value, Tensor):
        shape = "nested" if value.is_nested else tuple(value.shape)
        text = f"a tensor of shape {shape}, {value.dtype}, on {value.device}"
        return text if value.layout is torch.strided else f"{text}, layout {value.layout}"
    if isinstance(value, (list, tuple)):
        inner = type(value[0]).__name__ if value else "nothing"
        return (
            f"a {type(value).__name__} of length {len(value)} ({inner} first)"
            if value
            else f"an empty {type(value).__name__}"
        )
    if value is None or isinstance(value, (str, numbers.Number)):
        return repr(value) if value is None else f"{value!r} ({type(value).__name__})"
    return f"a {type(value).__module__}.{type(value).__qualname__}"


def name_error(op: str, argument: str, allowed: Sequence[str], got: str) -> ValueError:
    """The error for a name that is none of the allowed ones; suggests the nearest."""
    near = difflib.get_close_matches(got, allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{op}: {argument} must be one of {', '.join(map(repr, allowed))}, got {got!r}{hint}")


def fail_value(op: str, argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{op}: {argument} must {expected}, got {describe(got)}")


def fail_type(op: str, argument: str, expected: str, got: object) -> NoReturn:
    raise TypeError(f"{op}: {argument} must {expected}, got {describe(got)}")


# ---------------------------------------------------------------------------------------------- tensors


def has_storage(value: Tensor) -> bool:
    """Whether a tensor has values of its own: a plain one or a subclass like torchvision's tv_tensors, but none that
    stands for another (FakeTensor and others that redefine __torch_dispatch__).
    """
    return type(value) in _WITH_VALUES or type(value).__torch_dispatch__ is Tensor.__torch_dispatch__


def is_transformed(value: Tensor | None) -> bool:
    """Whether a tensor belongs to a torch.func transform (vmap, grad and others)."""
    return value is not None and _in_functorch is not None and _in_functorch(value)


def _may_be_corners(value: Any) -> bool:
    """False for a torchvision BoundingBoxes that says its coordinates are others than x1 y1 x2 y2."""
    return type(value) in _WITH_VALUES or getattr(getattr(value, "format", None), "value", "XYXY") == "XYXY"


def tensor(op: str, argument: str, value: Any, dtypes: frozenset[torch.dtype]) -> None:
    """A dense tensor of one of the dtypes."""
    if not isinstance(value, Tensor):
        kind = "floating-point" if dtypes is FLOAT_DTYPES else "int32 or int64"
        fail_type(op, argument, f"be a {kind} tensor", value)
    if value.dtype not in dtypes:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        fail_type(op, argument, f"have dtype {names}", value)
    if value.layout is not torch.strided or value.is_nested:
        fail_type(op, argument, "be a dense strided tensor (not sparse, nested or mkldnn)", value)
    if not _may_be_corners(value):
        raise ValueError(
            f"{op}: {argument} must be boxes x1 y1 x2 y2, got BoundingBoxes of format {value.format.value}; convert"
            " them by torchvision.transforms.v2.functional.convert_bounding_box_format"
        )


def is_like(value: Any, dtypes: frozenset[torch.dtype], shape: Sequence[int] | None, device: torch.device) -> bool:
    """Whether `like` lets a value pass, of any shape if that is None: for callers whose argument's name is text to be
    put together, or who know several shapes."""
    return (
        isinstance(value, Tensor)
        and value.dtype in dtypes
        and value.layout is _STRIDED
        and not value.is_nested
        and (shape is None or value.shape == shape)
        and value.device == device
        and _may_be_corners(value)
    )


def like(
    op: str,
    argument: str,
    value: Any,
    dtypes: frozenset[torch.dtype],
    shape: Sequence[int],
    device: torch.device,
    of: str,
) -> None:
    """A tensor of exactly this shape, on the device of argument `of`."""
    if is_like(value, dtypes, shape, device):
        return
    tensor(op, argument, value, dtypes)
    if value.shape != shape:
        fail_value(op, argument, f"have shape {tuple(shape)} to match {of} (nothing is broadcast)", value)
    if value.device != device:
        fail_value(op, argument, f"be on {device} like {of}", value)


# ---------------------------------------------------------------------------------------------- numbers and names


def are_plain(*values: Any) -> bool:
    """Whether `number` with its default bounds lets every one of these pass at the first look: floats in [0, inf)."""
    for value in values:
        if not (type(value) is float and 0.0 <= value < _INFINITY):
            return False
    return True


def number(op: str, argument: str, value: Any, low: float = 0.0, high: float = math.inf) -> None:
    """A finite real number in [low, high]."""
    if type(value) is float and low <= value <= high and -math.inf < value < math.inf:
        return
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real))):
        fail_type(op, argument, "be a number", value)
    if not low <= value <= high or not -_LARGEST <= value <= _LARGEST:
        if high < math.inf:
            fail_value(op, argument, f"be between {low:g} and {high:g}", value)
        fail_value(op, argument, f"be finite and at least {low:g}" if low > -math.inf else "be finite", value)


def positive(op: str, argument: str, value: Any) -> None:
    """A finite real number above 0."""
    number(op, argument, value, -math.inf)
    if value <= 0:
        fail_value(op, argument, "be positive", value)


def choice(op: str, argument: str, value: Any, allowed: Sequence[str]) -> None:
    if not isinstance(value, str):
        fail_type(op, argument, f"be one of {', '.join(map(repr, allowed))}", value)
    if value not in allowed:
        raise name_error(op, argument, allowed, value)


def flag(op: str, argument: str, value: Any) -> None:
    if not isinstance(value, bool):
        fail_type(op, argument, "be True or False", value)


def integer(op: str, argument: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        fail_type(op, argument, "be an int", value)
    if value < low:
        fail_value(op, argument, f"be at least {low}", value)


def four_weights(op: str, argument: str, value: Any) -> None:
    """Four positive finite numbers: a box coder's weights."""
    if not isinstance(value, (tuple, list)):
        fail_type(op, argument, "be a tuple of four positive numbers", value)
    if len(value) != 4:
        fail_value(op, argument, "have four positive numbers", value)
    if are_plain(*value) and 0.0 not in value:
        return
    for i, weight in enumerate(value):
        positive(op, f"{argument}[{i}]", weight)


# --------------------------------------------------------------------------------------------- shared keyword arguments


def grad_scale(op: str, value: Any, device: torch.device) -> None:
    """A finite number or a 0-d float tensor."""
    if type(value) is float and -_INFINITY < value < _INFINITY:
        return
    if isinstance(value, Tensor):
        like(op, "grad_scale", value, FLOAT_DTYPES, (), value.device, "a scalar")
        if value.device != device:
            fail_value(op, "grad_scale", f"be on {device} like the logits or deltas", value)
        return
    number(op, "grad_scale", value, low=-math.inf)


def inplace(op: str, value: Any, argument: str, target: Tensor) -> None:
    """The flag, and that writing into `target` would hit each element once."""
    if value is False:
        return
    flag(op, "inplace", value)
    if any(stride == 0 and size > 1 for stride, size in zip(target.stride(), target.shape, strict=True)):
        fail_value(
            op, argument, "have one memory location per element with inplace=True (got an expanded tensor)", target
        )


def divisor(op: str, argument: str, value: Any, device: torch.device, images: int | None = None) -> None:
    """avg_factor: None, a positive finite number, a 0-d tensor, or, where `images` is given, a tensor (images,)."""
    if value is None:
        return
    if isinstance(value, Tensor):
        tensor(op, argument, value, FLOAT_DTYPES | INDEX_DTYPES)
        if value.ndim != 0 and (images is None or value.shape != (images,)):
            one = "be 0-d" if images is None else f"be 0-d or of shape ({images},), one divisor per image"
            fail_value(op, argument, one, value)
        if value.device != device:
            fail_value(op, argument, f"be on {device} like the logits or deltas", value)
        if values_checked(value) and not bool(((value > 0) & (value < math.inf)).all()):
            fail_value(
                op, argument, "be positive and finite", value.reshape(-1).tolist()[0] if value.ndim == 0 else value
            )
        return
    positive(op, argument, value)


def reduction(op: str, name: Any, avg_factor: Any, device: torch.device) -> None:
    """The reduction's name; avg_factor belongs to "mean" only."""
    if name == "mean":
        if avg_factor is not None:
            divisor(op, "avg_factor", avg_factor, device)
        return
    choice(op, "reduction", name, REDUCTIONS)
    if avg_factor is not None:
        raise ValueError(f"{op}: avg_factor must be None unless reduction is 'mean', got reduction={name!r}")


def scopes(op: str, ids: Any, num_scopes: Any, shape: Sequence[int], device: torch.device, of: str) -> None:
    """scope_ids of this shape and num_scopes: both or neither."""
    if ids is None:
        if num_scopes is not None:
            fail_value(op, "num_scopes", "be None without scope_ids", num_scopes)
        return
    like(op, "scope_ids", ids, INDEX_DTYPES, shape, device, of)
    if num_scopes is None:
        fail_value(op, "num_scopes", "be given with scope_ids (counting them would synchronise with the device)", None)
    integer(op, "num_scopes", num_scopes, 1)


# ---------------------------------------------------------------------------------------------- values


def environment(name: str, key: Any) -> str | None:
    """The environment variable `name` as it is now; `key` is what ``environment_key(name)`` returned."""
    if not torch.compiler.is_compiling():
        # For a variable that is not set, the usual case, os.environ.get raises and catches a KeyError: several us.
        kept = getattr(os.environ, "_data", None)
        if kept is not None and key not in kept:
            return None
    return os.environ.get(name)


def environment_key(name: str) -> Any:
    """What the dict inside os.environ calls a variable: bytes, or upper-case text on Windows."""
    return os.environ.encodekey(name) if hasattr(os.environ, "encodekey") else name


_CHECK_KEY = environment_key("IOUBAL_CHECK")


def values_checked(sample: Tensor) -> bool:
    """Whether label and index values are read: IOUBAL_CHECK=auto (on the CPU), 1 (on every device), 0; where there are
    values to read.
    """
    mode = environment("IOUBAL_CHECK", _CHECK_KEY)
    if mode is None or mode == "auto":
        if not sample.is_cpu:
            return False
    elif mode not in _CHECK_MODES:
        raise name_error("ioubal_kernels", "the environment variable IOUBAL_CHECK", _CHECK_MODES, mode)
    elif mode == "0":
        return False
    # None in torch.compile, on the meta device, in a subclass (FakeTensor, a tracer's proxy) and in torch.func.
    return (
        has_storage(sample) and not sample.is_meta and not torch.compiler.is_compiling() and not is_transformed(sample)
    )


def check_labels(op: str, argument: str, impl: Any, labels: Tensor, low: int | None, high: int, expected: str) -> None:
    """Raise for the first label outside [low, high); `low` None: no lower bound."""
    first = impl.check_labels(labels, high, torch.iinfo(labels.dtype).min if low is None else low)
    if first >= 0:
        where = coordinates(first, labels.shape)
        value = int(labels.reshape(-1)[first])
        raise ValueError(f"{op}: {argument} must be {expected}, got {value} at {argument}{where} ({describe(labels)})")


def check_matched_idxs(op: str, impl: Any, matched_idxs: Tensor, gt_labels: Any, num_classes: int) -> None:
    """Raise for the first index that names no box of its image, or a box whose label is no class."""
    first = impl.check_matched_idxs(matched_idxs, gt_labels, num_classes)
    if first < 0:
        return
    image, row = divmod(first, matched_idxs.shape[1])
    value = int(matched_idxs[image, row])
    labels = gt_labels[image]
    at = f"at matched_idxs[{image}, {row}] ({describe(matched_idxs)})"
    padded = isinstance(gt_labels, Tensor)
    boxes = int((labels != -1).sum()) if padded else labels.shape[0]
    if not 0 <= value < labels.shape[0] or (padded and int(labels[value]) == -1):
        raise ValueError(
            f"{op}: matched_idxs must be -1 (background), -2 (ignored) or the index of one of the image's boxes,"
            f" got {value} {at}; image {image} has {boxes} boxes"
        )
    raise ValueError(
        f"{op}: gt_labels must be classes from 0 to {num_classes - 1} where matched, got {int(labels[value])} at"
        f" gt_labels[{image}][{value}], matched {at}"
    )


def coordinates(flat: int, shape: Sequence[int]) -> str:
    """Index text such as [2, 17] of a flat position."""
    position = []
    for size in reversed(shape):
        flat, index = divmod(flat, size)
        position.append(index)
    return str(position[::-1])
