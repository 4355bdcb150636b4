"""Runs mutants, each in a fork of this process, and says which are noticed.

    python mutant_runs.py LIBRARY FIRST STEP

Mutants FIRST, FIRST + STEP, ... of mutants.TABLE. A mutant first meets a part of the sweep; if it survives, all of it;
then the part in other orders of the threads. Prints JSON: number -> null (survived) or how it was noticed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import emulation
import mutants
import sweep
import torch

SEEDS = (1, 2, 3, 4)
SECONDS = 60  # for one mutant: a wrong kernel may run for ever
# The family that meets a file's mutants first; else the order of the sweep.
FAMILIES = {"matching": "matching", "fovea": "fovea", "cross_entropy": "softmax", "boxes": "boxes"}


def noticed(kernels: emulation.Kernels, number: int) -> None:
    """Ends with an exception, or the process, if the mutant is noticed."""
    signal.alarm(SECONDS)
    kernels.mutant(number)
    kernels.seed(0)
    first = FAMILIES.get(Path(mutants.TABLE[number - 1].file).stem, "") if number else ""
    sweep.run_all(reduced=True, first=first)
    sweep.run_all(first=first)
    if number:  # the right kernels are known to pass in any order (test_sanitized.py)
        for seed in SEEDS:
            kernels.seed(seed)
            sweep.run_all(reduced=True)


def in_fork(kernels: emulation.Kernels, number: int) -> str | None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(writing, 2)  # "SIMT: ..." and the like
        status = 0
        try:
            noticed(kernels, number)
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}"[:300].encode())
            status = 1
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as pipe:
        message = pipe.read()
    _, status = os.waitpid(child, 0)
    if status == 0:
        return None
    if os.WIFSIGNALED(status):
        message = f"{signal.Signals(os.WTERMSIG(status)).name} {message}"
    return message[:300]


def main() -> None:
    library, first, step = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    os.environ |= {"IOUBAL_CHECK": "0", "IOUBAL_SIMT_TIMEOUT": "10"}
    with emulation.emulated(library) as kernels:
        result = {0: in_fork(kernels, 0)}
        for number in range(first, len(mutants.TABLE) + 1, step):
            result[number] = in_fork(kernels, number)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
