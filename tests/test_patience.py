"""A server that goes away: what is asked waits, and nothing is done twice."""

import threading
import time

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState, create_trial

from normtune import storages
from normtune.patience import NothingWaits


@pytest.fixture
def storage(postgres_server):
    opened = storages.opened(postgres_server.database())
    yield opened
    opened.close()


@pytest.fixture
def study(storage):
    return optuna.create_study(study_name="s", storage=storage)


def test_a_call_waits_for_the_server(storage, study, postgres_server):
    """What it waits for is told once, with its reason, and that it is back."""
    told = []
    storage.tell = told.append
    postgres_server.stop()
    back = threading.Timer(0.8, postgres_server.start)
    back.start()
    started = time.monotonic()
    study.set_user_attr("key", 1)
    back.join()
    assert time.monotonic() - started > 0.7
    assert study.user_attrs == {"key": 1}
    assert len(told) == 2
    assert told[0].startswith("the storage does not answer; trainings go on, and it is asked on: ")
    assert "onnection" in told[0]
    assert told[1] == "the storage answers again"


def test_patience_can_end(storage, study, postgres_server):
    """After Ctrl-C there are only seconds left; a heartbeat never waits."""
    postgres_server.stop()
    try:
        storage.patience = 0.3
        with pytest.raises((optuna.exceptions.StorageInternalError, sqlalchemy.exc.DBAPIError)):
            study.set_user_attr("key", 1)
        storage.patience = 60
        started = time.monotonic()
        storage.record_heartbeat(1)
        assert time.monotonic() - started < 1
    finally:
        postgres_server.start()


def test_what_is_wrong_is_no_absence(storage, study):
    """Only a server that is away is waited for."""
    study.add_trial(create_trial(value=1.0))
    trial = study.trials[0]
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        storage.set_trial_user_attr(trial._trial_id, "key", 1)
    with pytest.raises(KeyError):
        storage.get_trial(12345)


def test_an_end_that_was_told_before_the_answer_was_lost_stands(storage, study):
    """Asked again, it is done; told another one, it is refused."""
    study.add_trial(create_trial(state=TrialState.RUNNING))
    trial_id = study.trials[0]._trial_id
    inner = storage._inner

    class Loses:
        """Carries out, and loses the first answer."""

        answers = 0

        def __getattr__(self, name):
            return getattr(inner, name)

        def set_trial_state_values(self, *args):
            answer = inner.set_trial_state_values(*args)
            self.answers += 1
            if self.answers == 1:
                lost = ConnectionError("lost")
                raise sqlalchemy.exc.OperationalError(None, {}, lost)
            return answer

    storage._inner = Loses()
    assert storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [2.0])
    assert (study.trials[0].state, study.trials[0].value) == (TrialState.COMPLETE, 2.0)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [3.0])


def test_a_worker_only_takes_what_waits(storage, study):
    """Optuna would sample a trial of its own where another worker was faster."""
    storage.takes = True
    with pytest.raises(NothingWaits):
        study.optimize(lambda _: 0.0, n_trials=1)
    assert study.trials == []
    storage.takes = False
    study.add_trial(create_trial(state=TrialState.WAITING))
    storage.takes = True
    study.optimize(lambda _: 0.0, n_trials=1)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE]


def test_the_clock_is_the_servers_and_in_utc(storage, postgres_server):
    """The server of the tests is set to another time zone, and so may the next machine be."""
    assert abs(storage.now() - time.time()) < 5
    ((zone,),) = postgres_server.execute("SHOW timezone")
    assert zone == "Europe/Berlin"


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_only_a_controller_says_that_a_worker_is_dead(storage, study):
    """Among workers a server that was away would make each take the others for dead."""
    storage.set_heartbeat(1)
    study.add_trial(create_trial(state=TrialState.RUNNING))
    storage.record_heartbeat(study.trials[0]._trial_id)
    storage._rdb.grace_period = -1  # any heartbeat is too old
    storage.takes = True
    optuna.storages.fail_stale_trials(study)
    assert study.trials[0].state == TrialState.RUNNING
    storage.takes = False
    optuna.storages.fail_stale_trials(study)
    assert study.trials[0].state == TrialState.FAIL
