"""The search: what it runs, what it keeps, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from small_study import gone, optuna_study, write_study

from normtune.errors import StudyError, SuggestionError
from normtune.records import NormRecord
from normtune.search import Progress, plan_of, record_study, search
from normtune.suggestion import suggest

RECORD = "run.norms.jsonl"


def arms(trials) -> list[tuple]:
    """What was run: max_norm, learning-rate factor, seed, whether free, value."""
    return sorted(
        (t.max_norm, t.lr_factor, t.seed, t.free, t.value if t.value is not None else math.inf)
        for t in trials
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study that was searched once: its file, its result and what was told meanwhile."""
    path = write_study(tmp_path_factory.mktemp("done") / "study")
    told: list[Progress] = []
    result = search(path, max_runs=7, progress=told.append)
    return path, result, told


# --- what a search is


def test_the_first_run_is_unclipped(done):
    """The unclipped run on the explore seed comes first, and its warm-up gives the suggestion."""
    path, result, _ = done
    first = result.trials[0]
    assert (first.max_norm, first.lr_factor, first.seed) == (math.inf, 1.0, 0)
    trial = optuna_study(path).trials[0]
    record = NormRecord.load(path.parent / "s.runs" / trial.user_attrs["folder"] / RECORD)
    assert result.settings.suggestion == suggest(record.norms[:40]).max_norm
    assert result.suggestion["max_norm"] == result.settings.suggestion


def test_one_training_is_one_trial(done):
    """Every trial is complete, and the trained ones are as many as the budget."""
    path, result, _ = done
    trials = optuna_study(path).trials
    assert {t.state for t in trials} == {TrialState.COMPLETE}
    assert sum(not t.free for t in result.trials) == 7
    assert len(trials) == len(result.trials)


def test_the_suggestion_and_common_defaults_are_arms(done):
    """No clipping, the suggestion, 1.0 and 10.0 are always tried or known."""
    _, result, _ = done
    tried = {t.max_norm for t in result.trials}
    assert {math.inf, result.settings.suggestion, 1.0, 10.0} <= tried


def test_a_free_run_is_what_training_would_give(done, tmp_path):
    """The value copied for a max_norm above all norms is that of the trained run, bit for bit."""
    path, result, _ = done
    (free,) = [t for t in result.trials if t.free]
    other = write_study(tmp_path / "other")
    body = (path.parent / "t.py").read_text()
    clip = "torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP); optimizer.step()"
    source = body.replace("optimizer.step()", clip.replace("CLIP", str(free.max_norm)))
    (other.parent / "t.py").write_text(source)
    import importlib.util

    from normtune.run import Run

    spec = importlib.util.spec_from_file_location("by_hand", other.parent / "t.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = Run(seed=0)
    module.train(run)
    assert run.values[-1][1] == free.value


def test_what_is_told_meanwhile(done):
    """The listener hears of the suggestion, of each start and end, and of the budget."""
    _, _, told = done
    kinds = [p.kind for p in told]
    assert kinds.count("started") == kinds.count("finished") == 7
    assert kinds.count("suggestion") == kinds.count("copied") == 1
    assert told[-1].done == told[-1].total == 7


def test_the_result_in_words_and_values(done):
    """The result prints its sentence, and gives a frame and strict JSON values."""
    _, result, _ = done
    assert result.verdict.sentence in str(result)
    assert "7 trainings" in str(result)
    frame = result.to_frame()
    assert frame["max_norm"].tolist() == [t.max_norm for t in result.trials]
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["trials"][0]["max_norm"] == "inf"


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.filterwarnings("ignore:Attempting to set identical:UserWarning")  # one lr_factor
@pytest.mark.parametrize(
    "plot", ["plot_slice", "plot_contour", "plot_optimization_history", "plot_intermediate_values"]
)
def test_optuna_can_draw_the_study(done, plot):
    """Optuna's own figures work on the study, those of matplotlib and those of plotly."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    figures = optuna.visualization.matplotlib
    assert getattr(figures, plot)(optuna_study(done[0])) is not None
    pytest.importorskip("plotly", reason="optuna.visualization needs plotly")
    assert getattr(optuna.visualization, plot)(optuna_study(done[0])).data


@pytest.fixture
def dashboard(done):
    """A client of optuna-dashboard over the study's storage, and the path of the study."""
    made = pytest.importorskip("optuna_dashboard", reason="opens the study with optuna-dashboard")
    client = pytest.importorskip("werkzeug.test").Client(
        made.wsgi(f"sqlite:///{done[0].parent}/s.db")
    )
    (study,) = client.get("/api/studies").json["study_summaries"]
    assert study["study_name"] == "s"
    return client, f"/api/studies/{study['study_id']}"


def test_optuna_dashboard_shows_the_study(done, dashboard):
    """Its trials with stage, free and clip share, and the verdict, as the browser gets them."""
    client, path = dashboard
    shown = client.get(path).json
    assert len(shown["trials"]) == len(done[1].trials)
    for trial, ours in zip(shown["trials"], done[1].trials, strict=True):
        told = {
            a["key"]: json.loads(a["value"].lower())
            for a in trial["user_attrs"]
            if a["key"] in ("free", "clip_share")
        }
        assert told == {"free": ours.free, "clip_share": pytest.approx(ours.clip_share)}
        assert {"key": "stage", "value": ours.stage} in trial["user_attrs"]
        assert trial["values"] == [ours.value]
        known = {p["name"]: p["param_external_value"] for p in trial["params"]}
        assert float(known.get("max_norm", "inf")) == ours.max_norm
    study = {a["key"]: a["value"] for a in shown["user_attrs"]}
    assert done[1].verdict.sentence in study["verdict"]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.filterwarnings("ignore:Attempting to set identical:UserWarning")
@pytest.mark.parametrize("kind", ["slice", "contour", "parallel_coordinate", "edf", "timeline"])
def test_optuna_dashboard_draws_the_study(dashboard, kind):
    """The figures of the study's page, and its table of trials as CSV."""
    pytest.importorskip("plotly", reason="optuna-dashboard draws with plotly")
    client, path = dashboard
    assert client.get(f"{path}/plot/{kind}").json["data"]
    assert "UserAttribute clip_share" in client.get(path.replace("/api/studies", "/csv")).text


# --- going on


def test_a_second_start_repeats_nothing(done):
    """A finished study is only read: the same trials and the same words."""
    path, result, _ = done
    told: list[Progress] = []
    again = search(path, max_runs=7, progress=told.append)
    assert not told
    assert arms(again.trials) == arms(result.trials)
    assert str(again) == str(result)


def test_a_larger_budget_goes_on(tmp_path):
    """More runs later are added to those that are there, here three at a time."""
    path = write_study(tmp_path / "study")
    first = search(path, max_runs=4)
    more = search(path, max_runs=6, jobs=3)
    assert arms(more.trials[: len(first.trials)]) == arms(first.trials)
    assert sum(not t.free for t in more.trials) == 6
    assert more.settings.raised == 0  # there was no verdict yet


def test_a_changed_study_is_refused(done):
    """What changed is named, with what it was and what it is now."""
    path, _, _ = done
    before = path.read_text()
    try:
        path.write_text(before.replace("warmup_steps: 40", "warmup_steps: 50"))
        with pytest.raises(StudyError, match=r"began: warmup_steps was 40, now 50\. Undo that"):
            search(path, max_runs=7)
    finally:
        path.write_text(before)


def test_one_controller_at_a_time(done):
    """A second normtune on the same study is refused while the first one works."""
    import fcntl

    path, _, _ = done
    with (path.parent / "s.runs" / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StudyError, match="another normtune works on this study already"):
            search(path)


SCRIPT = "import sys; from normtune.search import search; search(sys.argv[1])"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_a_killed_study_ends_like_one_that_was_not(tmp_path, number):
    """After Ctrl-C or a kill no training runs on, and a second start ends with the same trials."""
    waits = "time.sleep(0.005)"
    whole = search(write_study(tmp_path / "whole", before=waits, search="{max_runs: 5}"))
    path = write_study(tmp_path / "killed", before=waits, search="{max_runs: 5}")
    pids = path.parent / "pids"
    note = f"open({str(pids)!r}, 'a').write(str(os.getpid()) + chr(10)); {waits}"
    write_study(path.parent, before=note, search="{max_runs: 5}")
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, path], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(_lines(pids)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)  # until the second training runs
    os.kill(process.pid, number)
    assert process.wait(timeout=30) != 0
    assert all(gone(int(pid)) for pid in _lines(pids))
    again = search(path)
    assert arms(again.trials) == arms(whole.trials)


KILLER = """
import os, random, signal, sys, time
import optuna, scipy.stats, sqlalchemy  # loaded once for all controllers
from multiprocessing import forkserver
from normtune import processes
from normtune.search import search

processes.warm_up()  # and so is torch: a forked child may use this fork server, but not ask for it
forkserver._forkserver.ensure_running = forkserver.ensure_running = lambda: None
random.seed(4)
ended = os.WEXITED | os.WNOHANG | os.WNOWAIT


def count():
    return len(open(sys.argv[3]).read().split()) if os.path.exists(sys.argv[3]) else 0


for i in range(10):
    pid = os.fork()
    if not pid:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        search(sys.argv[1])
        os._exit(0)
    known = count()
    until = time.monotonic() + 20
    while count() == known and time.monotonic() < until and os.waitid(os.P_PID, pid, ended) is None:
        time.sleep(0.01)  # until a training has begun: a busy machine may need longer than a run
    time.sleep(random.uniform(0.0, 2.0) * float(sys.argv[2]))
    os.kill(pid, signal.SIGINT if i % 3 == 2 else signal.SIGKILL)
    os.waitpid(pid, 0)
"""


@pytest.mark.slow
def test_a_study_that_is_killed_ten_times_at_random_moments_ends_the_same(tmp_path):
    """No trial is there twice, no training runs on, and the trials are those of an unkilled one."""
    waits = "time.sleep(0.005)"
    budget = "{max_runs: 8}"
    whole = search(write_study(tmp_path / "whole", before=waits, search=budget))
    a_run = 2 * sum(t.seconds for t in whole.trials if not t.free) / 8  # with what is around it
    path = write_study(tmp_path / "killed", before=waits, search=budget)
    pids = path.parent / "pids"
    note = f"open({str(pids)!r}, 'a').write(str(os.getpid()) + chr(10)) if step == 1 else {waits}"
    write_study(path.parent, before=note, search=budget)
    subprocess.run([sys.executable, "-c", KILLER, path, str(a_run), pids], check=True, timeout=180)
    assert all(gone(int(pid)) for pid in _lines(pids))
    again = search(path)
    assert arms(again.trials) == arms(whole.trials)
    assert str(again.verdict) == str(whole.verdict)
    ended = [
        json.dumps(t.params)
        for t in optuna_study(path).trials
        if t.state.is_finished() and t.state != TrialState.FAIL
    ]
    assert len(ended) == len(set(ended)) == len(whole.trials)
    trained = [t for t in again.trials if not t.free]
    assert len(_lines(pids)) > len(trained)  # some were begun again


def _lines(file) -> set[str]:
    return set(file.read_text().split()) if file.exists() else set()


# --- recording only, and planning only


def test_record_runs_only_the_warm_up(tmp_path):
    """The warm-up stops by itself, and its record and suggestion are those of an unclipped run."""
    path = write_study(tmp_path / "study", params="{steps: 100000}")
    recorded = record_study(path)
    assert recorded.path == path.parent / "s.norms.jsonl"
    assert len(recorded.record) == 40
    assert recorded.suggestion.max_norm == suggest(recorded.path).max_norm
    assert np.isinf(recorded.record.max_norm).all()


def test_without_warmup_steps_a_search_reads_its_whole_unclipped_run(tmp_path):
    """The run is there in full; a recording of its own stops after 200 steps."""
    path = write_study(tmp_path / "study", warmup_steps=None, params="{steps: 240}")
    result = search(path, max_runs=4)
    folder = optuna_study(path).trials[0].user_attrs["folder"]
    whole = NormRecord.load(path.parent / "s.runs" / folder / RECORD)
    assert len(whole) == 240
    assert result.settings.suggestion == suggest(whole).max_norm
    assert len(record_study(path).record) == 200


def test_record_explains_a_failing_training(tmp_path):
    """A training that raises in its warm-up is one line."""
    path = write_study(tmp_path / "study", before="raise KeyError('batch')")
    with pytest.raises(StudyError, match="KeyError: 'batch'"):
        record_study(path)


def test_record_needs_enough_steps(tmp_path):
    """A training that ends before 30 steps carries no suggestion."""
    path = write_study(tmp_path / "study", params="{steps: 20}")
    with pytest.raises(SuggestionError, match="20"):
        record_study(path)


def test_a_plan_runs_and_writes_nothing(tmp_path):
    """The plan of a new study is words only."""
    path = write_study(tmp_path / "study")
    assert "12 runs at most, 0 done" in plan_of(path, max_runs=12)
    assert sorted(p.name for p in path.parent.iterdir()) == ["s.yaml", "t.py"]


def test_a_plan_knows_what_is_done(done):
    """The plan of a study that began counts its runs."""
    assert "9 runs at most, 7 done" in plan_of(done[0], max_runs=9)


@pytest.mark.parametrize("given", [{"max_runs": 3}, {"jobs": -1}, {"time_limit": 0}])
def test_impossible_arguments_are_refused(tmp_path, given):
    """Arguments that override the file are checked like its keys."""
    path = write_study(tmp_path / "study")
    with pytest.raises(ValueError, match="must be a"):
        search(path, **given)
