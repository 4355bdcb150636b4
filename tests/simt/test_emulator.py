"""The emulation of CUDA's execution model (simt.h) itself: right kernels run, every misuse is found."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
GXX = shutil.which("g++")
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-pthread", f"-I{HERE}"]

pytestmark = [
    pytest.mark.skipif(GXX is None, reason="needs g++"),
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
        reason="the emulation knows Linux on x86-64 and aarch64",
    ),
]


def compiled(target: Path, *arguments: object) -> Path:
    command = [GXX, *FLAGS, *map(str, arguments), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 and "cannot find -l" in done.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert done.returncode == 0, done.stderr
    return target


def run(program: Path, mode: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("IOUBAL_")}
    return subprocess.run([program, mode], env={**inherited, **environment}, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def selftest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Under the sanitizers that every kernel is to be run under."""
    return compiled(
        tmp_path_factory.mktemp("simt") / "selftest",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        HERE / "selftest.cpp",
    )


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = compiled(tmp_path_factory.mktemp("simt") / "raced", "-fsanitize=thread", HERE / "selftest.cpp")
    if "unexpected memory mapping" in run(program, "intrinsics").stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel")
    return program


@pytest.mark.parametrize(
    "mode",
    ["orders", "shuffled", "indices", "collectives", "intrinsics", "uninitialised_shared", "missing_barrier"],
)
def test_works(selftest: Path, mode: str) -> None:
    done = run(selftest, mode)
    assert done.returncode == 0 and not done.stdout, done.stderr


@pytest.mark.parametrize(
    ("mode", "messages"),
    [
        ("divergent_shuffle", ["divergence: warp 1", "lanes ffffffdf: wait in __shfl_xor_sync", "lanes 00000020"]),
        ("different_collectives", ["divergence: warp 0", "0000000f: wait in __ballot", "fffffff0: wait in __syncwarp"]),
        ("different_lines", ["divergence: warp 0", "lanes 0000000f: wait in __syncwarp (", "lanes fffffff0: wait in"]),
        ("foreign_mask", ["calls __syncwarp", "for lanes 0000ffff"]),
        ("exited_at_barrier", ["others have exited", "warp 1, lanes 00000100: exited"]),
        ("different_barriers", ["different barriers", "warp 0, lanes ffffffff: wait in __syncthreads"]),
        ("deadlock", ["divergence", "0000ffff: wait in __syncthreads", "ffff0000: wait in __syncwarp"]),
        ("endless_wait", ["runs for 1 s"]),
        ("global_overflow", ["AddressSanitizer: heap-buffer-overflow", "sum_kernel"]),
        ("misaligned_vector", ["misaligned address"]),
        ("misaligned_bytes", ["misaligned load of 16 bytes"]),
        ("shared_index", ["index 63 out of bounds"]),
        ("stack_overflow", ["AddressSanitizer: "]),
        ("big_block", ["invalid launch: a block of (1025,1,1)"]),
        ("big_block_3d", ["invalid launch: a block of (32,32,2)"]),
        ("empty_grid", ["invalid launch: a grid of (0,1,1)"]),
        ("big_grid", ["invalid launch: a grid of (2147483648,1,1)"]),
        ("launch_inside", ["a launch inside a kernel"]),
        ("outside", ["__syncthreads outside of a kernel"]),
    ],
)
def test_misuse_is_found(selftest: Path, mode: str, messages: list[str]) -> None:
    done = run(selftest, mode, IOUBAL_SIMT_TIMEOUT="1" if mode == "endless_wait" else "60")
    assert done.returncode != 0 and not done.stdout, done.stderr
    for message in messages:
        assert message in done.stderr, done.stderr


def test_thread_sanitizer_finds_races_within_a_block(raced: Path) -> None:
    clean = run(raced, "no_race")
    assert clean.returncode == 0, clean.stderr
    found = run(raced, "race")
    assert found.returncode != 0 and "data race" in found.stderr, found.stderr


def test_seed_of_the_environment(selftest: Path) -> None:
    for seed in ("0", "7", "123456789"):
        assert run(selftest, "collectives", IOUBAL_SIMT_SEED=seed).returncode == 0


def test_no_atomics_of_floating_point(tmp_path: Path) -> None:
    source = tmp_path / "sum.cpp"
    source.write_text('#include "simt.h"\nfloat add(float* p) { return atomicAdd(p, 1.f); }\n')
    done = subprocess.run([GXX, *FLAGS, "-fsyntax-only", source], capture_output=True, text=True)
    assert done.returncode != 0 and "no atomics of floating-point values" in done.stderr


def test_several_files_of_a_library_and_any_thread(tmp_path: Path) -> None:
    objects = [
        compiled(tmp_path / f"{part}.o", "-fPIC", "-c", f"-DPART={part}", HERE / "selftest_library.cpp")
        for part in ("first", "second")
    ]
    library = ctypes.CDLL(str(compiled(tmp_path / "library.so", "-shared", *objects)))

    def sums(number: int) -> bool:
        threads = 32 << number % 6
        out = (ctypes.c_double * 20)()
        (library.sum_first if number % 2 else library.sum_second)(out, len(out), threads)
        return all(value == threads * (threads - 1) / 2 for value in out)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(sums, range(40)))
    assert library.launches_first() == library.launches_second() == 40
