"""Doubts: each is there when the record gives cause, with its figures, and not otherwise."""

import math
from dataclasses import replace

import numpy as np
import pytest

from normtune.doubts import is_adaptive
from normtune.records import SCHEDULE, Finding, NormRecord, Origin
from normtune.suggestion import suggest

RNG = np.random.default_rng(0)
STEADY = RNG.lognormal(0.0, 0.3, 600)


def doubts(norms=STEADY, *, lr=0.1, metadata=None, max_norm=math.nan, **asked):
    """The doubts of a record made of `norms`, without the closing sentence."""
    record = norms
    if not isinstance(norms, NormRecord):
        record = NormRecord.of(norms, lr=lr, max_norm=max_norm, metadata=metadata)
    return suggest(record, **asked).doubts[:-1]


def only(sentences, word):
    """The one sentence that holds `word`."""
    found = [s for s in sentences if word in s]
    assert len(found) == 1, sentences
    return found[0]


def with_origin(**facts):
    """A steady record from a log of this kind."""
    return NormRecord.of(STEADY, lr=0.1, origin=Origin(path="train.log", kind="log", **facts))


def test_a_steady_record_has_no_doubt():
    """600 steady norms at one learning rate raise none."""
    assert doubts() == ()


def test_the_last_sentence_tells_a_guard_from_a_limit():
    """p90 is called a guard and p10 a step-size limit, and both point to the learning rate."""
    guard = suggest(STEADY).doubts[-1]
    limit = suggest(STEADY, rule="p10").doubts[-1]
    assert guard == (
        "p90 is a guard: it acts on spikes. It won't rescue a learning rate that is too high; if "
        "norms grow or explode, lower the learning rate first (0.3x) and record again"
    )
    assert limit.startswith("p10 is a step-size limit, not a guard: it scales 90 % of the steps.")


@pytest.mark.parametrize(("fall", "verb"), [(0.25, "fell"), (4.0, "grew")])
def test_drift_names_ratio_share_and_remedy(fall, verb):
    """Norms that move by half a record say how much, what that clips later, and what to do."""
    norms = STEADY * np.where(np.arange(600) < 300, 1.0, fall)
    text = only(doubts(norms), "second half")
    share = suggest(norms).candidates
    later = next(c for c in share if c.suggested).second_half
    assert text.startswith(f"norms {verb} ")
    assert "4x from the first" in text or "3.9x from the first" in text or "4.1x" in text
    assert f"would clip {100 * later:.0f} % of later steps" in text
    assert text.endswith("Record longer, or --skip 300")


def test_remedy_counts_from_the_start_of_the_record():
    """After 100 skipped steps the advice names a step of the whole record."""
    norms = STEADY * np.where(np.arange(600) < 350, 1.0, 0.2)
    assert only(doubts(norms, skip=100), "second half").endswith("--skip 350")


def test_no_skip_is_advised_where_too_little_would_be_left():
    """A record of 40 steps is only told to record longer."""
    norms = STEADY[:40] * np.where(np.arange(40) < 20, 1.0, 0.1)
    assert only(doubts(norms), "second half").endswith("Record longer")


def test_a_burn_in_that_sets_the_value_is_named():
    """Large norms in the first tenth are named together with the value without them."""
    norms = STEADY.copy()
    norms[:55] *= 20
    text = only(doubts(norms), "the start sets this value")
    assert "55 of the 60 steps" in text
    without = np.percentile(norms[60:], 90)
    assert f"Without it p90 is {without:.2f}: --skip 60" in text


def test_too_few_norms_have_no_upper_bound():
    """p99 of 100 norms has no upper bound, and the sentence says how many would give one."""
    text = only(doubts(STEADY[:100], rule="p99"), "too few")
    assert text.startswith("100 norms are too few for p99: its interval has no upper bound")
    assert "record about 3" in text or "record about 4" in text


def test_alike_neighbours_count_as_fewer():
    """Norms that come in long stretches are said to be worth fewer."""
    norms = np.exp(np.repeat(RNG.normal(size=20), 20)) * STEADY[:400]
    assert "worth about" in only(doubts(norms), "too few")


@pytest.mark.parametrize(("bad", "diverged"), [([5], False), (range(0, 600, 10), True)])
def test_nonfinite_steps_are_counted(bad, diverged):
    """A few are left out; more than 5 % mean a run that diverged."""
    norms = STEADY.copy()
    norms[list(bad)] = np.inf
    text = only(doubts(norms), "non-finite")
    assert text.startswith(f"{len(list(bad))} step")
    assert ("diverged" in text) == diverged


def test_a_run_that_ends_non_finite_diverged():
    """One last nan is enough."""
    text = only(doubts([*STEADY, math.nan]), "non-finite")
    assert "the last one too" in text
    assert "diverged" in text


def test_spikes_that_dominate_are_named():
    """A few steps that outweigh all others, and a value far above the median, are doubted."""
    spiky = STEADY.copy()
    spiky[::120] *= 1e5
    assert "5 steps of 600 above 10x the median" in only(doubts(spiky), "spikes dominate")
    heavy = STEADY * np.where(RNG.random(600) < 0.2, 50.0, 1.0)
    assert "x the median" in only(doubts(heavy), "tighter guard")


def test_sgd_below_every_norm_is_a_normalised_step():
    """A value below the smallest norm names the step length lr x max_norm."""
    text = only(
        doubts(rule=lambda norms: 0.1 * norms.min(), metadata={"optimizer": "SGD"}), "normalised"
    )
    assert "below the smallest norm" in text
    value = suggest(STEADY, rule=lambda norms: 0.1 * norms.min()).max_norm
    assert text.endswith(f"lr x max_norm = {0.1 * value:.3g}")


def test_clipping_most_steps_is_called_extreme():
    """p10 clips 90 %, above the Playbook's limit; under Adam that advice does not hold."""
    assert "90 % of the steps" in only(doubts(rule="p10"), "Tuning Playbook")
    assert not any("Playbook" in d for d in doubts(rule="p10", optimizer="Adam"))


@pytest.mark.parametrize(("eps", "doubted"), [(1e-8, False), (1e-4, True)])
def test_adams_eps_floor(eps, doubted):
    """Entries below 100 x eps are doubted: max_norm over the root of the number of parameters."""
    facts = {"optimizer": "AdamW", "eps": eps, "parameters": 1_000_000}
    assert any("eps" in d for d in doubts(metadata=facts)) == doubted


def test_sgd_has_no_eps_floor():
    """The floor belongs to optimizers that divide by the scale."""
    facts = {"optimizer": "SGD", "eps": 1.0, "parameters": 1_000_000}
    assert not any("eps" in d for d in doubts(metadata=facts))


@pytest.mark.parametrize(
    ("optimizer", "word"),
    [("AdamW", "hardly shrinks"), ("Muon+AdamW", "Muon normalises"), ("LBFGS", "LBFGS compares")],
)
def test_optimizers_with_their_own_meaning_of_clipping(optimizer, word):
    """Adam, Muon and LBFGS each get their sentence, and a given name beats the record's."""
    assert only(doubts(optimizer=optimizer, metadata={"optimizer": "SGD"}), word)


def test_adaptive_optimizers_are_known_by_name():
    """Adam's relatives are adaptive; SGD, Muon and an unknown one are not taken for such."""
    assert all(map(is_adaptive, ["Adam", "AdamW", "NAdam", "RMSprop", "Adafactor", "SGD+Adam"]))
    assert not any(map(is_adaptive, ["SGD", "Muon", "LBFGS", "", "MyOptimizer"]))


def test_a_falling_learning_rate_is_doubted():
    """An end below 90 % of the maximum is named with both rates; a warm-up upwards is not."""
    falling = np.linspace(0.1, 0.01, 600)
    assert "from 0.1 to 0.01" in only(doubts(lr=falling), "learning rate fell")
    assert doubts(lr=falling[::-1].copy()) == ()


@pytest.mark.parametrize("own", [False, True], ids=["header", "the user's own fact"])
def test_the_first_part_of_a_schedule_is_doubted(own):
    """600 of 2400 steps are too few where the schedule is known; 600 of 1200 are not."""
    for schedule, there in ((2400, True), (1200, False), (math.inf, False), ("long", False)):
        facts = {SCHEDULE: schedule}
        found = doubts(metadata={"metadata": facts} if own else facts)
        assert any("ends at step 600 of 2400" in text for text in found) == there
        assert any("Record 1200 steps" in text for text in found) == there


def test_a_skipped_burn_in_is_no_short_record():
    """What counts is how far the record reaches, not how many norms are left."""
    assert doubts(metadata={SCHEDULE: 1000}, skip=200) == ()


def test_belted_and_skipped_steps_are_counted():
    """Steps that the belt held and steps that a GradScaler skipped are named with their number."""
    record = NormRecord.of(STEADY, lr=0.1)
    some = np.arange(600) % 100 == 7
    assert "6 steps of the warm-up" in only(doubts(replace(record, belted=some)), "belt")
    assert "6 steps of 600 (1 %)" in only(doubts(replace(record, skipped=some)), "GradScaler")


@pytest.mark.parametrize(
    ("value", "word"),
    [("mean of window", "mean over a window"), ("last of window", "last step of each")],
)
def test_windowed_logs_are_doubted(value, word):
    """A log of window means or of every n-th step says what that hides."""
    assert only(doubts(with_origin(value=value)), word)


def test_unknown_sides_are_doubted():
    """A log that may hold norms from after clipping, or means, says so."""
    assert only(doubts(with_origin(clip_side="unknown")), "taken before clipping")
    assert only(doubts(with_origin(value="unknown")), "one step or a mean")


def test_gaps_between_logged_steps_are_doubted():
    """Every 50th step hides the spikes between."""
    record = NormRecord.of(STEADY, steps=np.arange(600) * 50, lr=0.1)
    assert "every 50th step" in only(doubts(record), "logged")


def test_findings_are_doubts():
    """What was found about the clip calls stands among the doubts, before the weaker ones."""
    finding = Finding("after-step", "the clip call at train.py:7 comes after step().", count=600)
    record = replace(NormRecord.of(STEADY, lr=0.1), findings=(finding,))
    found = doubts(record, optimizer="Adam")
    assert found[0] == "the clip call at train.py:7 comes after step() (600 times)"


def test_coarse_and_zero_norms_are_doubted():
    """Few distinct values and norms of zero are each named."""
    assert "distinct values" in only(doubts((0.2 * STEADY).round(2)), "few digits")
    zeros = STEADY.copy()
    zeros[::100] = 0.0
    assert only(doubts(zeros), "norm of exactly 0").startswith("6 steps of 600")


def test_the_current_value_is_judged():
    """A current value that clips most steps is a limit; one that clips none does nothing."""
    limit = only(doubts(current=0.5), "your current")
    share = round(100 * (STEADY > 0.5).mean())
    assert limit == (
        f"your current 0.5 clips {share} % of your steps: it acts as a step-size limit, not as a "
        "guard"
    )
    assert "clips none" in only(doubts(current=1000.0), "your current")
    assert doubts(current=float(np.percentile(STEADY, 80))) == ()


def test_a_record_of_a_heavily_clipped_run_is_doubted():
    """Norms recorded while the loop clipped most steps are those of a clipped run."""
    text = only(doubts(max_norm=0.5, current=1.5), "itself clipped")
    assert "max_norm=inf" in text


def test_the_most_serious_doubt_comes_first():
    """Non-finite steps stand before drift, drift before the number of norms."""
    norms = STEADY * np.where(np.arange(600) < 300, 1.0, 0.1)
    norms[::7] = np.nan
    order = [d.split()[0] for d in doubts(norms, optimizer="Adam")]
    assert "diverged" in doubts(norms)[0]
    assert order.index("norms") < order.index("under")
