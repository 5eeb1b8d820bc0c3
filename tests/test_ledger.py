"""The Optuna study in which trainings are entered, looked at with Optuna itself."""

import math

import optuna
import pytest
from optuna.trial import TrialState

from normtune.errors import StudyError
from normtune.ledger import INTERRUPTED, Ledger, Queued, Result
from normtune.plan import Planned
from normtune.storages import exists
from normtune.trials import Settings, same

RUN = Planned(0.5, 1.0, 0, "explore", free=False, reason="a reason")
NONE = Planned(math.inf, 1 / 3, 7, "lr", free=False, reason="a reason")


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/s.db"


def opened(url: str) -> optuna.Study:
    return optuna.load_study(study_name="s", storage=url)


def test_a_run_is_a_trial(url):
    """A finished run is a complete trial with its parameters, values and attributes."""
    ledger = Ledger(url, "s", "minimize")
    number, folder = ledger.begin(RUN)
    assert opened(url).trials[0].state == TrialState.RUNNING
    assert ledger.running() == {number: folder}
    facts = {"largest_norm": math.inf, "clip_share": 0.25, "seconds": 1.5, "first_value": 3.0}
    ledger.end(number, Result("finished", 2.0, ((10, 3.0), (20, 2.0)), facts))
    trial = opened(url).trials[0]
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 2.0)
    expected = {"clipping": "on", "max_norm": 0.5, "lr_factor": 1.0, "seed": 0}
    assert trial.params == expected
    assert trial.intermediate_values == {10: 3.0, 20: 2.0}
    assert trial.user_attrs["stage"] == "explore"
    (back,) = ledger.trials()
    assert (back.state, back.value, back.largest_norm) == ("finished", 2.0, math.inf)
    assert (back.clip_share, back.seconds, back.first_value) == (0.25, 1.5, 3.0)
    assert not ledger.running()


def test_no_clipping_is_a_category_of_its_own(url):
    """The unclipped arm has no max_norm parameter, and comes back as inf."""
    ledger = Ledger(url, "s", "minimize")
    ledger.begin(NONE)
    assert opened(url).trials[0].params == {"clipping": "off", "lr_factor": 1 / 3, "seed": 7}
    (back,) = ledger.trials()
    assert back.max_norm == math.inf
    assert same(back.lr_factor, 1 / 3)
    assert back.state == "running"


@pytest.mark.parametrize(("direction", "worst"), [("minimize", math.inf), ("maximize", -math.inf)])
def test_a_diverged_run_is_the_worst(url, direction, worst):
    """A diverged run is told as the worst value, never as NaN or failed."""
    ledger = Ledger(url, "s", direction)
    number, _ = ledger.begin(RUN)
    values = ((1, 2.0), (2, math.nan))
    ledger.end(number, Result("diverged", values=values, facts={"diverged": True}))
    trial = opened(url).trials[0]
    assert (trial.state, trial.value) == (TrialState.COMPLETE, worst)
    assert trial.user_attrs["diverged"] is True
    assert (ledger.trials()[0].state, ledger.trials()[0].value) == ("diverged", None)


def test_crashes_are_seen_and_interruptions_are_not(url):
    """Both are failed trials; the planner knows of the crash, and plans the other run again."""
    ledger = Ledger(url, "s", "minimize")
    for state in ("crashed", INTERRUPTED):
        number, _ = ledger.begin(RUN)
        ledger.end(number, Result(state, facts={"reason": "x"}))
    assert [t.state for t in opened(url).trials] == [TrialState.FAIL, TrialState.FAIL]
    assert [t.state for t in ledger.trials()] == ["crashed"]


def test_a_copy_has_the_numbers_of_its_source(url):
    """A free run takes over value and norms, is marked, and names its source."""
    ledger = Ledger(url, "s", "minimize")
    number, _ = ledger.begin(Planned(math.inf, 1.0, 0, "explore", free=False, reason=""))
    ledger.end(number, Result("finished", 2.0, facts={"largest_norm": 3.0, "clip_share": 0.0}))
    copy = ledger.copy(Planned(10.0, 1.0, 0, "explore", free=True, reason=""), number)
    trial = opened(url).trials[copy]
    assert (trial.value, trial.user_attrs["copied_from"]) == (2.0, number)
    back = ledger.numbers()[copy]
    assert (back.free, back.largest_norm, back.max_norm) == (True, 3.0, 10.0)
    ledger.withdraw([copy])
    assert list(ledger.numbers()) == [number]


def test_settings_come_back_as_they_were(url):
    """Settings survive the storage, a missing one and a second process included."""
    ledger = Ledger(url, "s", "maximize")
    assert ledger.settings is None
    settings = Settings(12, suggestion=0.1 + 0.2, low=1e-3, high=7.0, direction="maximize")
    ledger.settings = settings
    assert Ledger(url, "s", "maximize").settings == settings


def test_long_histories_are_thinned(url):
    """At most 200 intermediate values are kept, the last one among them."""
    ledger = Ledger(url, "s", "minimize")
    number, _ = ledger.begin(RUN)
    ledger.end(number, Result("finished", 1.0, tuple((i, float(i)) for i in range(1, 1002))))
    kept = opened(url).trials[0].intermediate_values
    assert len(kept) <= 200
    assert kept[1001] == 1001.0


def test_a_foreign_study_is_refused(url):
    """A study of the same name that normtune did not make is left alone."""
    optuna.create_study(storage=url, study_name="s").add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(StudyError, match="that this normtune did not make"):
        Ledger(url, "s", "minimize")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite:////nowhere/x.db", "unable to open database file"),
        ("nonsense", "Could not parse"),
        ("foo://bar", "Can't load plugin"),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_line(url, said):
    """What the database driver says arrives as one line."""
    with pytest.raises(StudyError) as caught:
        Ledger(url, "s", "minimize")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_asking_makes_no_file(url, tmp_path):
    """Asking whether a study exists leaves no database behind."""
    assert not exists(url, "s")
    assert not list(tmp_path.iterdir())
    Ledger(url, "s", "minimize")
    assert exists(url, "s")
    assert not exists(url, "other")


def test_a_worker_that_died_between_two_writes_has_entered_nothing(url):
    """What a run has as attributes counts once Optuna was told of its end, and not before."""
    ledger = Ledger(url, "s", "minimize")
    for state in ("finished", "crashed"):
        number, _ = ledger.begin(RUN)
        trial = optuna.trial.Trial(ledger.study, ledger.study.trials[number]._trial_id)
        ledger.write(trial, Result(state, 1.0, ((1, 1.0),)))
        assert ledger.numbers()[number].state == "running"
        ledger.study.tell(number, state=TrialState.FAIL)
    assert [t.state for t in ledger.trials()] == ["crashed"]


def test_a_run_that_was_entered_twice_counts_once(url):
    """As it may be where a server went away between the entry and its answer."""
    ledger = Ledger(url, "s", "minimize")
    number, _ = ledger.begin(RUN)
    ledger.study.add_trial(ledger.study.trials[number])
    assert [t.state.name for t in opened(url).trials] == ["RUNNING", "RUNNING"]
    assert list(ledger.numbers()) == [number]


def test_runs_for_workers_wait(url):
    """They have their parameters while they wait, are no run of a controller, and can be had back."""
    ledger = Ledger(url, "s", "minimize")
    number, folder = ledger.enqueue(RUN)
    ledger.enqueue(NONE, steps=40)
    assert [t.state.name for t in opened(url).trials] == ["WAITING", "WAITING"]
    (waiting,) = ledger.trials()  # a warm-up is no run of the study
    assert (waiting.max_norm, waiting.state) == (0.5, "running")
    assert not ledger.running()
    assert ledger.queued()[0] == Queued(number, folder, "waiting", "")
    assert ledger.planned(number) == RUN
    assert ledger.waiting()
    ledger.take_back()
    assert [q.state for q in ledger.queued()] == ["interrupted", "interrupted"]
    assert not ledger.waiting()
    assert not ledger.trials()
