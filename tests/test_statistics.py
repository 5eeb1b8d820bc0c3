"""Statistics of an array of norms, held against numpy, scipy.stats and torch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.signal import lfilter

from normtune import statistics

positive = st.floats(2.0**-10, 2.0**13, width=32)
norm_lists = st.lists(positive, min_size=2, max_size=60)


def ar1(rng, n, rho):
    """Lognormal norms whose logarithm is an AR(1) series of variance 1."""
    noise = rng.normal(size=n + 200)
    return np.exp(lfilter([math.sqrt(1 - rho**2)], [1, -rho], noise)[200:])


@settings(max_examples=50, deadline=None)
@given(norms=norm_lists, max_norm=positive)
def test_coefficient_is_torchs_bit_for_bit(norms, max_norm):
    """The factor is the one that clip_grad_norm_ computes for a float32 norm."""
    total = torch.tensor(norms, dtype=torch.float32)
    theirs = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    np.testing.assert_array_equal(statistics.coefficients(norms, max_norm), theirs.numpy())


def test_share_is_that_of_real_clipping():
    """The share of clipped steps is what clip_grad_norm_ does to real gradients."""
    generator = torch.Generator().manual_seed(0)
    norms, changed = [], 0
    for _ in range(60):
        parameter = torch.zeros(7, requires_grad=True)
        parameter.grad = torch.randn(7, generator=generator)
        before = parameter.grad.clone()
        norms.append(float(torch.nn.utils.clip_grad_norm_([parameter], 2.5)))
        changed += not torch.equal(before, parameter.grad)
    assert statistics.clip_share(np.array(norms), 2.5) == changed / 60
    assert 0 < changed < 60


def test_norm_equal_to_max_norm_counts_as_clipped():
    """Torch's 1e-6 makes a norm of exactly max_norm a clipped step, and just above it is none."""
    assert statistics.clip_share(np.array([1.0, 1.0]), 1.0) == 1.0
    assert statistics.clip_share(np.array([1.0, 1.0]), 1.000002) == 0.0


def test_extreme_norms_give_no_warning():
    """Norms beyond float32, of zero and an infinite max_norm have plain factors."""
    assert statistics.coefficients([1e300, 0.0, 1e-40], 1.0).tolist() == [0.0, 1.0, 1.0]
    assert statistics.coefficients([1.0, 0.0], math.inf).tolist() == [1.0, 1.0]


@settings(max_examples=50, deadline=None)
@given(norms=norm_lists, values=st.tuples(positive, positive))
def test_clipped_share_falls_and_kept_gradient_rises_with_max_norm(norms, values):
    """A larger max_norm never clips more steps and never keeps less of the gradient."""
    low, high = sorted(values)
    below = statistics.clip_effect(np.array(norms), low)
    above = statistics.clip_effect(np.array(norms), high)
    assert above.share <= below.share
    assert above.kept >= below.kept


def test_halves_add_up_to_the_whole():
    """With an even number of steps the share is the mean of both halves'."""
    effect = statistics.clip_effect(np.random.default_rng(0).lognormal(size=100), 1.0)
    assert effect.share == pytest.approx((effect.first_half + effect.second_half) / 2)


@pytest.mark.parametrize(("n", "p"), [(100, 90.0), (1000, 90.0), (1000, 99.0), (51, 50.0)])
def test_interval_ranks_are_the_binomial_ones(n, p):
    """For independent norms the ends lie within one rank of scipy's binomial quantiles."""
    interval = statistics.percentile_interval(np.arange(1.0, n + 1), p, effective=float(n))
    low, high = stats.binom.ppf([0.025, 0.975], n, p / 100)
    assert low <= interval.low <= low + 1
    assert high <= interval.high <= high + 1


@pytest.mark.parametrize(
    ("n", "rho", "p"), [(100, 0.0, 90), (500, 0.5, 90), (1000, 0.8, 90), (1000, 0.0, 99)]
)
def test_interval_covers_the_true_percentile(n, rho, p):
    """About 95 of 100 intervals hold the true percentile, with independent and with AR(1) norms."""
    rng = np.random.default_rng(7)
    truth = math.exp(stats.norm.ppf(p / 100))
    hits = 0
    for _ in range(500):
        norms = ar1(rng, n, rho)
        size = statistics.effective_size(norms, p)
        low, high = statistics.percentile_interval(norms, p, effective=size)
        hits += low <= truth <= high
    assert 0.92 <= hits / 500 <= 0.98


def test_interval_that_ignores_autocorrelation_covers_too_little():
    """The coverage test can fail: with the plain sample size the same intervals are too short."""
    rng = np.random.default_rng(7)
    truth = math.exp(stats.norm.ppf(0.9))
    hits = 0
    for _ in range(300):
        norms = ar1(rng, 1000, 0.8)
        low, high = statistics.percentile_interval(norms, 90, effective=1000.0)
        hits += low <= truth <= high
    assert hits / 300 < 0.85


@pytest.mark.parametrize(("n", "bounded"), [(100, False), (300, False), (368, True), (1000, True)])
def test_p99_has_an_upper_bound_only_from_368_norms_on(n, bounded):
    """Below, even the largest norm may lie under the true p99, so the upper end is inf."""
    interval = statistics.percentile_interval(np.arange(1.0, n + 1), 99.0, effective=float(n))
    assert math.isfinite(interval.high) == bounded
    assert bounded == (n >= statistics.size_with_upper_bound(99.0))


@pytest.mark.parametrize("p", [1.0, 10.0, 50.0, 100.0])
@pytest.mark.parametrize("effective", [1.0, 2.5, 30.0])
def test_interval_of_any_size_holds_the_percentile(p, effective):
    """With however few norms the interval is ordered and holds the sample's percentile."""
    norms = np.random.default_rng(0).lognormal(size=30)
    low, high = statistics.percentile_interval(norms, p, effective=effective)
    assert 0 <= low <= np.percentile(norms, p) <= high


def test_effective_size_follows_the_autocorrelation():
    """Independent norms count nearly in full, alike neighbours much less, constants in full."""
    rng = np.random.default_rng(0)
    independent = statistics.effective_size(ar1(rng, 5000, 0.0), 90)
    alike = statistics.effective_size(ar1(rng, 5000, 0.9), 90)
    assert 4000 < independent <= 5000
    assert 200 < alike < 1000
    assert statistics.effective_size(np.full(50, 2.0), 90) == 50


def test_mean_interval_is_that_of_students_t_for_many_norms():
    """For independent norms the interval of the mean is the textbook's."""
    norms = np.random.default_rng(1).normal(10.0, 1.0, 20_000)
    theirs = stats.norm.interval(0.95, norms.mean(), stats.sem(norms))
    np.testing.assert_allclose(statistics.mean_interval(norms), theirs, atol=0.003)


def test_drift_compares_medians_of_halves():
    """The ratio is the second half's median over the first half's, and inf after zeros."""
    assert statistics.drift(np.array([2.0, 2.0, 9.0, 5.0, 6.0, 7.0])).ratio == 3.0
    assert statistics.drift(np.array([0.0, 0.0, 1.0, 1.0])).ratio == math.inf


def clipped(norms, limit=1.0):
    """What a loop logs that clips before it measures."""
    return norms * np.minimum(1.0, limit / (norms + 1e-6))


@pytest.mark.parametrize("limit", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clipped_norms_are_found(limit, seed):
    """Norms measured after clipping pile up at the limit, whatever share is clipped."""
    norms = np.random.default_rng(seed).lognormal(0.0, 0.7, 300)
    pile = statistics.pile_up(clipped(norms, limit))
    assert pile is not None
    assert pile.value == pytest.approx(limit, rel=1e-4)
    assert pile.share == pytest.approx((norms > limit).mean(), abs=0.02)


@pytest.mark.parametrize("decimals", [2, 3])
def test_clipped_and_rounded_norms_are_found(decimals):
    """Rounding the log does not hide the pile."""
    norms = np.random.default_rng(3).lognormal(0.0, 0.7, 300)
    assert statistics.pile_up(clipped(norms).round(decimals)) is not None


def test_constant_norms_are_a_pile():
    """A log of one value, or nearly so, is a pile at that value."""
    almost = np.full(100, 3.0)
    almost[:4] = 5.0
    assert statistics.pile_up(np.full(40, 0.1)) == statistics.Pile(value=0.1, share=1.0)
    assert statistics.pile_up(almost) == statistics.Pile(value=3.0, share=0.96)


def as_bf16(norms):
    """Norms as a bfloat16 tensor holds them."""
    return torch.tensor(norms).to(torch.bfloat16).double().numpy()


def three_digits(norms):
    """Norms as a log with 3 significant digits prints them."""
    return np.array([float(f"{x:.3g}") for x in norms])


COARSENERS = {
    "two decimals": lambda norms: (0.3 * norms).round(2),
    "bf16": as_bf16,
    "three digits": three_digits,
    "as they are": lambda norms: norms,
    "float32": lambda norms: norms.astype(np.float32).astype(np.float64),
}


@pytest.mark.parametrize("name", COARSENERS)
@pytest.mark.parametrize("sigma", [0.1, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_rounded_norms_are_no_pile(name, sigma, seed):
    """Rounding to two decimals, to 3 digits or to bf16 is not taken for clipping."""
    norms = np.random.default_rng(seed).lognormal(0.0, sigma, 400)
    assert statistics.pile_up(COARSENERS[name](norms)) is None


def test_slowly_falling_norms_are_no_pile():
    """Norms that hardly move from step to step are no pile at their largest."""
    assert statistics.pile_up(np.linspace(1.0, 0.99, 1000)) is None


def test_coarseness_tells_few_values_from_many():
    """bf16 and two decimals are coarse by about their step, float32 is not."""
    norms = np.random.default_rng(0).lognormal(0.0, 0.2, 2000)
    assert 0.003 < statistics.coarseness(as_bf16(norms)) < 0.009
    assert statistics.coarseness(norms.round(2)) == pytest.approx(0.01, rel=0.1)
    assert statistics.coarseness(norms.astype(np.float32).astype(np.float64)) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.lists(positive, min_size=1, max_size=60))
def test_distinct_is_numpys_unique(values):
    """Each value once, in order."""
    ordered = np.sort(np.array(values))
    np.testing.assert_array_equal(statistics.distinct(ordered), np.unique(ordered))


def test_sorted_norms_are_not_copied():
    """Sorting the sorted gives back the array itself."""
    ordered = np.arange(5.0)
    assert statistics.in_order(ordered) is ordered
    assert statistics.in_order(ordered[::-1]).tolist() == ordered.tolist()


@settings(max_examples=50, deadline=None)
@given(st.lists(positive, min_size=30, max_size=80), st.floats(1, 99))
def test_rounding_keeps_the_share(values, p):
    """The rounded threshold lies within 2 % and clips the same share but for about one step."""
    ordered = np.sort(np.array(values))
    exact = float(np.percentile(ordered, p))
    short = statistics.round_threshold(ordered, exact)
    moved = abs(float((ordered > short).mean()) - float((ordered > exact).mean()))
    assert short == pytest.approx(exact, rel=0.02)
    assert moved <= 0.004 + 1 / len(ordered) + 1e-9


def test_rounding_stays_within_the_interval():
    """A rounded value that would leave its own interval keeps one more digit."""
    ordered = np.linspace(0.0024, 0.0025, 10_000)
    within = statistics.Interval(0.002431, 0.002436)
    short = statistics.round_threshold(ordered, 0.0024335, within=within)
    assert within.low <= short <= within.high
