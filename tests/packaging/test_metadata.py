"""What the project says of itself agrees everywhere, and the Makefile and the source distribution are complete."""

from __future__ import annotations

import re
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ["demo", "test", "test-slow", "build", "lint", "format", "bench-cpu", "cuda-code", "docs", "clean", "help"]
TARGETS += ["wheel", "wheel-matrix"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads(read("pyproject.toml"))


def version() -> str:
    from ioubal_kernels._version import __version__

    return __version__


def test_one_version_everywhere() -> None:
    import ioubal_kernels

    assert re.fullmatch(r"\d+\.\d+\.\d+", version())
    assert ioubal_kernels.__version__ == version()
    assert re.search(r"^version: (.+)$", read("CITATION.cff"), re.MULTILINE)[1] == version()
    assert re.search(r"^## \[(\d[^\]]*)\]", read("CHANGELOG.md"), re.MULTILINE)[1] == version()


def test_installed_version_is_this_one() -> None:
    try:
        installed = metadata.version("ioubal-kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("run from a checkout that is not installed")
    assert installed == version()


def test_dependencies(project: dict) -> None:
    """torch and numpy only, no upper bound; the build needs no torch; extras and entry point as documented."""
    assert project["project"]["dependencies"] == ["torch>=2.11", "numpy"]
    assert project["project"]["requires-python"] == ">=3.10"
    assert not [name for name in project["build-system"]["requires"] if name.startswith("torch")]
    extras = project["project"]["optional-dependencies"]
    assert set(extras) == {"train", "test", "lint", "docs"}
    assert not [name for name in extras["train"] if "<" in name or "==" in name]
    assert all("==" in name for name in extras["lint"])
    assert project["project"]["scripts"] == {"ioubal": "ioubal_kernels.cli:main"}


def test_constraints_pin_every_direct_dependency(project: dict) -> None:
    lines = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    pins: dict[str, set[str]] = {}
    for line in lines:
        name, exact = re.fullmatch(r"([\w.-]+)==([\w.]+)(?: ;.+)?", line).groups()
        pins.setdefault(name, set()).add(exact)
    assert pins["torch"] == {"2.11.0"} and pins["torchvision"] == {"0.26.0"}
    direct = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        direct += extra
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in direct}
    assert names <= set(pins)
    for requirement in project["project"]["optional-dependencies"]["lint"]:
        name, exact = requirement.split("==")
        assert pins[name] == {exact}


def test_every_folder_of_the_package_is_a_package() -> None:
    """find_packages leaves a folder without __init__.py out silently."""
    folders = {path.parent for path in (ROOT / "ioubal_kernels").rglob("*.py")}
    assert len(folders) > 1
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_instruction_set_flags_in_the_build() -> None:
    """The instruction set is chosen when the library runs: the build is the same on every machine and architecture."""
    for name in ("setup.py", "Makefile", "pyproject.toml"):
        assert not re.search(r"-m(?:arch|cpu|tune|avx|sse|fma|f16c|amx)", read(name)), name


def test_makefile_targets(building: ModuleType) -> None:
    makefile = read("Makefile")
    shown = building.run(["make", "help"], ROOT).stdout
    for target in TARGETS:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        assert re.search(rf"^  make {target} ", shown, re.MULTILINE), target
    for target in ("test", "test-slow", "lint"):
        assert re.search(rf"^make {target}$", read(".ci/run"), re.MULTILINE)


def test_existing_environment_that_lacks_packages(building: ModuleType, sources: Path, tmp_path: Path) -> None:
    """PYTHON= names what is missing and how to get it, before anything runs."""
    building.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare env"], tmp_path)
    python = tmp_path / "bare env" / "bin" / "python"
    done = building.run(["make", f"PYTHON={python}", "test"], sources, expect=2)
    assert re.search(r"^  torch>=2\.11 +not installed$", done.stderr, re.MULTILINE)
    assert re.search(r"^  pytest-xdist +not installed$", done.stderr, re.MULTILINE)
    assert f"'{python}' -m pip install -c constraints.txt" in done.stderr
    assert not (sources / ".venv").exists()


def test_source_distribution(building: ModuleType, sources: Path, tmp_path: Path) -> None:
    """Everything that is needed to build, test and read; nothing that was built."""
    (sources / "ioubal_kernels" / "_ioubal_cpu.so").write_bytes(b"leftover")
    (sources / "ioubal_kernels" / "_build_info.json").write_text("{}")
    building.run([sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path], sources)
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.name == f"ioubal_kernels-{version()}.tar.gz"
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    wanted = {"setup.py", "pyproject.toml", "Makefile", "constraints.txt", "tools/check_env.py", "bench/__init__.py"}
    wanted |= {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"}
    for folder in ("csrc", "ioubal_kernels", "tests"):
        files = [path.relative_to(sources).as_posix() for path in (sources / folder).rglob("*") if path.is_file()]
        wanted |= {name for name in files if not name.endswith((".so", ".pyc", "_build_info.json"))}
    assert wanted - names == set()
    assert [name for name in names if name.endswith((".so", ".o", ".pyc", "_build_info.json"))] == []
