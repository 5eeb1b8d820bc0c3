"""One study on many machines: workers that come, die, stop and go on, on a real PostgreSQL."""

import json
import math
import random
import re
import shutil
import signal
import sys
import time
import urllib.parse
from pathlib import Path

import optuna
import postgres
import pytest
import small_study
import sqlalchemy
from optuna.trial import TrialState
from several import Several, forking, until
from small_study import gone

from normtune.errors import StudyError
from normtune.ledger import Ledger
from normtune.plan import Planned
from normtune.presence import ControllerLease
from normtune.records import NormRecord
from normtune.search import search
from normtune.study import load_study

SCRIPTS = Path(__file__).parent / "scripts"
BEAT = 2


def write_study(folder, body="", **keys):
    """A study of the script that stands in for a training, with a statement of the test in it."""
    folder.mkdir(exist_ok=True, parents=True)
    shutil.copy(SCRIPTS / "pretend.py", folder)
    argv = [sys.executable, "pretend.py", "{seed}", *([body] if body else [])]
    known = {"command": argv, "metric": "val loss ([0-9.]+)", "warmup_steps": 40, "threads": 1}
    spent = {"max_runs": 6, "jobs": 0, "heartbeat": BEAT} | keys.pop("search", {})
    lines = [f"{k}: {json.dumps(v)}" for k, v in (known | {"search": spent} | keys).items()]
    path = folder / "s.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def url(postgres_server):
    return postgres_server.database()


@pytest.fixture(scope="module")
def forks(postgres_server):
    with forking() as process:
        yield process


@pytest.fixture
def several(tmp_path, url, forks):
    started = Several(tmp_path, url, forks)
    yield started
    started.end()


def optuna_trials(url):
    """All trials of the study, read by Optuna itself."""
    return optuna.load_study(study_name="s", storage=closing(url)).trials


def closing(url):
    """A storage that keeps no connection open."""
    return optuna.storages.RDBStorage(url, engine_kwargs={"poolclass": sqlalchemy.NullPool})


def runs(trials):
    """What was run, and what came of it."""
    return [(t.max_norm, t.lr_factor, t.seed, t.free, t.state, t.value) for t in trials]


# --- what a worker is


def test_one_worker_is_like_one_slot(tmp_path, url, several):
    """Nothing but the storage is shared, and the study is that of a search without workers."""
    alone = search(write_study(tmp_path / "alone"), jobs=1)
    path = write_study(tmp_path / "controller")
    there = write_study(tmp_path / "machine")
    worker = several.start("worker", there)
    told = []
    result = search(path, storage=url, progress=told.append)
    assert runs(result.trials) == runs(alone.trials)
    assert any(t.free for t in result.trials)
    assert {**result.suggestion, "source": alone.suggestion["source"]} == alone.suggestion
    assert result.verdict.to_dict() == alone.verdict.to_dict()
    assert "the study has ended" in worker.ends()
    assert "exit code 0" in worker.text
    kinds = [p.kind for p in told]
    assert kinds.count("started") == kinds.count("finished") == 6


def test_a_worker_knows_the_study_without_being_told(tmp_path, url, several):
    """Name, file, threads and time limit are in the study; with two studies the name is asked."""
    path = write_study(tmp_path / "s", "print(os.environ['OMP_NUM_THREADS'])", threads=3)
    worker = several.start("worker")
    worker.says("waiting for normtune search to begin a study")
    search(path, storage=url, max_runs=4)
    assert "exit code 0" in worker.ends()
    outputs = (path.parent / "s.runs").glob("*/output.txt")
    assert {file.read_text().splitlines()[1] for file in outputs} == {"3"}
    optuna.create_study(study_name="other", storage=closing(url))
    assert "holds 2 studies: other, s; say which by --study NAME" in several.start("worker").ends()
    path.rename(path.with_name("t.yaml"))
    lost = several.start("worker", "--study", "s").ends()
    assert "which is not on this machine; give its file here: normtune worker s.yaml" in lost


def test_a_worker_that_would_train_something_else_is_refused(tmp_path, url, several):
    """Each difference is named; the study goes on without it, as long as --wait says."""
    path = write_study(tmp_path / "s")
    controller = several.start("search", path, "--max-runs", 4)
    other = write_study(tmp_path / "other", "lr = 0.2", metric="loss ([0-9.]+)", threads=1)
    said = several.start("worker", other).ends()
    assert "s.yaml changed since this study began: command was [" in said
    assert "metric was 'val loss ([0-9.]+)', now 'loss ([0-9.]+)'. A worker trains what" in said
    assert "exit code 1" in said
    controller.signal(signal.SIGINT)
    controller.ends()
    bored = several.start("worker", path, "--wait", "0.5 s")
    assert "nothing to train for as long as --wait says" in bored.ends()


# --- workers that fail


def test_ctrl_c_and_sigterm_give_the_run_back(tmp_path, url, several):
    """The training ends with the worker, and another trains the run at once."""
    slow = (
        "print('pid', os.getpid(), flush=True); time.sleep(30 if not os.path.exists('go') else 0)"
    )
    path = write_study(tmp_path / "s", slow, search={"heartbeat": 60})
    controller = several.start("search", path, "--max-runs", 4)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 130)):
        worker = several.start("worker", path)
        worker.says("started: no clipping")
        until(lambda: any(output_pids(path)))
        worker.signal(number)
        assert f"exit code {code}" in worker.ends(10)
    assert all(gone(pid) for pid in output_pids(path))
    controller.says("gave it back; it is planned again")
    (path.parent / "go").touch()
    last = several.start("worker", path)
    assert "exit code 0" in controller.ends()
    assert "exit code 0" in last.ends()
    states = [t.state.name for t in optuna_trials(url)]
    assert states[:2] == ["FAIL", "FAIL"]
    assert set(states[2:]) == {"COMPLETE"}


def output_pids(path):
    texts = [file.read_text() for file in (path.parent / "s.runs").glob("*/output.txt")]
    return [int(pid) for text in texts for pid in re.findall(r"pid (\d+)", text)]


def test_four_workers_of_which_two_are_killed_and_one_is_stopped(tmp_path, url, several):
    """Rows 86 to 90: started together with the search, every planned run is trained once."""
    draw = random.Random(5)  # noqa: S311
    path = write_study(tmp_path / "s", "time.sleep(0.4)", search={"max_runs": 16})
    workers = [several.start("worker", path) for _ in range(4)]
    controller = several.start("search", path)
    stopped, *killed = workers[:3]
    stopped.says("finished")
    until(lambda: stopped.text.count("started") > stopped.text.count("finished"))
    stopped.signal(signal.SIGSTOP)
    for worker in killed:
        time.sleep(draw.uniform(0.1, 1.5))
        worker.signal(signal.SIGKILL)
    controller.says("died or gave it back; it is planned again")
    until(lambda: f":{stopped.pid} died" in controller.text)
    stopped.signal(signal.SIGCONT)
    stopped.says("was given to another worker, since this one was silent for over 6 s")
    assert "exit code 0" in controller.ends(60)
    for worker in (stopped, workers[3]):
        assert "exit code 0" in worker.ends()
    check_each_run_once(url, path, 16)


def check_each_run_once(url, path, n):
    trials = optuna_trials(url)
    assert {t.state for t in trials} <= {TrialState.COMPLETE, TrialState.FAIL}
    ended = [t for t in trials if t.state == TrialState.COMPLETE]
    trained = [t for t in ended if not t.user_attrs["free"]]
    assert len(trained) == n
    assert len({json.dumps(t.params) for t in ended}) == len(ended)
    for trial in trained:  # what the run itself had, and not what another one had
        folder = path.parent / "s.runs" / trial.user_attrs["folder"]
        printed = re.findall(r"epoch 1 val loss ([0-9.]+)", (folder / "output.txt").read_text())
        assert [float(value) for value in printed] == [trial.value]
        max_norm = NormRecord.load(folder / "run.norms.jsonl").max_norm
        assert set(max_norm) == {trial.params.get("max_norm", math.inf)}


INSTANT = """
from pathlib import Path
from normtune.records import RecordWriter, dumps, header, row
from normtune.tasks import Outcome

def carried_out(self, number, task):
    with Path("trained").open("a") as file:
        file.write(f"{task.seed}\\n")
    task.folder.mkdir(parents=True)
    writer = RecordWriter(task.record_path)
    rows = [row(i, 1.0 + i, max_norm=task.max_norm) for i in range(1, 5)]
    writer.write([dumps(header(optimizer="SGD")), *rows])
    writer.close()
    return Outcome("finished", ((1, float(task.seed)),), "", 0.01)

worker._Worker._carried_out = carried_out  # a training that takes no time
"""


def begun(path, url):
    """The study as a controller begins it."""
    study, ledger = load_study(path), Ledger(url, "s", "minimize")
    facts = {"study": study.fingerprint(), "path": str(path), "threads": 1, "heartbeat": BEAT}
    for key, fact in facts.items():
        ledger.keep(key, fact)
    return ledger


def test_two_hundred_short_runs_are_each_trained_once(tmp_path, url, several):
    """Rows 88 and 89: four workers race for each run, and a lost race leaves no trace."""
    ledger = begun(write_study(tmp_path / "s"), url)
    workers = [several.start("worker", before=INSTANT) for _ in range(4)]
    for seed in range(200):
        ledger.enqueue(Planned(0.5, 1.0, seed, "confirm", free=False, reason=""))
        until(lambda: sum(q.state == "waiting" for q in ledger.queued()) < 8)
    until(lambda: all(q.state == "ended" for q in ledger.queued()))
    ledger.keep("ended", "all are trained")
    assert all("exit code 0" in worker.ends() for worker in workers)
    trained = [int(seed) for seed in (tmp_path / "trained").read_text().split()]
    assert sorted(trained) == list(range(200))
    trials = optuna_trials(url)
    assert [(t.state, t.value) for t in trials] == [
        (TrialState.COMPLETE, float(seed)) for seed in range(200)
    ]
    assert len({t.user_attrs["worker"] for t in trials}) == 4


def test_a_server_that_is_restarted_loses_nothing(tmp_path, url, several, postgres_server):
    """Row 92: dropped connections and a server that is away cost no run and no result."""
    path = write_study(tmp_path / "s", "time.sleep(1)", search={"max_runs": 5})
    workers = [several.start("worker", path) for _ in range(2)]
    controller = several.start("search", path)
    controller.says("[1/5")
    others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = "
    postgres_server.execute(f"{others}'{url.rpartition('/')[2]}'")
    controller.says("seed 0: the suggestion; worker")
    postgres_server.stop()
    time.sleep(1.5)  # trainings end meanwhile
    postgres_server.start()
    assert "exit code 0" in controller.ends(60)
    said = [controller.text, *(worker.ends() for worker in workers)]
    assert all("exit code 0" in text for text in said)
    assert any(
        "the storage does not answer; trainings go on, and it is asked on" in t for t in said
    )
    assert any("the storage answers again" in text for text in said)
    assert not any("Traceback" in text for text in said)
    assert {t.state for t in optuna_trials(url)} == {TrialState.COMPLETE}
    check_each_run_once(url, path, 5)


def test_a_machine_on_which_all_crashes_leaves_the_runs_to_others(tmp_path, url, several):
    """It ends after two crashes in a row, and the study goes on."""
    body = "time.sleep(0.3); assert 'BROKEN' not in os.environ, 'no GPU'"
    path = write_study(tmp_path / "s", body, search={"max_runs": 5, "heartbeat": 1})
    sick = several.start("worker", path, BROKEN="1")
    well = several.start("worker", path)
    controller = several.start("search", path)
    said = sick.ends()
    assert "2 trainings in a row crashed on this machine, the last with: " in said
    assert "AssertionError: no GPU" in said
    assert "exit code 1" in said
    assert "exit code 0" in controller.ends()
    assert "exit code 0" in well.ends()


def test_a_training_at_fault_ends_the_study_for_all(tmp_path, url, several):
    """What no other run would do better is said by the controller and by every worker."""
    path = write_study(tmp_path / "s", metric="test loss ([0-9.]+)")
    worker = several.start("worker", path)
    with pytest.raises(StudyError, match="never appeared in the output"):
        search(path, storage=url)
    assert (
        "the study has ended after 1 run here: the metric 'test loss ([0-9.]+)' never"
        in worker.ends()
    )


def test_a_warm_up_at_a_lower_rate_is_a_workers_too(tmp_path, url, several):
    """Where the unclipped run carries no suggestion; it is no run of the study."""
    body = "norms = norms if lr_factor < 1 else [math.nan] * 40"
    path = write_study(tmp_path / "s", f"lr_factor = orders['lr_factor']; {body}")
    worker = several.start("worker", path)
    result = search(path, storage=url, max_runs=4)
    assert "exit code 0" in worker.ends()
    assert any("0.1 x the learning rate" in note for note in result.notes)
    assert sum(not t.free for t in result.trials) == 4
    (warmup,) = [t for t in optuna_trials(url) if "warm-up" in t.user_attrs]
    assert (warmup.state, warmup.user_attrs["warm-up"]) == (TrialState.PRUNED, 40)


# --- one controller


def test_two_controllers_are_refused_while_the_other_lives(tmp_path, url, several):
    """The second one, on another machine, says where the first one is, and begins when it died."""
    first = several.start("search", write_study(tmp_path / "a", search={"heartbeat": 1}))
    first.says("no worker lives; on each machine")
    second = write_study(tmp_path / "b", search={"heartbeat": 1})
    with pytest.raises(StudyError) as caught:
        search(second, storage=url)
    assert re.fullmatch(
        r"another normtune search works on this study already: on \S+ \(process "
        rf"{first.pid}\)\. End it there; if that machine is gone, this one can begin in [123] s",
        str(caught.value),
    )
    first.signal(signal.SIGKILL)
    worker = several.start("worker", second)
    until(lambda: Ledger(url, "s").now() > Ledger(url, "s").fact("controller")["until"])
    result = search(second, storage=url, max_runs=4)
    assert sum(not t.free for t in result.trials) == 4
    assert "exit code 0" in worker.ends()


def test_who_holds_the_lock_of_a_dead_controller_is_its_heir_at_once(tmp_path, url, several):
    """On one machine the lock file of the study proves that the other one is gone."""
    path = write_study(tmp_path / "s", search={"heartbeat": 60})
    dead = several.start("search", path)
    dead.says("no worker lives; on each machine")
    dead.signal(signal.SIGKILL)
    dead.ends()
    heir = several.start("search", path)
    heir.says("no worker lives; on each machine")
    waiting = [t for t in optuna_trials(url) if t.state == TrialState.WAITING]
    assert len(waiting) == 1  # what the dead one had enqueued was taken back


def test_a_controller_that_was_stopped_gives_way(tmp_path, url):
    """It finds the lease in other hands, and enters nothing more."""
    ledger = Ledger(url, "s", "minimize")
    with ControllerLease(ledger, 60, "here") as lease:
        other = {**ledger.fact("controller"), "id": "other", "host": "there", "pid": 7}
        ledger.keep("controller", other)
        lease._renew()
        with pytest.raises(StudyError, match=r"took this study over, on there \(process 7\)"):
            lease.check()
    assert ledger.fact("controller") == other


# --- secrets


def test_the_password_is_nowhere(tmp_path, url, several, postgres_server):
    """Row 99: not in ps, output, records, HTML, the study, nor anything that a training can log."""
    looks = "step > 1 or (print(dict(os.environ), sys.argv), os.system('ps axww'))"
    path = small_study.write_study(tmp_path / "s", before=looks, threads=1)
    worker = several.start("worker", path, "-v")
    controller = several.start("search", path, "--max-runs", 4, "--jobs", 0)
    assert "exit code 0" in controller.ends(60)
    assert "exit code 0" in worker.ends()
    report = several.start("report", path, "-o", tmp_path / "page.html")
    assert "exit code 0" in report.ends()
    database = url.rpartition("/")[2]
    texts = [repr(postgres_server.execute(f"TABLE {table}", database)) for table in TABLES]
    texts += [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    whole = "\n".join(texts)
    assert "normtune" in whole  # ps has shown the processes
    assert "no clipping, to which all is compared" in whole  # the study
    assert "<html" in whole
    for secret in (postgres.PASSWORD, urllib.parse.quote(postgres.PASSWORD, safe="")):
        assert secret not in whole


TABLES = ("study_user_attributes", "study_system_attributes", "trial_user_attributes", "studies")
