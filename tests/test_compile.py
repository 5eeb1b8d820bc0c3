"""torch.compile: true norms, the same graphs as without a recorder, and an imposed max_norm obeyed."""

import math

import loops
import numpy as np
import pytest
import torch
from loops import early_bound
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from normtune.recorder import NormRecorder


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled:
    """A training whose parts are compiled by a backend that counts graphs and operations."""

    def __init__(self, part, *, recorder=None, clip=loops.CLIP, fullgraph=False, steps=12):
        self.counter = CompileCounterWithBackend("eager")
        model = loops.net()
        self.model = model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.recorder = recorder(optimizer) if recorder else None

        def compiled(function, name):
            if name != part:
                return function
            return torch.compile(function, backend=self.counter, fullgraph=fullgraph)

        parameters = list(model.parameters())
        forward = compiled(model, "model")
        step = compiled(optimizer.step, "step")
        clip_all = compiled(lambda p: early_bound(p, clip), "clip")

        def clip_and_step():
            early_bound(parameters, clip)
            optimizer.step()

        both = compiled(clip_and_step, "clip and step") if part == "clip and step" else None
        self.true, self.returned = [], []
        for x, y in loops.batches(steps):
            optimizer.zero_grad()
            loops.loss_of(forward, x, y).backward()
            self.true.append(loops.true_norm(parameters))
            if both:
                both()
            else:
                self.returned.append(clip_all(parameters))
                step()
        if self.recorder:
            self.recorder.close()

    @property
    def graphs(self):
        return self.counter.frame_count, self.counter.op_count

    def same_as(self, other):
        return all(map(torch.equal, self.model.parameters(), other.model.parameters()))


@pytest.mark.parametrize("part", ["model", "step", "clip"])
def test_graphs_and_operations_are_those_without_a_recorder(part):
    """No graph break, no recompilation, the same number of operations (rows 64, 65)."""
    ours = Compiled(part, recorder=NormRecorder)
    torch._dynamo.reset()
    theirs = Compiled(part)
    assert ours.graphs == theirs.graphs
    assert theirs.counter.frame_count >= 1
    assert ours.same_as(theirs)


@pytest.mark.parametrize("part", ["model", "step", "clip", "clip and step"])
def test_norms_are_true_whatever_is_compiled(part):
    """Measured by the clip call, or handed over by the compiled one (rows 64, 65, 66)."""
    run = Compiled(part, recorder=NormRecorder)
    np.testing.assert_allclose(run.recorder.record.norms, run.true, rtol=1e-5)


@pytest.mark.parametrize("part", ["model", "step", "clip", "clip and step"])
@pytest.mark.parametrize("max_norm", [0.21, math.inf])
def test_an_imposed_max_norm_is_obeyed_whatever_is_compiled(part, max_norm):
    """Parameters are those of an eager loop that asks for it (row 66)."""
    ours = Compiled(part, recorder=lambda o: NormRecorder(o, max_norm=max_norm))
    theirs = Compiled("nothing", clip=max_norm if max_norm < math.inf else 1e30)
    assert ours.same_as(theirs)
    np.testing.assert_allclose(ours.recorder.record.norms, theirs.true, rtol=1e-5)


@pytest.mark.parametrize("max_norm", [0.21, math.inf])
def test_a_compiled_clip_of_a_model_that_nobody_records_keeps_its_value(max_norm):
    """What is imposed reaches the recorder's own parameters only, in one graph for both models."""
    model, other = loops.net(), loops.net()
    counter = CompileCounterWithBackend("eager")
    recorder = NormRecorder(torch.optim.SGD(model.parameters(), lr=0.05), max_norm=max_norm)

    @torch.compile(backend=counter, fullgraph=True)
    def clip_all(parameters):
        return nn.utils.clip_grad_norm_(parameters, 0.1)

    for x, y in loops.batches(4):
        for one, expected in ((model, max_norm), (other, 0.1), (model, max_norm)):
            one.zero_grad()
            loops.loss_of(one, x, y).backward()
            true = loops.true_norm(one.parameters())
            clip_all(list(one.parameters()))
            left = loops.true_norm(one.parameters())
            assert left == pytest.approx(min(expected, true), rel=1e-5)
    recorder.close()
    assert counter.frame_count == 2


def test_a_compiled_clip_is_one_full_graph():
    """With fullgraph=True, compiled once, the norm returned as ever (row 66)."""
    run = Compiled("clip", recorder=NormRecorder, fullgraph=True)
    assert run.counter.frame_count == 1
    np.testing.assert_allclose([float(t) for t in run.returned], run.true, rtol=1e-5)
    np.testing.assert_allclose(run.recorder.record.norms, run.true, rtol=1e-5)


def test_a_recorder_made_after_the_first_compilation_is_seen():
    """Also where the clip was compiled before any recorder was there (row 66)."""
    model = loops.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    @torch.compile(backend="eager", fullgraph=True)
    def clip_all(parameters):
        return nn.utils.clip_grad_norm_(parameters, loops.CLIP)

    def steps(n):
        true = []
        for x, y in loops.batches(n):
            optimizer.zero_grad()
            loops.loss_of(model, x, y).backward()
            true.append(loops.true_norm(model.parameters()))
            clip_all(list(model.parameters()))
            optimizer.step()
        return true

    steps(2)
    recorder = NormRecorder(optimizer)
    true = steps(3)
    recorder.close()
    np.testing.assert_allclose(recorder.record.norms, true, rtol=1e-5)
    steps(2)
    assert len(recorder.record) == 3


def test_changing_the_imposed_value_while_training_is_obeyed():
    """A compiled clip sees each new value."""

    def run(*, imposed):
        torch._dynamo.reset()
        model = loops.net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        recorder = NormRecorder(optimizer) if imposed else None

        @torch.compile(backend="eager")
        def clip_all(parameters):
            return nn.utils.clip_grad_norm_(parameters, loops.CLIP)

        for i, (x, y) in enumerate(loops.batches(6)):
            limit = (0.1, 0.5, 0.2)[i // 2]
            if recorder is not None:
                recorder.max_norm = limit
            optimizer.zero_grad()
            loops.loss_of(model, x, y).backward()
            if imposed:
                clip_all(list(model.parameters()))
            else:
                early_bound(model.parameters(), limit)
            optimizer.step()
        if recorder:
            recorder.close()
        return list(model.parameters())

    assert all(map(torch.equal, run(imposed=True), run(imposed=False)))


def test_a_compiled_clip_of_a_model_that_nobody_records_is_not_recorded():
    """Its norm is not taken for that of the recorded model."""
    other = Compiled("clip", steps=2)
    model = loops.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = NormRecorder(optimizer)
    true = []
    for x, y in loops.batches(4):
        Compiled("clip", steps=1)
        optimizer.zero_grad()
        loops.loss_of(model, x, y).backward()
        true.append(loops.true_norm(model.parameters()))
        optimizer.step()
    recorder.close()
    assert other.recorder is None
    np.testing.assert_allclose(recorder.record.norms, true, rtol=1e-5)


def test_a_learning_rate_factor_holds_in_a_compiled_step():
    """The rate is an input of the graph, not part of it."""

    def run(*, factor):
        torch._dynamo.reset()
        model = loops.net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05 if factor else 0.05 * 0.3)
        recorder = NormRecorder(optimizer, lr_factor=0.3) if factor else None
        step = torch.compile(optimizer.step, backend="eager")
        for x, y in loops.batches(5):
            optimizer.zero_grad()
            loops.loss_of(model, x, y).backward()
            step()
        if recorder:
            recorder.close()
            assert optimizer.param_groups[0]["lr"] == 0.05
        return list(model.parameters())

    assert all(map(torch.equal, run(factor=True), run(factor=False)))


def whole_step(options=None, *, compiled, clip, steps=80):
    """A training whose step, backward() and all, is one compiled function."""
    counter = CompileCounterWithBackend("eager")
    model = loops.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = NormRecorder(optimizer, **options) if options is not None else None

    def step(x, y):
        optimizer.zero_grad()
        loops.loss_of(model, x, y).backward()
        if clip:
            early_bound(model.parameters(), loops.CLIP)
        optimizer.step()

    train = torch.compile(step, backend=counter) if compiled else step
    for x, y in loops.batches(steps):
        train(x, y)
    if recorder:
        recorder.close()
    return recorder, counter.frame_count, list(model.parameters())


@pytest.mark.parametrize("clip", [False, True])
def test_a_step_that_is_compiled_with_its_backward_pass_is_seen_and_not_retraced(clip):
    """The compiler meets the hooks of backward(), too; it must not trace them (row 64)."""
    _, expected, others = whole_step(compiled=True, clip=clip)
    for options in ({"measure": "step"}, {"measure": "backward"}):
        torch._dynamo.reset()
        ours, frames, parameters = whole_step(options, compiled=True, clip=clip)
        assert frames == expected > 1
        assert all(map(torch.equal, parameters, others))
        eager, _, _ = whole_step(options, compiled=False, clip=clip)
        assert len(ours.record) == len(eager.record) == 80
        np.testing.assert_allclose(ours.record.norms, eager.record.norms, rtol=1e-5)
