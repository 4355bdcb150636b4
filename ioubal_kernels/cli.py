"""The `ioubal` program, also `python -m ioubal_kernels`.

`doctor` and `--version` run on the base install. Everything else needs the extra [train]; without it, one line says so.
Exit codes: 0 ok, 1 failed, 2 usage or data, 3 input/output, 130 and 143 signals.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from ._version import __version__

EXTRA_MODULES = ("typer", "rich", "yaml", "torchvision", "pycocotools", "matplotlib", "PIL")
INSTALL_LINE = "pip install 'ioubal_kernels[train]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code.

    Args:
        arguments: without the program's name; default `sys.argv[1:]`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"ioubal {__version__}")
        return 0
    if arguments == ["doctor"]:
        from . import doctor

        return doctor.main()
    missing = [name for name in EXTRA_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        print(INSTALL_LINE, file=sys.stderr)
        return 2
    from .detection.commands import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
