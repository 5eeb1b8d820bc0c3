"""Every kind of loop: true norms, nothing changed, torch's clip when imposed."""

import copy
import math

import loops
import numpy as np
import pytest
import torch

from normtune.errors import SuggestionError
from normtune.recorder import NormRecorder
from normtune.records import NormRecord
from normtune.suggestion import suggest

pytestmark = pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # on a GPU


def run(case, *, max_norm=None, clip=loops.CLIP, watched=True):
    """The loop once: its model, true norms, its recorder, and the RNG state at its end."""
    made = []
    torch._dynamo.reset()

    def watch(optimizer):
        if not watched:
            return None
        made.append(NormRecorder(optimizer, max_norm=max_norm, **dict(case.options)))
        return made[-1]

    torch.manual_seed(0)
    model, true = case.loop(watch, clip)
    state = torch.get_rng_state()
    if made:
        made[0].close()
    return model, true, (made[0] if made else None), state


def same(a, b):
    return all(
        torch.equal(p, q) or (p.isnan().equal(q.isnan()) and p.isnan().any())
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


def recorded(recorder):
    return recorder._buffer.store.record()


def by_name(*, recorded=None, **wanted):
    chosen = [c for c in loops.CASES if all(getattr(c, k) == v for k, v in wanted.items())]
    if recorded is not None:
        chosen = [c for c in chosen if c.recorded == recorded]
    return pytest.mark.parametrize("case", chosen, ids=lambda c: c.name)


@by_name(recorded=True)
def test_the_recorded_norm_is_the_true_norm_of_every_step(case):
    """One row a step, equal to the norm of the gradients as backward() left them."""
    _, true, recorder, _ = run(case)
    record = recorded(recorder)
    found = np.where(record.skipped & ~np.isfinite(record.norms), np.nan, record.norms)
    expected = np.where(record.skipped & ~np.isfinite(record.norms), np.nan, true)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@by_name()
def test_parameters_and_random_state_are_bit_identical_with_a_recorder(case):
    """A recorder with max_norm=None changes nothing at all."""
    model, _, _, state = run(case)
    alone, _, _, state_alone = run(case, watched=False)
    assert same(model, alone)
    assert torch.equal(state, state_alone)


@by_name(own_clip=True)
def test_an_imposed_max_norm_takes_the_place_of_the_loops_own(case):
    """The loop asks for another value; the parameters are those of the loop that asks for ours."""
    imposed, _, recorder, _ = run(case, max_norm=0.21, clip=loops.CLIP)
    asked, _, _, _ = run(case, watched=False, clip=0.21)
    assert same(imposed, asked)
    assert recorded(recorder).norms.size


@by_name(own_clip=True)
def test_an_imposed_inf_clips_nothing_and_still_measures(case):
    """The loop's clip calls only measure; the parameters are those of a loop that never clips."""
    free, true, recorder, _ = run(case, max_norm=math.inf)
    never, _, _, _ = run(case, watched=False, clip=1e30)
    assert same(free, never)
    np.testing.assert_allclose(recorded(recorder).norms, true, rtol=1e-5)


@by_name(own_clip=False, imposable=True)
def test_an_imposed_max_norm_clips_right_before_the_step_where_no_loop_clips(case):
    """The parameters change as if the loop clipped at ours; the unclipped norms are recorded."""
    _, true, recorder, _ = run(case, max_norm=0.21)
    record = recorded(recorder)
    np.testing.assert_allclose(record.norms, true, rtol=1e-5)
    assert set(record.max_norm) == {0.21}


def test_a_plain_loop_under_an_imposed_max_norm_equals_one_that_clips_by_torch():
    """Right before the step: bit for bit what clip_grad_norm_ would have done there."""
    plain = next(c for c in loops.CASES if c.loop is loops.plain)
    clipped = next(c for c in loops.CASES if c.loop is loops.early)
    assert same(run(plain, max_norm=0.21)[0], run(clipped, watched=False, clip=0.21)[0])


@pytest.mark.parametrize(
    "case", [c for c in loops.CASES if c.finding], ids=lambda c: f"{c.name}: {c.finding}"
)
def test_a_misplaced_or_unusual_clip_call_is_named(case):
    """The finding stands in the record, with the file and line of the call where there is one."""
    _, _, recorder, _ = run(case)
    found = {f.kind: f for f in recorder.findings}
    assert case.finding in found
    if case.finding.startswith("clip"):
        place = "a compiled function" if "compile" in case.name else "loops.py:"
        assert place in found[case.finding].text


@pytest.mark.parametrize(
    "case",
    [c for c in loops.CASES if not c.finding and c.recorded],
    ids=lambda c: c.name,
)
def test_a_sound_loop_gives_no_finding(case):
    """No false alarm."""
    allowed = {"half-precision-overflow"}
    _, _, recorder, _ = run(case)
    assert {f.kind for f in recorder.findings} <= allowed


@by_name(refused=True)
def test_no_max_norm_is_suggested_from_norms_that_are_not_true(case, monkeypatch):
    """The refusal gives the reason."""
    monkeypatch.setattr(loops, "STEPS", 60)
    monkeypatch.setattr(loops.batches, "__defaults__", (60, torch.float32))
    _, _, recorder, _ = run(case)
    store = recorder._buffer.store
    if not store._attempt.blocks:
        assert any(f.blocks for f in recorder.findings)
        return
    with pytest.raises(SuggestionError):
        suggest(recorded(recorder))


def test_skipped_steps_are_marked_and_stay_outside_the_statistics():
    """Fused and not, a step that the GradScaler skipped gives the same row."""
    for loop in (loops.amp_skips, loops.amp_skips_fused, loops.amp_skips_clip):
        case = next(c for c in loops.CASES if c.loop is loop)
        record = recorded(run(case)[2])
        assert np.flatnonzero(record.skipped).tolist() == [3, 7]
        assert not np.isfinite(record.norms[record.skipped]).any()
        assert len(record.finite) == loops.STEPS - 2


def test_a_given_up_batch_is_a_skipped_row():
    """Its clip call was seen, and no step followed."""
    for loop in (loops.given_up, loops.raising):
        case = next(c for c in loops.CASES if c.loop is loop)
        record = recorded(run(case)[2])
        assert np.flatnonzero(record.skipped).tolist() == [5]


def test_a_copied_model_does_not_drag_its_recorder_along():
    """Deepcopy and pickle of a watched model still work, and the copy is not watched."""
    case = next(c for c in loops.CASES if c.loop is loops.plain)
    model = run(case)[0]
    assert same(copy.deepcopy(model), model)
    assert isinstance(NormRecord.of([1.0]), NormRecord)
