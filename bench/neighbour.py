"""Whether a core's execution units are shared at the moment: a small computation in the L1 cache, timed.

A core of a virtual machine is often one of a physical core's two threads, the other one another customer's. While that
one is busy, what is bound by arithmetic takes up to 1.4 times as long and a copy as long as ever, so that a ratio to
the copy says more about the neighbour than about the kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

ENTRIES, REPEATS = 4096, 8  # the probe: about 40 us
SHARED = 1.12  # times the probe's usual time alone: its spread alone is 2 %, shared it takes 1.3 to 1.5 times as long
FIRST_PROBES = 20_000  # a second: busy spells of 0.3 s were seen
SPIKES = 3  # an interrupt lasts as long as a probe: several in a row are slow where a neighbour is
WAIT_SECONDS = 0.5


def probe_of_torch() -> Callable[[], float]:
    """Seconds of some sigmoids on numbers in the L1 cache."""
    x = torch.linspace(-8, 0, ENTRIES)
    result = torch.empty_like(x)

    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(REPEATS):
            torch.sigmoid(x, out=result)
        return time.perf_counter() - start

    return seconds


class Neighbour:
    """Says when the core is not shared. It learns what the probe takes alone: its 2 % quantile, over the first probes
    and, as a machine may be busy for long, whatever comes faster later."""

    def __init__(self, probe: Callable[[], float] | None = None, first_probes: int = FIRST_PROBES) -> None:
        self.probe = probe_of_torch() if probe is None else probe
        found = sorted(self.probe() for _ in range(first_probes))
        self.alone = found[len(found) // 50]

    def is_idle(self) -> bool:
        """Whether the core is ours right now."""
        fastest = min(self.probe() for _ in range(SPIKES))
        self.alone = min(self.alone, 1.02 * fastest)
        return fastest <= SHARED * self.alone

    def wait(self, seconds: float = WAIT_SECONDS) -> bool:
        """Waits until the core is ours, at most so long; whether it is."""
        end = time.perf_counter() + seconds
        while not self.is_idle():
            if time.perf_counter() >= end:
                return False
        return True
