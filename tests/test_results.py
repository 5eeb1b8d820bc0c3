"""What a search found, as text."""

import json
import math

import pytest

from normtune.comparison import verdict
from normtune.results import SearchResult
from normtune.trials import Settings, Trial


def result_of(settings: Settings, trials: list[Trial]) -> SearchResult:
    return SearchResult(
        name="s",
        storage="sqlite:///s.db",
        verdict=verdict(settings, trials),
        suggestion={"max_norm": settings.suggestion},
        settings=settings,
        trials=tuple(trials),
        notes=("a note",),
        why_ended="all is decided",
    )


@pytest.fixture
def helped():
    """Five fresh seeds on which the suggestion beats no clipping, and a free arm of 10."""
    settings = Settings(24, suggestion=0.5, low=0.01, high=5.0, current=10.0, lr=0.1)
    none, arms = math.inf, []
    for seed in range(6):
        stage = "confirm" if seed else "explore"
        noise = 0.01 * (seed % 3)
        for max_norm, value in ((none, 2.0), (0.5, 1.0), (10.0, 2.0)):
            free = max_norm == 10.0
            value_ = value + noise + (0.003 * seed if max_norm == 0.5 else 0.0)
            share = 0.25 if max_norm == 0.5 else 0.0
            arms.append(
                Trial(max_norm, 1.0, seed, "finished", stage, value_, free, 3.0, 0.1, share)
            )
    return result_of(settings, arms)


def test_the_table_has_a_row_for_each_arm(helped):
    """Arms with max_norm, clipped share, failures, mean and difference stand in one table."""
    lines = str(helped).splitlines()
    rows = [line for line in lines if line.startswith("  ") and " of " in line]
    assert len(rows) == len(helped.verdict.arms) == 3
    (suggestion,) = [row for row in rows if " 0.5 " in row]
    assert "25 %" in suggestion
    assert "0 of 5" in suggestion
    assert "-0.9" in suggestion
    assert any("5 free" in row for row in rows)


def test_it_ends_with_the_sentence_and_the_suggestion(helped):
    """The verdict's sentence is followed by what the suggestion does, and by the notes."""
    text = str(helped)
    assert helped.verdict.sentence in text
    assert "the suggestion 0.5 helps against no clipping" in text
    assert "better than the loop's own 10" in text
    assert text.endswith("- a note")


def test_json_is_strict(helped):
    """Everything is plain; infinite values are strings."""
    plain = json.loads(json.dumps(helped.to_dict(), allow_nan=False))
    assert plain["trials"][0]["max_norm"] == "inf"
    assert plain["settings"]["suggestion"] == 0.5
    assert plain["verdict"]["suggestion_vs_none"] == "helps"


def test_without_fresh_seeds_nothing_is_claimed():
    """A study that only explored says that the suggestion was not tried on fresh seeds."""
    settings = Settings(8, suggestion=0.5, low=0.01, high=5.0)
    explored = [Trial(math.inf, 1.0, 0, "finished", "explore", 2.0)]
    text = str(result_of(settings, explored))
    assert "the suggestion 0.5 was not tried on fresh seeds" in text
    assert "study s: 1 training, 0 s in all" in text
