"""The sweep of the studies and the tables that are made of it."""

import doctest
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from made_up_sweep import NORMS, OTHERS, STUDIES, made_up_sweep
from test_studies import skip_without_data

import candidates  # isort: skip - the studies are scripts; made_up_sweep finds them
import configurations  # isort: skip
import purposes  # isort: skip
import rules  # isort: skip
import sweep  # isort: skip

from normtune import doubts

TINY = configurations.Configuration("digits", "SGD", 0.01, {"steps": 40, "hidden": 8})


@pytest.fixture
def stored(tmp_path):
    """A sweep of two made-up studies, three rates and three seeds."""
    return made_up_sweep(tmp_path / "sweep.jsonl.gz")


# --- configurations and candidates ---


def test_there_are_enough_configurations():
    """At least 30, all different, of eight studies, with parameters that the studies know."""
    names = [c.name for c in configurations.CONFIGURATIONS]
    assert len(set(names)) == len(names) >= 30
    assert len({c.study for c in configurations.CONFIGURATIONS}) == 8


@pytest.mark.parametrize(
    ("rule", "norms", "expected"),
    [
        ("by_optimizer", NORMS, 1.5),
        ("capped", NORMS, 1.9),
        ("capped", np.array([1.0] * 60 + [10.0] * 40), 2.0),
        ("tail", NORMS, 1.9),
        ("tail", np.array([1.0] * 80 + [100.0] * 20), 1.0),
        ("lower_half", np.array([1.0] * 50 + [3.0] * 50), 1.0),
        ("unstable", NORMS, 1.9),
        ("unstable", np.append(NORMS, math.inf), 1.1),
        ("unstable", np.array([1.0] * 50 + [4.0] * 50), 1.0),
        ("calm", NORMS, 1.9),
        ("calm", np.append(NORMS, [500.0, 900.0]), 1.5),
        ("calm", np.append(NORMS, math.nan), 1.5),
    ],
)
def test_candidates_by_hand(rule, norms, expected):
    """Each candidate gives what its sentence says, on norms where that can be seen."""
    assert candidates.RULES[rule](norms, "SGD") == pytest.approx(expected)


def test_by_optimizer_is_p90_under_adam():
    """Only SGD and its momentum get the median."""
    assert candidates.by_optimizer(NORMS, "AdamW") == pytest.approx(1.9)


def test_there_are_at_most_six_candidates():
    """As fixed in the log before the sweep was read, and each is named there."""
    log = (STUDIES / "LOG.md").read_text(encoding="utf-8")
    assert len(candidates.CANDIDATES) == 6
    assert all(f"`{name}`" in log for name in candidates.CANDIDATES)


# --- which runs ---


def test_every_rule_runs_at_its_very_value():
    """All that rules and people ask for to 4 digits, no clipping first, and nothing twice."""
    values = sweep.values_to_run(NORMS, "SGD")
    assert values[0] == math.inf
    assert {*OTHERS, 1.9, 1.0, 10.0} <= set(values)
    assert len(set(values)) == len(values)


def test_a_dead_warm_up_leaves_the_fixed_values():
    """Too few finite norms carry no rule, but 1 and 10 can still be tried."""
    values = sweep.values_to_run(np.array([1.0] * 5 + [math.nan] * 20), "SGD")
    assert values == [math.inf, *sweep.FIXED]


def test_free_runs_are_the_runs_they_stand_for():
    """A run copied from the unclipped one equals the trained one to the last digit."""
    pytest.importorskip("sklearn")
    none = sweep.train_once(TINY, 0, "clip", math.inf)
    limit = 1.001 * none["largest"]
    unit = sweep.Unit(TINY, 0, (("clip", limit), ("clip", 0.01)), none)
    free, clipped = sweep.carry_out(unit)
    trained = sweep.train_once(TINY, 0, "clip", limit)
    assert free["free"]
    assert not clipped["free"]
    assert free["values"] == trained["values"] != clipped["values"]
    assert clipped["clipped"] == 1.0
    assert len(none["norms"]) == 40


@pytest.mark.parametrize(("arm", "package"), [("AutoClip p10", "autoclip"), ("ZClip", "zclip")])
@pytest.mark.filterwarnings("ignore")  # those packages' own
def test_other_clippers_act(arm, package):
    """The published packages clip from within the step, so the model becomes another one."""
    pytest.importorskip("sklearn")
    pytest.importorskip(package)
    none = sweep.train_once(TINY, 0, "clip", math.inf)
    other = sweep.train_once(TINY, 0, arm, math.inf)
    assert other["values"][0] == none["values"][0]
    assert other["values"][-1] != none["values"][-1]
    assert "norms" not in other


def test_the_rate_warms_up_and_stays():
    """The rate grows evenly over a tenth of the steps."""
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2.0)
    before = sweep.warm_rate(optimizer, 40)
    rates = []
    for _ in range(6):
        before()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


# --- the store ---


def test_the_store_comes_back(stored):
    """What was saved is read back, and a second start finds nothing to do."""
    stored.add([])
    again = sweep.Sweep.load(stored.path)
    assert again.rows == stored.rows
    assert again.environments == stored.environments


def test_a_sweep_goes_on_where_it_stopped(tmp_path):
    """Only the runs that are not in the store are planned."""
    pytest.importorskip("sklearn")
    found = sweep.Sweep(tmp_path / "sweep.jsonl.gz", environments=[{}])
    unit = sweep.missing(found, TINY, "none", 0)
    assert unit.arms == (("clip", math.inf),)
    found.add(sweep.carry_out(unit))
    later = sweep.missing(found, TINY, "clip", 0)
    assert len(later.arms) > 8
    assert ("clip", math.inf) not in later.arms
    found.add([found.rows[0] | {"max_norm": later.arms[0][1]}])
    rest = sweep.missing(sweep.Sweep.load(found.path), TINY, "clip", 0)
    assert rest.arms == later.arms[1:]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the packages that clip
@pytest.mark.parametrize("study", sorted({c.study for c in configurations.CONFIGURATIONS}))
def test_one_configuration_end_to_end(study, tmp_path):
    """From the unclipped run to its row in the tables, with two seeds of 40 steps."""
    skip_without_data(study)
    pytest.importorskip("autoclip")
    pytest.importorskip("zclip")
    whole = next(c for c in configurations.CONFIGURATIONS if c.study == study)
    short = replace(whole, others={**whole.others, "steps": 40})
    found = sweep.Sweep(tmp_path / "sweep.jsonl.gz", environments=[{}])
    for kind, seed in sweep.stages(2):
        found.add(sweep.carry_out(sweep.missing(found, short, kind, seed)))
        assert sweep.missing(found, short, kind, seed).arms == ()
    (curve,) = rules.all_of(sweep.Sweep.load(found.path))
    assert len(curve.scores) == len(curve.others) == 2
    assert list(rules.configurations_table([curve]).index) == [whole.name]
    methods = rules.regrets([curve])["method"]
    assert {*candidates.RULES, *rules.FIXED, *sweep.ONLINE} == set(methods)


# --- the tables ---


def test_the_searched_rate_is_the_best_unclipped_one(stored):
    """Rates below it are low, rates above it too high."""
    regime = rules.regimes(rules.curves(stored))
    assert regime["made up SGD 0.1"] == "searched"
    assert regime["made up SGD 0.03"] == "low"
    assert regime["made up SGD 0.3"] == "too high"


def test_regret_by_hand(stored):
    """p90 = 1.9 loses 2 of a range of 8 where 1.0 is best, and nothing where it is best."""
    data = rules.regrets(rules.curves(stored)).set_index(["method", "configuration"])
    assert data.loc[("p90", "made up SGD 0.3"), "lost"] == pytest.approx(0.25)
    assert data.loc[("p90", "made up SGD 0.1"), "lost"] == pytest.approx(0.0)
    assert data.loc[("no clipping", "made up SGD 0.3"), "lost"] == pytest.approx(1.0)
    assert data.loc[("no clipping", "made up SGD 0.3"), "failed"] == 3
    assert data.loc[("p90", "made up SGD 0.3"), "in sd"] == pytest.approx(2.0 / 0.1)
    assert data.loc[("ZClip", "made up SGD 0.3"), "lost"] == pytest.approx(0.5 / 8)


def test_the_best_is_chosen_on_other_seeds():
    """A value that won on one seed by luck is not taken as the best of that seed."""
    lucky = pd.DataFrame({1.0: [5.0, 5.0, 5.0], 2.0: [1.0, 8.0, 8.0]})
    nothing = lucky > 100
    found = rules.Curve("c", "s", "SGD", 1.0, 9, lucky, nothing, lucky, lucky, nothing, 10.0, NORMS)
    assert list(found.best_elsewhere) == [5.0, 8.0, 8.0]


def test_bootstrap_over_tasks_is_scipy_s():
    """The mean over tasks, each task counted once however many configurations it has."""
    part = pd.DataFrame({"study": ["a", "a", "b", "c"], "lost": [0.0, 0.2, 0.4, 0.6]})
    mean, low, high = rules.over_tasks(part)
    assert mean == pytest.approx(np.mean([0.1, 0.4, 0.6]))
    assert 0.1 <= low < mean < high <= 0.6


def test_no_candidate_wins_by_failing(stored):
    """What fails where the default doesn't replaces nothing, and a tie doesn't either."""
    table = rules.candidates_table(rules.regrets(rules.curves(stored)))
    assert set(table["replaces p90"]) == {"no"}


def test_a_clear_win_would_replace_the_default(stored):
    """The guard can fail: losses that are lower on every task make a candidate the default."""
    data = rules.regrets(rules.curves(stored))
    better = data["method"] == "capped"
    gain = data["study"].map({"made up": 0.1, "another": 0.2})
    data.loc[better, "lost"] -= gain[better]
    table = rules.candidates_table(data)
    assert table.loc["capped", "replaces p90"] == "yes"


def test_the_short_answer_names_what_people_use(stored):
    """The default beside p10, 1.0, no clipping and the packages, at good and too high rates."""
    table = rules.short_table(rules.regrets(rules.curves(stored)))
    assert list(table["p90"]) == ["0.0 %", "25.0 %", "0 of 6"]
    assert list(table["1.0"]) == ["12.5 %", "0.0 %", "0 of 6"]
    assert list(table["no clipping"]) == ["0.0 %", "100.0 %", "6 of 6"]
    assert {"p10", "AutoClip p10", "ZClip"} < set(table)


def test_what_never_learned_is_left_out(stored):
    """A configuration that failed at every max_norm tells no rule from another, and is named."""
    for row in stored.rows:
        if row["study"] == "another" and row["lr"] == 0.3:
            row |= {"state": "stuck", "values": [10.0, 9.9]}
    assert rules.hopeless(stored) == ["another SGD 0.3"]
    assert len(rules.curves(stored)) == 5


def test_a_run_too_few_is_named(stored):
    """A value that was never run is an error that says what to do, and no neighbour's result."""
    with pytest.raises(LookupError, match=r"not run at 0\.01; run studies/sweep.py again"):
        rules.curves(stored)[0].column(0.01)


def test_interpolation_meets_the_runs(stored):
    """At a value that was run it gives that run, and beyond the last one no clipping."""
    first = rules.curves(stored)[0]
    assert rules.between(first, 1.9, first.means) == pytest.approx(first.means[1.9])
    assert rules.between(first, 99.0, first.means) == first.means[math.inf]


def test_the_page_is_written_from_the_results(stored, tmp_path):
    """Every study and configuration has its row, and the pictures are drawn."""
    pytest.importorskip("matplotlib")
    import readme

    page = readme.write(stored, tmp_path)
    assert "6 configurations of 2 studies (6 with 3 seeds)" in page
    assert "| made up SGD 0.3 | too high |" in page
    assert all(f"]({name}.py)" in page for name in readme.ORDER)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert (tmp_path / "rules.png").stat().st_size > 1000


def test_the_page_shows_the_stored_results():
    """README.md of the studies is that of the sweep beside it; studies/readme.py writes it."""
    pytest.importorskip("matplotlib")
    import readme

    found = sweep.Sweep.load()
    data, in_pairs = rules.regrets(rules.curves(found)), purposes.pairs(found)
    page = (STUDIES / "README.md").read_text(encoding="utf-8")
    assert readme.markdown(rules.rules_table(data)) in page
    assert readme.markdown(rules.candidates_table(data)) in page
    assert readme.markdown(purposes.pairs_table(in_pairs)) in page
    project = (STUDIES.parent / "README.md").read_text(encoding="utf-8")
    assert readme.with_answers(project, readme.short(data, in_pairs)) == project


def test_the_stored_sweep_is_whole():
    """Five seeds and more of everything, packages too, and no run of the tables is missing."""
    found = sweep.Sweep.load()
    all_curves = rules.curves(found)
    assert len(all_curves) + len(rules.hopeless(found)) == len(configurations.CONFIGURATIONS)
    seeds = rules.regrets(all_curves)["runs"]
    assert seeds.min() == seeds.max() >= 5
    assert purposes.missing(found) == []


def test_short_warm_ups_misjudge_as_the_doubt_says():
    """`normtune.doubts.COVERED`: below it every second share is off by more than 3 x, above few."""
    rows = rules.warmup_rows(rules.curves(sweep.Sweep.load()))
    off = rows.groupby("length")["realised"].agg(rules.misjudged)
    shares = {share: off[f"{100 * share:g} %"] for share in rules.LENGTHS}
    assert min(part for share, part in shares.items() if share < doubts.COVERED) > 0.4
    assert max(part for share, part in shares.items() if share >= doubts.COVERED) < 0.25


@pytest.mark.parametrize("module", [sweep, rules, purposes])
def test_examples_in_docstrings(module):
    """What the docstrings show is what comes out."""
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert found.attempted
    assert not found.failed
