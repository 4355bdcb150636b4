"""The `ioubal` program, also `python -m ioubal_kernels`.

`doctor`, `bench` and `--version` run on the base install (`bench` lists what it lacks as not installed). Everything
else needs the extra [train]; without it, one line says so.
Exit codes: 0 ok, 1 failed, 2 usage or data, 3 input/output, 130 and 143 signals.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

from ._version import __version__

EXTRA_MODULES = ("typer", "rich", "yaml", "torchvision", "pycocotools", "matplotlib", "PIL", "scipy")
INSTALL_LINE = "pip install 'ioubal_kernels[train]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code.

    Args:
        arguments: without the program's name; default `sys.argv[1:]`.
    """
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has read enough
        # What is still buffered goes nowhere, or the interpreter complains of it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 3


def _run(arguments: list[str]) -> int:
    _keep_waiting_threads_short()
    if arguments == ["--version"]:
        print(f"ioubal {__version__}")
        return 0
    if arguments == ["doctor"]:
        from . import doctor

        return doctor.main()
    if arguments[:1] == ["bench"]:
        from .bench import program

        return program.main(arguments[1:])
    missing = [name for name in EXTRA_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        print(INSTALL_LINE, file=sys.stderr)
        return 2
    from .commands import run

    return run(arguments)


def _keep_waiting_threads_short() -> None:
    """Let OpenMP threads spin for a few microseconds at most before they sleep.

    By default they spin for as long as their turn lasts, and when anything else runs on the same cores (a loader
    process is enough) each of a step's thousand barriers then waits for the scheduler: a training step took 6 times as
    long. libgomp reads this once, when torch is loaded.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


if __name__ == "__main__":
    sys.exit(main())
