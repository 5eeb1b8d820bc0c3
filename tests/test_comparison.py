"""Paired comparison held against SciPy, and the six sentences on trials whose answer is known."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from normtune.comparison import verdict
from normtune.fresh import Runs, level_of, margin_of
from normtune.paired import LEVEL, LEVEL_EQUAL, Noise, compare, share_interval
from normtune.trials import Settings, Trial

INF = math.inf
SETTINGS = Settings(24, suggestion=0.8, low=0.01, high=5.0, lr=0.1)
THIRD, HALF = 1 / 3, 3**-0.5
SEED_EFFECT = [0.3, -0.2, 0.1, -0.4, 0.25, -0.05, 0.15, -0.3, 0.2, -0.05]
OWN = [0.11, -0.17, 0.05, 0.13, -0.08, -0.12, 0.09, 0.02, -0.06, 0.03]


@pytest.mark.parametrize("n", [2, 3, 6, 10, 30])
def test_interval_is_the_paired_t_interval(n):
    """Without other arms the interval is that of scipy.stats.ttest_rel at this level."""
    rng = np.random.default_rng(n)
    a, b = rng.normal(2, 1, n), rng.normal(2.5, 1, n)
    found = compare(a.tolist(), b.tolist(), margin=0.1)
    expected = stats.ttest_rel(a, b).confidence_interval(1 - 2 * LEVEL)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.difference == pytest.approx(np.mean(a - b))


def test_other_arms_lend_degrees_of_freedom():
    """Four df of other arms enter variance and t quantile, more than four do not count."""
    a, b = np.array([1.0, 1.4, 1.1]), np.array([2.0, 2.2, 2.3])
    d = a - b
    variance = (2 * d.var(ddof=1) + 4 * 2 * 0.04) / 6
    half = stats.t.ppf(1 - LEVEL, 6) * math.sqrt(variance / 3)
    for df in (4, 20):
        found = compare(a.tolist(), b.tolist(), margin=0.1, noise=Noise(0.04, df))
        assert (found.low, found.high) == pytest.approx((d.mean() - half, d.mean() + half))


@pytest.mark.parametrize(
    ("a", "b", "margin", "relation", "reason"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.95], 0.1, "better", "quality"),
        ([2.0, 2.1, 1.95], [1.0, 1.1, 0.9], 0.1, "worse", "quality"),
        ([1.0, 1.1, 0.9], [1.01, 1.09, 0.91], 0.5, "equal", "quality"),
        ([1.0, 2.0, 0.5], [1.5, 1.0, 1.1], 0.1, "undecided", "quality"),
        ([1.0, 1.1, 0.9], [INF, INF, 1.0], 0.1, "undecided", "quality"),
        ([1.0, 1.1, 0.9], [INF, INF, INF], 0.1, "better", "reliability"),
        ([1.0, INF, 0.9], [INF, INF, 1.0], 0.1, "undecided", "quality"),
        ([INF, INF], [1.0, 1.0], 0.1, "undecided", "quality"),
        ([INF, INF], [INF, INF], 0.1, "undecided", "quality"),
        ([1.0], [2.0], 0.1, "undecided", "quality"),
        ([], [], 0.1, "undecided", "quality"),
        ([1.0] * 6, [INF, INF, *[1.5] * 4], 0.1, "better", "quality"),
        ([1.0] * 6, [INF, INF, INF, *[1.0] * 3], 0.1, "better", "reliability"),
        ([1.0, 1.1, 1.0, INF], [2.0, 2.1, 2.1, 2.0], 0.1, "undecided", "quality"),
    ],
)
def test_relation(a, b, margin, relation, reason):
    """Reliability first, then the interval; a winner by quality must not fail more often."""
    found = compare(a, b, margin=margin)
    assert (found.relation, found.reason) == (relation, reason)


@pytest.mark.parametrize(
    ("a", "b", "earlier", "relation"),
    [
        ([1.0, 1.1, 0.9], [INF, INF, 1.0], (0, 1), "better"),
        ([1.0, 1.1, 0.9], [INF, INF, 1.0], (1, 1), "undecided"),
        ([INF, INF], [1.0, 1.0], (1, 0), "worse"),
        ([1.0, INF, 0.9], [INF, INF, INF], (0, 1), "undecided"),
        ([1.0] * 4, [INF, INF, 1.0, 1.0], (0, 1), "undecided"),
        ([1.0] * 4, [INF, 1.0, 1.0, 1.0], (0, 1), "equal"),
    ],
)
def test_with_few_seeds_the_explore_seed_is_a_witness(a, b, earlier, relation):
    """Two of three failures are luck too often; with a failure before them they are not."""
    assert compare(a, b, margin=0.1, earlier=earlier).relation == relation


def test_mirror():
    """Swapping the arms mirrors everything."""
    a, b = [1.0, 1.3, 0.9, 1.2], [1.1, 1.5, 0.8, 1.4]
    one, other = compare(a, b, margin=0.3), compare(b, a, margin=0.3)
    assert (one.low, one.high, one.as_good, one.b_as_good) == pytest.approx(
        (-other.high, -other.low, other.b_as_good, other.as_good)
    )
    assert one.p_better + other.p_better == pytest.approx(1.0)


def test_one_side_of_the_margin_is_enough_to_be_as_good():
    """As good asks for no more than: not worse by the margin."""
    found = compare([1.0, 1.4, 0.8], [1.2, 1.1, 1.3], margin=0.9)
    assert found.relation == "undecided"
    assert found.as_good
    assert not found.b_as_good


def test_p_better_counts_failures_as_losses_and_ties_half():
    """One win, one loss by failure, one tie, both failed: half of four."""
    found = compare([1.0, INF, 2.0, INF], [2.0, 1.0, 2.0, INF], margin=0.1)
    assert found.p_better == pytest.approx(0.5)
    assert (found.failed_a, found.failed_b, found.n, found.n_finished) == (2, 1, 4, 2)


@pytest.mark.parametrize(("k", "n"), [(0, 6), (1, 6), (3, 7), (6, 6)])
def test_share_interval_is_scipys_exact_one(k, n):
    """A share k of n has the Clopper-Pearson interval of scipy.stats.binomtest."""
    expected = stats.binomtest(k, n).proportion_ci(method="exact")
    assert share_interval(k, n) == pytest.approx((expected.low, expected.high))


def test_identical_runs_are_not_tested():
    """Copies of each other are equal, whatever the margin."""
    found = compare([1.0, 2.0], [1.0, 2.0], margin=1e-9, identical=True)
    assert (found.relation, found.reason, found.as_good) == ("equal", "identical", True)


def test_runs_that_end_alike_to_the_last_bit_are_identical():
    """Where every trained pair is exactly equal there is nothing to test either."""
    assert compare([1.0, 2.0], [1.0, 2.0], margin=math.nan).reason == "identical"


def test_arms_of_different_length_are_refused():
    """A loss without its partner is an error that says what came."""
    with pytest.raises(ValueError, match="one loss a seed each but got 1 and 2"):
        compare([1.0], [1.0, 2.0], margin=0.1)


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.6])
def test_more_seeds_are_enough_at_the_same_noise(shift):
    """With that many more seeds of the same difference and noise the comparison is decided."""
    d = np.array([0.5, -0.5, 0.4, -0.4]) + shift
    found = compare(d.tolist(), [0.0] * 4, margin=0.35)
    assert found.relation == "undecided"
    n = 4 + found.more_seeds
    sd = d.std(ddof=1)
    half, near = (stats.t.ppf(1 - p, n - 1) * sd / math.sqrt(n) for p in (LEVEL, LEVEL_EQUAL))
    assert half < abs(d.mean()) or abs(d.mean()) + near < 0.35


@pytest.mark.slow
def test_two_looks_err_in_about_five_percent_of_equal_pairs():
    """Looks at 3 and 6 seeds at this level call one arm better in .036 of truly equal pairs."""
    d = np.random.default_rng(0).standard_normal((4000, 6))
    zero = [0.0] * 6
    said = [
        any(compare(row[:n], zero[:n], margin=1e-9).relation == "better" for n in (3, 6))
        for row in d.tolist()
    ]
    assert 0.025 < np.mean(said) < 0.05


# --- the verdict -------------------------------------------------------------------------------


def run(max_norm, value, *, lr=1.0, seed=0, stage="explore", **other):
    state = other.pop("state", "finished" if value is not None else "diverged")
    return Trial(max_norm, lr, seed, state, stage, value, **other)


def explored(none=9.0, best=1.5):
    """Explore runs: 0.3 is the best value, 0.8 the suggestion."""
    values = {INF: none, 0.8: 3.0, 1.0: 3.2, 0.09: 3.0, 0.3: best, 0.15: 2.6, 4.0: 6.0}
    return [run(c, v) for c, v in values.items()]


def rates(third=5.0):
    """Unclipped runs that bracket a third of the rate."""
    values = {THIRD: third, HALF: 6.0, 30**-0.5: 6.5, 0.1: 8.0}
    return [run(INF, v, lr=factor, stage="lr") for factor, v in values.items()]


def fresh(arms, n=4):
    """Finished fresh runs of {(max_norm, lr_factor): mean}; None diverges in every seed."""
    return [
        run(
            c,
            None if mean is None else mean + SEED_EFFECT[i] + OWN[(3 * k + i) % 10],
            lr=lr,
            seed=i + 1,
            stage="confirm",
        )
        for k, ((c, lr), mean) in enumerate(arms.items())
        for i in range(n)
    ]


N, C, S, L1, L2 = (INF, 1.0), (0.3, 1.0), (0.8, 1.0), (INF, THIRD), (INF, HALF)

KINDS = {
    1: {N: 9.0, C: 2.0, L1: 5.0, L2: 6.0},
    2: {N: 9.0, C: 4.0, L1: 2.0, L2: 6.0},
    3: {N: 9.0, C: 4.0, L1: 4.0, L2: 6.0},
    4: {N: 9.0, C: 4.0},
    5: {N: 4.0, C: 4.0},
    6: {N: 4.5, C: 4.0},
}
WORDS = {
    1: "Clipping gives a better model: max_norm 0.3 beats no clipping at learning rate 0.1",
    2: "A lower learning rate is better",
    3: "Clipping only makes up for a learning rate that is too high",
    4: "Clipping helps at learning rate 0.1",
    5: "Equal within",
    6: "Undecided at learning rate 0.1",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_six_sentences(kind):
    """Each known truth gets its sentence, with the rate, the seeds and what they varied."""
    n = 2 if kind == 6 else 6
    settings = replace(SETTINGS, margin=0.4, varied="initial weights")
    found = verdict(settings, [*explored(), *rates(), *fresh(KINDS[kind], n)])
    assert found.kind == kind
    assert found.sentence.startswith(WORDS[kind])
    assert f"{n} fresh seeds, varying initial weights" in found.sentence
    assert found.seeds == tuple(range(1, n + 1))


def test_better_model_needs_a_bracketed_rate():
    """Where the best lower rate has no near neighbours, the sentence stays open."""
    open_rates = [t for t in rates() if t.lr_factor in (THIRD, HALF)]
    found = verdict(SETTINGS, [*explored(), *open_rates, *fresh(KINDS[1], 6)])
    assert found.kind == 4
    assert "tried: 0.577x, 0.333x" in found.sentence


def test_better_model_needs_both_lower_rates():
    """One confirmed lower rate is not enough."""
    arms = {arm: mean for arm, mean in KINDS[1].items() if arm != L2}
    assert verdict(SETTINGS, [*explored(), *rates(), *fresh(arms, 6)]).kind == 4


def test_clipping_that_hurts_is_no_gain():
    """No clipping ahead of the best clipped value ends as equal or worse, said in words."""
    found = verdict(SETTINGS, [*explored(), *fresh({N: 2.0, C: 4.0, S: 5.0}, 6)])
    assert found.kind == 5
    assert "no clipping is at least as good" in found.sentence
    assert found.suggestion_vs_none == "hurts"


def test_failures_decide_before_quality():
    """An arm that diverges in all seeds loses, and the sentence counts its failures."""
    found = verdict(SETTINGS, [*explored(), *fresh({N: None, C: 4.0, S: 4.0}, 3)])
    assert found.kind == 4
    assert "(3 of 3 runs failed without, 0 with it)" in found.sentence
    assert found.suggestion_vs_none == "helps"
    row = found.arms[0]
    assert (row.label, row.failed, row.seeds) == ("no clipping", 3, 3)
    assert math.isnan(row.mean)


@pytest.mark.parametrize(("explored_none", "said"), [(None, "better"), (9.0, "undecided")])
def test_failures_on_the_explore_seed_are_remembered(explored_none, said):
    """No clipping failed in two of three fresh seeds, and before them or not."""
    trials = [*explored(none=explored_none), *fresh({N: 4.0, C: 4.0}, 3)]
    lost = [t for t in trials if t.arm == N and t.stage == "confirm"][:2]
    trials = [replace(t, state="diverged", value=None) if t in lost else t for t in trials]
    runs = Runs(SETTINGS, trials)
    assert runs.compare(C, N, margin=0.1).relation == said


def test_where_every_run_fails_it_says_what_to_do():
    """Neither arm ever finished: no seeds would help, a lower rate might."""
    found = verdict(SETTINGS, [*explored(), *fresh({N: None, C: None}, 3)])
    assert found.kind == 6
    assert "every run failed, with max_norm 0.3 and without clipping" in found.sentence


@pytest.mark.parametrize(
    ("mean", "to_none", "to_best"),
    [
        (4.0, "helps", "as good"),
        (8.0, "helps", "worse"),
        (9.0, "equal", "worse"),
        (12.0, "hurts", "worse"),
    ],
)
def test_the_suggestion(mean, to_none, to_best):
    """Against no clipping and against the best found, over the same seeds."""
    settings = replace(SETTINGS, margin=0.4)
    found = verdict(settings, [*explored(), *fresh({N: 9.0, C: 4.0, S: mean}, 6)])
    assert (found.suggestion_vs_none, found.suggestion_vs_best) == (to_none, to_best)


def test_the_suggestion_may_be_the_best():
    """A value that one seed cannot tell from the best is confirmed as the best itself."""
    values = {INF: 9.0, 0.8: 2.98, 0.5: 2.95, 1.0: 3.4, 0.09: 5.0, 0.3: 3.3, 4.0: 8.0}
    trials = [*(run(c, v) for c, v in values.items()), *fresh({N: 9.0, S: 4.0}, 6)]
    found = verdict(SETTINGS, trials)
    assert (found.best, found.suggestion_vs_best) == (0.8, "best")
    assert found.arms[1].label == "suggestion, best found"


def test_the_current_value():
    """The loop's own value has its row, and the suggestion is compared with it."""
    settings = replace(SETTINGS, current=4.0)
    found = verdict(settings, [*explored(), *fresh({N: 9.0, C: 4.0, S: 4.0, (4.0, 1.0): 7.0}, 6)])
    assert found.suggestion_vs_current == "better"
    assert "current" in [row.label for row in found.arms]
    assert verdict(SETTINGS, explored()).suggestion_vs_current == ""


def test_free_runs_are_identical_and_add_no_degrees_of_freedom():
    """Copies of the unclipped runs are called identical, and the noise is that of trained runs."""
    settings = replace(SETTINGS, current=4.0)
    arms = fresh({N: 4.0, C: 4.0, S: 4.0}, 4)
    copies = [replace(t, max_norm=4.0, free=True) for t in arms if math.isinf(t.max_norm)]
    without = Runs(settings, [*explored(), *arms])
    with_ = Runs(settings, [*explored(), *arms, *copies])
    current = with_.compare((4.0, 1.0), N, margin=0.1)
    assert (current.relation, current.reason) == ("equal", "identical")
    assert with_.compare(C, N, margin=0.1) == without.compare(C, N, margin=0.1)
    found = verdict(settings, [*explored(), *arms, *copies])
    assert [r.free for r in found.arms if r.label == "current"] == [4]


def test_maximize_mirrors_minimize():
    """A study that maximizes says the same, with values as the user has them."""
    trials = [*explored(), *rates(), *fresh(KINDS[1], 6)]
    mirrored = [replace(t, value=-t.value) for t in trials]
    one = verdict(SETTINGS, trials)
    other = verdict(replace(SETTINGS, direction="maximize"), mirrored)
    assert other.sentence == one.sentence
    assert [r.mean for r in other.arms] == pytest.approx([-r.mean for r in one.arms])


def test_the_margin_is_one_sd_of_a_run_near_the_best():
    """Pooled over arms within 3 sd of the best, each around its own mean; far arms don't count."""
    arms = fresh({N: 9.0, C: 4.0, S: 4.1}, 6)
    margin = margin_of(Runs(SETTINGS, [*explored(), *arms]))
    near = [[t.value for t in arms if t.arm == arm] for arm in (C, S)]
    assert margin.loss == pytest.approx(math.sqrt(np.mean([np.var(v, ddof=1) for v in near])))
    assert margin.sd == pytest.approx(1.0)


@pytest.mark.parametrize(("asked", "expected"), [(0.05, 0.05), ("0.05", 0.05), ("1 %", 0.04)])
def test_the_users_margin(asked, expected):
    """Loss units, or a share of the best arm's loss."""
    settings = replace(SETTINGS, margin=asked)
    margin = margin_of(Runs(settings, [*explored(), *fresh({N: 9.0, C: 4.0}, 10)]))
    assert margin.loss == pytest.approx(expected, rel=0.02)
    assert margin.source == "user"


@pytest.mark.parametrize("asked", ["a lot", "-1 %", 0.0])
def test_a_margin_that_is_none_is_refused(asked):
    """A margin that is no positive number is an error that says what came."""
    settings = replace(SETTINGS, margin=asked)
    with pytest.raises(ValueError, match="margin must be"):
        verdict(settings, [*explored(), *fresh({N: 9.0, C: 4.0})])


@pytest.mark.parametrize(
    ("first", "note"),
    [(1000.0, "measurable but tiny"), (14.0, ""), (6.0, "too noisy to choose by")],
)
def test_the_margin_is_held_against_what_was_learned(first, note):
    """Under .1 % of the loss gained it is tiny, over 5 % too noisy."""
    arms = [replace(t, first_value=first) for t in fresh({N: 4.0, C: 4.0})]
    assert verdict(SETTINGS, [*explored(), *arms]).margin.note == note


def test_without_fresh_seeds_it_only_leads():
    """Below 12 runs there is no verdict, and it says how many runs would decide."""
    found = verdict(replace(SETTINGS, max_runs=8), explored())
    assert found.kind == "none"
    assert (
        found.sentence == "max_norm 0.3 leads on one seed, no verdict: 17 more runs would decide."
    )
    assert verdict(SETTINGS, []).kind == "none"


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_it_stays_strict_json(n):
    """A verdict at any stage becomes JSON without NaN or Infinity."""
    text = json.dumps(
        verdict(SETTINGS, [*explored(), *fresh(KINDS[1], n)]).to_dict(), allow_nan=False
    )
    assert json.loads(text)["kind"] in (1, 4, 6)


def test_running_and_crashed_runs_are_not_results():
    """They change nothing."""
    trials = [*explored(), *fresh({N: 9.0, C: 4.0})]
    more = [
        replace(trials[-1], seed=9, state="running", value=None),
        replace(trials[-1], seed=9, state="crashed", value=None),
    ]
    assert verdict(SETTINGS, [*trials, *more]) == verdict(SETTINGS, trials)


def test_clipping_at_the_lower_rate_is_noted():
    """One more arm says whether clipping is still worth it at the winning rate."""
    trials = [*explored(), *rates(), *fresh({**KINDS[2], (0.3, THIRD): 1.0}, 6)]
    assert (
        "clipping at 0.333x the learning rate still helps there" in verdict(SETTINGS, trials).notes
    )


def test_three_looks_spend_less_at_the_first():
    """From 40 runs up the look at three seeds is dear."""
    forty = replace(SETTINGS, max_runs=40)
    assert [level_of(s, n) for s in (SETTINGS, forty) for n in (3, 6)] == [0.02, 0.02, 0.01, 0.02]


def test_a_budget_raised_after_a_verdict_halves_the_error():
    """Another look is paid for, and the note says so."""
    once = replace(SETTINGS, raised=1)
    assert [level_of(replace(SETTINGS, raised=k), 6) for k in (0, 1, 2)] == [0.02, 0.01, 0.005]
    trials = [*explored(), *fresh({N: 9.0, C: 4.0})]
    assert "the budget was raised once after a verdict" in " ".join(verdict(once, trials).notes)
    assert "raised" not in " ".join(verdict(SETTINGS, trials).notes)


def test_what_people_ask_about_always_has_a_row():
    """The suggestion, the current value, 1 and 10: by fresh seeds, by one seed, or not tried."""
    settings = replace(SETTINGS, current=4.0)
    trials = [*explored(), *fresh({N: 9.0, C: 4.0}, 4)]
    rows = {r.max_norm: r for r in verdict(settings, trials).explored}
    assert list(rows) == [0.8, 4.0, 1.0, 10.0]
    assert [r.label for r in rows.values()] == ["suggestion", "current", *["common default"] * 2]
    assert (rows[1.0].seeds, rows[1.0].mean) == (0, 3.2)
    assert rows[1.0].delta == pytest.approx(3.2 - 9.0)
    assert math.isnan(rows[10.0].mean)
    copy = run(10.0, 9.0, free=True)
    failed = [replace(t, state="diverged", value=None) if t.max_norm == 1 else t for t in trials]
    rows = {r.max_norm: r for r in verdict(settings, [*failed, copy]).explored}
    assert (rows[10.0].free, rows[10.0].delta, rows[1.0].failed) == (1, 0.0, 1)
    more = fresh({N: 9.0, C: 4.0, S: 4.0, (4.0, 1.0): 7.0, (1.0, 1.0): 5.0, (10.0, 1.0): 9.0}, 2)
    assert verdict(settings, [*explored(), *more]).explored == ()
    alone = verdict(settings, explored()).explored
    assert [r.max_norm for r in alone] == [INF, 0.3, 0.8, 4.0, 1.0, 10.0]
