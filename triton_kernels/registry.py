"""Every op by the name of its schema (ioubal_kernels/ops/library.py)."""

from __future__ import annotations

from collections.abc import Callable

from . import detection, focal

OPS: dict[str, Callable[..., None]] = {
    name: getattr(module, name)
    for module, names in (
        (detection, ("detection_sums", "detection_fill", "detection_backward")),
        (focal, ("focal_sums", "focal_fill", "focal_backward", "focal_elementwise")),
    )
    for name in names
}
