"""What goes to a run and comes back."""

import math

from normtune.tasks import Outcome, value_of


def test_value_rules():
    """Last, best and mean of last 3 are what they say, in either direction."""
    values = [(1, 4.0), (2, 1.0), (3, 2.0), (4, 6.0)]
    assert value_of(values, "last", "minimize") == 6.0
    assert value_of(values, "best", "minimize") == 1.0
    assert value_of(values, "best", "maximize") == 6.0
    assert value_of(values, "mean of last 3", "minimize") == 3.0
    assert value_of(values[:1], "mean of last 3", "minimize") == 4.0


def test_an_outcome_is_kept_whole(tmp_path):
    """An outcome comes back from its file as it was, non-finite values included."""
    outcome = Outcome("diverged", ((1, 2.5), (2, math.inf)), "the reported value was inf", 1.25)
    outcome.save(tmp_path)
    assert Outcome.load(tmp_path) == outcome
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert Outcome.load(tmp_path / "nowhere") is None
