"""Commands as runs of a study: what is imposed and proved, and what becomes of those that fail."""

import contextlib
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import TrialState
from several import until
from small_study import gone, optuna_study
from typer.testing import CliRunner

from normtune import commands
from normtune.cli import app
from normtune.errors import NormtuneError, StudyError, SuggestionError
from normtune.processes import Child, end_all, first_to_end
from normtune.proofs import _ignored_seed
from normtune.recorder import NormRecorder
from normtune.records import NormRecord
from normtune.search import Progress, plan_of, record_study, search
from normtune.study import load_study
from normtune.tasks import Task

SCRIPTS = Path(__file__).parent / "scripts"
PYTHON = sys.executable
METRIC = "val loss ([0-9.]+)"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """One thread, and no downloads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write_study(folder, body="", *, command=None, **keys):
    """A study of the script that stands in for a training, with a statement of the test in it."""
    folder.mkdir(exist_ok=True)
    shutil.copy(SCRIPTS / "pretend.py", folder)
    argv = command or [PYTHON, "pretend.py", "{seed}", *([body] if body else [])]
    known = {"command": argv, "metric": METRIC, "warmup_steps": 40, "threads": 1}
    known |= {"search": {"max_runs": 4}} | keys
    lines = [f"{key}: {json.dumps(value)}" for key, value in known.items() if value is not None]
    path = folder / "s.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def pretending(tmp_path, body="", **how):
    """A run of the stand-in."""
    shutil.copy(SCRIPTS / "pretend.py", tmp_path)
    command = (PYTHON, "pretend.py", "{seed}", *([body] if body else []))
    known = {"folder": tmp_path / "run", "train": "", "home": tmp_path, "seed": 3}
    known |= {"command": command, "metric": METRIC}
    return Child(Task(**{**known, **how}))


def pretended(tmp_path, body="", **how):
    """The outcome of one run of the stand-in."""
    child = pretending(tmp_path, body, **how)
    try:
        assert first_to_end([child], timeout=60)
    finally:
        end_all([child])
    return child.outcome()


# --- one run -----------------------------------------------------------------------------------


def test_a_run_has_its_values_its_record_and_its_output(tmp_path):
    """Every match is an intermediate value; the norms, the command and the output are kept."""
    outcome = pretended(tmp_path, max_norm=0.5)
    assert outcome.ending == "finished"
    values = re.findall(METRIC, (tmp_path / "run" / "output.txt").read_text())
    assert [value for _, value in outcome.values] == [float(value) for value in values]
    assert outcome.first_value == outcome.values[0][1]
    record = NormRecord.load(tmp_path / "run" / "run.norms.jsonl")
    assert set(record.max_norm) == {0.5}
    assert "pretend.py 3" in (tmp_path / "run" / "command.txt").read_text()


def test_only_the_two_tokens_are_replaced_and_no_shell_is_asked(tmp_path):
    """Row 98: braces of JSON, other names and shell syntax reach the command as they are."""
    rest = ["{max_norm.__class__}", '{"lr": {seed}}', "; echo INJECTED", "$(echo x)", "a b", "*"]
    body = "print('argv', json.dumps(sys.argv[3:]))"
    command = (PYTHON, "pretend.py", "{seed}", body, "--out={run_dir}/x", *rest)
    assert pretended(tmp_path, command=command).ending == "finished"
    (line,) = re.findall("argv (.*)", (tmp_path / "run" / "output.txt").read_text())
    assert json.loads(line) == [f"--out={tmp_path}/run/x", rest[0], '{"lr": 3}', *rest[2:]]


def test_the_environment_of_a_run(tmp_path, monkeypatch):
    """Threads are divided, output comes at once, and no storage with a password is seen (row 99)."""
    monkeypatch.setenv("NORMTUNE_STORAGE", "postgresql://u:secret@h/db")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    env = commands.environment(Task(tmp_path, "", tmp_path, seed=7, threads=3))
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "3"
    assert env["PYTHONHASHSEED"] == "7"
    assert not any("secret" in value for value in env.values())


@pytest.mark.parametrize(
    ("visible", "slots", "expected"),
    [
        ("0,1", 2, ["0", "1"]),
        ("4,5,6,7", 2, ["4,5", "6,7"]),
        ("3", 3, ["3", "3", "3"]),
        ("GPU-a,GPU-b", 3, ["GPU-a", "GPU-b", "GPU-a"]),
        ("0,1", 1, ["0,1"]),
        ("", 2, ["", ""]),
    ],
)
def test_parallel_runs_share_the_gpus(tmp_path, monkeypatch, visible, slots, expected):
    """Each slot has its own part of those that are visible; a single run sees them all."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    tasks = [Task(tmp_path, "", tmp_path, seed=0, slot=i, slots=slots) for i in range(slots)]
    assert [commands.environment(t)["CUDA_VISIBLE_DEVICES"] for t in tasks] == expected


ENDINGS = {
    "a nan at the end": ("value = math.nan", "diverged", "the last value was nan"),
    "dead norms": (
        "norms[-5:] = [math.nan] * 5",
        "diverged",
        "the gradient norm was no longer finite at the end",
    ),
    "its own check of the loss": (
        "norms[-1] = 1e5; record(); sys.exit('Loss is nan, stopping training')",
        "diverged",
        'exit code 1: "epoch 0 val loss',
    ),
    "a crash after dead norms": (
        "norms[-5:] = [math.inf] * 5; record(); raise ValueError('bad logits')",
        "diverged",
        "ValueError: bad logits",
    ),
    "a nan in the text of a crash": (
        "record(); raise ValueError('column nan not found')",
        "crashed",
        "ValueError: column nan not found",
    ),
    "an error (row 82)": ("raise RuntimeError('disk')", "crashed", 'RuntimeError: disk"'),
    "sys.exit(3) (row 84)": ("sys.exit(3)", "crashed", "ended with exit code 3; its output ends"),
    "out of memory (row 83)": ("x = [0] * 10**15", "crashed", "out of memory: MemoryError"),
    "a worker out of memory": (
        "print('exitcode  : -9 (pid: 7)'); sys.exit(1)",
        "crashed",
        "out of memory: exitcode",
    ),
    "killed (row 83)": ("os.kill(os.getpid(), 9)", "crashed", "killed (out of memory?)"),
    "a fault": ("os.kill(os.getpid(), signal.SIGSEGV)", "crashed", "ended with SIGSEGV"),
    "another max_norm": ("max_norm = 7.0", "unusable", "max_norm inf was not imposed"),
    "another rate": ("said['lr_factor'] = 0.5", "unusable", "was scaled by 0.5 instead of 1"),
    "no step": ("norms.clear(); sys.exit()", "unusable", "no step was seen: "),
    "no value": (
        "record(); print('the end'); sys.exit()",
        "finished",
        "",
    ),
}


@pytest.mark.parametrize(("body", "ending", "reason"), ENDINGS.values(), ids=ENDINGS)
def test_what_becomes_of_a_run(tmp_path, body, ending, reason):
    """Diverged, crashed, out of memory and unusable are told apart, each with its reason."""
    outcome = pretended(tmp_path, body)
    assert (outcome.ending, outcome.reason if not reason else "") == (ending, "")
    assert reason in outcome.reason
    assert "\n" not in outcome.reason


def test_a_program_that_does_not_exist_is_named(tmp_path):
    """A misspelt program is no crash to try again."""
    outcome = pretended(tmp_path, command=("pyhton", "x.py"))
    assert (outcome.ending, outcome.reason.partition(":")[0]) == ("unusable", "cannot start pyhton")


def test_a_record_of_another_arm_does_not_count():
    """The proof is the record's own rows and header: each step's max_norm, and the rate."""
    task = Task(Path(), "", Path(), seed=0, max_norm=0.5, lr_factor=0.25)
    facts = {"imposed": True, "lr_factor": 0.25}
    right = NormRecord.of([1.0, 2.0], max_norm=0.5, metadata=facts)
    assert commands.not_imposed(right, task) == ""
    once = NormRecord.of([1.0, 2.0], max_norm=[0.5, 1.0], metadata=facts)
    assert "the run's record says 1" in commands.not_imposed(once, task)
    own = NormRecord.of([1.0], max_norm=0.5, metadata={"lr_factor": 0.25})
    assert "the run's record says none" in commands.not_imposed(own, task)
    unscaled = NormRecord.of([1.0], max_norm=0.5, metadata={"imposed": True})
    assert "was scaled by 1 instead of 0.25" in commands.not_imposed(unscaled, task)


def test_the_recorder_says_its_rate_or_ends_the_run():
    """The header is a proof: a step that could not be scaled raises instead of being recorded."""
    import torch

    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    with NormRecorder(optimizer, lr_factor=0.25, max_norm=math.inf) as recorder:
        parameter.grad = torch.ones(2)
        optimizer.step()
        assert recorder.record.metadata["lr_factor"] == 0.25
    with NormRecorder([parameter], lr_factor=0.25, max_norm=math.inf):
        for _ in range(3):
            (parameter * 2).sum().backward()
            with (
                contextlib.nullcontext() if _ == 0 else pytest.raises(NormtuneError, match="scale")
            ):
                torch.nn.utils.clip_grad_norm_([parameter], 1.0)


ORPHAN = (
    "p = subprocess.Popen(['sleep', '300'], start_new_session=True); print('pid', p.pid); {then}"
)


def test_what_a_command_leaves_behind_ends_with_it(tmp_path):
    """A process in a session of its own, as torchrun's workers are, included."""
    pretended(tmp_path, ORPHAN.format(then="os._exit(0)"))
    (pid,) = re.findall(r"pid (\d+)", (tmp_path / "run" / "output.txt").read_text())
    assert gone(int(pid))


def test_a_run_that_is_told_again_and_again_to_end_still_ends_what_it_started(tmp_path):
    """A second signal does not interrupt the ending that the first one began."""
    child = pretending(tmp_path, ORPHAN.format(then="time.sleep(300)"))
    output = tmp_path / "run" / "output.txt"
    try:
        until(lambda: output.exists() and "pid" in output.read_text())
        for _ in range(100):
            child._signal(signal.SIGTERM)
            time.sleep(0.002)
        assert first_to_end([child], timeout=30)
    finally:
        end_all([child])
    (pid,) = re.findall(r"pid (\d+)", output.read_text())
    assert gone(int(pid))


# --- a study -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study of a command that was searched once, two runs at a time."""
    path = write_study(tmp_path_factory.mktemp("done") / "study")
    told: list[Progress] = []
    body = "print('gpu', os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ['OMP_NUM_THREADS'])"
    write_study(path.parent, body)
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = "5,6"
    try:
        result = search(path, max_runs=5, jobs=2, progress=told.append, verbose=True)
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
    return path, result, told


def test_a_command_is_searched_like_a_function(done):
    """One trial a run, the suggestion from the unclipped run, and free runs copied."""
    path, result, _ = done
    first = result.trials[0]
    assert (first.max_norm, first.seed, first.state) == (math.inf, 0, "finished")
    assert sum(not t.free for t in result.trials) == 5
    assert any(t.free for t in result.trials)
    assert result.settings.suggestion == result.suggestion["max_norm"]
    trials = optuna_study(path).trials
    assert {t.state for t in trials} == {TrialState.COMPLETE}
    assert trials[0].intermediate_values.keys() == {1, 2}


def test_slots_have_their_own_gpu_and_all_runs_the_same_threads(done):
    """CUDA_VISIBLE_DEVICES and OMP_NUM_THREADS as the runs themselves saw them."""
    path, _, _ = done
    outputs = [file.read_text() for file in path.parent.glob("s.runs/*/output.txt")]
    seen = {tuple(re.findall(r"gpu (\S+) (\S+)", text)[0]) for text in outputs}
    assert seen == {("5", "1"), ("6", "1")}


def test_the_time_left_and_the_output_are_told(done):
    """Progress estimates what is left, and -v shows what the trainings print."""
    _, _, told = done
    ends = [p.seconds_left for p in told if p.kind == "finished"]
    assert ends[0] > ends[-1] == 0.0
    printed = [p.text for p in told if p.kind == "output"]
    assert any(re.fullmatch(r"\d+\| epoch 1 val loss [0-9.]+", text) for text in printed)


def test_a_changed_script_is_refused(done):
    """Row 93: its contents are part of the study, and so are the command and the metric."""
    path, _, _ = done
    script = path.parent / "pretend.py"
    before = script.read_text()
    try:
        script.write_text(before + "\n# another\n")
        with pytest.raises(StudyError, match="contents of the train file was"):
            search(path, max_runs=5)
    finally:
        script.write_text(before)


def test_a_metric_that_never_appears_stops_after_the_first_run(tmp_path):
    """The output is quoted, and no second run is spent."""
    path = write_study(tmp_path / "study", metric="test loss ([0-9.]+)")
    said = r"'test loss .*' never appeared in the output; its output has \"epoch 0 val loss 2"
    with pytest.raises(StudyError, match=said):
        search(path)
    assert len(optuna_study(path).trials) == 1


def test_diverged_runs_are_results_and_a_rate_that_is_not_there_is_told(tmp_path):
    """Rows 80 and 81: the worst value and marked, never NaN. A hand-written update has no rate."""
    path = write_study(tmp_path / "study", "lr = None; value = math.nan if max_norm > 5 else value")
    result = search(path)
    trial = optuna_study(path).trials[0]
    assert (trial.state, trial.value) == (TrialState.COMPLETE, math.inf)
    assert trial.user_attrs["diverged"] is True
    assert result.trials[1].state == "finished"
    assert result.settings.lr_runs == 0
    assert any("no lower learning rate is tried" in note for note in result.notes)


def test_norms_without_a_range_end_the_study_in_one_line(tmp_path):
    """Row 94: zeros and what is not finite give no bounds, nor does a gentle warm-up of them."""
    path = write_study(tmp_path / "study", "norms = [0.0, math.inf] * 20")
    with pytest.raises(SuggestionError, match="finite"):
        search(path)


def test_crashes_quote_the_last_lines_and_stop_the_study(tmp_path):
    """Row 82: three in a row, with what the first one printed last."""
    path = write_study(tmp_path / "study", "raise RuntimeError('disk full')")
    with pytest.raises(StudyError, match=r'3 trainings in a row crashed.*RuntimeError: disk full"'):
        search(path)
    assert [t.state for t in optuna_study(path).trials] == [TrialState.FAIL] * 3


def test_a_run_over_its_time_limit_is_ended_with_all_that_it_started(tmp_path):
    """A crash with its reason; a process in a session of its own is ended too."""
    path = write_study(tmp_path / "study", ORPHAN.format(then="time.sleep(300)"))
    with pytest.raises(StudyError, match=r"3 trainings .* took longer than the time limit of 1 s"):
        search(path, time_limit="1.2 s")
    outputs = [file.read_text() for file in path.parent.glob("s.runs/*/output.txt")]
    pids = re.findall(r"pid (\d+)", "".join(outputs))
    assert len(pids) == 3
    assert all(gone(int(pid)) for pid in pids)


def test_a_command_that_ignores_its_seed_is_refused(tmp_path):
    """Two seeds with the same norms and value; the way out is named."""
    body = "draw = random.Random(5); norms = [draw.random() for _ in norms]; value = min(lr, 9.0)"
    path = write_study(tmp_path / "study", body, seed_inside=True)
    study = load_study(path)
    with pytest.raises(StudyError) as caught:
        search(path, max_runs=12, jobs=2)
    assert "the command sets a seed of its own: seeds 0 and 1 gave the same" in str(caught.value)
    assert "as in --seed {seed}" in str(caught.value)
    given = replace(study, config=study.config.model_copy(update={"seed_inside": False}))
    assert _ignored_seed(given, "seeds 0 and 1").startswith("the command ignores its {seed}: seeds")


def test_a_warm_up_of_a_command_needs_no_value(tmp_path):
    """Normtune record on such a study ends with the suggestion."""
    path = write_study(tmp_path / "study", "record(); sys.exit()")
    recorded = record_study(path)
    assert len(recorded.record) == 40
    assert recorded.suggestion.max_norm > 0


def test_parallel_runs_need_files_of_their_own(tmp_path):
    """A metric file outside of {run_dir} is refused where runs go side by side."""
    path = write_study(tmp_path / "study", metric=None, metric_file="out/m.json:loss")
    with pytest.raises(StudyError, match=r"would write over each other's out/m\.json:loss"):
        search(path, jobs=2)
    assert "4 runs at most" in plan_of(path)


MARKS = """
if orders["stop_diverged"]:
    record(); Path(run, f"diverged-{os.getpid()}").write_text("the norms exploded")
    time.sleep(300)
"""


def test_a_command_whose_norms_explode_is_ended_at_once(tmp_path):
    """Its process says so and the command ends, unless the study wants every run whole."""
    outcome = pretended(tmp_path, MARKS)
    assert (outcome.ending, outcome.reason) == ("diverged", "the norms exploded")
    (tmp_path / "whole").mkdir()
    assert pretended(tmp_path / "whole", MARKS, finish_diverged=True).ending == "finished"


DYING = """
import sys, torch
torch.manual_seed(int(sys.argv[1]))
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(10**9):
    if step == 40:
        model.weight.data.fill_(float(sys.argv[2]))
    optimizer.zero_grad()
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
"""


@pytest.mark.slow
def test_a_script_without_end_whose_weights_are_nan_is_ended(tmp_path):
    """Normtune sees it from inside; the norms until then are recorded."""
    (tmp_path / "dying.py").write_text(DYING)
    outcome = pretended(tmp_path, command=(PYTHON, "dying.py", "{seed}", "nan"))
    assert outcome.ending == "diverged"
    assert outcome.reason == "3 gradient norms in a row were not finite"
    record = NormRecord.load(tmp_path / "run" / "run.norms.jsonl")
    assert len(record.finite) == 40


# --- kills -------------------------------------------------------------------------------------

KILLER = """
import os, random, signal, sys, time
import optuna, scipy.stats, sqlalchemy  # loaded once for all controllers
from normtune.search import search

random.seed(3)
for i in range(10):
    pid = os.fork()
    if not pid:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        search(sys.argv[1])
        os._exit(0)
    time.sleep(random.uniform(0.1, 1.5))
    os.kill(pid, signal.SIGINT if i % 3 == 2 else signal.SIGKILL)
    os.waitpid(pid, 0)
"""


@pytest.mark.slow
def test_a_controller_that_is_killed_ten_times_at_random_moments_goes_on(tmp_path):
    """Rows 85 and 86: nothing is run twice, nothing is left running, the end is the same."""
    body = "print('pid', os.getpid(), flush=True); time.sleep(0.15); " + ORPHAN.format(then="pass")
    whole = search(write_study(tmp_path / "whole", body))
    path = write_study(tmp_path / "killed", body)
    subprocess.run([PYTHON, "-c", KILLER, path], check=True, timeout=120)
    outputs = [file.read_text() for file in path.parent.glob("s.runs/*/output.txt")]
    pids = re.findall(r"pid (\d+)", "".join(outputs))
    assert all(gone(int(pid)) for pid in pids)
    again = search(path)
    assert [(t.max_norm, t.seed, t.value) for t in again.trials] == [
        (t.max_norm, t.seed, t.value) for t in whole.trials
    ]
    ended = [t.params for t in optuna_study(path).trials if t.state == TrialState.COMPLETE]
    assert len(ended) == len({json.dumps(p) for p in ended})


# --- from nothing: the command line ------------------------------------------------------------


@contextlib.contextmanager
def inside(folder):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def normtune(folder, *arguments):
    with inside(folder):
        return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def pretend(tmp_path):
    """A folder with the stand-in."""
    shutil.copy(SCRIPTS / "pretend.py", tmp_path)
    return tmp_path


COMMAND = ("--", PYTHON, "pretend.py", "{seed}")


def test_a_search_from_nothing_writes_the_study_that_goes_on(pretend):
    """study.yaml says the same as the command line, and a second start of either repeats nothing."""
    options = ["search", "--metric", METRIC, "--max-runs", 4, "--warmup-steps", 40]
    first = normtune(pretend, *options, *COMMAND)
    assert first.exit_code == 0, first.output
    assert "wrote study.yaml: normtune search study.yaml goes on with it" in first.stdout
    assert "leads, no verdict" in first.stdout
    assert re.search(r"\[1/4, .* left at most\] no clipping, seed 0: ", first.stdout)
    config = load_study(pretend / "study.yaml").config
    assert config.command == COMMAND[1:]
    assert (config.metric, config.warmup_steps, config.search.max_runs) == (METRIC, 40, 4)
    for again in (["search", "study.yaml"], [*options, *COMMAND]):
        done = normtune(pretend, *again)
        assert done.exit_code == 0, done.output
        assert "[" not in done.stdout  # no event: nothing was run
    other = normtune(pretend, *options, "--maximize", *COMMAND)
    assert other.exit_code == 1
    assert "study.yaml holds another study (direction is 'minimize' there, 'maximize' here)" in (
        other.stderr
    )


def test_everything_of_a_command_line_comes_back_from_its_study(pretend):
    """Numbers, words that YAML knows and quotes stay the text that they are."""
    odd = ["1e-3", "no", "12:30", "~", "{}", "a: b", "#", "it's", "é\t", "", "- x", "0x10"]
    command = ["--seed-inside", "--metric-file", "{run_dir}/a.json:b", "--time-limit", "30 min"]
    with inside(pretend):
        from normtune import cli

        keys = {"metric_file": command[2], "seed_inside": True, "metric": None}
        study, save = cli._asked_study(
            ["prog", *odd], Path("odd.yaml"), {**keys, "search": {"time_limit": "30 min"}}
        )
        assert save()
        again = load_study("odd.yaml")
        assert not save()
    assert again.config == study.config
    assert again.config.command == ("prog", *odd)
    assert again.config.search.time_limit == 1800


WRONG = {
    "no metric": ([], "a command needs metric: such as"),
    "two metrics": (["--metric", METRIC, "--metric-file", "a:b"], "but got both"),
    "no group": (["--metric", "val loss"], "needs parentheses around the number"),
    "no pattern": (["--metric", "val loss ("], "is no regular expression: missing )"),
    "no key": (["--metric-file", "a.json"], "metric_file must be path:key"),
    "no time": (["--metric", METRIC, "--time-limit", "long"], "such as 90 s, 30 min or 2 h"),
    "another folder": (["--metric", METRIC, "--study", "../x.yaml"], "must be a file in this"),
}


@pytest.mark.parametrize(("options", "said"), WRONG.values(), ids=WRONG)
def test_wrong_use_is_one_line_before_anything_runs(pretend, options, said):
    """Exit code 2, and no file is written."""
    done = normtune(pretend, "search", *options, *COMMAND)
    assert (done.exit_code, len(done.stderr.strip().splitlines())) == (2, 1), done.output
    assert said in done.stderr
    assert [file.name for file in pretend.iterdir()] == ["pretend.py"]


def test_a_command_without_a_seed_is_refused(pretend):
    """Neither {seed} nor --seed-inside: every run would be the same."""
    command = ["--", PYTHON, "pretend.py"]
    done = normtune(pretend, "search", "--metric", METRIC, *command)
    assert done.exit_code == 2
    assert "as in --seed {seed}, or set seed_inside: true (--seed-inside)" in done.stderr


def test_options_of_a_command_are_refused_for_a_study(pretend):
    """A study file says its metric itself."""
    path = write_study(pretend)
    done = normtune(pretend, "search", "--metric-file", "a:b", path)
    assert done.exit_code == 2
    assert "--metric-file is for a command" in done.stderr


def test_a_plan_of_a_command_writes_nothing(pretend):
    """--plan prints the split, and no study.yaml appears."""
    done = normtune(pretend, "search", "--plan", "--metric", METRIC, "--max-runs", 12, *COMMAND)
    assert "12 runs at most, 0 done" in done.stdout
    assert [file.name for file in pretend.iterdir()] == ["pretend.py"]


# --- scripts that know nothing of normtune -----------------------------------------------------


def by_hand(folder, capsys, script, *arguments):
    """What a script prints in this process, unwatched."""
    argv, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        with inside(folder):
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    finally:
        sys.argv = argv
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_script_with_its_own_clipping_is_searched(tmp_path, capsys):
    """Its flag is not needed, and the values are those that the flag would have given."""
    metric = r"valid loss +([0-9.]+)"
    command = [PYTHON, SCRIPTS / "word_model.py", "--seed", "{seed}"]
    done = normtune(
        tmp_path, "search", "--metric", metric, "--max-runs", 4, "--json", "--", *command
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["settings"]["current"] == 0.25
    runs = [t for t in result["trials"] if not t["free"]]
    assert len(runs) == 4
    for run in runs:
        clip = ["--clip", run["max_norm"], "--seed", run["seed"]]
        printed = by_hand(tmp_path, capsys, "word_model.py", *clip)
        assert run["value"] == float(re.findall(metric, printed)[-1])


@pytest.mark.slow
def test_a_script_without_clipping_and_without_a_seed_is_searched(tmp_path):
    """Clipped and seeded from inside, a higher accuracy being better."""
    metric = r"Accuracy: (\d+)/120"
    command = [PYTHON, SCRIPTS / "no_clip.py"]
    options = ["--metric", metric, "--maximize", "--seed-inside", "--max-runs", 4, "--json"]
    done = normtune(tmp_path, "search", *options, "--", *command)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["settings"]["current"] is None
    assert result["settings"]["reuse"]  # runs of one seed are bit-equal until they are clipped
    clipped = [t for t in result["trials"] if not t["free"] and t["max_norm"] != "inf"]
    assert len(clipped) == 3
    assert all(0 < t["clip_share"] <= 1 for t in clipped)
    outputs = tmp_path.glob("study.runs/*/output.txt")
    assert len({re.findall(metric, file.read_text())[0] for file in outputs}) > 1


@pytest.mark.slow
def test_a_hugging_face_trainer_script_is_searched(tmp_path):
    """The metric comes from the trainer_state.json in each run's own folder."""
    pytest.importorskip("transformers", reason="needs the extra transformers")
    words = (
        "--output_dir {run_dir} --seed {seed} --max_steps 40 --eval_strategy steps --eval_steps 20 "
        "--learning_rate 1e-2 --per_device_train_batch_size 8 --logging_steps 20 --save_strategy no "
        "--report_to none --use_cpu true --disable_tqdm true"
    )
    command = [PYTHON, SCRIPTS / "finetune.py", *words.split()]
    where = "{run_dir}/trainer_state.json:eval_loss"
    options = ["--metric-file", where, "--warmup-steps", 40, "--max-runs", 4, "--json"]
    done = normtune(tmp_path, "search", *options, "--", *command)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["settings"]["current"] == 1.0
    runs = {t["value"] for t in result["trials"] if not t["free"]}
    files = tmp_path.glob("study.runs/*/trainer_state.json")
    histories = [json.loads(file.read_text())["log_history"] for file in files]
    assert runs == {[row["eval_loss"] for row in h if "eval_loss" in row][-1] for h in histories}
    assert len(histories) == 4
