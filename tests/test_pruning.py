"""Which trainings are hopeless, and which cannot be told."""

import pytest

from normtune.pruning import LEAST_SHARE, Pruner, pruner_of

# From 10 down: the best run has gained 8 at the half, then 9.
BEST = {0: 10.0, 25: 4.0, 50: 2.0, 75: 1.0, 100: 0.5}
OTHERS = [{0: 10.0, 25: 6.0, 50: 5.0, 75: 4.0, 100: 3.0}, dict.fromkeys(BEST, 10.0)]


def test_nothing_is_judged_before_half_of_the_schedule_nor_at_its_end():
    """The least gains are a share of the best run's, by step."""
    pruner = pruner_of([BEST, *OTHERS], "minimize")
    assert pruner == Pruner({50: LEAST_SHARE * 8.0, 75: LEAST_SHARE * 9.0}, "minimize")


@pytest.mark.parametrize("curves", [[], [BEST, BEST], [dict.fromkeys(BEST, 10.0)] * 3])
def test_too_little_to_judge_by(curves):
    """Fewer than three whole runs, or none that gained, prune nothing."""
    assert pruner_of(curves, "minimize") is None


@pytest.mark.parametrize(
    ("values", "hopeless"),
    [
        ([(0, 10.0), (25, 10.0)], False),
        ([(0, 10.0), (50, 4.5)], True),
        ([(0, 10.0), (50, 4.3)], False),
        ([(0, 20.0), (50, 14.3)], False),
        ([(0, 10.0), (60, 9.0)], False),
        ([(50, 9.0)], False),
        ([(0, 10.0), (75, 11.0)], True),
    ],
)
def test_what_is_hopeless(values, hopeless):
    """A run that gained less than the share of the best run's gain at that step."""
    pruner = pruner_of([BEST, *OTHERS], "minimize")
    why = pruner.why(values)
    assert bool(why) == hopeless
    assert not hopeless or why.startswith(f"hopeless at step {values[-1][0]}: it gained ")


def test_maximize_mirrors_minimize():
    """Accuracies that rise are judged as losses that fall."""
    curves = [{step: -value for step, value in c.items()} for c in (BEST, *OTHERS)]
    pruner = pruner_of(curves, "maximize")
    assert pruner.gains == pruner_of([BEST, *OTHERS], "minimize").gains
    assert pruner.why([(0, -10.0), (50, -4.5)])
    assert not pruner.why([(0, -10.0), (50, -4.3)])
