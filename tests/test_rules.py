"""Rules, held against numpy and the figures of their papers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normtune import rules
from normtune.errors import SuggestionError

NORMS = np.random.default_rng(0).lognormal(size=500)


@pytest.mark.parametrize("p", [10, 50, 75, 90, 95, 99])
def test_percentile_rules_are_numpys(p):
    """Each pN of RULES is numpy's percentile, by its name or as a function."""
    assert rules.RULES[f"p{p}"](NORMS) == np.percentile(NORMS, p)
    assert rules.parse(f"p{p}")(NORMS) == np.percentile(NORMS, p)
    assert rules.parse(rules.RULES[f"p{p}"]).name == f"p{p}"


@pytest.mark.parametrize(
    ("name", "value", "label"),
    [
        ("p97.5", np.percentile(NORMS, 97.5), "p97.5"),
        ("P90", np.percentile(NORMS, 90), "p90"),
        ("p100", NORMS.max(), "p100"),
        ("median_multiple", 2 * np.median(NORMS), "2 x median"),
        ("median_multiple:3", 3 * np.median(NORMS), "3 x median"),
        ("pascanu", 5 * NORMS.mean(), "5 x mean"),
        ("pascanu:0.5", 0.5 * NORMS.mean(), "0.5 x mean"),
        (None, np.percentile(NORMS, 90), "p90"),
        (np.max, NORMS.max(), "max"),
        (lambda norms: norms.max(), NORMS.max(), "your function"),
    ],
)
def test_rules_are_read_as_written(name, value, label):
    """A name, a name with a factor, nothing and a function all give a rule with its label."""
    rule = rules.parse(name)
    assert rule(NORMS) == pytest.approx(value)
    assert rule.label == label


@pytest.mark.parametrize("name", [*rules.RULES, "p97.5", "pascanu:3", "median_multiple:0.5"])
def test_the_name_of_a_rule_gives_the_rule_again(name):
    """What a suggestion stores as its rule can be handed back."""
    rule = rules.parse(name)
    assert rule.name == name
    assert rules.parse(rule.name)(NORMS) == rule(NORMS)


@pytest.mark.parametrize("wrong", ["p0.9", "0.9", 0.9])
def test_a_percentile_below_one_is_explained(wrong):
    """A percentile written as a fraction says how to write it."""
    text = "percentile must lie in 1..100 but got 0.9; write p90 for the 90th percentile."
    with pytest.raises(ValueError) as error:
        rules.parse(wrong)
    assert str(error.value) == text


@pytest.mark.parametrize("wrong", ["p101", "p0", "90", "mean", "", 90, "p-5", "pascanu:x", "p"])
def test_other_wrong_rules_are_one_clear_line(wrong):
    """Unknown names and impossible percentiles or factors are a ValueError of one line."""
    with pytest.raises(ValueError, match="must") as error:
        rules.parse(wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("factor", ["0", "-1", "inf", "nan"])
def test_factors_must_be_above_zero(factor):
    """A factor that is no finite number above 0 is refused."""
    with pytest.raises(ValueError, match="above 0"):
        rules.parse(f"pascanu:{factor}")


@pytest.mark.parametrize("value", [math.nan, 0.0, -1.0, math.inf, None, "x"])
def test_a_rule_must_give_a_usable_number(value):
    """A function that gives no finite number above 0 is refused by name."""

    def mine(norms):
        return value

    with pytest.raises(SuggestionError, match="the rule mine must give"):
        rules.parse(mine)(NORMS)


@settings(max_examples=50, deadline=None)
@given(
    norms=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40),
    scale=st.floats(1e-3, 1e3),
)
def test_rules_scale_with_the_norms(norms, scale):
    """Norms k times as large give a max_norm k times as large: no rule has a unit of its own."""
    array = np.array(norms)
    for name, rule in rules.RULES.items():
        assert rule(scale * array) == pytest.approx(scale * rule(array)), name


def test_interval_of_a_multiple_is_the_multiple_of_the_interval():
    """2 x median has twice the interval of p50; the mean has its own; a function has none."""
    ordered = np.sort(NORMS)
    median = rules.parse("p50").interval(NORMS, ordered, effective=500.0)
    double = rules.parse("median_multiple").interval(NORMS, ordered, effective=500.0)
    mean = rules.parse("pascanu:1").interval(NORMS, ordered, effective=500.0)
    assert double == (2 * median.low, 2 * median.high)
    assert mean.low < NORMS.mean() < mean.high
    assert math.isnan(rules.parse(np.max).interval(NORMS, ordered, effective=500.0).low)
