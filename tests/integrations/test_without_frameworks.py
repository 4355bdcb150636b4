"""What a user sees without the optional frameworks, and that the package itself never imports them."""

from __future__ import annotations

import subprocess
import sys

import pytest

MISSING = """
import sys
sys.modules[{name!r}] = None  # as if it were not installed
import ioubal_kernels.integrations as integrations
assert {name!r} in dir(integrations)
try:
    integrations.{name}
except ImportError as error:
    print(error)
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mmdet", ("needs MMDetection 3", "mmdet 3.3.0, mmcv 2.1.0, mmengine 0.10.7", "mim install mmengine==")),
        ("detectron2", ("needs Detectron2", "pip install --no-build-isolation", "facebookresearch/detectron2")),
    ],
)
def test_a_missing_framework_says_what_to_install(name, words):
    message = run(MISSING.format(name=name))
    assert message.startswith(f"ioubal_kernels.integrations.{name}: ")
    for word in words:
        assert word in message


def test_the_package_imports_neither():
    program = (
        "import sys, ioubal_kernels, ioubal_kernels.integrations\n"
        "[getattr(ioubal_kernels, name) for name in ioubal_kernels.__all__]\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'mmdet', 'mmcv', 'mmengine', 'detectron2'}))\n"
    )
    assert run(program).strip() == "[]"
