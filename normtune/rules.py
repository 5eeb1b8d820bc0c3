"""Rules that turn norms into one max_norm, each with its source.

A rule is a function of the finite norms of a run, shape ``(n,)``, that gives a max_norm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from normtune import statistics
from normtune.errors import SuggestionError

Norms = npt.NDArray[np.float64]
RuleFunction = Callable[[Norms], float]

DEFAULT = "p90"


def percentile(norms: Norms, p: float = 90.0) -> float:
    """Clip the largest ``100 - p`` percent (Seetharaman et al. 2020, arXiv:2007.14469).

    >>> percentile(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), p=50.0)
    3.0
    """
    return statistics.percentile(norms, p)


def p10(norms: Norms) -> float:
    """Clip 90 % of the steps: AutoClip (Seetharaman et al. 2020, arXiv:2007.14469).

    >>> p10(np.linspace(0.0, 10.0, 11))
    1.0
    """
    return percentile(norms, 10.0)


def p50(norms: Norms) -> float:
    """Clip half of the steps; above that, lower the learning rate (Google Tuning Playbook).

    >>> p50(np.linspace(0.0, 10.0, 11))
    5.0
    """
    return percentile(norms, 50.0)


def p75(norms: Norms) -> float:
    """Clip a quarter of the steps, between the Playbook's p90 and its limit of one half.

    >>> p75(np.linspace(0.0, 10.0, 11))
    7.5
    """
    return percentile(norms, 75.0)


def p90(norms: Norms) -> float:
    """Clip 10 % of the steps: the Google Tuning Playbook's start for unclipped norms.

    >>> p90(np.linspace(0.0, 10.0, 11))
    9.0
    """
    return percentile(norms, 90.0)


def p95(norms: Norms) -> float:
    """Clip 5 % of the steps, as TRELLIS does with its last 1000 (AdaptiveGradClipper).

    >>> p95(np.linspace(0.0, 10.0, 11))
    9.5
    """
    return percentile(norms, 95.0)


def p99(norms: Norms) -> float:
    """Clip rare spikes only; AutoClip tried up to p100 (Seetharaman et al. 2020).

    >>> p99(np.linspace(0.0, 100.0, 101))
    99.0
    """
    return percentile(norms, 99.0)


def median_multiple(norms: Norms, factor: float = 2.0) -> float:
    """Clip above `factor` times the median: icefall's ScaledAdam (k2-fsa/icefall PR 1292).

    >>> median_multiple(np.array([1.0, 2.0, 9.0]))
    4.0
    """
    return factor * statistics.percentile(norms, 50.0)


def pascanu(norms: Norms, factor: float = 5.0) -> float:
    """Clip above `factor` times the mean (Pascanu et al. 2013, arXiv:1211.5063, section 3.2).

    The paper gives 0.5 to 10 as the range of the factor; 5 acts on spikes only.

    >>> pascanu(np.array([1.0, 2.0, 9.0]), factor=0.5)
    2.0
    """
    return factor * float(np.mean(norms))


RULES: Mapping[str, RuleFunction] = MappingProxyType(
    {
        "p10": p10,
        "p50": p50,
        "p75": p75,
        "p90": p90,
        "p95": p95,
        "p99": p99,
        "median_multiple": median_multiple,
        "pascanu": pascanu,
    }
)


@dataclass(frozen=True)
class Rule:
    """A rule as the user asked for it.

    Attributes:
        name: What `parse` takes, such as ``"p90"`` or ``"median_multiple:3"``.
        label: What a table shows, such as ``"p90"`` or ``"3 x median"``.
        function: Norms to max_norm.
        percentile: The percentile it stands on, 0 to 100; nan for a rule that stands on none.
        factor: What that percentile, or the mean, is multiplied by.
    """

    name: str
    label: str
    function: RuleFunction
    percentile: float = math.nan
    factor: float = 1.0

    def __call__(self, norms: Norms) -> float:
        """The max_norm for `norms`.

        Raises:
            SuggestionError: If the rule gives no finite number above 0.
        """
        value = _as_number(self.function(norms))
        if not (math.isfinite(value) and value > 0):
            message = (
                f"the rule {self.name} must give a finite max_norm above 0 but gave {value:g} for "
                f"these {len(norms)} norms; choose a higher percentile or another rule"
            )
            raise SuggestionError(message)
        return value

    def interval(self, norms: Norms, ordered: Norms, *, effective: float) -> statistics.Interval:
        """The 95 % interval of this rule's value; (nan, nan) for a function of the user's own.

        Args:
            norms: Finite norms in the order of the steps.
            ordered: The same norms, sorted.
            effective: Effective sample size for this rule's percentile.

        Returns:
            Its lower and its upper end; inf where the sample gives no upper bound.
        """
        if not math.isnan(self.percentile):
            plain = statistics.percentile_interval(ordered, self.percentile, effective=effective)
        elif self.name.partition(":")[0] == "pascanu":
            plain = statistics.mean_interval(norms)
        else:
            return statistics.Interval(math.nan, math.nan)
        return statistics.Interval(self.factor * plain.low, self.factor * plain.high)


def parse(rule: str | RuleFunction | None) -> Rule:
    """The rule that the user names.

    Args:
        rule: ``"p90"``, ``"p97.5"``, ``"median_multiple"``, ``"median_multiple:3"``,
            ``"pascanu:5"``, a function of an array, or None for p90.

    Returns:
        The rule with its name and its label.

    Raises:
        ValueError: If there is no such rule.

    >>> parse("median_multiple:3").label
    '3 x median'
    >>> parse("p0.9")
    Traceback (most recent call last):
    ValueError: percentile must lie in 1..100 but got 0.9; write p90 for the 90th percentile.
    """
    if rule is None:
        rule = DEFAULT
    if isinstance(rule, Rule):
        return rule
    if callable(rule):
        name = getattr(rule, "__name__", type(rule).__name__)
        name = "your function" if name == "<lambda>" else name
        return parse(name) if RULES.get(name) is rule else Rule(name, name, rule)
    if not isinstance(rule, str):
        raise ValueError(_unknown(rule))  # noqa: TRY004 - wrong arguments are ValueErrors here
    text = rule.strip().lower()
    number = re.fullmatch(r"p([0-9]*\.?[0-9]+)", text)
    return _percentile_rule(float(number[1])) if number else _factor_rule(text, rule)


def _percentile_rule(p: float) -> Rule:
    if not 1 <= p <= 100:
        message = f"percentile must lie in 1..100 but got {p:g}; write p90 for the 90th percentile."
        raise ValueError(message)
    name = f"p{p:g}"
    return Rule(name, name, RULES.get(name) or (lambda norms: percentile(norms, p)), percentile=p)


def _factor_rule(text: str, asked: str) -> Rule:
    name, _, given = text.partition(":")
    if name not in ("median_multiple", "pascanu"):
        raise ValueError(_unknown(asked))
    if name == "pascanu":
        factor = _factor(given, 5.0, asked)
        label = f"{factor:g} x mean"
        return Rule(_name(name, given, factor), label, lambda n: pascanu(n, factor), factor=factor)
    factor = _factor(given, 2.0, asked)
    return Rule(
        _name(name, given, factor),
        f"{factor:g} x median",
        lambda norms: median_multiple(norms, factor),
        percentile=50.0,
        factor=factor,
    )


def _name(name: str, given: str, factor: float) -> str:
    return f"{name}:{factor:g}" if given else name


def _factor(given: str, default: float, asked: str) -> float:
    try:
        factor = float(given) if given else default
    except ValueError:
        factor = math.nan
    if not (math.isfinite(factor) and factor > 0):
        message = (
            f"the factor of a rule must be a number above 0 but got {asked!r}; write pascanu:5"
        )
        raise ValueError(message)
    return factor


def _unknown(rule: object) -> str:
    try:
        number = float(str(rule))
    except ValueError:
        number = math.nan
    if 0 < number < 1:
        return (
            f"percentile must lie in 1..100 but got {number:g}; write p90 for the 90th percentile."
        )
    hint = f"; write p{number:g}" if 1 <= number <= 100 else ""
    known = ", ".join(RULES)
    return f"rule must be one of {known}, pN, NAME:FACTOR or a function but got {rule!r}{hint}"


def _as_number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
