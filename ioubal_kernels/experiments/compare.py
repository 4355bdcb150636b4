"""Means over seeds, paired differences, intervals and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

TESTED_FROM = 6
"""Seeds from which on a permutation test is made: with 5 the smallest p is 1/16, and nothing could be significant."""

CONFIDENCE = 0.95
_EXACT_UP_TO = 16  # all 2^16 assignments of signs; above, that many random ones
_RESAMPLES = 99_999


@dataclass(frozen=True)
class Summary:
    """Values over seeds: their number, mean and standard deviation (n - 1; None for one value)."""

    n: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class Difference:
    """An arm minus the baseline, paired by seed.

    Attributes:
        n: seeds that both have.
        mean: of the differences.
        sd: their standard deviation; None below 2 seeds.
        low, high: 95 % confidence interval of the mean (Student's t); None below 2 seeds.
        p: two-sided paired permutation test (random signs); None below `TESTED_FROM` seeds.
        p_holm: p after Holm's correction over the primary outcomes; None for the others.
    """

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarize(values: Sequence[float]) -> Summary | None:
    """None without values."""
    if not values:
        return None
    data = np.asarray(values, dtype=float)
    return Summary(len(data), float(data.mean()), float(data.std(ddof=1)) if len(data) > 1 else None)


def compare(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """The difference of two arms' values by seed, over the seeds that both have; None without any."""
    seeds = sorted(arm.keys() & baseline.keys())
    if not seeds:
        return None
    values = np.array([arm[seed] - baseline[seed] for seed in seeds], dtype=float)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return Difference(n, mean, None, None, None, None)
    sd = float(values.std(ddof=1))
    # scipy has no interval for values that are all the same.
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(CONFIDENCE) if sd > 0 else (mean, mean)
    return Difference(n, mean, sd, float(low), float(high), permutation_p(values) if n >= TESTED_FROM else None)


def permutation_p(differences: np.ndarray) -> float:
    """Two-sided p of paired differences under random signs: exact up to 16 of them."""
    exact = len(differences) <= _EXACT_UP_TO
    found = stats.permutation_test(
        (differences,),
        lambda values, axis: np.mean(values, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=2**_EXACT_UP_TO if exact else _RESAMPLES,
        batch=4096,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's step-down correction; entries without a p stay without, and do not count."""
    tested = sorted((p, name) for name, p in p_values.items() if p is not None)
    corrected: dict[str, float | None] = dict.fromkeys(p_values)
    highest = 0.0
    for rank, (p, name) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        corrected[name] = highest
    return corrected
