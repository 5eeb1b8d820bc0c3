"""Rules of a max_norm from an unclipped warm-up: the published ones, and six candidates.

The candidates were written down in LOG.md before any result of the sweep was read.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from normtune import rules

Norms = npt.NDArray[np.float64]
Rule = Callable[[Norms, str], float]
FEWEST = 10  # finite norms


def by_optimizer(norms: Norms, optimizer: str) -> float:
    """p50 under SGD, p90 under Adam and its relatives."""
    return rules.percentile(finite(norms), 50.0 if optimizer == "SGD" else 90.0)


def capped(norms: Norms, _optimizer: str) -> float:
    """p90, but at most 2 x the median."""
    return min(rules.p90(finite(norms)), rules.median_multiple(finite(norms)))


def tail(norms: Norms, _optimizer: str) -> float:
    """p90, but p50 where p99 is above 10 x the median."""
    kept = finite(norms)
    heavy = rules.p99(kept) > 10 * rules.p50(kept)
    return rules.p50(kept) if heavy else rules.p90(kept)


def lower_half(norms: Norms, _optimizer: str) -> float:
    """p90 of the first and of the second half, the smaller of the two."""
    kept = finite(norms)
    half = len(kept) // 2
    return min(rules.p90(kept[:half]), rules.p90(kept[half:]))


def unstable(norms: Norms, _optimizer: str) -> float:
    """p90, but p10 where a step was non-finite or the median rose above 3 x its first half's."""
    kept = finite(norms)
    half = len(kept) // 2
    grew = rules.p50(kept[half:]) > 3 * rules.p50(kept[:half])
    return rules.p10(kept) if grew or len(kept) < len(norms) else rules.p90(kept)


def calm(norms: Norms, _optimizer: str) -> float:
    """p90 of the steps before the first explosion, and p50 of them where there is one."""
    for i in range(FEWEST, len(norms)):
        before = norms[:i]
        if not norms[i] <= 10 * np.median(finite(before)):
            return rules.p50(finite(before))
    return rules.p90(finite(norms))


def finite(norms: Norms) -> Norms:
    """The finite ones, in their order."""
    return norms[np.isfinite(norms)]


def published(name: str) -> Rule:
    """A rule of `normtune.rules`, which looks at finite norms only."""
    rule = rules.parse(name)
    return lambda norms, _optimizer: rule(finite(norms))


PUBLISHED = ("p10", "p50", "p75", "p90", "p95", "p99", "median_multiple", "pascanu")
CANDIDATES: dict[str, Rule] = {
    rule.__name__: rule for rule in (by_optimizer, capped, tail, lower_half, unstable, calm)
}
RULES: dict[str, Rule] = {name: published(name) for name in PUBLISHED} | CANDIDATES
