"""The controller of a search: what it makes of runs that fail, repeat or cannot be used."""

import math
from dataclasses import replace

import pytest
from finished_study import write_finished
from optuna.trial import TrialState
from small_study import optuna_study, write_study

from normtune.controller import Controller
from normtune.errors import StudyError
from normtune.ledger import Ledger
from normtune.search import search
from normtune.study import load_study


@pytest.mark.parametrize(("direction", "worst"), [("minimize", math.inf), ("maximize", -math.inf)])
def test_a_diverged_run_is_a_result(tmp_path, direction, worst):
    """Runs that end non-finite are the worst value and marked; the search goes on."""
    # Only clipped runs end well.
    after = "run.report(1.0 + run.max_norm / 1e3 + run.seed if run.max_norm < 1.2 else math.nan)"
    path = write_study(tmp_path / "study", after=after, direction=direction)
    result = search(path, max_runs=5)
    assert {t.state for t in result.trials if t.max_norm > 1.2} == {"diverged"}
    trial = optuna_study(path).trials[0]
    assert (trial.state, trial.value) == (TrialState.COMPLETE, worst)
    assert trial.user_attrs["diverged"] is True
    assert trial.user_attrs["reason"] == "the reported value was nan"


def test_a_run_whose_norms_explode_is_a_failure_unless_asked_otherwise(tmp_path):
    """Whatever it reports: dead norms are a result; with finish_diverged the value counts."""
    dies = (
        "if step == 9 and run.lr_factor == 1.0 and run.max_norm > 1.2: "
        "model.weight.data.fill_(math.nan); run.report = lambda *_: None"
    )
    first = []
    for key in ("", ", finish_diverged: true"):
        path = write_study(
            tmp_path / f"study{len(key)}",
            before=dies,
            after="return 1.0",
            search="{max_runs: 4" + key + "}",
        )
        first += [search(path).trials[0].state, optuna_study(path).trials[0].user_attrs["reason"]]
    assert first == ["diverged", "3 gradient norms in a row were not finite", "finished", ""]


def test_cheaper_runs_before_the_confirmation(tmp_path):
    """With explore_fraction they train half of the schedule, with prune the hopeless a quarter."""
    slow = "if run.max_norm < 0.1: optimizer.param_groups[0]['lr'] = 1e-4"
    path = write_study(
        tmp_path / "study", before=slow, search="{prune: true, explore_fraction: 0.5}"
    )
    body = (path.parent / "t.py").read_text()
    steps = 'run.params.get("steps", 60)'
    (path.parent / "t.py").write_text(body.replace(steps, "round(80 * run.fraction)"))
    result = search(path, max_runs=12)
    trials = [t for t in optuna_study(path).trials if not t.user_attrs["free"]]
    assert {t.user_attrs["fraction"] for t in trials} == {0.5, 1.0}
    for trial in trials:
        confirms = trial.user_attrs["stage"] == "confirm"
        pruned = trial.state == TrialState.PRUNED
        assert trial.user_attrs["fraction"] == (1.0 if confirms else 0.5)
        assert pruned == (not confirms and trial.params.get("max_norm", 1.0) < 0.1)
        assert max(trial.intermediate_values) == (80 if confirms else 20 if pruned else 40)
        if pruned:
            assert trial.value == trial.intermediate_values[20]
            assert "hopeless at step 20: it gained" in trial.user_attrs["reason"]
    assert {t.state for t in result.trials} <= {"finished", "stuck"}


@pytest.mark.parametrize(("seeds", "raised"), [([1, 2, 3], [1, 1, 2]), ([], [0, 0, 0])])
def test_a_budget_raised_after_a_verdict_is_remembered(tmp_path, seeds, raised):
    """Raising counts where fresh seeds were looked at; going on with the same budget does not."""
    path = write_finished(tmp_path / "study")
    ledger = Ledger(load_study(path).storage, "s", "minimize")
    ledger.keep("verdict", {"seeds": seeds})
    found = []
    for max_runs in (30, 30, 40):
        study = load_study(path)
        search_ = study.config.search.model_copy(update={"max_runs": max_runs})
        config = study.config.model_copy(update={"search": search_})
        Controller(replace(study, config=config), lambda _: None)._open()
        found.append(ledger.settings.raised)
    assert found == raised


def test_crashes_are_counted_by_reason(tmp_path):
    """They are no results; the note says how many there were, and of what."""
    crash = "if run.max_norm in (1.0, 10.0): raise RuntimeError('disk full')"
    result = search(write_study(tmp_path / "study", after=crash), max_runs=5)
    assert sum(t.state == "crashed" for t in result.trials) == 2
    assert "2 trainings crashed: 2 of: RuntimeError: disk full" in str(result)


def test_three_crashes_in_a_row_stop_the_study(tmp_path):
    """A training that always raises ends the study with the first error's last line."""
    path = write_study(tmp_path / "study", after="raise RuntimeError(f'disk {os.getpid() * 0}')")
    with pytest.raises(StudyError, match=r"3 trainings in a row crashed.*RuntimeError: disk 0"):
        search(path)
    states = [t.state for t in optuna_study(path).trials]
    assert states == [TrialState.FAIL] * 3


def test_a_mended_training_may_start_over(tmp_path):
    """Before the first result a study may still change: crashed runs don't bind it."""
    path = write_study(tmp_path / "study", after="raise RuntimeError")
    with pytest.raises(StudyError, match="crashed"):
        search(path)
    write_study(path.parent)
    assert sum(not t.free for t in search(path, max_runs=4).trials) == 4


UNUSABLE = {
    "returns a string": ("return 'good'", "train returned 'good' but needs the validation value"),
    "never made a step": ("return 1.0", "never called run.watch"),
}


@pytest.mark.parametrize(("body", "said"), UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_training_stops_at_once(tmp_path, body, said):
    """What no other run would do better is said after the first run."""
    path = write_study(tmp_path / "study", source=f"def train(run):\n    {body}\n")
    with pytest.raises(StudyError, match=said):
        search(path)
    assert len(optuna_study(path).trials) == 1


def test_a_training_that_ignores_the_seed_is_refused(tmp_path):
    """Two seeds with the same norms and value mean that the seed is not used."""
    path = write_study(tmp_path / "study")
    body = (path.parent / "t.py").read_text()
    (path.parent / "t.py").write_text(body.replace("run.seed", "7"))
    with pytest.raises(StudyError, match=r"your train ignores run\.seed: seeds 0 and 1"):
        search(path, max_runs=12)


def test_an_undeterministic_training_copies_no_run(tmp_path):
    """Where runs of one seed differ before the first clipped step, every run is trained."""
    path = write_study(tmp_path / "study")
    body = (path.parent / "t.py").read_text()
    (path.parent / "t.py").write_text(body.replace("manual_seed(run.seed)", "seed()"))
    result = search(path, max_runs=5)
    assert not result.settings.reuse
    assert not any(t.free for t in result.trials)
    assert "the training is not deterministic" in str(result)


def test_an_unclipped_run_that_dies_early_gets_a_gentle_warm_up(tmp_path):
    """Where too few norms are finite, the suggestion comes from a tenth of the learning rate."""
    path = write_study(
        tmp_path / "study",
        before="if step == 9 and run.lr_factor == 1.0 and run.max_norm > 1: "
        "model.weight.data.fill_(math.inf)",
    )
    result = search(path, max_runs=4)
    assert result.trials[0].state == "diverged"
    assert math.isfinite(result.settings.suggestion)
    assert any("0.1 x the learning rate" in note for note in result.notes)
