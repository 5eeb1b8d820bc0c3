"""What a search found, as text."""

import json
import math
import re
from dataclasses import replace

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
    rows = [line for line in lines if line.startswith("  ") and " of 5" in line]
    assert len(rows) == len(helped.verdict.arms) == 3
    (suggestion,) = [row for row in rows if " 0.5 " in row]
    assert "25 %" in suggestion
    assert "0 of 5" in suggestion
    assert "-0.9" in suggestion
    assert any("5 free" in row and row.endswith("same as no clipping") for row in rows)
    assert max(map(len, rows)) <= 110


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
    """A study that only explored has rows of one seed, and says nothing of the suggestion."""
    settings = Settings(8, suggestion=0.5, low=0.01, high=5.0, current=2.0)
    explored = [
        Trial(math.inf, 1.0, 0, "finished", "explore", 2.0),
        Trial(0.5, 1.0, 0, "finished", "explore", 1.5),
        Trial(1.0, 1.0, 0, "diverged", "explore"),
        Trial(10.0, 1.0, 0, "finished", "explore", 2.0, free=True),
    ]
    text = str(result_of(settings, explored))
    assert "the suggestion 0.5 had no fresh seeds\n" in text
    assert "study s: 3 trainings, 0 s in all" in text
    rows = [re.split(r" {2,}", line.strip()) for line in text.splitlines()[4:9]]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("no clipping", "none", "one seed only"),
        ("suggestion, best found", "0.5", "-0.5 on one seed only"),
        ("current", "2", "not tried"),
        ("common default", "1", "one seed only"),
        ("common default", "10", "same as no clipping on one seed"),
    ]
    assert rows[3][-2] == "1 of 1"


def test_a_suggestion_without_fresh_seeds_is_told(helped):
    """Where the sentence takes the whole budget, nothing is said of the suggestion."""
    settings = replace(helped.settings, suggestion=0.3, margin=0.3)
    seen = [t for t in helped.trials if t.max_norm != 0.3]
    text = str(result_of(settings, seen))
    assert "suggestion 0.3 had no fresh seeds within this budget: nothing is said of it" in text
    assert "what counts as equal: within 0.3, which is" in text
    assert "(yours; " in text
