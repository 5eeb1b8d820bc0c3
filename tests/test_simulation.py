"""The simulation that the planner's thresholds come from: its truths hold, and a small run works."""

import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from normtune.plan import Planned, free_from

STUDIES = Path(__file__).parent.parent / "studies"
SIMULATION = runpy.run_path(str(STUDIES / "simulation.py"), run_name="simulation")
World, SHAPES = SIMULATION["World"], SIMULATION["SHAPES"]


def train(world, max_norm, seed, lr=1.0):
    return world.train(Planned(max_norm, lr, seed, "explore", free=False, reason=""))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_world_is_what_it_says(shape):
    """The best is no worse than no clipping, and from the largest norm up nothing clips."""
    world = World(shape, "flat", 3)
    max_norm, cost = world.best
    assert cost <= world.cost(math.inf)
    assert cost == world.cost(max_norm)
    assert world.mean(2 * world.p["largest"]) == world.mean(math.inf)


def test_a_run_that_clips_nothing_is_the_unclipped_run():
    """Above the seed's largest norm the value is that of no clipping, below it is not."""
    world = World("U inside the norms", "flat", 1, stuck=0.0)
    base = train(world, math.inf, 5)
    limit = free_from(base.largest_norm, half_precision=False)
    assert train(world, limit, 5).value == base.value
    assert train(world, 0.99 * base.largest_norm, 5).value != base.value


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_arms_share_their_seeds_as_told(rho):
    """The correlation between two arms over seeds is the world's."""
    world = World("flat", "flat", 2, correlation=rho, noise_ratio=1.0, stuck=0.0)
    low, none = 0.1 * world.p["median"], math.inf
    values = np.array([[train(world, c, s).value for c in (low, none)] for s in range(400)])
    assert np.corrcoef(values.T)[0, 1] == pytest.approx(rho, abs=0.1)
    assert values.std(axis=0) == pytest.approx([1.0, 1.0], abs=0.12)


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("better model", 2, 10), ("rate too high", -0.3, 0.3)]
)
def test_the_best_lower_rate_is_as_far_as_the_kind_says(kind, low, high):
    """The gap between the best clipped value and the best unclipped rate is the truth scored."""
    for number in range(5):
        world = World("plateau with cliff", kind, number)
        best_rate = min(world.unclipped(f) for f in np.geomspace(0.01, 1, 400))
        clipped = min(world.clipped(c) for c in np.geomspace(world.low, world.p["largest"], 400))
        assert low - 0.1 <= best_rate - clipped <= high + 0.1


def test_scoring_worlds_are_not_tuning_worlds():
    """Same shape, same number: other norms, other heights."""
    tuning, scoring = (World(SHAPES[0], "better model", 0, r) for r in ("tuning", "scoring"))
    assert tuning.p["median"] != scoring.p["median"]
    assert tuning.p["height"] != scoring.p["height"]


def test_a_small_run_writes_its_tables(tmp_path, monkeypatch, capsys):
    """Two worlds of each kind give every table, as JSON and as a page; a second call adds to it."""
    for only in (["--only", "search", "--strategy", "normtune explore"], ["--only", "verdict"]):
        words = ["--tuning", "--worlds", "2", "--budgets", "12", "--out", str(tmp_path), *only]
        monkeypatch.setattr(sys, "argv", ["simulation.py", *words])
        SIMULATION["main"]()
    page = (tmp_path / "simulation.md").read_text()
    assert capsys.readouterr().out.strip().endswith(page.strip())
    stored = json.loads((tmp_path / "simulation.json").read_text())
    assert {row["shape"] for row in stored["search"]} == {*SHAPES, "all"}
    assert {row["truth"] for row in stored["verdicts"]} >= {"placebo", "better model"}
    assert "| within one sd after 12 runs: all | at least 0.95 |" in page
