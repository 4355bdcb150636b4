"""Compiles every Triton kernel for a GPU architecture, without a GPU, and reads what the machine code costs.

The launchers themselves choose the variants: they run on CPU tensors with a driver that only compiles. The figures are
held against triton_budget.json; `python tests/triton/aot.py --write` renews it, and its difference belongs into the
same commit as the change that is meant.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
BUDGET = Path(__file__).with_name("triton_budget.json")
CAPABILITIES = (80, 90, 100)
DTYPES = ("float32", "bfloat16", "float16")
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton-cache"))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import ioubal_kernels as ik  # noqa: E402
from ioubal_kernels import backends, testing  # noqa: E402
from ioubal_kernels.ops import autograd, library, with_triton  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


# What may differ from the operations that the source names: multiply-adds, products and sums that ptxas may contract
# into them (those with a rounding of their own it must not), approximate divisions, numbers flushed to 0; not ceil and
# floor, whose argument ends with "- 0.5", which leaves no number that small.
INEXACT = re.compile(
    r"(?<![\w.])(?:(?:fma|mad)\.\S*f(?:32|64)|(?:mul|add|sub|div)\.(?!rn\.f)\S*f(?:32|64)|(?!cvt\.r[pm]i)\S+\.ftz\S*)"
)
WIDE = re.compile(r"(?<![\w.])(ld|st)\.global\S*\.v(?:4\.b32|2\.b64|8\.b16)\b")
EXACT_KERNELS = ("match_",)  # what the names begin with of kernels whose results are compared for equality


class CompileOnly:
    """A driver for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def figures(cubin: bytes, ptx: str) -> dict[str, int]:
    """Registers, stack and local memory, which hold what is spilled, 16-byte accesses, float atomics, which there must
    be none of, and operations that may be rounded otherwise than written.

    Accesses are counted in PTX: ptxas neither joins nor splits them, and to disassemble takes as long as to compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [TOOLS / "cuobjdump", "-res-usage", file]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*\bLOCAL:(\d+)", usage).groups()
    wide = collections.Counter(WIDE.findall(ptx))
    return {
        "registers": int(registers),
        "stack": int(stack),
        "local": int(local),
        "wide_loads": wide["ld"],
        "wide_stores": wide["st"],
        "float_atomics": len(re.findall(r"\b(?:atom|red)\.\S*\.f(?:16|32|64)", ptx)),
        "inexact": len(INEXACT.findall(ptx)),
    }


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """What a training step and the other functions launch, by name; every kernel in every layout it has."""

    def detection(layout: str, levels: Any, classes: int = 80, **options: Any) -> None:
        inputs = testing.detection_inputs(
            images=2, classes=classes, per_location=9, levels=levels, layout=layout, dtype=dtype
        ).requiring_grad()
        out = ik.iou_balanced_detection_loss(*inputs.arguments(), backend="triton", **options)
        (out.classification + out.localization).backward()

    def flat(function: Any, classes: int, weighted: bool, reduction: str, offset: int = 0) -> None:
        rows = testing.classification_inputs(rows=200, classes=classes, softmax=True, dtype=dtype)
        rows.logits = testing.placed(rows.logits, offset)
        options: dict[str, Any] = {}
        if weighted:
            options = {"weight": rows.weight, "scope_ids": rows.scope_ids, "num_scopes": rows.num_scopes}
        x = rows.logits.requires_grad_()
        function(x, rows.labels, rows.iou, backend="triton", reduction=reduction, **options).sum().backward()

    def smooth_l1() -> None:
        pred, target = testing.delta_inputs(dtype=dtype)
        ik.iou_balanced_smooth_l1_loss(pred.requires_grad_(), target, backend="triton").backward()

    def boxes() -> None:
        pred, target = testing.delta_inputs(dtype=dtype)
        ik.decode_boxes(pred.requires_grad_(), target, backend="triton").sum().backward()
        ik.encode_boxes(pred.detach(), target, backend="triton")
        ik.paired_box_iou(pred.detach(), target, backend="triton")
        ik.delta_iou(pred.detach(), target, backend="triton")

    def in_place() -> None:
        rows = testing.classification_inputs(rows=200, classes=80, dtype=dtype)
        x = rows.logits.requires_grad_()
        ik.iou_balanced_sigmoid_focal_loss(x * 1, rows.labels, rows.iou, backend="triton", inplace=True).backward()

    def matching(padded: bool, rule: str, index: torch.dtype) -> None:
        d = testing.detection_inputs(images=2, per_location=9, levels=((16, 32),), dtype=dtype)
        gt = d.padded() if padded else d
        own = d.anchors.expand(2, -1, 4) if padded else d.anchors
        options = {"gt_labels": gt.gt_labels if padded else None, "dtype": index, "backend": "triton"}
        ik.match_anchors(own.to(dtype), gt.gt_boxes, **ik.MATCHING_RULES[rule], **options)
        ik.match_fovea(gt.gt_boxes, [(16, 32), (8, 16)], strides=(8, 16), scale_ranges=((1, 64), (32, 128)), **options)

    focal, softmax = ik.iou_balanced_sigmoid_focal_loss, ik.iou_balanced_cross_entropy
    wide, mixed = ((32, 64), (16, 32)), ((32, 64), (5, 7))

    def misaligned() -> None:
        """Logits and a gradient that lie differently, as a compiled call has them."""
        with mock.patch.object(autograd, "_empty_in_phase", torch.empty_like):
            flat(focal, 81, False, "mean", 1)

    yield "detection flat", lambda: detection("flat", wide)
    yield "detection nchw", lambda: detection("nchw", mixed)
    yield "detection nchw 91", lambda: detection("nchw", mixed, 91)  # of 16 bits, vectors of a single logit
    yield "detection channels_last 91", lambda: detection("channels_last", wide, 91, gamma=1.5, box_coder="fovea")
    yield "focal weighted", lambda: flat(focal, 80, True, "mean")
    yield "focal none", lambda: flat(focal, 80, False, "none")
    yield "focal misaligned", misaligned
    yield "cross entropy 81", lambda: flat(softmax, 81, True, "mean")
    yield "cross entropy 4096", lambda: flat(softmax, 4096, False, "none")
    yield "smooth L1", smooth_l1
    yield "boxes", boxes
    yield "in place", in_place
    yield "matching retinanet", lambda: matching(False, "retinanet", torch.int32)
    yield "matching ssd", lambda: matching(True, "ssd", torch.int64)
    yield "matching roi_heads", lambda: matching(False, "roi_heads", torch.int64)


# Cases that together launch every kernel; the others compile more variants of some.
CORE = (
    *("detection flat", "detection nchw", "focal weighted", "cross entropy 81", "smooth L1", "boxes", "in place"),
    "matching retinanet",
)


@functools.cache
def _take_cpu_tensors() -> None:
    """Registers the launchers for CPU tensors, which torch allows once."""
    for schema in library.SCHEMAS:
        name = schema.split(".")[0]
        library._library.impl(f"{name}.triton", with_triton._kernel(name), "CPU")


def compile_all(capability: int, dtypes: list[str], only: Container[str] | None = None) -> dict[str, dict[str, int]]:
    """Figures of every compiled kernel by "sm_90 bfloat16 case: kernel #n"."""
    triton.runtime.driver.set_active(CompileOnly(capability))
    found: dict[str, dict[str, int]] = {}
    seen: dict[str, Any] = {}
    renewed: set[JITFunction] = set()
    label = ""
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if self not in renewed:  # it keeps what an earlier call compiled, for another architecture
            self.device_caches.clear()
            renewed.add(self)
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel is not None and kernel.hash not in seen:
            seen[kernel.hash] = kernel
            name, n = self.__name__, 1
            while f"{label}: {name} #{n}" in found:
                n += 1
            found[f"{label}: {name} #{n}"] = figures(kernel.asm["cubin"], kernel.asm["ptx"])
        return kernel

    JITFunction.run = compile_only
    _take_cpu_tensors()
    row = backends._BACKENDS["triton"]
    backends._BACKENDS["triton"] = dataclasses.replace(row, device="cpu", unavailable=lambda: None)
    try:
        for dtype in dtypes:
            for name, case in cases(getattr(torch, dtype)):
                if only is None or name in only:
                    label = f"sm_{capability} {dtype} {name}"
                    case()
    finally:
        JITFunction.run = run
    return found


def breaches(found: dict[str, dict[str, int]], budget: dict[str, list[int]]) -> list[str]:
    """What is wrong, one line each. The budget holds [registers, wide loads, wide stores] per kernel."""
    wrong = []
    for name, got in found.items():
        for figure in ("stack", "local", "float_atomics"):
            if got[figure]:
                wrong.append(f"{name}: {figure} {got[figure]}")
        if got["inexact"] and name.split(": ")[1].startswith(EXACT_KERNELS):
            wrong.append(f"{name}: {got['inexact']} operations that are not rounded as written")
        if name not in budget:
            wrong.append(f"{name}: not in {BUDGET.name}")
            continue
        registers, loads, stores = budget[name]
        if got["registers"] > registers:
            wrong.append(f"{name}: {got['registers']} registers, {registers} allowed")
        if got["wide_loads"] < loads or got["wide_stores"] < stores:
            wrong.append(f"{name}: {got['wide_loads']} and {got['wide_stores']} wide accesses, not {loads}, {stores}")
    return wrong


def read_budget() -> dict[str, list[int]]:
    return json.loads(BUDGET.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, action="append", help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: all")
    parser.add_argument("--case", action="append", help="only these")
    parser.add_argument("--core", action="store_const", const=CORE, dest="case", help="few that launch every kernel")
    parser.add_argument("--write", action="store_true", help="renew the budget")
    options = parser.parse_args()
    found: dict[str, dict[str, int]] = {}
    for capability in options.capability or CAPABILITIES:
        for dtype in options.dtype or DTYPES:  # each by itself, as the tests run: a variant is listed once per run
            found |= compile_all(capability, [dtype], options.case)
    if not found:
        parser.error(f"no case is named {' or '.join(map(repr, options.case))}")
    for name, got in found.items():
        print(name, got, flush=True)
    if options.write:
        budget = read_budget() if BUDGET.exists() else {}
        budget |= {name: [got["registers"], got["wide_loads"], got["wide_stores"]] for name, got in found.items()}
        lines = [f"  {json.dumps(name)}: {json.dumps(budget[name])}" for name in sorted(budget)]
        BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        return 0
    wrong = breaches(found, read_budget())
    print("\n".join(wrong) or f"{len(found)} kernels within the budget")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
