"""clip_after: an unclipped warm-up with a belt, then clipping at the suggestion."""

import math

import loops
import numpy as np
import pytest
import torch

from normtune.belt import ABOVE, AFTER, CLIP, Belt
from normtune.recorder import NormRecorder
from normtune.suggestion import suggest

WARMUP = 40


class Scripted:
    """A training of one parameter whose gradient norms are given, clipping as the loop says."""

    def __init__(self, norms, *, clip=None, recorder=None, momentum=0.0, give_up=False):
        self.parameter = torch.nn.Parameter(torch.zeros(4))
        self.optimizer = torch.optim.SGD([self.parameter], lr=0.1, momentum=momentum)
        self.recorder = recorder(self.optimizer) if recorder else None
        self.path = []
        for norm in norms:
            self.optimizer.zero_grad()
            (self.parameter * norm / 2).sum().backward()
            if clip is not None:
                total = torch.nn.utils.clip_grad_norm_([self.parameter], clip)
                if give_up and not math.isfinite(total):
                    self.path.append(self.parameter.detach().clone())
                    continue
            self.optimizer.step()
            self.path.append(self.parameter.detach().clone())

    def moved(self):
        """The length of each step."""
        points = torch.stack([torch.zeros(4), *self.path])
        return torch.linalg.vector_norm(points.diff(dim=0), dim=1).numpy()


def belted(n=WARMUP, **options):
    def make(optimizer):
        recorder = NormRecorder(optimizer, **options)
        recorder.clip_after(n)
        return recorder

    return make


def random_norms(n, seed=0):
    return np.random.default_rng(seed).lognormal(sigma=0.5, size=n).tolist()


@pytest.mark.parametrize("clip", [None, 0.01])
def test_the_warmup_is_unclipped_and_then_the_suggestion_clips(clip):
    """The steps' lengths are those of min(1, max_norm / norm), with and without a clip call."""
    norms = random_norms(2 * WARMUP)
    run = Scripted(norms, clip=clip, recorder=belted())
    limit = suggest(np.array(norms[:WARMUP])).max_norm
    assert run.recorder.max_norm == pytest.approx(limit, rel=1e-6)
    expected = np.concatenate([norms[:WARMUP], np.minimum(norms[WARMUP:], limit)])
    np.testing.assert_allclose(run.moved(), 0.1 * expected, rtol=1e-4)
    record = run.recorder.record
    np.testing.assert_allclose(record.norms, norms, rtol=1e-6)
    assert set(record.max_norm[:WARMUP]) == {math.inf}
    assert set(record.max_norm[WARMUP:]) == {run.recorder.max_norm}
    run.recorder.close()


def test_a_rule_may_be_given():
    """As for suggest."""

    def make(optimizer):
        recorder = NormRecorder(optimizer)
        recorder.clip_after(WARMUP, rule="p50")
        return recorder

    norms = random_norms(WARMUP + 1)
    run = Scripted(norms, recorder=make)
    assert run.recorder.max_norm == suggest(np.array(norms[:WARMUP]), rule="p50").max_norm
    run.recorder.close()


@pytest.mark.parametrize("clip", [None, 0.01])
def test_a_spike_is_clipped_at_ten_medians_and_marked(clip):
    """Above 100 x the running median of the norms so far, from the 11th step on."""
    norms = [1.0] * 20 + [500.0] + [1.0] * 5
    run = Scripted(norms, clip=clip, recorder=belted())
    assert run.moved()[20] == pytest.approx(0.1 * CLIP, rel=1e-3)
    record = run.recorder.record
    np.testing.assert_allclose(record.norms, norms, rtol=1e-6)
    assert np.flatnonzero(record.belted).tolist() == [20]
    run.recorder.close()


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_non_finite_step_is_left_out_and_marked(clip, bad):
    """Neither parameters nor momentum change; the next step is as if it had not been."""
    norms = [1.0] * 20 + [bad] + [1.0] * 3
    run = Scripted(norms, clip=clip, recorder=belted(), momentum=0.9)
    without = Scripted([1.0] * 23, momentum=0.9)
    assert torch.equal(run.path[20], run.path[19])
    torch.testing.assert_close(run.path[-1], without.path[-1])
    assert np.flatnonzero(run.recorder.record.belted).tolist() == [20]
    run.recorder.close()


def test_a_loop_that_leaves_out_non_finite_steps_itself_loses_no_other():
    """Its `if not isfinite: continue` means one step not taken, not two."""
    norms = [1.0] * 20 + [math.nan] + [1.0] * 5
    run = Scripted(norms, clip=5.0, recorder=belted(), give_up=True)
    np.testing.assert_allclose(run.moved(), [0.1] * 20 + [0.0] + [0.1] * 5, rtol=1e-4)
    run.recorder.close()


def test_the_belt_holds_where_norms_are_measured_at_the_end_of_backward():
    """For loops that clip by their own arithmetic, or not at all."""
    norms = [1.0] * 20 + [500.0, math.nan] + [1.0] * 3
    run = Scripted(norms, recorder=belted(measure="backward"))
    expected = [0.1] * 20 + [0.1 * CLIP, 0.0] + [0.1] * 3
    np.testing.assert_allclose(run.moved(), expected, rtol=1e-3)
    assert np.flatnonzero(run.recorder.record.belted).tolist() == [20, 21]
    run.recorder.close()


def test_the_belt_is_off_for_the_first_steps_and_after_the_warmup():
    """A few steps make no median, and then the suggestion is in force."""
    norms = [1.0] * (AFTER - 1) + [1000.0]
    run = Scripted(norms, recorder=belted())
    assert run.moved()[-1] == pytest.approx(100.0)
    assert not run.recorder.record.belted.any()
    run.recorder.close()
    norms = [*random_norms(WARMUP), 1e6]
    run = Scripted(norms, recorder=belted())
    assert run.moved()[-1] == pytest.approx(0.1 * run.recorder.max_norm, rel=1e-3)
    assert not run.recorder.record.belted.any()
    run.recorder.close()


def test_the_running_median_is_that_of_numpy():
    """The limit changes exactly at 100 x the upper median of what was seen."""
    belt, seen = Belt(100, None), []
    for norm in random_norms(60, seed=3):
        if len(seen) >= AFTER:
            median = np.percentile(seen, 50, method="higher")
            assert belt.limit(ABOVE * median * 0.999) == math.inf
            assert belt.limit(ABOVE * median * 1.001) == pytest.approx(CLIP * median)
            assert belt.limit(math.inf) == 0.0
        belt.saw(norm)
        seen.append(norm)


def test_a_warmup_that_gives_no_suggestion_goes_on_unclipped():
    """All zero, or nearly all non-finite: one warning, and no exception leaves the step."""
    for norms in ([0.0] * (WARMUP + 5), [1.0] * 12 + [math.nan] * (WARMUP + 5)):
        with pytest.warns(UserWarning, match="found no max_norm in the warm-up"):
            run = Scripted(norms, recorder=belted())
        assert run.recorder.max_norm == math.inf
        run.recorder.close()


@pytest.mark.parametrize("n", [0, 29, -1, 30.0, "100"])
def test_a_warmup_too_short_to_suggest_from_is_refused(n):
    """At least 30 steps, as suggest needs."""
    recorder = NormRecorder(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    with pytest.raises(ValueError, match="n_steps must be a whole number of at least 30"):
        recorder.clip_after(n)
    recorder.close()


def test_a_warmup_goes_on_after_a_restart(tmp_path):
    """state_dict knows its end, its rule and, once there is one, the max_norm."""
    path = tmp_path / "x.norms.jsonl"
    norms = random_norms(WARMUP + 5)

    def first(optimizer):
        recorder = NormRecorder(optimizer, path)
        recorder.clip_after(WARMUP, rule="p50")
        return recorder

    run = Scripted(norms[:25], recorder=first)
    state = run.recorder.state_dict()
    run.recorder.close()

    def second(optimizer):
        recorder = NormRecorder(optimizer, path)
        recorder.load_state_dict(state)
        return recorder

    run = Scripted(norms[25:], recorder=second)
    expected = suggest(np.array(norms[:WARMUP]), rule="p50").max_norm
    assert run.recorder.max_norm == expected
    np.testing.assert_allclose(run.recorder.record.norms, norms, rtol=1e-6)
    run.recorder.close()


def test_the_belt_knows_the_norms_from_before_a_restart():
    """Its median goes on, and a spike right after the restart is clipped."""
    recorder = Scripted([1.0] * 20, recorder=belted()).recorder
    state = recorder.state_dict()
    recorder.close()

    def again(optimizer):
        recorder = NormRecorder(optimizer)
        recorder.load_state_dict(state)
        return recorder

    run = Scripted([500.0], recorder=again)
    assert run.moved()[0] == pytest.approx(0.1 * CLIP, rel=1e-3)
    run.recorder.close()


def test_a_plain_training_with_the_belt_equals_one_without_where_nothing_spikes():
    """The warm-up of a sound training is bit for bit the unclipped one."""

    def train(*, watched):
        model = loops.net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        recorder = NormRecorder(optimizer) if watched else None
        if recorder:
            recorder.clip_after(WARMUP)
        for x, y in loops.batches(30):
            optimizer.zero_grad()
            loops.loss_of(model, x, y).backward()
            optimizer.step()
        if recorder:
            recorder.close()
        return model

    assert all(
        map(torch.equal, train(watched=True).parameters(), train(watched=False).parameters())
    )
