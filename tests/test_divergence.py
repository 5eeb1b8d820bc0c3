"""A training that has diverged is told from one that only has spikes."""

import math

import numpy as np
import pytest
import torch
from small_study import carried_out, task_for

from normtune import gradients
from normtune.divergence import DEAD_NORMS, EXPLODED, EXPLODED_NORMS, Divergence
from normtune.records import NormRecord

USUAL = [1.0] * 10


def told(norms, *, died=True, series="norm"):
    """Why the norms say that a training has diverged."""
    return Divergence(lambda: died).saw([(series, norm) for norm in norms])


@pytest.mark.parametrize(
    ("norms", "died", "why"),
    [
        (USUAL, True, ""),
        ([*USUAL, math.nan, math.inf], True, ""),
        ([*USUAL, math.nan, 1.0, math.inf, math.inf], True, ""),
        ([math.nan] * DEAD_NORMS, True, "3 gradient norms in a row were not finite"),
        ([math.inf] * 50, False, ""),
        ([*USUAL, *[1.1 * EXPLODED] * EXPLODED_NORMS], False, "10 in a row above 1e+04"),
        ([*USUAL, *[1.1 * EXPLODED] * (EXPLODED_NORMS - 1), 1.0] * 3, True, ""),
        ([*USUAL, *[0.9 * EXPLODED] * 50], True, ""),
        ([0.0] * 20 + [1e-6] * 9, True, ""),
        (np.geomspace(1, 1e12, 200), False, "the gradient norms exploded"),
    ],
)
def test_what_counts_as_diverged(norms, died, why):
    """Non-finite norms in a row with dead weights, or norms in a row far above the first ones."""
    assert why in told(norms, died=died)
    assert bool(told(norms, died=died)) == bool(why)


def test_it_is_the_same_in_one_piece_and_in_many():
    """Norms come in by flushes of any length."""
    norms = [*USUAL, *[2 * EXPLODED] * EXPLODED_NORMS]
    divergence = Divergence(lambda: True)
    pieces = [divergence.saw([("norm", norm)]) for norm in norms]
    assert pieces[-1] == told(norms) != ""
    assert not any(pieces[:-1])


def test_two_series_are_two_trainings():
    """The one with large norms is no explosion of the other."""
    mixed = [(name, norm) for _ in range(40) for name, norm in (("a", 1.0), ("b", 1e6))]
    assert Divergence(lambda: True).saw(mixed) == ""


def test_spikes_are_no_explosion():
    """Heavy-tailed norms, with single ones far above all others, are usual."""
    norms = np.random.default_rng(0).lognormal(0.0, 2.0, 5000)
    assert norms.max() / np.median(norms[:10]) > 100
    assert told(norms) == ""


@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (math.nan, False), (-math.inf, False)])
def test_all_finite_is_torch_isfinite(value, finite):
    """One number anywhere decides, in any dtype."""
    tensors = [torch.ones(3, dtype=d) for d in (torch.float32, torch.float16, torch.float64)]
    tensors[1][2] = value
    assert gradients.all_finite(tensors) == finite
    assert gradients.all_finite([])


# --- in a run

DIES = "o = setup(run)\nfor i in range(400):\n    step(*o)\n    if i == 20: {harm}\nreturn 1.0"
NAN = "o[0].weight.data.fill_(float('nan'))"
HUGE = "o[1].param_groups[0]['lr'] = 2.0"


@pytest.mark.parametrize(
    ("harm", "why"), [(NAN, "were not finite"), (HUGE, "the gradient norms exploded")]
)
def test_a_run_ends_at_once_where_its_norms_explode(tmp_path, harm, why):
    """It is a result that diverged, a flush after the fact; with finish_diverged it goes on."""
    outcome = carried_out(task_for(tmp_path, DIES.format(harm=harm)))
    assert outcome.ending == "diverged"
    assert why in outcome.reason
    assert len(NormRecord.load(tmp_path / "run" / "run.norms.jsonl")) < 400
    (tmp_path / "to its end").mkdir()
    task = task_for(tmp_path / "to its end", DIES.format(harm=harm), finish_diverged=True)
    outcome = carried_out(task)
    assert (outcome.ending, outcome.values[-1][1]) == ("finished", 1.0)
    assert len(NormRecord.load(task.record_path)) == 400


def test_a_loop_that_leaves_bad_steps_out_goes_on(tmp_path):
    """Non-finite norms with weights that stay finite are the loop's own business."""
    body = (
        "o = setup(run)\nkeep = torch.optim.SGD.step\n"
        "def careful(self, closure=None):\n"
        "    if all(torch.isfinite(p.grad).all() for p in o[0].parameters()): keep(self)\n"
        "torch.optim.SGD.step = careful\n"
        "for i in range(150):\n"
        "    step(*o)\n"
        "    if i > 50: o[0].register_forward_hook(lambda m, x, y: y * float('inf'))\n"
        "return 1.0"
    )
    assert carried_out(task_for(tmp_path, body)).ending == "finished"
