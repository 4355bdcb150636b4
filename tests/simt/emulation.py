"""The CUDA kernels and their launchers on the CPU: csrc/cuda compiled by g++ over simt.h into a library, and its ops in
place of the C++ library's, so that the public functions with backend="cpu" run the CUDA code.

``build`` compiles (cached in build/, safe from several processes), ``emulated`` installs. Flavours: plain, for any
process; asan, coverage and mutants for processes of their own, see ``environment``.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ioubal_kernels.ops import autograd, library, workspace

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
FOLDERS = ("cuda", "math", "common")  # of csrc: what the kernels are made of
TORCH = Path(torch.__file__).parent
NAME = "_ioubal_simt.so"
FLAVOUR = "IOUBAL_SIMT_FLAVOUR"  # environment: what build() without arguments builds
KEPT_SECONDS = 24 * 3600  # how long builds of other sources stay

FLAGS = (
    *("-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"),
    "-ffp-contract=off",  # for matching, as nvcc's --fmad=false
    *("-DIOUBAL_SIMT", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
)
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
FLAVOURS = {
    "plain": ("-O1", "-g0"),
    "asan": ("-O1", "-g1", *SANITIZERS),
    "coverage": ("-O0", "-g0", "--coverage", "-fprofile-abs-path"),
    "mutants": ("-O1", "-g0", "-include", "mutant.h"),
}


def compiler() -> list[str]:
    """The command of the C++ compiler, from CXX."""
    return shlex.split(os.environ.get("CXX") or "g++")


def unavailable() -> str | None:
    """Why the emulation cannot run here."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return "the emulation knows Linux on x86-64 and aarch64"
    if shutil.which(compiler()[0]) is None:
        return f"the emulation needs a C++ compiler: {compiler()[0]} is absent"
    return None


def _sources(csrc: Path) -> list[Path]:
    inside = [path for folder in FOLDERS for path in (csrc / folder).iterdir()]
    return sorted(inside) + sorted(path for path in HERE.iterdir() if path.suffix in (".h", ".cpp"))


def _identity(csrc: Path, flags: tuple[str, ...]) -> str:
    """A digest of all that the library depends on."""
    digest = hashlib.sha256()
    version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout
    for text in (*compiler(), version, torch.__version__, str(TORCH), *flags):
        digest.update(text.encode() + b"\0")
    for path in _sources(csrc):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-6000:]}")


def _compile(csrc: Path, flags: tuple[str, ...], folder: Path) -> None:
    include = [f"-I{csrc}", f"-I{HERE}", "-isystem", str(TORCH / "include")]
    sources = sorted((csrc / "cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
    sources.sort(key=lambda path: not path.stem.startswith("focal_fill_"))  # the longest first
    objects = [str(folder / f"{source.stem}.o") for source in (*sources, HERE / "hooks.cpp")]

    def one(source: Path, target: str) -> None:
        _run([*compiler(), "-x", "c++", *FLAGS, *flags, *include, "-c", str(source), "-o", target])

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(one, (*sources, HERE / "hooks.cpp"), objects))
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    _run([*compiler(), "-shared", "-pthread", *flags, *objects, *libraries, "-o", str(folder / "linking.so")])


@functools.cache
def build(flavour: str | None = None, csrc: Path = CSRC) -> Path:
    """The library of a flavour, compiled if its sources, flags or compiler are new."""
    flavour = flavour or os.environ.get(FLAVOUR) or "plain"
    flags = FLAVOURS[flavour]
    folder = ROOT / "build" / f"simt-{flavour}-{_identity(csrc, flags)}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be compiling the same: then wait for it
        if not (folder / NAME).is_file():
            _compile(csrc, flags, folder)
            os.replace(folder / "linking.so", folder / NAME)
    for other in (ROOT / "build").glob(f"simt-{flavour}-*"):
        if other != folder and time.time() - other.stat().st_mtime > KEPT_SECONDS:
            shutil.rmtree(other, ignore_errors=True)
    return folder / NAME


def environment(flavour: str) -> dict[str, str]:
    """For a process that is to load a library of this flavour: the sanitizers' runtimes come before all else."""
    result = {**os.environ, "OMP_NUM_THREADS": "1", FLAVOUR: flavour}
    if "-fsanitize=address,undefined" in FLAVOURS[flavour]:
        names = ("libasan.so", "libubsan.so")
        found = [
            subprocess.check_output([*compiler(), f"-print-file-name={name}"], text=True).strip() for name in names
        ]
        if not all(Path(path).is_file() for path in found):
            raise FileNotFoundError(f"the compiler has no sanitizers: {found}")
        result["LD_PRELOAD"] = " ".join(found)
        result["ASAN_OPTIONS"] = "detect_leaks=0:abort_on_error=0"
        result["UBSAN_OPTIONS"] = "print_stacktrace=1"
    return result


class Kernels:
    """A loaded library of emulated kernels."""

    def __init__(self, path: Path) -> None:
        for schema in library.SCHEMAS:
            name = schema.split("(")[0].replace("OVERLOAD", "simt")
            library._library.define(schema.replace("OVERLOAD", "simt"))
            torch.library.register_fake(f"ioubal::{name}", library._no_output, lib=library._library)
        library._library.define(library.PLAN_SCHEMA.replace("OVERLOAD", "simt"))
        torch.ops.load_library(str(path))
        self._symbols = ctypes.CDLL(str(path))
        self._symbols.simt_seed.argtypes = [ctypes.c_uint]
        self._symbols.simt_mutant.argtypes = [ctypes.c_int]
        self._symbols.simt_launches.restype = ctypes.c_ulong

    def seed(self, seed: int) -> None:
        """Draws the order of blocks, warps and lanes of all later launches."""
        self._symbols.simt_seed(seed)

    def mutant(self, number: int) -> None:
        """Chooses a wrong version of the kernels; 0: none."""
        self._symbols.simt_mutant(number)

    @property
    def launches(self) -> int:
        """Kernels launched so far."""
        return self._symbols.simt_launches()


@functools.cache
def load(path: Path) -> Kernels:
    """One library per process: its ops cannot be registered twice."""
    return Kernels(path)


def _filled(doubles: int, floats: int, device: torch.device) -> list[torch.Tensor]:
    """A workspace of bytes 0xff: NaN as float and double, and no index. What is read before it is written shows."""
    (tensor,) = _plain_workspace(doubles, floats, device)
    tensor.view(torch.uint8).fill_(0xFF)
    return [tensor]


_plain_workspace = workspace._tensor


@contextlib.contextmanager
def plan(iterations: int = -1) -> Iterator[None]:
    """As library.choose_cuda_plan, for the emulated kernels."""
    torch.ops.ioubal.cuda_plan.simt(iterations)
    try:
        yield
    finally:
        torch.ops.ioubal.cuda_plan.simt(-1)


@contextlib.contextmanager
def emulated(path: Path, seed: int = 0) -> Iterator[Kernels]:
    """Inside, the ops on CPU tensors are the CUDA kernels, in an order drawn from the seed.

    Memory is NaN before it is written: the workspace by a hook, outputs by torch's deterministic mode.
    """
    kernels = load(path)
    kernels.seed(seed)
    deterministic = torch.are_deterministic_algorithms_enabled()
    replaced = {
        (library, "backend_of"): lambda x: "simt",
        (library, "isa_levels"): lambda: [0],  # the emulated kernels know none: one pass
        (library, "limit_isa"): lambda level: 0,
        (library, "cpu_variants"): lambda dtype: ["emulated"],
        (workspace, "_tensor"): _filled,
        (autograd, "_empty_in_phase"): torch.empty_like,  # as compiled calls have it; in place covers the other one
    }
    saved = {key: getattr(*key) for key in replaced}
    library.OVERLOAD["simt"] = "simt"
    try:
        for (module, name), value in replaced.items():
            setattr(module, name, value)
        torch.use_deterministic_algorithms(True)
        yield kernels
    finally:
        torch.use_deterministic_algorithms(deterministic)
        for (module, name), value in saved.items():
            setattr(module, name, value)
        library.OVERLOAD.pop("simt", None)
