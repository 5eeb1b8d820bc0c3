"""What clipping was good for: which further runs are asked for, and what is said of them."""

import math

import pytest
from made_up_sweep import LOSSES, made_up, made_up_sweep

import purposes  # isort: skip - the studies are scripts; made_up_sweep finds them

RATES = {0.055: 2.5, 0.17: 2.5}  # added ones, and what no clipping scores there


@pytest.fixture
def stored(tmp_path):
    """Two made-up studies: 0.1 is the best rate without clipping, at 0.3 only clipping learns."""
    return made_up_sweep(tmp_path / "sweep.jsonl.gz")


def of(sweep, name="made up"):
    """The pair of one study."""
    return next(pair for pair in purposes.pairs(sweep) if pair.study == name)


def add_rates(sweep):
    """Rates on both sides of the best one, with clipping and without."""
    for lr, loss in RATES.items():
        for seed in range(3):
            sweep.rows += [made_up("rate", lr, m, seed, loss) for m in (1.9, math.inf)]


def confirm(sweep, clipped=2.0):
    """Fresh seeds that repeat what the sweep found; at 0.3 the best clipped value as given."""
    known = {(lr, m): loss for lr, losses in LOSSES.items() for m, loss in losses.items()}
    known[0.3, 1.0] = clipped
    cells = [(lr, m) for lr, limits in purposes.confirmed(of(sweep)).items() for m in limits]
    for lr, m in cells:
        loss = known.get((lr, m), RATES.get(lr, LOSSES.get(lr, {}).get(1.9)))
        sweep.rows += [made_up("confirm", lr, m, seed, loss) for seed in purposes.FRESH]


def said(sweep, lr):
    pair = of(sweep)
    return purposes.in_short(purposes.verdict_at(pair, lr), pair)


def test_the_best_of_each_rate(stored):
    """No clipping beside the best value that clips a step, in means over the seeds."""
    tried = of(stored).tried
    assert tried[0.3] == pytest.approx(purposes.Tried(none=10.0, clipped=2.0, max_norm=1.0))
    assert tried[0.1].none == pytest.approx(2.0)


def test_rates_are_asked_for_on_both_sides_of_the_best():
    """The tool itself asks for lower ones only; here a best rate at the top is no end either."""
    assert purposes.around({1.0: 2.0, 2.0: 1.0, 4.0: 2.0}) == []
    assert purposes.around({1.0: 2.0, 2.0: 1.0}) == [6.0]
    assert purposes.around({2.0: 1.0, 4.0: 2.0}) == pytest.approx([2 / 3])
    assert purposes.around({1.0: 2.0, 4.0: 1.0, 16.0: 2.0}) == pytest.approx([8.0, 2.0])


def test_the_plan_ends_with_bracketed_rates_and_fresh_seeds(stored):
    """Rates are added until the best has near neighbours, then all arms get seeds of their own."""
    seen = []
    while left := purposes.missing(stored):
        seen.append({arm for unit in left for arm, _ in unit.arms})
        for unit in left:
            lr, seed = unit.configuration.lr, unit.seed
            loss = 2.0 + math.log(lr / 0.12) ** 2
            stored.rows += [
                made_up(arm, lr, m, seed, loss, unit.configuration.study) for arm, m in unit.arms
            ]
    assert seen[0] == {"rate"}
    assert seen[-1] == {"confirm"}
    assert purposes.around(of(stored).without) == purposes.around(of(stored).clipped) == []
    fresh = [row for row in stored.rows if row["arm"] == "confirm"]
    assert {row["seed"] for row in fresh} == set(purposes.FRESH)
    for lr in purposes.places(of(stored)):
        there = {(row["lr"], float(row["max_norm"])) for row in fresh if row["study"] == "made up"}
        assert purposes.cells(of(stored), lr) <= there


def test_an_added_rate_counts_once_all_its_seeds_are_there(stored):
    """Half of its runs would compare other seeds; they are asked for again."""
    add_rates(stored)
    assert 0.17 in of(stored).tried
    stored.rows.pop()
    assert 0.17 not in of(stored).tried
    assert purposes.rates_to_run(of(stored)) == [0.17]


def test_clipping_that_only_makes_up_for_the_rate(stored):
    """At 0.3 clipping reaches what 0.1 reaches without it."""
    add_rates(stored)
    confirm(stored)
    assert said(stored, 0.3) == "only makes up for the rate"


def test_clipping_that_gives_a_better_model(stored):
    """At 0.3 it reaches what no rate reaches without it; that is open where rates lie far apart."""
    confirm(stored, clipped=1.0)
    assert said(stored, 0.3) == "helps; other rates open"
    stored.rows = [row for row in stored.rows if row["arm"] != "confirm"]
    add_rates(stored)
    confirm(stored, clipped=1.0)
    assert said(stored, 0.3) == "better model"


def test_a_higher_rate_counts_too(stored):
    """At 0.03 clipping changes nothing, and 0.1 without it is better."""
    add_rates(stored)
    confirm(stored)
    assert said(stored, 0.03) == "another rate is better"


def test_nothing_is_said_without_fresh_seeds(stored):
    """The seeds that chose the arms confirm nothing."""
    assert said(stored, 0.3) == "not confirmed"


def test_every_training_has_its_sentence(stored):
    """Each is counted once under its kind of rate, and the suggestion beside it."""
    add_rates(stored)
    confirm(stored)
    rows = purposes.trainings([of(stored)])
    table = purposes.sentences_table(rows)
    assert table.loc["only makes up for the rate", "too high"] == 1
    assert int(table.to_numpy().sum()) == 3
    suggestions = purposes.suggestion_table(rows)
    assert suggestions.loc["against no clipping: helps", "too high"] == 1
    assert suggestions.loc["against the best found: worse", "too high"] == 1


def test_pairs_in_a_table_and_a_sentence(stored):
    """A row a task and optimizer, with the difference of clipping and none in loss units."""
    for row in stored.rows:
        if (row["arm"], row["lr"], row["max_norm"]) == ("clip", 0.3, 1.0):
            row["values"][1] -= 1.0
    add_rates(stored)
    confirm(stored, clipped=1.0)
    row = purposes.pairs_table([of(stored)]).loc["made up SGD"]
    assert row["best rate, none"] == "0.1"
    assert row["clipped - none, same rate"] == "0 and 6 of 6 failed"
    assert row["clipped - none, each at its best"].startswith("-1 (")
    told = purposes.told([of(stored)])
    assert told == "Of 1 pairs of task and optimizer: better model 1 (made up SGD)."
