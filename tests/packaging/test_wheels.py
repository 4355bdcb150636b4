"""The wheel's build and audit, the matrix of Pythons and torch versions, and the workflow files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


# ---------------------------------------------------------------------------------------------- the matrix


@pytest.fixture
def fake_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH and a pyenv folder of our own; programs that answer as an interpreter of their version would."""

    def program(path: Path, answer: str, status: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho '{answer}'\nexit {status}\n")
        path.chmod(0o755)

    program(tmp_path / "bin" / "python3.10", "3.10")
    program(tmp_path / "bin" / "python3.11", "pyenv: python3.11: command not found", 127)  # a shim not selected
    program(tmp_path / "pyenv" / "versions" / "3.11.9" / "bin" / "python", "3.11")
    program(tmp_path / "pyenv" / "versions" / "3.13.1" / "bin" / "python", "3.12")  # a folder that lies
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    return tmp_path


def test_interpreters_are_found(wheel_matrix: ModuleType, fake_pythons: Path) -> None:
    assert wheel_matrix.find_python("3.10") == str(fake_pythons / "bin" / "python3.10")
    assert wheel_matrix.find_python("3.11") == str(fake_pythons / "pyenv" / "versions" / "3.11.9" / "bin" / "python")
    assert wheel_matrix.find_python("3.13") is None
    assert wheel_matrix.find_python("3.99") is None


@pytest.fixture
def matrix(wheel_matrix: ModuleType, tmp_path: Path):
    wheel = tmp_path / "ioubal_kernels-0.1.0-py3-none-manylinux_2_28_x86_64.whl"
    wheel.write_bytes(b"")
    return wheel_matrix.Matrix(wheel, tmp_path / "work", None)


def test_a_cell_without_its_python_is_not_run(wheel_matrix: ModuleType, matrix, tmp_path: Path) -> None:
    cell = wheel_matrix.Cell("3.99", "2.11")
    matrix.try_cell(cell)
    assert cell.result == "not run" and "no Python 3.99" in cell.reason and cell.found == {}
    assert wheel_matrix.verdict([cell], strict=False) == 1  # nothing passed


@pytest.mark.parametrize(
    "failing, output, result, reason",
    (
        ("torch==9.99.*", "ERROR: No matching distribution found for torch==9.99.*", "not run", "torch has no build"),
        ("torch==9.99.*", "ERROR: connection reset", "not run", "connection reset"),
        (".whl", "ERROR: not a supported wheel on this platform", "failed", "the wheel does not install"),
        ("wheel_smoke.py", "AssertionError: gradient", "failed", "AssertionError: gradient"),
        (None, '{"python": "3.11.7", "torch": "9.99.0"}', "passed", ""),
    ),
)
def test_what_fails_decides_the_result(
    wheel_matrix: ModuleType, matrix, monkeypatch, failing: str | None, output: str, result: str, reason: str
) -> None:
    """A wheel that does not install or compute has failed; what is not there to be tried is not run."""
    commands = []

    def run(command: list, cwd: Path) -> subprocess.CompletedProcess:
        text = " ".join(map(str, command))
        commands.append(text)
        if "-m venv" in text:
            (matrix.env / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
        if failing is not None and failing in text:
            return subprocess.CompletedProcess(command, 1, "", output)
        if "metadata.requires" in text:
            listed = ["sympy>=1.13", "nvidia-cudnn-cu13==9.1", "cuda-toolkit[cublas]==13.0.2", "cuda-bindings<14",
                      "triton==3.6.0"]  # fmt: skip
            return subprocess.CompletedProcess(command, 0, json.dumps({"version": "9.99.0", "requires": listed}), "")
        if "--target" in text:
            (Path(command[command.index("--target") + 1]) / "nvidia").mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0, output if "wheel_smoke.py" in text else "", "")

    monkeypatch.setattr(wheel_matrix, "run", run)
    monkeypatch.setattr(wheel_matrix, "find_python", lambda version: sys.executable)
    cell = wheel_matrix.Cell("3.11", "9.99")
    matrix.try_cell(cell)
    assert (cell.result, reason in cell.reason) == (result, True), cell
    assert not matrix.env.exists()
    if result == "passed":
        assert cell.found["torch"] == "9.99.0"
        (plain,) = [text for text in commands if "sympy" in text]
        assert not re.search("nvidia|cuda|triton", plain.split("install", 1)[1])
        matrix.try_cell(wheel_matrix.Cell("3.12", "9.99"))  # the next Python takes the same NVIDIA libraries
        (shared,) = [text for text in commands if "--target" in text]
        assert "nvidia-cudnn-cu13==9.1 cuda-toolkit[cublas]==13.0.2" in shared and "cuda-bindings" not in shared


def test_table_and_verdict(wheel_matrix: ModuleType) -> None:
    cell = wheel_matrix.Cell
    cells = [
        cell("3.10", "2.11", "passed", found={"torch": "2.11.0"}),
        cell("3.11", "2.11", "not run", "no Python 3.11"),
        cell("3.10", "newest", "failed", "AssertionError"),
    ]
    shown = wheel_matrix.table(cells)
    assert "| 3.10 | passed (2.11.0) | failed |" in shown and "| 3.11 | not run |  |" in shown
    assert "1 passed, 1 failed, 1 not run" in shown and "Python 3.11, torch 2.11: not run: no Python 3.11" in shown
    assert wheel_matrix.verdict(cells, strict=False) == 1
    assert wheel_matrix.verdict(cells[:2], strict=False) == 0
    assert wheel_matrix.verdict(cells[:2], strict=True) == 1
    assert wheel_matrix.verdict(cells[:1], strict=True) == 0


def test_smoke_test_refuses_a_checkout() -> None:
    """It must test what was installed: here it would test the sources."""
    done = subprocess.run(
        [sys.executable, "-c", "import wheel_smoke; wheel_smoke.check_installed()"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'tools'}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "does not lie in" in done.stderr


# ---------------------------------------------------------------------------------------------- the build


@pytest.mark.slow
def test_make_wheel(building: ModuleType, sources: Path, tmp_path: Path) -> None:
    """One wheel whose manylinux tag is auditwheel's, of our libraries alone, and an sdist that gives the same wheel."""
    for objects in (building.ROOT / "build").glob("cpu-*"):
        shutil.copytree(objects, sources / "build" / objects.name)
    shown = building.run(["make", f"PYTHON={sys.executable}", "wheel"], sources, MAKEFLAGS="").stdout
    assert not list((sources / "build").glob("env-*"))  # nothing was installed into the environment that it used
    (wheel,) = (sources / "dist").glob("*.whl")
    (archive,) = (sources / "dist").glob("*.tar.gz")
    assert wheel.name in shown and archive.name in shown
    policy = re.fullmatch(r"ioubal_kernels-[\d.]+-py3-none-(manylinux_\d+_\d+_\w+)\.whl", wheel.name)[1]
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if not name.endswith("/")}
        (metadata,) = [name for name in names if name.endswith(".dist-info/WHEEL")]
        assert f"Tag: py3-none-{policy}\n" in opened.read(metadata).decode().replace("\r", "")
        opened.extract("ioubal_kernels/_ioubal_cpu.so", tmp_path)
    assert [name for name in names if ".so" in name] == ["ioubal_kernels/_ioubal_cpu.so"]  # nothing copied in
    audit = [sys.executable, "-m", "auditwheel", "show", wheel]
    seen = building.run(audit, tmp_path, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}").stdout
    # By the symbols taken from the system; libtorch, which comes from outside, it counts against any policy.
    constrains = re.search(r'constrains the platform tag to "([^"]+)"', " ".join(seen.split()))
    assert constrains[1] == policy, seen

    # torch's libraries are the installed torch's: no path of the machine that built them is kept.
    needed = building.run(["readelf", "-d", tmp_path / "ioubal_kernels" / "_ioubal_cpu.so"], tmp_path).stdout
    assert "[libtorch_cpu.so]" in needed and "RPATH" not in needed and "RUNPATH" not in needed

    with tarfile.open(archive) as opened:
        inside = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    assert {"examples/plain_loop.py", "tools/build_wheel.py", "tools/wheel_smoke.py"} <= inside
    pip = [sys.executable, "-m", "pip", "wheel", "-q", archive, "--no-deps", "--no-build-isolation", "-w", tmp_path]
    building.run(pip, tmp_path, IOUBAL_BUILD_CPU="0")  # what is compiled is the same files: seen above
    (pure,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(pure) as opened:
        others = set(opened.namelist())
    assert names - others == {"ioubal_kernels/_ioubal_cpu.so"} and others - names == set()


def test_wheel_without_a_library_is_refused(build_wheel: ModuleType, tmp_path: Path) -> None:
    """What the build says and what the wheel contains must agree."""
    wheel = tmp_path / "ioubal_kernels-0.1.0-py3-none-linux_x86_64.whl"
    for built, files in ((True, []), (False, ["_ioubal_cpu.so"]), (True, ["_ioubal_cpu.so", "libgomp-1.so.1"])):
        with zipfile.ZipFile(wheel, "w") as opened:
            info = {"cpu": {"built": built}, "cuda": {"built": False}}
            opened.writestr("ioubal_kernels/_build_info.json", json.dumps(info))
            for name in files:
                opened.writestr(f"ioubal_kernels/{name}", b"")
        with pytest.raises(build_wheel.Failed, match="should contain the libraries"):
            build_wheel.libraries_of(wheel)


# ---------------------------------------------------------------------------------------------- the workflows


def steps_of(workflow: Path) -> list[dict]:
    loaded = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    assert {"name", "jobs", "permissions"} <= loaded.keys()
    for name, job in loaded["jobs"].items():
        assert job["runs-on"] == "ubuntu-22.04" and job["timeout-minutes"] <= 90, name
        assert set([job["needs"]] if "needs" in job else []) <= loaded["jobs"].keys()
    return [step for job in loaded["jobs"].values() for step in job["steps"]]


def test_there_are_two_workflows() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "wheels.yml"]
    tested = yaml.safe_load(WORKFLOWS[0].read_text())["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert len(tested) == 2 and all(isinstance(version, str) for version in tested)  # 3.10 unquoted is 3.1


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_name_what_exists(workflow: Path) -> None:
    """Actions have exact versions; every make target and every file of the project named in a step is there."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set()
    for step in steps_of(workflow):
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@v\d+\.\d+\.\d+", step["uses"]), step["uses"]
            continue
        for target in re.findall(r"\bmake ([\w-]+)", step["run"]):
            assert re.search(rf"^{target}:.*##", makefile, re.MULTILINE), target
            named.add(target)
        for name in re.findall(r"\b((?:tools|examples|tests)/[\w./-]+|constraints\.txt)", step["run"]):
            assert (ROOT / name).is_file(), name
            named.add(name)
    wanted = {"ci.yml": {"lint", "test", "test-slow", "docs"}, "wheels.yml": {"wheel", "tools/wheel_matrix.py"}}
    assert wanted[workflow.name] <= named
