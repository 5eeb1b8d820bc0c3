"""The recorder that nobody made: the same norms in every kind of loop, and nothing kept alive."""

import gc
import json
import math
import threading
import weakref

import loops
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from normtune import automatic, interception, listening, orders
from normtune.errors import NormtuneError
from normtune.launch import findings_in, records_in
from normtune.orders import Orders
from normtune.recorder import NormRecorder
from normtune.records import NormRecord


@pytest.fixture
def reside(tmp_path, monkeypatch):
    """Makes a resident for this process, and takes it away again."""
    made = []
    for name in ("__init__", "__setstate__"):
        monkeypatch.setattr(Optimizer, name, getattr(Optimizer, name))
    monkeypatch.setattr(automatic.atexit, "register", lambda _: None)
    torch._dynamo.reset()

    def make(**given):
        made.append(automatic._Resident(Orders(tmp_path, **given)))
        interception.reside(made[-1])
        return made[-1]

    yield make
    for resident in made:
        resident.over()
    interception.reside(None)
    listening.COMPILED.watched = bool(listening.listeners_of_thread())


def run(case, resident, clip=loops.CLIP):
    torch.manual_seed(0)
    model, true = case.loop(lambda _: None, clip)
    resident.over()
    return model, true


# Without a hint a hand-written class has no hooks, and measure="backward" is nobody's wish.
UNSEEN = {loops.duck, loops.own_arithmetic}
SEEN = [case for case in loops.CASES if case.recorded and case.loop not in UNSEEN]


@pytest.mark.parametrize("case", SEEN, ids=lambda c: c.name)
def test_a_loop_that_nobody_edits_gives_its_true_norms(case, reside, tmp_path):
    """The table of loops, without the line that makes a recorder."""
    _, true = run(case, reside())
    record = NormRecord.load(records_in(tmp_path)[0])
    missing = np.zeros(len(true), bool)
    missing[: len(record)] = record.skipped & ~np.isfinite(record.norms)
    found = np.where(missing[: len(record)], np.nan, record.norms)
    np.testing.assert_allclose(found, np.where(missing, np.nan, true), rtol=1e-5)


# A GAN's generator, which its loop does not clip, is clipped too where a max_norm is imposed.
CLIPPED = [case for case in SEEN if case.own_clip and case.loop is not loops.gan]


@pytest.mark.parametrize("case", CLIPPED, ids=lambda c: c.name)
def test_an_imposed_max_norm_reaches_a_loop_that_nobody_edits(case, reside):
    """From its first step on, compiled or not, the parameters are those of that max_norm."""
    imposed, _ = run(case, reside(max_norm=0.21))
    interception.reside(None)
    torch._dynamo.reset()
    torch.manual_seed(0)
    asked, _ = case.loop(lambda _: None, 0.21)
    for p, q in zip(imposed.parameters(), asked.parameters(), strict=True):
        assert torch.equal(p, q)


def test_two_optimizers_have_a_series_each_in_one_file(reside, tmp_path):
    """A GAN's discriminator is clipped, its generator is not; each says its own optimizer."""
    case = next(c for c in loops.CASES if c.loop is loops.gan)
    _, true = run(case, reside())
    (path,) = records_in(tmp_path)
    record = NormRecord.load(path)
    np.testing.assert_allclose(record.norms, true, rtol=1e-5)
    assert record.metadata["optimizer"] == "SGD"
    other = NormRecord.load(path, series="Adam")
    assert len(other) == len(true)
    assert other.metadata["optimizer"] == "Adam"


def test_gradients_that_were_clipped_at_the_imposed_value_are_not_clipped_again(reside):
    """From the first step on, where the backward pass came before the recorder."""

    def measure_and_clip(model, clip):
        loops.early_bound(model.parameters(), math.inf)
        loops.early_bound(model.parameters(), clip)

    reside(max_norm=0.21)
    imposed, _ = loops.simple(lambda _: None, clip=lambda m: measure_and_clip(m, loops.CLIP))
    interception.reside(None)
    asked, _ = loops.simple(lambda _: None, clip=lambda m: measure_and_clip(m, 0.21))
    for p, q in zip(imposed.parameters(), asked.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_second_optimizer_of_the_same_parameters_does_not_clip_again(reside):
    """Also at the first step, where no backward pass was counted yet."""

    def both(clip):
        model = loops.net()
        optimizers = [
            kind(model.parameters(), lr=0.01) for kind in (torch.optim.SGD, torch.optim.Adam)
        ]
        for x, y in loops.batches():
            model.zero_grad()
            loops.loss_of(model, x, y).backward()
            loops.early_bound(model.parameters(), clip)
            for optimizer in optimizers:
                optimizer.step()
        return model

    reside(max_norm=0.21)
    imposed = both(loops.CLIP)
    interception.reside(None)
    asked = both(0.21)
    for p, q in zip(imposed.parameters(), asked.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("clips", [False, True])
def test_an_optimizer_made_anew_for_the_same_parameters_goes_on_with_its_series(
    clips, reside, tmp_path
):
    """Scripts that lower the learning rate so; another class of optimizer has a series of its own."""
    resident = reside()
    model, _ = model_and_optimizer()
    kinds = [torch.optim.SGD, torch.optim.SGD, torch.optim.Adam, torch.optim.SGD]
    for i, kind in enumerate(kinds):
        optimizer = kind(model.parameters(), lr=0.1 / (i + 1))
        torch.optim.lr_scheduler.ConstantLR(optimizer)  # keeps the optimizer until the next gc
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.ones(4, 6)).pow(2).mean().backward()
            if clips:
                loops.early_bound(model.parameters(), 0.1)
            optimizer.step()
    resident.over()
    (path,) = records_in(tmp_path)
    notes = NormRecord.load(path).origin.notes
    assert len(NormRecord.load(path)) == (20 if clips else 15)
    assert notes == (() if clips else ("also series 'Adam': 5 steps",))


def test_two_optimizers_of_a_kind_on_the_same_parameters_have_a_series_each(reside):
    """Both were there before the first step."""
    resident = reside()
    model, first = model_and_optimizer()
    second = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        train(model, first, steps=1)
        train(model, second, steps=1)
    assert resident.recorder.record.origin.notes == ("also series 'SGD 2': 3 steps",)


def model_and_optimizer():
    model = nn.Linear(6, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def train(model, optimizer, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, 6)).pow(2).mean().backward()
        optimizer.step()


def test_models_that_a_script_drops_are_freed_at_once(reside):
    """A script that trains model after model must not fill the memory; no garbage is left over."""
    resident = reside()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            model, optimizer = model_and_optimizer()
            train(model, optimizer)
            gone = weakref.ref(model), weakref.ref(optimizer)
            del model, optimizer
            assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()
    assert resident.recorder.record.origin.notes == (
        "also series 'SGD 2': 5 steps",
        "also series 'SGD 3': 5 steps",
    )


def test_a_script_with_a_recorder_of_its_own_is_recorded_too(reside, tmp_path):
    """Both see each step, and the max_norm of the command wins over the script's own."""
    resident = reside(max_norm=math.inf)
    model, optimizer = model_and_optimizer()
    with NormRecorder(optimizer, max_norm=0.1) as own:
        train(model, optimizer)
        mine = own.record.norms
    resident.over()
    np.testing.assert_array_equal(NormRecord.load(records_in(tmp_path)[0]).norms, mine)


def test_enough_steps_end_the_process_as_sys_exit_does(reside, tmp_path):
    """The handlers and finally blocks of the script run, and the record is whole."""
    reside(steps=7)
    model, optimizer = model_and_optimizer()
    with pytest.raises(SystemExit) as ended:
        train(model, optimizer, steps=100)
    assert ended.value.code == 0
    assert len(NormRecord.load(records_in(tmp_path)[0])) == 7
    assert orders.marks(tmp_path, orders.ENOUGH)


def test_a_loop_that_swallows_its_end_is_left_at_its_next_step(reside, monkeypatch):
    """A bare except: must not train on."""
    resident = reside(steps=2)
    left = []
    monkeypatch.setattr(automatic, "_leave", lambda: left.append(True))
    model, optimizer = model_and_optimizer()
    with pytest.raises(SystemExit):
        train(model, optimizer)
    train(model, optimizer, steps=1)
    assert left
    assert resident.recorder.n_steps == 2


def test_enough_steps_in_another_thread_end_the_whole_process(reside, monkeypatch):
    """SystemExit would end that thread only."""
    reside(steps=2)
    left = []
    monkeypatch.setattr(automatic, "_leave", lambda: left.append(True))
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    thread = threading.Thread(target=train, args=model_and_optimizer())
    thread.start()
    thread.join(20)
    assert left


def test_two_training_threads_have_a_record_each(reside, tmp_path):
    """What they train at the same time is not mixed: 60 true norms for each."""
    case = next(c for c in loops.CASES if c.loop is loops.early)
    resident = reside()
    true = {}

    def work(clip):
        true[clip] = [case.loop(lambda _: None, clip)[1] for _ in range(5)]

    threads = [threading.Thread(target=work, args=(clip,)) for clip in (0.2, 0.4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    resident.over()
    records = [NormRecord.load(path) for path in records_in(tmp_path)]
    assert sorted(r.current for r in records) == [0.2, 0.4]
    for record in records:
        np.testing.assert_allclose(record.norms, true[record.current][0], rtol=1e-5)
        assert len(record.origin.notes) == 4  # the models that followed, a series each


def test_the_first_steps_are_written_at_once(reside, tmp_path):
    """A script that ends by os._exit() or is killed soon has something to suggest from."""
    reside()
    train(*model_and_optimizer(), steps=30)
    assert len(NormRecord.load(records_in(tmp_path)[0])) == 30


def test_what_cannot_be_imposed_ends_the_run_with_its_reason(reside, tmp_path):
    """An lr that is computed inside the step cannot be scaled, so the run must not count."""
    reside(lr_factor=0.5)
    model, _ = model_and_optimizer()
    optimizer = torch.optim.Adafactor(model.parameters())
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(NormtuneError, match="cannot scale the learning rate of Adafactor"):
        train(model, optimizer)
    assert "cannot scale" in next(iter(orders.marks(tmp_path, orders.FAILED).values()))


def test_a_recording_that_fails_never_disturbs_the_training(reside, tmp_path, monkeypatch):
    """Without anything imposed the training goes on, and the parent is told."""
    reside()

    def broken(_):
        message = "no room"
        raise OSError(message)

    monkeypatch.setattr(automatic, "_new_file", broken)
    train(*model_and_optimizer())
    assert list(orders.marks(tmp_path, orders.FAILED).values()) == ["OSError: no room"]


def test_the_end_says_what_the_process_had(reside, tmp_path):
    """The parent tells from it why nothing was recorded."""
    resident = reside()
    model_and_optimizer()
    resident.over()
    (text,) = orders.marks(tmp_path, orders.OVER).values()
    assert json.loads(text) == {"optimizers": 1, "steps": 0}
    assert findings_in(tmp_path) == []


def test_orders_travel_through_the_environment(tmp_path, monkeypatch):
    """Infinity and the run's folder included."""
    given = Orders(tmp_path, max_norm=math.inf, lr_factor=0.1, seed=3, steps=9, metadata={"a": 1})
    for name, value in given.environment({"PYTHONPATH": "mine"}).items():
        monkeypatch.setenv(name, value)
    assert Orders.of_environment() == given
    assert given.environment({"PYTHONPATH": "mine"})["PYTHONPATH"].endswith(":mine")
    assert given.environment({})["PYTHONPATH"] == str(orders.INJECT)


def test_a_seed_is_set_for_torch_numpy_and_random():
    """The same seed draws the same, from all three."""
    import random

    def draw():
        automatic._seed(5)
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002, S311

    assert draw() == draw()
