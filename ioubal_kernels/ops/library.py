"""The op schemas, their fakes, and the compiled libraries that implement them.

A schema is declared here once; a backend registers kernels for its overload of it: ``.cpp`` for the C++ libraries,
``.triton`` for the Triton kernels (with_triton.py). Ops are out-variants: Python allocates, the op fills every element.
Without a library the schemas still exist, so that imports and fake tensors work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FLAT = "Tensor x, Tensor labels, Tensor iou, Tensor? weight, Tensor? scope_ids, int num_scopes"
_BOXES = "Tensor pred, Tensor target, Tensor? iou, Tensor? weight, Tensor? scope_ids, int num_scopes"
# level_sizes: of flat heads whose sums are by level; else empty.
_DETECTION = (
    "Tensor[] logits, Tensor[] deltas, Tensor anchors, Tensor matched_idxs, Tensor[] gt_boxes, Tensor[] gt_labels,"
    " int[] level_sizes, int scope, float eta, float alpha, float gamma, float lambda_, float beta, int box_coder,"
    " float[] box_weights"
)
_GT = "Tensor[] gt_boxes, Tensor[] gt_labels"
# Divisor: a tensor, else a number > 0, else the count in the sums over the world size.
_DIVISOR = "Tensor? avg_factor, float divisor, float world_size"
_SCALE = "Tensor? grad_scale_tensor, float grad_scale"
_DETECTION_LOSS = (
    "float eps, float w_loc, bool normalize_loc, float cls_weight, Tensor? cls_avg_factor, float cls_divisor,"
    f" Tensor? loc_avg_factor, float loc_divisor, float world_size, {_SCALE}"
)
# What a kernel keeps between its launches and for the backward: one tensor by `workspace.py`, or none (CPU).
_SCRATCH = "Tensor(w!)[] workspace"
ISA_LEVELS = (0, 2, 4, 5, 6)  # instruction sets of the CPU kernels, see `limit_isa`
BEST_ISA = ISA_LEVELS[-1]  # a limit that limits nothing


def _flat_schemas(name: str, inputs: str, parameters: str, loss_parameters: str, elementwise: str) -> list[str]:
    return [
        f"{name}_sums.OVERLOAD({inputs}, {parameters}, Tensor(a!) sums, {_SCRATCH}) -> ()",
        f"{name}_fill.OVERLOAD({inputs}, {parameters}, {loss_parameters}, {_DIVISOR}, {_SCALE}, bool compute_sums,"
        f" Tensor(a!) sums, Tensor(b!) loss, Tensor(c!)[] grads, {_SCRATCH}) -> ()",
        f"{name}_backward.OVERLOAD({inputs}, {parameters}, {loss_parameters}, {_DIVISOR}, {_SCALE}, bool filled,"
        " Tensor sums, Tensor grad_output, Tensor(a!) grad, Tensor[] workspace) -> ()",
        f"{name}_elementwise.OVERLOAD({inputs}, {parameters}, {loss_parameters}, {elementwise}, bool compute_sums,"
        f" Tensor(a!) sums, Tensor(b!) out, {_SCRATCH}) -> ()",
    ]


SCHEMAS = [
    *_flat_schemas("focal", _FLAT, "float eta, float alpha, float gamma", "float eps", "bool gradient"),
    *_flat_schemas("cross_entropy", _FLAT, "int background, float eta", "float eps", "Tensor? grad_output"),
    *_flat_schemas(
        "smooth_l1",
        _BOXES,
        "float lambda_, float beta, float[] box_weights, bool normalize",
        "float w_loc, float eps",
        "Tensor? grad_output",
    ),
    f"detection_sums.OVERLOAD({_DETECTION}, Tensor(a!) sums, {_SCRATCH}) -> ()",
    f"detection_fill.OVERLOAD({_DETECTION}, {_DETECTION_LOSS}, bool compute_sums, Tensor(a!) sums,"
    f" Tensor(b!)[] outputs, Tensor(c!)[] grad_logits, Tensor(d!)[] grad_deltas, {_SCRATCH}) -> ()",
    f"detection_backward.OVERLOAD({_DETECTION}, {_DETECTION_LOSS}, bool filled, Tensor sums, Tensor? grad_cls,"
    " Tensor? grad_loc, Tensor(a!)[] grad_logits, Tensor(b!)[] grad_deltas, Tensor[] workspace) -> ()",
    "rescale.OVERLOAD(Tensor(a!)[] grads, Tensor grad_output, Tensor? grad_scale_tensor, float grad_scale) -> ()",
    "decode_boxes.OVERLOAD(Tensor deltas, Tensor anchors, float[] weights, int box_coder, Tensor(a!) out) -> ()",
    "decode_boxes_backward.OVERLOAD(Tensor grad_output, Tensor deltas, Tensor anchors, float[] weights, int box_coder,"
    " Tensor(a!) grad) -> ()",
    "encode_boxes.OVERLOAD(Tensor boxes, Tensor anchors, float[] weights, int box_coder, Tensor(a!) out) -> ()",
    "paired_box_iou.OVERLOAD(Tensor boxes1, Tensor boxes2, Tensor(a!) out) -> ()",
    "delta_iou.OVERLOAD(Tensor pred, Tensor target, float[] weights, int box_coder, Tensor(a!) out) -> ()",
    # Boxes: N tensors (G_i, 4), or one (N, G, 4) with NaN where there is none. Labels: alike, or no tensor; -1: no box.
    f"match_anchors.OVERLOAD(Tensor anchors, {_GT}, float high, float low, bool allow_low_quality, bool force_best,"
    f" Tensor(a!) matched_idxs, {_SCRATCH}) -> ()",
    f"match_fovea.OVERLOAD({_GT}, int[] heights, int[] widths, int[] strides, float[] min_sizes, float[] max_sizes,"
    " float sigma, Tensor(a!) matched_idxs) -> ()",
]
# On the CPU and outside torch.compile: a loss's check of values and fill in one call of few arguments, because passing
# each of them takes 0.5 us, most of a small call. What the lists hold is told at their C++ functions.
_PACKED = "(Tensor[] read, Tensor(a!)[] written, int[] integers, float[] numbers) -> int"
# Host-side helpers that read values: they return a number and have no fake.
VALUE_SCHEMAS = [
    f"focal_checked_fill.OVERLOAD{_PACKED}",
    f"cross_entropy_checked_fill.OVERLOAD{_PACKED}",
    f"detection_checked_fill.OVERLOAD{_PACKED}",
    "check_labels.OVERLOAD(Tensor labels, int num_classes, int min_label) -> int",
    "check_matched_idxs.OVERLOAD(Tensor matched_idxs, Tensor[] gt_labels, int num_classes) -> int",
]
# See choose_cuda_plan.
PLAN_SCHEMA = "cuda_plan.OVERLOAD(int iterations) -> ()"
# backend -> overload; the dispatch key tells the two libraries apart
OVERLOAD = {"cpu": "cpp", "cuda": "cpp", "triton": "triton"}
LIBRARIES = ("cpu", "cuda")  # backends that are compiled

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARY_FILES = {backend: _PACKAGE / f"_ioubal_{backend}.so" for backend in LIBRARIES}
_library = torch.library.Library("ioubal", "DEF")
_overloads: dict[tuple[str, str], Any] = {}  # an op never changes, so neither does what is found once


def _no_output(*args: Any) -> None:
    return None


def _define() -> None:
    for overload in sorted(set(OVERLOAD.values())):
        for schema in SCHEMAS:
            _library.define(schema.replace("OVERLOAD", overload))
            name = schema.split("(")[0].replace("OVERLOAD", overload)
            torch.library.register_fake(f"ioubal::{name}", _no_output, lib=_library)
    for schema in VALUE_SCHEMAS:
        _library.define(schema.replace("OVERLOAD", "cpp"))
    # Instruction set in use: 0 portable, 2 AVX2, 4 AVX-512, 5 AVX-512 with BF16, 6 Zen 5; a limit >= 0 caps it.
    _library.define("cpu_isa(int limit) -> int")
    # Logits of one scale from which on 16-bit ones are looked up in a table; negative: the default. Returns the number.
    _library.define("cpu_table(int entries) -> int")
    _library.define(PLAN_SCHEMA.replace("OVERLOAD", "cpp"))


def build_info() -> dict[str, Any]:
    """What the last build of this copy wrote about itself (setup.py), by backend; {} where none has run."""
    try:
        return json.loads((_PACKAGE / "_build_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _load(backend: str, file: Path) -> str | None:
    """Load one library; returns why it cannot be. Never raises: what is absent must not break the import."""
    if backend == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if not file.is_file():
        reason = build_info().get(backend, {}).get("reason")
        return f"the {backend.upper()} library {file.name} was not built" + (f": {reason}" if reason else "")
    try:
        torch.ops.load_library(str(file))
    except (OSError, RuntimeError) as error:
        return f"{file.name} does not load under torch {torch.__version__}: {error}"
    return None


_define()
_load_errors = {backend: _load(backend, file) for backend, file in _LIBRARY_FILES.items()}


def load_error(backend: str) -> str | None:
    """Why the backend's compiled library is absent; None when it is loaded."""
    return _load_errors[backend]


def available(backend: str) -> bool:
    """Whether the backend's kernels are loaded, which needs no GPU."""
    return _load_errors.get(backend, "") is None


def backend_of(x: Tensor) -> str:
    """The compiled library whose kernels take a tensor."""
    return "cuda" if x.is_cuda else "cpu"


def op(name: str, backend: str) -> Any:
    """The overload of an op that belongs to a backend."""
    if torch.compiler.is_compiling():
        return getattr(getattr(torch.ops.ioubal, name), OVERLOAD[backend])
    found = _overloads.get((name, backend))
    if found is None:
        found = _overloads[name, backend] = getattr(getattr(torch.ops.ioubal, name), OVERLOAD[backend])
    return found


def limit_isa(level: int) -> int:
    """Caps the CPU kernels' instruction set; returns the one in use.

    0 portable, 2 AVX2, 4 AVX-512, 5 AVX-512 BF16, 6 the same on Zen 5. For tests and benchmarks: the choice is the
    process's, and the best one is the default.
    """
    return torch.ops.ioubal.cpu_isa(level)


def isa_levels() -> list[int]:
    """The instruction sets that this CPU has, the plainest first. Leaves the best one selected."""
    best = limit_isa(BEST_ISA)
    return [level for level in ISA_LEVELS if level <= best]


def limit_table(entries: int) -> int:
    """From how many 16-bit logits of a scale on the CPU looks up their focal loss; negative: the default. For tests."""
    return torch.ops.ioubal.cpu_table(entries)


def choose_cuda_plan(iterations: int = -1) -> None:
    """Chooses how the focal loss's dense pass is launched on GPUs. For tests and measurements.

    Args:
        iterations: groups of 512 vectors of 16 bytes that a block takes, at most 8; negative: by rule.
    """
    torch.ops.ioubal.cuda_plan.cpp(iterations)


def cpu_variants(dtype: torch.dtype) -> Iterator[str]:
    """Selects each way in which this CPU can compute in this dtype, and names it. For tests."""
    for level in isa_levels():
        limit_isa(level)
        limit_table(-1)
        yield f"isa {level}"
        if dtype.itemsize == 2:
            limit_table(64)
            yield f"isa {level}, table"
    limit_table(-1)
