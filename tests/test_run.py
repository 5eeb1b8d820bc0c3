"""A run: what `train(run)` is given, and how its end is told."""

import math

import numpy as np
import pytest
import torch
from small_study import carried_out, task_for

from normtune.records import NormRecord
from normtune.run import Run, RunEnded, TrainError, load_train


def train_by_hand(run: Run, steps: int) -> torch.nn.Linear:
    """A few steps of a linear model, all drawn from the run's seed."""
    torch.manual_seed(run.seed)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    run.watch(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(4, 3)) - 1).square().mean().backward()
        optimizer.step()
    return model


# --- what the training is given


def test_watch_clips_as_torch_does():
    """A run with a max_norm ends in the parameters of a loop that calls clip_grad_norm_."""
    ours = train_by_hand(Run(seed=3, max_norm=0.2), 20)
    torch.manual_seed(3)
    theirs = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        (theirs(torch.randn(4, 3)) - 1).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.2)
        optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)


def test_watch_scales_the_learning_rate():
    """A run with a factor equals a loop whose learning rate was changed by hand."""
    ours = train_by_hand(Run(seed=3, max_norm=math.inf, lr_factor=0.5), 20)
    torch.manual_seed(3)
    theirs = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.25)
    for _ in range(20):
        optimizer.zero_grad()
        (theirs(torch.randn(4, 3)) - 1).square().mean().backward()
        optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)


def test_watch_is_called_once():
    """A second call would leave half of the training without its arm, so it is refused."""
    run = Run()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    run.watch(optimizer)
    with pytest.raises(TrainError, match="once, with all optimizers"):
        run.watch(optimizer)
    with pytest.raises(TrainError, match="once, with all optimizers"):
        Run().watch()


@pytest.mark.parametrize("value", [1.5, np.float32(1.5), torch.tensor(1.5), torch.tensor([1.5])])
def test_any_number_can_be_reported(value):
    """Floats, NumPy scalars and tensors of one element are validation values."""
    run = Run()
    run.report(value, 7)
    run.report(value)
    assert run.values == [(7, 1.5), (2, 1.5)]


@pytest.mark.parametrize("value", ["0.3", True, None, torch.ones(2), [1.0]])
def test_what_is_no_number_is_refused(value):
    """A report that is no single number is an error that says what came."""
    with pytest.raises(TrainError, match="needs the validation value as one number"):
        Run().report(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_report_ends_the_run(value):
    """A non-finite value is a diverged run, and no `except Exception` holds it."""
    run = Run()
    assert not issubclass(RunEnded, Exception)
    with pytest.raises(RunEnded):
        run.report(value)
    assert run.ended is not None
    assert run.ended[0] == "diverged"


# --- finding the training


def test_finds_a_function_in_a_module(tmp_path, monkeypatch):
    """``package.module:function`` is imported from the folder of the study."""
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    (tmp_path / "packaged").mkdir()
    (tmp_path / "packaged" / "deep.py").write_text("def fit(run): return 4.5\n")
    assert load_train("packaged.deep:fit", tmp_path)(None) == 4.5


FAULTY = {
    "a missing module": ("x = 1", "nowhere.at_all:train", "looked for in"),
    "an import that fails": ("import not_there", "b.py:train", "No module named 'not_there'"),
    "a syntax error": ("def train(run:", "b.py:train", "SyntaxError"),
    "another name": (
        "def trian(run): ...",
        "b.py:train",
        "has no function 'train'; did you mean tr",
    ),
    "no argument": (
        "def train(): ...",
        "b.py:train",
        "must take one argument, as in def train(run)",
    ),
    "no function": ("train = 3", "b.py:train", "has no function 'train'"),
}


@pytest.mark.parametrize(("source", "train", "said"), FAULTY.values(), ids=FAULTY)
def test_says_why_a_training_cannot_be_imported(tmp_path, monkeypatch, source, train, said):
    """A training that cannot be imported is one line that says where it was looked for."""
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    (tmp_path / "b.py").write_text(source)
    with pytest.raises(TrainError) as caught:
        load_train(train, tmp_path)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value) or "b.py" in str(caught.value)


# --- in a process of its own

ENDINGS = {
    "reports": ("o = setup(run); step(*o); run.report(2.0, 1); run.report(1.0, 2)", "finished", ""),
    "returns": ("o = setup(run); step(*o); return 1.0", "finished", ""),
    "exits with 0": ("o = setup(run); step(*o); run.report(1.0); sys.exit()", "finished", ""),
    "never steps": ("setup(run); return float('nan')", "unusable", "never made a step"),
    "returns nan": ("o = setup(run); step(*o); return float('nan')", "diverged", "value was nan"),
    "swallows its end": (
        (
            "o = setup(run); step(*o)\ntry: run.report(float('inf'))\nexcept BaseException: pass\n"
            "while True: step(*o)"
        ),
        "diverged",
        "value was inf",
    ),
    "raises on nan norms": (
        (
            "m, o = setup(run); step(m, o)\nm.weight.data.fill_(float('nan')); step(m, o)\n"
            "raise ValueError('loss is nan')"
        ),
        "diverged",
        "no longer finite, then ValueError: loss is nan",
    ),
    "raises": ("raise RuntimeError('no data\\nat all')", "crashed", "RuntimeError: no data"),
    "exits with 3": ("sys.exit(3)", "crashed", "SystemExit: 3"),
    "is killed": ("os.kill(os.getpid(), 9)", "crashed", "killed (out of memory?)"),
    "segfaults": ("os.kill(os.getpid(), 11)", "crashed", "killed by SIGSEGV"),
    "leaves": ("os._exit(4)", "crashed", "exit code 4"),
    "reports nothing": ("o = setup(run); step(*o)", "unusable", "train reported nothing"),
    "returns a string": ("o = setup(run); step(*o); return '0.3'", "unusable", "returned '0.3'"),
    "never watches": ("return 1.0", "unusable", "never called run.watch"),
    "learning rate None": (
        (
            "p = torch.nn.Parameter(torch.ones(1)); o = torch.optim.SGD([p], lr=0.1)\n"
            "o.param_groups[0]['lr'] = None; run.watch(o)"
        ),
        "crashed",
        "cannot scale the learning rate",
    ),
}


@pytest.mark.parametrize(("body", "ending", "reason"), ENDINGS.values(), ids=ENDINGS)
def test_how_a_run_ends(tmp_path, body, ending, reason):
    """Each way to end is told apart: a result, a crash, or a training that cannot be used."""
    outcome = carried_out(task_for(tmp_path, body, lr_factor=0.5))
    assert outcome.ending == ending
    assert reason in outcome.reason
    if ending == "finished":
        assert outcome.values[-1][1] == 1.0


@pytest.mark.parametrize(
    "loop",
    [
        "while True: step(*o)",
        "while True:\n    try: step(*o)\n    except Exception: pass",
        "while True:\n    try: step(*o)\n    except BaseException: pass",
    ],
    ids=["plain", "except Exception", "except BaseException"],
)
def test_a_warm_up_stops_by_itself(tmp_path, loop):
    """The warm-up ends after its steps, whatever the loop catches, and its norms are all there."""
    task = task_for(tmp_path, f"o = setup(run)\n{loop}", stop_after=40)
    outcome = carried_out(task)
    assert outcome.ending == "stopped"
    assert 40 <= len(NormRecord.load(task.record_path)) <= 41


def test_a_run_is_set_up_before_its_module(tmp_path):
    """Threads and seeds are set when the user's module is imported, and output is kept apart."""
    body = "o = setup(run); step(*o); print('said', THREADS, DRAWN); return 1.0"
    task = task_for(tmp_path, body, threads=1, seed=5)
    source = task.home / "t.py"
    top = "import torch\nTHREADS = torch.get_num_threads()\nDRAWN = torch.rand(1).item()\n"
    source.write_text(top + source.read_text())
    assert carried_out(task).ending == "finished"
    drawn = torch.rand(1, generator=torch.Generator().manual_seed(5)).item()
    assert (task.folder / "output.txt").read_text() == f"said 1 {drawn}\n"
