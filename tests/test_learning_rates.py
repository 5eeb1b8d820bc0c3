"""A learning-rate factor equals a run whose learning rate was changed by hand, bit for bit."""

import math

import loops
import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from normtune.errors import StudyError
from normtune.recorder import NormRecorder

FACTOR = 0.3

OPTIMIZERS = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True),
    "AdamW foreach": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True),
    "AdamW fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
    "SGD fused": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, fused=True),
    "tensor lr": lambda p, lr: torch.optim.AdamW(p, lr=torch.tensor(lr)),
    "Adagrad": lambda p, lr: torch.optim.Adagrad(p, lr=lr, lr_decay=0.1),
    "two groups": lambda p, lr: torch.optim.SGD([{"params": p}, {"params": [], "lr": 2 * lr}], lr),
}


class EachEpoch:
    """A scheduler that is stepped every fourth batch."""

    def __init__(self, scheduler):
        self.scheduler, self.batches = scheduler, 0

    def step(self):
        self.batches += 1
        if self.batches % 4 == 0:
            self.scheduler.step()


class OnPlateau:
    """A scheduler that is told a validation loss every other batch, and this one never falls."""

    def __init__(self, optimizer):
        self.scheduler = schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
        self.batches = 0

    def step(self):
        self.batches += 1
        if self.batches % 2 == 0:
            self.scheduler.step(1.0)


SCHEDULES = {
    "none": lambda _: None,
    "step, per epoch": lambda o: EachEpoch(schedulers.StepLR(o, 1, gamma=0.5)),
    "cosine, per epoch": lambda o: EachEpoch(schedulers.CosineAnnealingLR(o, T_max=3)),
    "plateau": OnPlateau,
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=5),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, T_max=8),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.7),
    "one cycle": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda i: 1 / (1 + i)),
    "chained": lambda o: schedulers.ChainedScheduler(
        [
            schedulers.LinearLR(o, total_iters=4),
            schedulers.ExponentialLR(o, 0.9),
        ]
    ),
}


class ByHand:
    """The plain slow way: the loop itself multiplies before the step and puts back after it."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __enter__(self):
        self.own = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * FACTOR

    def __exit__(self, *_):
        for group, own in zip(self.optimizer.param_groups, self.own, strict=True):
            group["lr"] = own


class Nothing:
    def __init__(self, optimizer):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def train(make, schedule, *, by_hand, scheduler_first=True):
    """One training; the rates that its loop saw after each step, and its parameters."""
    model = loops.net()
    optimizer = make(list(model.parameters()), 0.05)
    scheduler = schedule(optimizer) if scheduler_first else None
    recorder = None if by_hand else NormRecorder(optimizer, lr_factor=FACTOR)
    scheduler = scheduler or schedule(optimizer)
    around = ByHand if by_hand else Nothing
    seen = []
    for x, y in loops.batches():
        optimizer.zero_grad()
        loops.loss_of(model, x, y).backward()
        with around(optimizer):
            optimizer.step()
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        if scheduler is not None:
            scheduler.step()
    if recorder is not None:
        assert len(recorder.record) == loops.STEPS
        recorder.close()
    return model, seen


def same(a, b):
    return all(map(torch.equal, a.parameters(), b.parameters()))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_factor_equals_a_rate_changed_by_hand(make):
    """Bit for bit, and the loop sees its own rates after each step (row 17d)."""
    ours, seen = train(make, SCHEDULES["none"], by_hand=False)
    theirs, expected = train(make, SCHEDULES["none"], by_hand=True)
    assert same(ours, theirs)
    assert seen == expected


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("scheduler_first", [True, False])
@pytest.mark.parametrize(
    "name", ["SGD", "momentum", "AdamW foreach", "AdamW fused", "tensor lr", "two groups"]
)
def test_schedulers_never_see_the_factor(schedule, scheduler_first, name):
    """Rates follow the loop's own schedule, made before the recorder or after it (row 17d)."""
    make = OPTIMIZERS[name]
    ours, seen = train(make, schedule, by_hand=False, scheduler_first=scheduler_first)
    theirs, expected = train(make, schedule, by_hand=True)
    assert same(ours, theirs)
    assert seen == expected
    assert schedule is SCHEDULES["none"] or seen[0] != seen[-1]  # this schedule did something


def test_a_plain_sgd_factor_equals_a_smaller_lr():
    """No schedule: the same as giving the optimizer the smaller rate."""
    ours, _ = train(OPTIMIZERS["SGD"], SCHEDULES["none"], by_hand=False)
    model = loops.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * FACTOR)
    for x, y in loops.batches():
        optimizer.zero_grad()
        loops.loss_of(model, x, y).backward()
        optimizer.step()
    assert same(ours, model)


def closure_run(*, by_hand, set_inside):
    model = loops.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    recorder = None if by_hand else NormRecorder(optimizer, lr_factor=FACTOR)
    seen = []
    for i, (x, y) in enumerate(loops.batches()):

        def closure(i=i, x=x, y=y):
            optimizer.zero_grad()
            loss = loops.loss_of(model, x, y)
            loss.backward()
            group = optimizer.param_groups[0]
            seen.append(group["lr"])
            if set_inside:
                group["lr"] = 0.05 / (1 + i)
            return loss

        if by_hand:
            loss = closure()
            with ByHand(optimizer):
                optimizer.step(lambda loss=loss: loss)
        else:
            optimizer.step(closure)
        seen.append(optimizer.param_groups[0]["lr"])
    if recorder is not None:
        recorder.close()
    return model, seen


@pytest.mark.parametrize("set_inside", [False, True])
def test_a_rate_set_inside_the_closure_is_kept_and_scaled(set_inside):
    """Lightning sets rates there; the factor lives from the closure's return on (row 17d)."""
    ours, seen = closure_run(by_hand=False, set_inside=set_inside)
    theirs, expected = closure_run(by_hand=True, set_inside=set_inside)
    assert same(ours, theirs)
    assert seen == expected


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_reads_its_rate_before_the_first_closure(search):
    """And has the smaller one all the same, through all evaluations of its step."""

    def run(lr, **options):
        model = loops.net()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=lr, max_iter=4, line_search_fn=search)
        recorder = NormRecorder(optimizer, **options)
        for x, y in loops.batches():

            def closure(x=x, y=y):
                assert optimizer.param_groups[0]["lr"] == lr
                optimizer.zero_grad()
                loss = loops.loss_of(model, x, y)
                loss.backward()
                return loss

            optimizer.step(closure)
            assert optimizer.param_groups[0]["lr"] == lr
        recorder.close()
        return model

    smaller = run(0.1 * FACTOR)
    assert same(run(0.1, lr_factor=FACTOR), smaller)
    assert not same(run(0.1), smaller)


@pytest.mark.parametrize("name", ["momentum", "AdamW foreach", "AdamW fused"])
def test_steps_that_a_grad_scaler_leaves_out_leave_no_factor(name):
    """Gradients that overflow now and then; fused optimizers are called all the same."""

    def run(*, by_hand):
        model = loops.net()
        optimizer = OPTIMIZERS[name](list(model.parameters()), 0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        recorder = None if by_hand else NormRecorder(optimizer, lr_factor=FACTOR)
        seen = []
        for i, (x, y) in enumerate(loops.batches()):
            optimizer.zero_grad()
            loss = loops.loss_of(model, x, y)
            scaler.scale(loss * math.inf if i in (2, 5, 6) else loss).backward()
            with (ByHand if by_hand else Nothing)(optimizer):
                scaler.step(optimizer)
            scaler.update()
            seen.append(optimizer.param_groups[0]["lr"])
        if recorder is not None:
            recorder.close()
        return model, seen

    ours, seen = run(by_hand=False)
    theirs, expected = run(by_hand=True)
    assert same(ours, theirs)
    assert seen == expected == [0.05] * loops.STEPS


class Breaking(torch.optim.SGD):
    """Raises inside the arithmetic of one step, as a device out of memory would."""

    breaks = False

    @torch.no_grad()
    def step(self, closure=None):
        if self.breaks:
            message = "out of memory"
            raise RuntimeError(message)
        return super().step(closure)


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_step_that_raised_leaves_the_loops_own_rate(scheduled):
    """The loop catches, its scheduler goes on, and nothing stays scaled (row 17d)."""

    def run(*, by_hand):
        model = loops.net()
        optimizer = Breaking(model.parameters(), lr=0.05)
        recorder = None if by_hand else NormRecorder(optimizer, lr_factor=FACTOR)
        scheduler = schedulers.ExponentialLR(optimizer, 0.8)
        around = ByHand if by_hand else Nothing
        seen = []
        for i, (x, y) in enumerate(loops.batches()):
            optimizer.breaks = i in (4, 5)
            optimizer.zero_grad()
            loops.loss_of(model, x, y).backward()
            try:
                with around(optimizer):
                    optimizer.step()
            except RuntimeError:
                pass
            seen.append(optimizer.param_groups[0]["lr"])
            if scheduled:
                scheduler.step()
        if recorder is not None:
            recorder.close()
        return model, seen

    ours, seen = run(by_hand=False)
    theirs, expected = run(by_hand=True)
    assert seen == expected
    assert same(ours, theirs)


def test_a_closure_that_raised_leaves_the_loops_own_rate():
    """The factor is not on while the closure runs."""
    model = loops.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with NormRecorder(optimizer, lr_factor=FACTOR):

        def closure():
            raise ArithmeticError

        for _ in range(2):
            with pytest.raises(ArithmeticError):
                optimizer.step(closure)
            assert optimizer.param_groups[0]["lr"] == 0.05


def test_closing_leaves_the_loops_own_rate_and_no_factor():
    """After close() a step has the full rate."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    NormRecorder(optimizer, lr_factor=FACTOR).close()
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert parameter.item() == -0.5


def test_the_record_holds_the_loops_own_rate():
    """The factor is told by the run, not by a changed lr."""
    model = loops.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = NormRecorder(optimizer, lr_factor=FACTOR)
    for x, y in loops.batches():
        optimizer.zero_grad()
        loops.loss_of(model, x, y).backward()
        optimizer.step()
    assert set(recorder.record.lr) == {0.05}
    recorder.close()


@pytest.mark.parametrize("lr", [None, "auto"])
def test_a_rate_that_is_computed_inside_the_step_is_refused(lr):
    """Adafactor's lr=None: before the first step, with the reason (row 17d)."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(StudyError, match="computed inside the step"):
        NormRecorder(optimizer, lr_factor=FACTOR)
    NormRecorder(optimizer).close()


@pytest.mark.parametrize("factor", [0, -1, math.inf, math.nan, "1"])
def test_a_factor_that_cannot_be_meant_is_refused(factor):
    """It must be a finite number above 0."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    with pytest.raises(ValueError, match="lr_factor must be"):
        NormRecorder(optimizer, lr_factor=factor)
