"""Which implementation runs: what exists here, the automatic choice for a device, and the ways to override it.

A backend is one row of ``_BACKENDS``. Its module offers the functions of ``reference`` with the same arguments. An
override is, in this order, the ``backend=`` argument, ``use_backend(name)``, the environment variable
``IOUBAL_BACKEND``; without one (or with ``"auto"``) the first available backend for the tensors' device is taken, and
``reference`` runs anywhere.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

import torch

from .validation import environment, environment_key, name_error

_BACKEND_KEY = environment_key("IOUBAL_BACKEND")
_BUILD_LINE = "pip install --no-build-isolation ."


@dataclass(frozen=True)
class Backend:
    """One row of the registry."""

    name: str
    load: Callable[[], ModuleType]  # imports its module at the first use
    device: str | None  # the device type it takes, None for any
    float64: bool
    unavailable: Callable[[], str | None]  # None when usable, else why not and what to do
    automatic: bool = True  # whether automatic choice may take it


def _load_ops() -> ModuleType:
    from . import ops

    return ops


def _load_triton() -> ModuleType:
    from .ops import with_triton

    return with_triton


def _load_reference() -> ModuleType:
    from . import reference

    return reference


def _library_reason(backend: str) -> str | None:
    """Why a compiled library is absent, and what to do."""
    try:
        reason = _load_ops().load_error(backend)
    except ImportError as error:
        reason = f"ioubal_kernels.ops cannot be imported ({error})"
    return None if reason is None else f"{reason}; build it with `{_BUILD_LINE}` in the source directory"


def _cpu_reason() -> str | None:
    return _library_reason("cpu")


def _cuda_reason() -> str | None:
    """The library loads without a GPU, which says that it is built; running it takes one."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build; install one that is, then `{_BUILD_LINE}`"
    reason = _library_reason("cuda")
    if reason is None and not torch.cuda.is_available():
        return (
            "built, but no GPU usable here: torch.cuda.is_available() is false (no NVIDIA GPU, or no driver for CUDA"
            f" {torch.version.cuda}); use backend='cpu' on CPU tensors"
        )
    return reason or _no_code_for_the_gpu()


def _no_code_for_the_gpu() -> str | None:
    built = _load_ops().library.build_info().get("cuda", {}).get("architectures", [])
    try:
        capability = torch.cuda.get_device_capability()
    except (RuntimeError, AssertionError) as error:
        return f"the GPU does not answer ({error})"
    if runs_on(built, capability):
        return None
    return (
        f"the library has code for {' '.join(built)} only, the GPU's compute capability is"
        f" {'.'.join(map(str, capability))}; build it with `{_BUILD_LINE}` in the source directory, without"
        " TORCH_CUDA_ARCH_LIST or with this GPU in it"
    )


def runs_on(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for these ("sm_80", "compute_90") runs there; True where it is not known what was built.

    Machine code serves its major version from its minor version on, "a" variants their own version only, PTX
    everything from its version on.
    """
    for name in architectures:
        kind, number = name.split("_")
        major, minor = divmod(int(number.rstrip("af")), 10)
        newer = capability >= (major, minor) if kind == "compute" else capability[0] == major and capability[1] >= minor
        if (capability == (major, minor)) if number.endswith("a") else newer:
            return True
    return not architectures


def _triton_reason() -> str | None:
    try:
        return _load_triton().unavailable()
    except ImportError as error:
        return f"ioubal_kernels.ops cannot be imported ({error})"


# Their answers are constants to torch.compile, which cannot trace what looks for files and GPUs; see _override.
_triton_reason._dynamo_marked_constant = _no_code_for_the_gpu._dynamo_marked_constant = True

# Triton's interpreter (TRITON_INTERPRET=1) runs the kernels on CPU tensors, slowly: for tests, so only by name.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

# Automatic choice goes through the rows in this order.
_BACKENDS = {
    row.name: row
    for row in (
        Backend("cpu", _load_ops, "cpu", True, _cpu_reason),
        Backend("cuda", _load_ops, "cuda", False, _cuda_reason),
        Backend("triton", _load_triton, "cpu" if _INTERPRETED else "cuda", False, _triton_reason, not _INTERPRETED),
        Backend("reference", _load_reference, None, True, lambda: None),
    )
}
BACKEND_NAMES = tuple(_BACKENDS)

_process_choice: str | None = None
_context_choice: contextvars.ContextVar[str | None] = contextvars.ContextVar("ioubal_backend", default=None)
_pending: list[
    use_backend
] = []  # process-wide choices, the latest last; one leaves when it is entered as a context manager
_PENDING_KEPT = 64
_warned: set[str] = set()
_lock = threading.Lock()
_chosen: dict[tuple[str | None, torch.device, bool], ModuleType] = {}


def available_backends() -> list[str]:
    """Names of the backends that can run here, in the order automatic choice prefers them."""
    return [row.name for row in _BACKENDS.values() if row.unavailable() is None]


def unavailable_reason(name: str) -> str | None:
    """Why a backend cannot run here and what to do, or None if it can. ValueError for an unknown name."""
    _check_name("unavailable_reason", "name", name)
    return _BACKENDS[name].unavailable()


class use_backend:
    """Choose the backend of every call that does not name one.

    ``use_backend("reference")`` holds for the whole process from now on; ``with use_backend("reference"):`` holds
    inside the block, for the current thread or task, and then restores what was before (for the moment between the
    two, the whole process sees it); ``@use_backend("reference")`` holds during the calls of a function. ``"auto"`` or
    None returns to the automatic choice.

    Raises ValueError for an unknown name, RuntimeError for a backend that is absent here (with the reason).
    """

    def __init__(self, name: str | None) -> None:
        if name is not None and name != "auto":
            _check_name("use_backend", "name", name)
            _usable_row("use_backend", name)
        self.name = "auto" if name is None else name
        self._tokens: list[contextvars.Token[str | None]] = []
        with _lock:
            _pending.append(self)
            del _pending[:-_PENDING_KEPT]
            _apply_pending()

    def _leave_process(self) -> None:
        with _lock:
            if self in _pending:
                _pending.remove(self)
                _apply_pending()

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self._leave_process()
        later = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction, inspect.isclass)
        if any(kind(function) for kind in later):
            raise TypeError(
                "use_backend: function must be a plain function, whose body runs while it is called, got"
                f" {function!r}; there, `with use_backend(...):` inside the body"
            )

        @functools.wraps(function)
        def chosen(*args: Any, **kwargs: Any) -> Any:
            token = _context_choice.set(self.name)
            try:
                return function(*args, **kwargs)
            finally:
                _context_choice.reset(token)

        return chosen

    def __enter__(self) -> use_backend:
        self._leave_process()  # the choice moves from the process to this context
        self._tokens.append(_context_choice.set(self.name))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _context_choice.reset(self._tokens.pop())


def _apply_pending() -> None:
    global _process_choice
    _process_choice = _pending[-1].name if _pending else None


def _override() -> str | None:
    """The name in force for calls that give none."""
    return _context_choice.get() or _process_choice or environment("IOUBAL_BACKEND", _BACKEND_KEY) or None


# torch.compile cannot trace a context variable: it takes the answer at trace time as a constant. This is what
# torch.compiler.assume_constant_result sets, without importing the whole compiler with this package.
_override._dynamo_marked_constant = True


def choose(op: str, backend: str | None, device: torch.device, float64: bool) -> ModuleType:
    """The module that runs `op` on tensors of this device. float64: a tensor to be differentiated is float64.

    Raises ValueError for an unknown name or a backend of another device, TypeError for float64 where the named backend
    has none, RuntimeError for an absent backend.
    """
    name = backend
    if name is None:
        name = _override()
    if name == "auto":
        name = None
    # What torch.compile traces does not use the table: it would be traced again once that has changed.
    module = None if torch.compiler.is_compiling() else _chosen.get((name, device, float64))
    return module if module is not None else _resolve(op, name, backend is not None, device, float64)


def _resolve(op: str, name: str | None, is_argument: bool, device: torch.device, float64: bool) -> ModuleType:
    if name is None:
        row = _automatic(device.type, float64)
    else:
        origin = "backend" if is_argument else "backend (chosen by use_backend or IOUBAL_BACKEND)"
        _check_name(op, origin, name)
        row = _BACKENDS[name]
        if row.device is not None and row.device != device.type:
            raise ValueError(f"{op}: {origin} {name!r} takes {row.device} tensors, got tensors on {device}")
        if float64 and not row.float64:
            raise TypeError(f"{op}: {origin} {name!r} has no float64; use backend='reference' or float32 tensors")
        _usable_row(op, name)
    module = row.load()
    if not torch.compiler.is_compiling() and (name is not None or not _warning_due(row, device.type)):
        _chosen[name, device, float64] = module
    return module


def _automatic(device_type: str, float64: bool) -> Backend:
    reasons = []
    for row in _BACKENDS.values():
        if row.device not in (None, device_type) or (float64 and not row.float64) or not row.automatic:
            continue
        reason = row.unavailable()
        if reason is None:
            if reasons and row.device is None:
                _warn_fallback(device_type, reasons)
            return row
        reasons.append(f"{row.name}: {reason}")
    raise RuntimeError(f"no backend takes {device_type} tensors")  # not reached: reference takes every device


def _warn_fallback(device_type: str, reasons: list[str]) -> None:
    """Say once per device type and process why the slow path runs; never while torch.compile traces."""
    if torch.compiler.is_compiling():
        return
    with _lock:
        if device_type in _warned:
            return
        _warned.add(device_type)
    warnings.warn(
        f"ioubal_kernels runs its slow reference backend on {device_type} tensors ({'; '.join(reasons)})",
        RuntimeWarning,
        stacklevel=6,
    )


def _warning_due(row: Backend, device_type: str) -> bool:
    """Whether automatic choice fell back to the reference without having said so yet."""
    return row.device is None and device_type in ("cpu", "cuda") and device_type not in _warned


def _check_name(op: str, argument: str, name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{op}: {argument} must be a string or None, got {type(name).__name__}")
    if name not in _BACKENDS:
        raise name_error(op, argument, BACKEND_NAMES, name)


def _usable_row(op: str, name: str) -> Backend:
    reason = _BACKENDS[name].unavailable()
    if reason is not None:
        raise RuntimeError(f"{op}: backend {name!r} is not available: {reason}")
    return _BACKENDS[name]
