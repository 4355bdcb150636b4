"""Real builds by pip in a copy of the checkout: complete, without a compiler, without torch, with a broken source."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow
PIP_WHEEL = [sys.executable, "-m", "pip", "wheel", "-v", ".", "--no-deps", "--no-build-isolation", "-w"]


def only_wheel(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def info_of(wheel: Path) -> dict:
    with zipfile.ZipFile(wheel) as opened:
        return json.loads(opened.read("ioubal_kernels/_build_info.json"))["cpu"]


def names_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())


@pytest.fixture(scope="module")
def wheel(building: ModuleType, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Object files of the checkout's own build save minutes; the build looks at their dates and flags as it always does.
    for objects in (building.ROOT / "build").glob("cpu-*"):
        shutil.copytree(objects, sources / "build" / objects.name)
    building.run([*PIP_WHEEL, folder], sources, IOUBAL_BUILD_CPU="1")
    return only_wheel(folder)


def test_wheel_has_the_library_and_one_tag_for_all_pythons(wheel: Path, sources: Path) -> None:
    version, python, abi, platform = wheel.stem.removeprefix("ioubal_kernels-").split("-")
    assert (python, abi) == ("py3", "none")
    assert platform != "any"
    names = names_of(wheel)
    assert "ioubal_kernels/_ioubal_cpu.so" in names
    assert info_of(wheel)["built"] is True and info_of(wheel)["reason"] is None
    modules = {path.relative_to(sources).as_posix() for path in (sources / "ioubal_kernels").rglob("*.py")}
    for folder in ("bench", "triton_kernels"):
        found = (sources / folder).rglob("*.py")
        modules |= {f"ioubal_kernels/{path.relative_to(sources).as_posix()}" for path in found}
    assert modules - names == set()
    assert not [name for name in names if name.startswith(("tests", "csrc", "tools"))]


SAME_NUMBERS = """
import hashlib, json, sys
import torch
import ioubal_kernels as ik
from ioubal_kernels import ops
assert ops.available("cpu"), ops.load_error("cpu")
generator = torch.Generator().manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    logits = torch.randn(2, 37, 5, generator=generator).to(dtype).requires_grad_()
    deltas = (torch.randn(2, 37, 4, generator=generator) / 4).to(dtype).requires_grad_()
    corner = torch.rand(37, 2, generator=generator) * 50
    anchors = torch.cat([corner, corner + 10 + torch.rand(37, 2, generator=generator) * 20], 1)
    matched = torch.randint(-2, 3, (2, 37), generator=generator)
    boxes = [anchors[:3] + 1, anchors[5:8] - 1]
    labels = [torch.tensor([0, 4, 2]), torch.tensor([1, 1, 3])]
    out = ik.iou_balanced_detection_loss(logits, deltas, anchors, matched, boxes, labels, backend="cpu")
    (out.classification + out.localization).backward()
    for tensor in (out.classification, out.localization, out.mean_iou, logits.grad, deltas.grad):
        digest.update(tensor.detach().double().numpy().tobytes())
json.dump(dict(digest=digest.hexdigest(), file=ik.__file__), open(sys.argv[1], "w"))
"""


def test_wheel_works_outside_the_checkout(building: ModuleType, wheel: Path, sources: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere it loads its library and computes bitwise what an in-place build of the same sources does."""
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "unpacked")
    building.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], sources, IOUBAL_BUILD_CPU="1")
    found = {}
    for place in (tmp_path / "unpacked", sources):
        out = tmp_path / "found.json"
        building.run([sys.executable, "-c", SAME_NUMBERS, out], tmp_path, PYTHONPATH=str(place))
        found[place] = json.loads(out.read_text())
        assert Path(found[place]["file"]).parent.parent == place
    first, second = (each["digest"] for each in found.values())
    assert first == second
    code = "import ioubal_kernels.bench as b; print(b.__file__)"
    shown = building.run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(tmp_path / "unpacked")).stdout
    assert Path(shown.strip()) == tmp_path / "unpacked" / "ioubal_kernels" / "bench" / "__init__.py"


def test_builds_are_incremental(building: ModuleType, wheel: Path, sources: Path) -> None:
    """Nothing compiles twice; a changed header compiles what includes it; a changed flag or removed file is noticed."""
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    building.run(build, sources, IOUBAL_BUILD_CPU="1")
    library = sources / "ioubal_kernels" / "_ioubal_cpu.so"
    before = library.stat().st_mtime_ns
    assert "up to date" in building.run(build, sources, IOUBAL_BUILD_CPU="1").stdout
    assert library.stat().st_mtime_ns == before
    os.utime(sources / "csrc" / "cpu" / "isa.cpp")
    count = len(list((sources / "csrc" / "cpu").glob("*.cpp")))
    assert f"1 of {count} sources compiled" in building.run(build, sources, IOUBAL_BUILD_CPU="1").stdout
    assert library.stat().st_mtime_ns > before


def test_without_a_compiler_the_wheel_is_pure_python(
    building: ModuleType, wheel: Path, sources: Path, tmp_path: Path
) -> None:
    """After a build with a compiler in the same folder: no leftover of it may get in."""
    done = building.run([*PIP_WHEEL, tmp_path], sources, CXX="/nonexistent")
    assert "NOTE: no CPU library: no C++ compiler found (CXX=/nonexistent)" in done.stdout + done.stderr
    pure = only_wheel(tmp_path)
    assert pure.name.endswith("-py3-none-any.whl")
    assert info_of(pure) == {"built": False, "reason": "no C++ compiler found (CXX=/nonexistent)"}
    assert names_of(wheel) - names_of(pure) == {"ioubal_kernels/_ioubal_cpu.so"}


def test_required_library_is_an_error(building: ModuleType, sources: Path, tmp_path: Path) -> None:
    done = building.run([*PIP_WHEEL, tmp_path], sources, expect=1, CXX="/nonexistent", IOUBAL_BUILD_CPU="1")
    assert "the CPU library cannot be built: no C++ compiler found (CXX=/nonexistent)" in done.stdout + done.stderr
    assert list(tmp_path.glob("*.whl")) == []
    done = building.run([*PIP_WHEEL, tmp_path], sources, expect=1, IOUBAL_BUILD_CPU="yes")
    assert "IOUBAL_BUILD_CPU: expected auto, 0 or 1, got 'yes'" in done.stdout + done.stderr


def test_source_that_does_not_compile(building: ModuleType, tmp_path: Path) -> None:
    """By default a pure-Python wheel whose reason quotes the compiler; required, an error that shows it."""
    sources = building.copy_sources(tmp_path / "checkout")
    shutil.rmtree(sources / "csrc" / "cpu")
    (sources / "csrc" / "cpu").mkdir()
    (sources / "csrc" / "cpu" / "broken.cpp").write_text("int broken() { return undeclared_name; }\n")
    building.run([*PIP_WHEEL, tmp_path / "auto"], sources)
    reason = info_of(only_wheel(tmp_path / "auto"))["reason"]
    assert reason.startswith("compiling csrc/cpu/broken.cpp failed: ") and "undeclared_name" in reason
    done = building.run([*PIP_WHEEL, tmp_path / "required"], sources, expect=1, IOUBAL_BUILD_CPU="1")
    assert "compiling csrc/cpu/broken.cpp failed" in done.stdout + done.stderr


def test_isolated_install_without_torch(building: ModuleType, sources: Path, tmp_path: Path) -> None:
    """`pip install .` as pip does it by default: a build environment with setuptools and nothing else."""
    building.run([sys.executable, "-m", "venv", tmp_path / "env"], tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    building.run([python, "-m", "pip", "install", "--no-deps", "."], sources)
    code = (
        "import json; from importlib import metadata\n"
        "dist = metadata.distribution('ioubal-kernels')\n"
        "info = json.loads(dist.locate_file('ioubal_kernels/_build_info.json').read_text())['cpu']\n"
        "wheel = dist.read_text('WHEEL')\n"
        "print(json.dumps(dict(info=info, wheel=wheel, version=dist.version)))"
    )
    found = json.loads(building.run([python, "-c", code], tmp_path).stdout)
    assert "Tag: py3-none-any" in found["wheel"]
    assert found["info"]["built"] is False and "torch was not installed" in found["info"]["reason"]


def test_editable_install_finds_bench_from_anywhere(
    building: ModuleType, wheel: Path, sources: Path, tmp_path: Path
) -> None:
    """`pip install -e .` maps ioubal_kernels.bench to bench/ and builds the library in place."""
    building.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    shown = building.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).stdout
    # torch and setuptools of this environment, after the new one's own packages.
    here = [path for path in sys.path if path.endswith("site-packages")]
    Path(shown.strip(), "borrowed.pth").write_text("\n".join(here) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python]
    building.run(
        [*pip, "install", "--no-deps", "--no-build-isolation", "--ignore-installed", "-e", "."],
        sources,
        IOUBAL_BUILD_CPU="1",
    )
    code = "import ioubal_kernels.bench as b, ioubal_kernels as k; print(b.__file__); print(k.__file__)"
    bench, package = building.run([python, "-c", code], tmp_path).stdout.split("\n")[:2]
    assert Path(bench) == sources / "bench" / "__init__.py"
    assert Path(package) == sources / "ioubal_kernels" / "__init__.py"
    assert (sources / "ioubal_kernels" / "_ioubal_cpu.so").exists()
