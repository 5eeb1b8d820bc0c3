"""The planner as a table: trials so far -> next runs."""

import itertools
import math
import zlib
from dataclasses import replace

import numpy as np
import pytest

from normtune.plan import (
    Planned,
    Settings,
    Trial,
    _looks,
    describe_plan,
    free_from,
    next_runs,
    split,
)
from normtune.trials import settle, state_of

INF = math.inf
SETTINGS = Settings(24, suggestion=0.8, low=0.01, high=5.0)


def ended(max_norm, value, *, lr=1.0, seed=0, stage="explore", largest=20.0, **other):
    """A finished training; value None is a diverged one."""
    state = other.pop("state", "finished" if value is not None else "diverged")
    largest = INF if state == "diverged" else largest
    return Trial(max_norm, lr, seed, state, stage, value, largest_norm=largest, **other)


def running(max_norm, *, lr=1.0, seed=0, stage="explore"):
    return Trial(max_norm, lr, seed, "running", stage)


def crashed(max_norm, *, lr=1.0, seed=0, stage="explore"):
    return Trial(max_norm, lr, seed, "crashed", stage)


def cells(plan):
    """The planned runs as (max_norm, lr_factor, seed), rounded."""
    return [(round(r.max_norm, 4), round(r.lr_factor, 4), r.seed) for r in plan.runs]


NONE = ended(INF, 9.0)
GAP = math.sqrt(0.01 * 0.8)  # the middle of the widest gap
FIRST = [NONE, ended(0.8, 3.0), ended(1.0, 3.2), ended(10.0, 8.0), ended(GAP, 3.0)]
# Seven explored values, clipping far ahead.
EXPLORED = [*FIRST, ended(0.3, 1.5), ended(0.15, 2.6)]
# Clipped values no better than no clipping.
LEVEL = [
    ended(INF, 3.0),
    *(ended(c, 3 + d) for c, d in ((0.8, 0.1), (1, -0.1), (10, 0), (GAP, 0.2), (0.3, 0), (2, 0.1))),
]
LOWER = [ended(INF, 5.0, lr=1 / 3, stage="lr"), ended(INF, 8.0, lr=0.1, stage="lr")]
BRACKETED = [
    *LOWER,
    ended(INF, 6.0, lr=3**-0.5, stage="lr"),
    ended(INF, 6.5, lr=30**-0.5, stage="lr"),
]
RATES = (1.0, 1 / 3, 3**-0.5)


def confirmed(*arms, seeds):
    """Finished fresh runs: (max_norm, lr_factor, mean); seeds differ by little."""
    return [
        ended(
            c,
            mean + 0.1 * math.sin(7 * seed + c if c < INF else seed),
            lr=lr,
            seed=seed,
            stage="confirm",
        )
        for c, lr, mean in arms
        for seed in seeds
    ]


TABLE = {
    "nothing yet: no clipping on the explore seed": ([], "explore", [(INF, 1.0, 0)]),
    "no clipping runs: wait for its norms": ([running(INF)], "explore", []),
    "no clipping is known: suggestion, 1, 10, and the widest gap": (
        [NONE],
        "explore",
        [(0.8, 1.0, 0), (1.0, 1.0, 0), (10.0, 1.0, 0), (0.0894, 1.0, 0)],
    ),
    "what runs or is done is not planned again": (
        [NONE, running(0.8), ended(10.0, 8.0)],
        "explore",
        [(1.0, 1.0, 0), (0.0894, 1.0, 0)],
    ),
    "a crash is tried once more, first of all": (
        [NONE, crashed(1.0), ended(0.8, 3.0)],
        "explore",
        [(1.0, 1.0, 0), (10.0, 1.0, 0), (0.0894, 1.0, 0)],
    ),
    "two crashes: left out": (
        [NONE, crashed(1.0), crashed(1.0), ended(0.8, 3.0)],
        "explore",
        [(10.0, 1.0, 0), (0.0894, 1.0, 0)],
    ),
    "two crashes without clipping: nothing to compare with": ([crashed(INF)] * 2, "done", []),
    "explore is spent, a run goes on: wait": (
        [*EXPLORED[:-1], running(0.15)],
        "explore",
        [],
    ),
    "clipping clearly leads: a third and a tenth of the rate": (
        EXPLORED,
        "lr",
        [(INF, 0.3333, 0), (INF, 0.1, 0)],
    ),
    "the first rates run: wait": (
        [*EXPLORED, LOWER[0], running(INF, lr=0.1, stage="lr")],
        "lr",
        [],
    ),
    "a third is best: bisect to both sides": (
        [*EXPLORED, *LOWER],
        "lr",
        [(INF, 0.5774, 0), (INF, 0.1826, 0)],
    ),
    "a tenth is best: extend below, bisect above": (
        [*EXPLORED, LOWER[0], ended(INF, 4.0, lr=0.1, stage="lr")],
        "lr",
        [(INF, 0.1826, 0), (INF, 0.0333, 0)],
    ),
    "the full rate is best: only below it": (
        [
            *EXPLORED,
            ended(INF, 9.5, lr=1 / 3, stage="lr"),
            ended(INF, 9.9, lr=0.1, stage="lr"),
        ],
        "lr",
        [(INF, 0.5774, 0)],
    ),
    "bracketed: none, best and both lower rates on two fresh seeds": (
        [*EXPLORED, *BRACKETED],
        "confirm",
        [
            (c, lr, seed)
            for seed in (1, 2)
            for c, lr in ((INF, 1.0), (0.3, 1.0), (INF, 0.3333), (INF, 0.5774))
        ],
    ),
    "no clear lead: no learning-rate search, none and best on fresh seeds": (
        LEVEL,
        "confirm",
        [(c, 1.0, seed) for seed in (1, 2) for c in (INF, 0.8)],
    ),
    "arms far behind get no third seed; the suggestion comes next": (
        [
            *EXPLORED,
            *BRACKETED,
            *confirmed(
                (INF, 1.0, 9.0),
                (0.3, 1.0, 2.0),
                (INF, 1 / 3, 5.0),
                (INF, 3**-0.5, 6.0),
                seeds=(1, 2),
            ),
        ],
        "confirm",
        [(0.8, 1.0, 1), (0.8, 1.0, 2), (0.8, 1.0, 3), (0.3, 1.0, 3), (INF, 1.0, 3)],
    ),
}


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_next_runs(case):
    """The trials so far give these runs, in this order, and this stage."""
    trials, stage, expected = TABLE[case]
    plan = next_runs(SETTINGS, trials)
    assert (plan.stage, cells(plan)) == (stage, expected)
    assert plan.reason
    assert all(run.reason and run.stage == stage for run in plan.runs)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_trials_does_not_matter(seed):
    """The plan is a function of the set of trials."""
    trials = [*EXPLORED, *LOWER, crashed(0.2)]
    shuffled = [trials[i] for i in np.random.default_rng(seed).permutation(len(trials))]
    assert next_runs(SETTINGS, shuffled) == next_runs(SETTINGS, trials)


def test_permuting_seed_labels_changes_no_ask():
    """Neither another explore seed nor other labels of fresh seeds change what is asked."""
    plan = next_runs(SETTINGS, FIRST)
    moved = [replace(t, seed=t.seed + 7) for t in FIRST]
    other = next_runs(replace(SETTINGS, seed=7), moved)
    assert [r.max_norm for r in other.runs] == [r.max_norm for r in plan.runs]
    fresh = confirmed((0.3, 1.0, 2.0), seeds=(1, 2, 3))
    relabelled = [replace(t, seed=4 - t.seed) for t in fresh]
    assert next_runs(SETTINGS, [*FIRST, *fresh]) == next_runs(SETTINGS, [*FIRST, *relabelled])


@pytest.mark.parametrize("helps", [True, False])
def test_permuting_the_seeds_of_a_look_changes_no_ask(helps):
    """Seeds that were run together are exchangeable: whatever their labels, the same comes next."""
    swapped = {1: 2, 2: 1, 4: 6, 5: 4, 6: 5, 7: 9, 8: 7, 9: 10, 10: 8}
    settings = replace(SETTINGS, max_runs=60, current=2.0)
    trials, asked = [], 0
    while runs := next_runs(settings, trials).runs:
        trials += [simulated(run, helps=helps) for run in runs]
        moved = [replace(t, seed=swapped.get(t.seed, t.seed)) for t in trials]
        plan, other = next_runs(settings, trials), next_runs(settings, moved)
        assert cells(other) == cells(plan)
        asked += plan.stage == "confirm"
    assert asked >= 3


def test_maximize_mirrors_minimize():
    """A study that maximizes plans as one that minimizes the negative value."""
    mirrored = [replace(t, value=-t.value) for t in EXPLORED]
    flipped = replace(SETTINGS, direction="maximize")
    assert next_runs(flipped, mirrored) == next_runs(SETTINGS, EXPLORED)


def test_parallel_slots_get_different_values():
    """With asked values still running, the next ask is another one, away from them."""
    trials = list(FIRST)
    for _ in range(2):
        (run,) = next_runs(SETTINGS, trials).runs
        trials.append(running(run.max_norm))
    values = [t.max_norm for t in trials if t.max_norm < INF]
    apart = [abs(math.log10(a / b)) for a, b in itertools.combinations(values, 2)]
    assert min(apart) > 0.039
    assert next_runs(SETTINGS, trials).runs == ()


def test_values_beyond_the_largest_norm_are_free():
    """10 is copied where no norm reached it, costs no run, and is never asked for again."""
    base = ended(INF, 9.0, largest=4.0)
    plan = next_runs(SETTINGS, [base])
    assert {r.max_norm: r.free for r in plan.runs if r.max_norm in (1.0, 10.0)} == {
        1.0: False,
        10.0: True,
    }
    copy = Trial(10.0, 1.0, 0, "finished", "explore", 9.0, free=True, largest_norm=4.0)
    trials = [base, copy]
    while (plan := next_runs(SETTINGS, trials)).stage == "explore":
        trials += [ended(r.max_norm, 3.0 + r.max_norm, largest=4.0) for r in plan.runs]
        assert all(r.max_norm < free_from(4.0, half_precision=False) for r in plan.runs)
    assert sum(not t.free for t in trials) == split(SETTINGS).explore


@pytest.mark.parametrize(
    ("max_norm", "other", "free"),
    [
        (4.00001, {}, True),
        (4.000001, {}, False),
        (4.03, {"half_precision": True}, False),
        (4.05, {"half_precision": True}, True),
        (8.0, {"reuse": False}, False),
    ],
)
def test_free_is_what_torch_leaves_untouched(max_norm, other, free):
    """Free from 1.000001 x largest + 1e-6 up, from 1.01 x in half precision, never without reuse."""
    settings = replace(SETTINGS, current=max_norm, **other)
    plan = next_runs(settings, [ended(INF, 9.0, largest=4.0)])
    assert [r.free for r in plan.runs if r.max_norm == max_norm] == [free]


@pytest.mark.parametrize("norm", [0.0123, 1.0, 3.7, 812.0])
def test_torch_agrees_that_the_coefficient_is_one(norm):
    """At the smallest free max_norm torch multiplies by exactly 1.0 in fp32."""
    import torch

    gradient = torch.full((64,), norm / 8)
    parameter = torch.nn.Parameter(torch.zeros(64))
    parameter.grad = gradient.clone()
    largest = float(torch.linalg.vector_norm(gradient))
    torch.nn.utils.clip_grad_norm_([parameter], free_from(largest, half_precision=False))
    assert torch.equal(parameter.grad, gradient)


def test_an_arm_that_is_likely_free_waits_for_the_unclipped_run():
    """A current value that was free on one seed is not trained on another before it is known."""
    settings = replace(SETTINGS, current=30.0)
    fresh = confirmed((INF, 1.0, 3.0), (0.8, 1.0, 3.0), seeds=(1, 2))
    trials = [*LEVEL, ended(30.0, 3.0, free=True), *fresh]
    for _ in range(10):
        plan = next_runs(settings, trials)
        current = [r for r in plan.runs if r.max_norm == 30.0]
        assert all(r.free for r in current)
        if current:
            break
        trials += [
            ended(r.max_norm, 3.0, lr=r.lr_factor, seed=r.seed, stage="confirm") for r in plan.runs
        ]
    assert current


@pytest.mark.parametrize("max_runs", [4, 5, 8, 11, 12, 16, 24, 30, 40, 60])
@pytest.mark.parametrize("helps", [True, False])
def test_any_budget_ends_and_is_kept(max_runs, helps):
    """A study of any size ends, spends no more than its runs and plans nothing twice."""
    settings = replace(SETTINGS, max_runs=max_runs, current=2.0)
    trials, seen = [], set()
    while runs := next_runs(settings, trials).runs:
        run = runs[0]
        assert (run.max_norm, run.lr_factor, run.seed) not in seen
        seen.add((run.max_norm, run.lr_factor, run.seed))
        trials.append(simulated(run, helps=helps))
    assert next_runs(settings, trials).stage == "done"
    assert sum(not t.free for t in trials) <= max_runs
    assert max_runs >= 12 or all(t.stage == "explore" for t in trials)


@pytest.mark.parametrize("cut", range(1, 40, 4))
def test_a_killed_study_goes_on_alike(cut):
    """The trials of a study that lost what was running end the same."""
    trials, other = [], []
    while runs := next_runs(SETTINGS, trials).runs:
        trials.append(simulated(runs[0]))
        lost = [*other, replace(simulated(runs[0]), state="running", value=None)]
        next_runs(SETTINGS, lost)
        if len(other) < cut:
            other.append(trials[-1])
    while runs := next_runs(SETTINGS, other).runs:
        other.append(simulated(runs[0]))
    assert other == trials


def test_slots_in_parallel_spend_the_same_budget():
    """Four slots that end in random order spend no more, and plan nothing twice."""
    rng = np.random.default_rng(3)
    done, busy, seen = [], [], set()
    while True:
        waiting = [replace(t, state="running", value=None) for t in busy]
        for run in next_runs(SETTINGS, [*done, *waiting]).runs[: 4 - len(busy)]:
            assert (run.max_norm, run.lr_factor, run.seed) not in seen
            seen.add((run.max_norm, run.lr_factor, run.seed))
            busy.append(simulated(run))
        if not busy:
            break
        done.append(busy.pop(rng.integers(len(busy))))
    assert len(done) <= SETTINGS.max_runs


def simulated(run: Planned, *, helps=True):
    """A training with a best max_norm of 0.3 and a best unclipped rate of a third."""
    name = f"{run.max_norm:.9g} {run.lr_factor:.9g}"
    own = np.random.default_rng([zlib.crc32(name.encode()), run.seed]).normal(0, 0.5)
    shared = np.random.default_rng(run.seed).normal(0, 0.3)
    place = min(run.max_norm, 20.0)
    value = 2 + 4 * math.log10(place / 0.3) ** 2 if helps else 3.0
    if run.lr_factor != 1.0 and run.max_norm == INF:
        value = 4 + 8 * math.log10(run.lr_factor * 3) ** 2
    value += own + shared
    return ended(
        run.max_norm, value, lr=run.lr_factor, seed=run.seed, stage=run.stage, free=run.free
    )


def test_confirm_runs_train_in_full():
    """explore_fraction shortens explore and learning-rate runs, never confirm."""
    settings = replace(SETTINGS, explore_fraction=0.5)
    for trials in ([NONE], EXPLORED, [*EXPLORED, *BRACKETED]):
        plan = next_runs(settings, trials)
        assert {r.fraction for r in plan.runs} == {1.0 if plan.stage == "confirm" else 0.5}


@pytest.mark.parametrize(("least", "looks"), [(3, (3, 6, 10)), (4, (4, 10)), (8, (8,))])
def test_min_seeds_are_had_by_every_arm_that_is_compared(least, looks):
    """No arm is dropped before, the sentence's arms come together, and there is no look more."""
    settings = replace(SETTINGS, max_runs=60, min_seeds=least)
    assert _looks(settings) == looks
    trials = []
    while runs := next_runs(settings, trials).runs:
        if runs[0].stage == "confirm" and not any(t.stage == "confirm" for t in trials):
            assert {run.seed for run in runs} == set(range(1, least + 1))
            assert len({(run.max_norm, run.lr_factor) for run in runs}) == 4
        trials += [simulated(run) for run in runs]
    fresh = [
        t.arm for t in trials if t.stage == "confirm" and (t.lr_factor == 1 or t.max_norm == INF)
    ]
    assert min(fresh.count(arm) for arm in fresh) >= least
    assert {fresh.count(arm) for arm in fresh} <= set(looks)


def test_min_seeds_need_a_budget():
    """Four arms of six seeds are 24 runs of confirmation."""
    six = replace(SETTINGS, min_seeds=6)
    assert split(six).sentences == (4, 5, 6)
    assert split(replace(six, max_runs=40)).sentences == (1, 2, 3, 4, 5, 6)


def test_clipping_is_tried_at_the_lower_rate_that_wins():
    """From 40 runs up, on the seeds that this rate has; below it is not."""
    arms = confirmed(
        (INF, 1.0, 9.0), (0.3, 1.0, 5.0), (INF, 1 / 3, 2.0), (INF, 3**-0.5, 3.0), seeds=(1, 2, 3)
    )
    trials = [*EXPLORED, *LOWER, *BRACKETED[2:], *arms]
    for max_runs in (24, 40):
        settings = replace(SETTINGS, max_runs=max_runs, explore_runs=7, lr_runs=5)
        seen, plan = list(trials), None
        while runs := next_runs(settings, seen).runs:
            plan = runs
            seen += [
                ended(r.max_norm, 3.0 + 0.1 * r.seed, lr=r.lr_factor, seed=r.seed, stage=r.stage)
                for r in runs
            ]
        lower = [(r.max_norm, r.lr_factor) for r in plan] == [(0.3, 1 / 3)] * len(plan)
        assert lower == (max_runs == 40)


def test_the_gradient_kept_starts_the_extension_for_sgd_only():
    """Below the lowest rate SGD goes to the gradient kept, Adam to a third."""
    best = ended(0.3, 1.5, kept=0.012)
    trials = [*FIRST, best, ended(0.15, 2.6), LOWER[0], ended(INF, 4.0, lr=0.1, stage="lr")]
    assert (INF, 0.012, 0) in cells(next_runs(SETTINGS, trials))
    assert (INF, 0.0333, 0) in cells(next_runs(replace(SETTINGS, adaptive=True), trials))


@pytest.mark.parametrize(
    ("max_runs", "expected"),
    [
        (4, (4, 0, 0)),
        (8, (8, 0, 0)),
        (12, (6, 2, 4)),
        (16, (7, 3, 6)),
        (24, (7, 5, 12)),
        (30, (8, 6, 16)),
        (40, (10, 6, 24)),
    ],
)
def test_split(max_runs, expected):
    """max_runs is divided as the design says; every run is in one part."""
    parts = split(replace(SETTINGS, max_runs=max_runs))
    assert (parts.explore, parts.lr, parts.confirm) == expected


def test_what_a_budget_can_say():
    """8 runs say nothing, 16 never say "better model", 24 say all."""
    assert split(replace(SETTINGS, max_runs=8)).sentences == ()
    assert 1 not in split(replace(SETTINGS, max_runs=16)).sentences
    assert split(SETTINGS).sentences == (1, 2, 3, 4, 5, 6)
    assert split(replace(SETTINGS, lr_runs=0)).sentences == (4, 5, 6)


def test_describe_plan_tells_time_from_the_runs_so_far():
    """The dry run prints the split, the time at the mean of the runs so far, and the sentences."""
    assert "not known before the first run" in describe_plan(SETTINGS)
    timed = [replace(NONE, seconds=3600.0)]
    assert "about 23.0 hours at 1 run a time" in describe_plan(SETTINGS, timed)
    assert "about 11.5 hours at 2 runs a time" in describe_plan(SETTINGS, timed, jobs=2)
    assert "no sentence is within reach" in describe_plan(replace(SETTINGS, max_runs=8))


@pytest.mark.parametrize(
    ("value", "first", "direction", "state"),
    [
        (0.5, 1.0, "minimize", "finished"),
        (0.96, 1.0, "minimize", "stuck"),
        (1.5, 1.0, "minimize", "stuck"),
        (0.9, 0.1, "maximize", "finished"),
        (0.102, 0.1, "maximize", "stuck"),
        (-0.3, -0.1, "minimize", "finished"),
        (0.5, None, "minimize", "finished"),
        (None, 1.0, "minimize", "diverged"),
        (math.nan, 1.0, "minimize", "diverged"),
        (-math.inf, 1.0, "minimize", "diverged"),
    ],
)
def test_state_of(value, first, direction, state):
    """Non-finite is diverged; no better than 5 % below the first report is stuck."""
    assert state_of(value, first, direction) == state


def test_a_small_gain_is_no_failure_where_nobody_gains_more():
    """In fine-tuning, where the first report is good already, 3 % is a result."""
    small = ended(0.3, 0.97, state="stuck", first_value=1.0)
    tuned = ended(0.8, 0.94, first_value=1.0)
    learned = ended(0.8, 0.2, first_value=1.0)
    assert [t.state for t in settle([small, tuned], "minimize")] == ["finished", "finished"]
    assert [t.state for t in settle([small, learned], "minimize")] == ["stuck", "finished"]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"max_runs": 3}, "max_runs must be at least 4 but got 3"),
        ({"low": 6.0}, "low < high but got 6.0 and 5.0"),
        ({"suggestion": 0.0}, "suggestion must be above 0 but got 0.0"),
        ({"current": -1.0}, "current must be above 0 but got -1.0"),
    ],
)
def test_settings_refuse_what_cannot_be_searched(wrong, match):
    """Impossible settings are told with what came."""
    with pytest.raises(ValueError, match=match):
        replace(SETTINGS, **wrong)
