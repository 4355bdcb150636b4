"""Means, paired differences, intervals and tests, against values worked out by hand or by enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ioubal_kernels.experiments.compare import compare, holm, permutation_p, summarize


def test_summarize():
    assert summarize([]) is None
    one = summarize([5.0])
    assert (one.n, one.mean, one.sd) == (1, 5.0, None)
    three = summarize([1.0, 2.0, 6.0])
    assert three.mean == 3.0
    assert three.sd == pytest.approx(7**0.5)


def test_differences_are_paired_by_seed():
    found = compare({0: 11.0, 1: 22.0, 2: 33.0, 9: 99.0}, {2: 30.0, 1: 20.0, 0: 10.0, 5: 0.0})
    assert (found.n, found.mean, found.sd) == (3, 2.0, 1.0)
    # Student's t with 2 degrees of freedom: 4.30265.
    assert found.high - 2.0 == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert found.low + found.high == pytest.approx(4.0)
    assert found.p is None  # below 6 seeds
    assert compare({0: 1.0}, {1: 1.0}) is None
    assert compare({0: 3.0}, {0: 1.0}).low is None
    same = compare({0: 1.5, 1: 2.5}, {0: 1.0, 1: 2.0})
    assert (same.sd, same.low, same.high) == (0.0, 0.5, 0.5)


def test_permutation_test_of_six_seeds():
    rising = {seed: 1.0 + 0.1 * seed for seed in range(6)}
    assert compare(rising, dict.fromkeys(rising, 0.0)).p == pytest.approx(2 / 64)
    assert compare(dict(list(rising.items())[:5]), dict.fromkeys(rising, 0.0)).p is None


@pytest.mark.parametrize("seed", range(4))
def test_permutation_test_is_exact(seed):
    values = np.random.default_rng(seed).normal(0.4, 1.0, 8)
    means = [abs(np.mean(values * signs)) for signs in itertools.product((1, -1), repeat=8)]
    exact = np.mean([mean >= abs(values.mean()) - 1e-12 for mean in means])
    assert permutation_p(values) == pytest.approx(exact)


def test_permutation_test_of_many_seeds_is_near_the_t_test():
    values = np.random.default_rng(1).normal(0.5, 1.0, 20)
    from scipy.stats import ttest_1samp

    assert permutation_p(values) == pytest.approx(ttest_1samp(values, 0).pvalue, abs=0.01)
    assert permutation_p(values) == permutation_p(values)


def test_holm():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({"a": None, "b": 0.02}) == {"a": None, "b": 0.02}
    assert holm({}) == {}
