"""The controller of a search: what it makes of runs that fail, repeat or cannot be used."""

import math

import pytest
from optuna.trial import TrialState
from small_study import optuna_study, write_study

from normtune.errors import StudyError
from normtune.search import search


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
