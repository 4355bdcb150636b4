"""The layers of CONTRIBUTING.md, read from the source: imports go downward only, in Python and in C++."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ioubal_kernels"
ROOT_PACKAGE = "(package)"  # ioubal_kernels/__init__.py, which re-exports everything up to the modules

# Bottom first. A module imports from lower layers, and from modules of its own name (functional_x from functional_y).
LAYERS = [
    ["_version", "validation", "distributed"],
    ["boxes"],
    ["reference", "triton_kernels"],
    ["ops"],
    ["backends"],
    ["functional"],
    ["losses", "analysis", "calibration"],
    [ROOT_PACKAGE],
    ["testing", "doctor"],
    ["integrations"],
    ["detection"],
    ["experiments"],
    ["bench"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def layer_name(module: str) -> str:
    """'detection.data.coco' is 'detection'; 'reference_terms' is 'reference'; '' is the package itself."""
    top = module.split(".")[0]
    if top in ("", "__init__"):
        return ROOT_PACKAGE
    return top if top in RANK else top.split("_")[0] or top


def sources() -> list[tuple[str, Path]]:
    """(dotted name below ioubal_kernels, file) of every Python file that the package is made of."""
    found = [(path.relative_to(PACKAGE), path) for path in sorted(PACKAGE.rglob("*.py"))]
    for folder in ("bench", "triton_kernels"):
        found += [(path.relative_to(ROOT), path) for path in sorted((ROOT / folder).rglob("*.py"))]
    return [(".".join(name.with_suffix("").parts), path) for name, path in found]


def imported(name: str, path: Path) -> set[str]:
    """Dotted names below ioubal_kernels that a file imports anywhere, lazily too, by statement or import_module."""
    package = name.split(".")[:-1]  # of module a.b and of package a.b.__init__ alike: what `from .` starts at
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()

    def absolute(module: str) -> None:
        if module == "ioubal_kernels" or module.startswith("ioubal_kernels."):
            names.add(module.removeprefix("ioubal_kernels").removeprefix("."))

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                absolute(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = ["ioubal_kernels", *package[: len(package) - node.level + 1], *base]
            if base and base[0] == "ioubal_kernels":
                if len(base) > 1:
                    absolute(".".join(base))
                else:  # from . import x, from ioubal_kernels import x: a module, or a name of the package
                    for alias in node.names:
                        absolute(f"ioubal_kernels.{alias.name}" if is_module(alias.name) else "ioubal_kernels")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            target = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
            if isinstance(target, str) and target:
                absolute("ioubal_kernels." + target.lstrip(".") if target.startswith(".") else target)
    return names


def is_module(name: str) -> bool:
    return name in RANK or (PACKAGE / f"{name}.py").exists() or (PACKAGE / name / "__init__.py").exists()


def upward(name: str, imports: set[str]) -> list[str]:
    """The imports of module `name` that its layer forbids."""
    own = layer_name(name)
    return [
        f"{name} (layer {own}) imports {target or 'ioubal_kernels'} (layer {layer_name(target)})"
        for target in sorted(imports)
        if layer_name(target) != own and RANK[layer_name(target)] >= RANK[own]
    ]


def test_every_module_has_a_layer() -> None:
    unknown = [name for name, _ in sources() if layer_name(name) not in RANK]
    assert not unknown, f"modules without a layer; give each a place in LAYERS: {unknown}"


def test_python_imports_go_downward() -> None:
    found = [line for name, path in sources() for line in upward(name, imported(name, path))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "text", "forbidden"),
    [
        ("functional", "from .detection import train", True),
        ("functional", "def f():\n    from ioubal_kernels.cli import main", True),
        ("ops.library", "from ..backends import choose", True),
        ("boxes", "import ioubal_kernels", True),
        ("ops.library", "import importlib\nimportlib.import_module('.functional', 'ioubal_kernels')", True),
        ("detection.train", "from ..losses import IoUBalancedLoss", False),
        ("reference_terms", "from .boxes import decode_boxes\nfrom . import reference", False),
        ("detection.data.coco", "from ..errors import DataError\nfrom ... import functional", False),
    ],
)
def test_the_rule_itself(module: str, text: str, forbidden: bool, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(text)
    assert bool(upward(module, imported(module, path))) is forbidden


FORBIDDEN_INCLUDES = {
    "math": r"torch/|ATen/|c10/|Python\.h|pybind11/|common/|cpu/|cuda/",
    "common": r"ATen/|Python\.h|pybind11/|torch/extension\.h|(?<!\w)cpu/|(?<!\w)cuda/",
    "cpu": r"ATen/|Python\.h|pybind11/|torch/extension\.h|(?<!\w)cuda/",
    "cuda": r"ATen/|Python\.h|pybind11/|torch/extension\.h|(?<!\w)cpu/",
}


def test_cpp_includes_go_downward() -> None:
    """math includes no torch; cpu and cuda never each other; nothing includes what is not on the stable ABI."""
    found, read = [], 0
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in (".h", ".cpp", ".inc", ".cu", ".cuh"):
            continue
        read += 1
        layer = path.relative_to(ROOT / "csrc").parts[0]
        assert layer in FORBIDDEN_INCLUDES, f"csrc/{layer} has no rule in FORBIDDEN_INCLUDES"
        pattern = FORBIDDEN_INCLUDES[layer] + (r"|torch/" if path.suffix == ".cuh" else "")
        for include in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8"), re.MULTILINE):
            if re.search(pattern, include):
                found.append(f"{path.relative_to(ROOT)} includes {include}")
    assert read > 0 and not found, "\n".join(found)


IMPORT_PROBE = """
import json, os, sys, threading
import torch
tasks = lambda: len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
before, threads, native = set(sys.modules), threading.active_count(), tasks()
import ioubal_kernels
for name in ioubal_kernels.__all__:
    getattr(ioubal_kernels, name)
new = sorted(set(sys.modules) - before)
found = dict(new=new, threads=threading.active_count() - threads, native=tasks() - native)
open(sys.argv[1], "w").write(json.dumps(found))
"""


def test_importing_the_package_is_quiet_and_light(tmp_path: Path) -> None:
    """Nothing printed, no warning, no thread, none of the optional packages, also when every public name is used."""
    out = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", IMPORT_PROBE, str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""
    found = json.loads(out.read_text())
    assert found["threads"] == 0 and found["native"] == 0
    assert "ioubal_kernels.functional" in found["new"]
    heavy = "torchvision|matplotlib|pycocotools|triton|typer|rich|PIL|yaml|torch._dynamo|torch._inductor"
    assert [name for name in found["new"] if re.match(rf"(?:{heavy})(?:\.|$)", name)] == []
    assert [name for name in found["new"] if re.match(r"ioubal_kernels\.(?:detection|cli|bench)", name)] == []
