"""Searches replayed on a sweep: the stored trainings are objectives, failures and all."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from made_up_sweep import NORMS, STUDIES, made_up_sweep

sys.path.insert(0, str(STUDIES))

import replay
import rules


@pytest.fixture
def stored(tmp_path):
    return made_up_sweep(tmp_path / "sweep.jsonl.gz")


@pytest.fixture
def objectives(stored):
    """Of the rate that is too high: 1.0 costs 2, 1.9 costs 4, and without clipping it fails."""
    found = rules.curves(stored)
    (curve,) = [c for c in found if (c.study, c.lr) == ("made up", 0.3)]
    return replay.replayed(stored, curve, found)


def test_what_was_run_is_found_again(objectives):
    """Each stored run is the objective at its max_norm."""
    for of in objectives:
        reached = {c: row for c, row in of.rows.items() if c < 2 or math.isinf(c)}
        assert len(reached) > 8
        for max_norm, row in reached.items():
            trial = of.train(max_norm)
            assert (trial.state, trial.value) == (row["state"], row["values"][-1])
            assert of.cost(max_norm) == (row["values"][-1] if trial.state == "finished" else 10.0)


def test_between_two_runs_it_is_interpolated_in_the_logarithm(objectives):
    """Half way between 1.0 and 1.1 in log(max_norm), in this seed alone."""
    of = objectives[1]
    middle = math.sqrt(1.0 * 1.1)
    expected = np.mean([of.rows[c]["values"][-1] for c in (1.0, 1.1)])
    assert of.train(middle).value == pytest.approx(expected)
    assert of.train(1e-3).value == of.rows[0.5]["values"][-1]


def test_beside_a_failure_the_nearer_run_decides(objectives):
    """And from the largest norm, 2.0, up it is the unclipped run, which failed."""
    of = objectives[0]
    broken = dict(of.rows) | {1.441: of.rows[1.441] | {"state": "stuck"}}
    of = replace(of, rows=broken)
    assert [of.train(c).state for c in (1.2, 1.3, 1.46, 1.49)] == [
        "finished",
        "stuck",
        "stuck",
        "finished",
    ]
    assert of.train(1.2).value == of.rows[1.1]["values"][-1]
    assert of.cost(1.3) == 10.0
    assert [of.train(c).state for c in (2.1, 500.0, math.inf)] == ["stuck"] * 3


def test_the_study_is_what_a_user_would_have_started(objectives):
    """Its suggestion and range come from the norms of the unclipped run of the same seed."""
    settings = objectives[2].settings
    assert settings.suggestion == pytest.approx(np.percentile(np.tile(NORMS, 4), 90))
    assert (settings.seed, settings.high) == (2, 2.0)


def test_regret_is_counted_on_the_other_seeds(objectives):
    """In sd of one run, from the best stored value there; failures cost the worst."""
    sd = objectives[0].curve.sd
    assert replay.regret(objectives, 0, 1.0) == 0.0
    assert replay.regret(objectives, 0, 1.9) == min(2.0 / sd, replay.WORST)
    assert replay.regret(objectives, 0, math.inf) == replay.WORST


def test_the_replay_writes_its_tables(stored, tmp_path, monkeypatch, capsys):
    """Every search by task, the difference to TPE with its error, as JSON and as a page."""
    stored.save()
    words = ["--results", str(stored.path), "--without", "GPSampler", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["replay.py", *words])
    replay.main()
    page = (tmp_path / "replay.md").read_text()
    assert capsys.readouterr().out.strip() == page.strip()
    result = json.loads((tmp_path / "replay.json").read_text())
    assert (result["seeds"], result["configurations"]) == (3, 6)
    last = result["regret"]["12"]
    assert set(last) == {"made up", "another", "all"}
    assert last["made up"]["normtune"] < last["made up"]["none, no search"]
    gap = result["against"]["TPE"]["12"]["all"]["mean"]
    assert gap == pytest.approx(last["all"]["normtune"] - last["all"]["TPE"], abs=2e-3)
    assert "| made up | " in page
