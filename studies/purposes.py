"""What clipping was good for: rates searched on both sides, fresh seeds, the tool's own verdict.

The sweep chooses: at every rate the best clipped value, and the best rates without clipping. Seeds
that chose nothing confirm, and `normtune.comparison.verdict` says which of its six sentences holds.

python studies/purposes.py run        # trains what is missing (an hour); can be stopped at any time
python studies/purposes.py trainings  # how often each sentence holds, by kind of rate
python studies/purposes.py pairs      # a row a task and optimizer
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from configurations import SMALLER, Configuration  # noqa: E402 - found through the line above
from rules import DEFAULT, REGIMES, Curve, curves, number, regimes  # noqa: E402
from sweep import FURTHER, RESULTS, Row, Sweep, Unit, environment, run_stage  # noqa: E402

from normtune import statistics  # noqa: E402
from normtune.arms import Arms, unbracketed  # noqa: E402
from normtune.comparison import Comparison, Verdict, verdict  # noqa: E402
from normtune.trials import Settings, Trial, state_of  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

FRESH = range(100, 106)  # six seeds, as the tool itself confirms with; the sweep has none of them
MOST_RATES = 8  # added to a task and optimizer
SENTENCES = {
    1: "better model",
    2: "another rate is better",
    3: "only makes up for the rate",
    4: "helps; other rates open",
    5: "equal or worse",
    6: "undecided",
    "none": "not confirmed",
}


@dataclass(frozen=True)
class Tried:
    """What one rate came to, in means over the seeds that choose.

    Attributes:
        none: Score without clipping.
        clipped: Score of the best value that clips a step.
        max_norm: That value.
    """

    none: float
    clipped: float
    max_norm: float


@dataclass(frozen=True)
class Pair:
    """A task and an optimizer at every rate.

    Attributes:
        study: The task.
        optimizer: The optimizer.
        curves: Its configurations in the sweep.
        rows: Further runs: rates between and beyond those of the sweep, and all fresh seeds.
    """

    study: str
    optimizer: str
    curves: tuple[Curve, ...]
    rows: tuple[Row, ...] = field(repr=False)

    @property
    def seeds(self) -> list[int]:
        """The seeds that choose: those that each of its configurations has."""
        return sorted(set.intersection(*(set(c.scores.index) for c in self.curves)))

    @cached_property
    def tried(self) -> dict[float, Tried]:
        """By rate, those of the sweep and those that were added."""
        found = {c.lr: of_curve(c) for c in self.curves}
        for lr in {row["lr"] for row in self.rows if row["arm"] == "rate"}:
            runs = self.limits(lr)
            if len(runs) > 1 and all(len(scores) == len(self.seeds) for scores in runs.values()):
                means = {m: sum(scores) / len(scores) for m, scores in runs.items()}
                found[lr] = Tried(means[math.inf], means[min(means)], min(means))
        return dict(sorted(found.items()))

    def limits(self, lr: float) -> dict[float, list[float]]:
        """The scores at an added rate, by max_norm."""
        runs: dict[float, list[float]] = {}
        for row in self.rows:
            if row["arm"] == "rate" and row["lr"] == lr and row["seed"] in self.seeds:
                runs.setdefault(float(row["max_norm"]), []).append(score(row))
        return runs

    @property
    def without(self) -> dict[float, float]:
        """Score by rate, without clipping."""
        return {lr: t.none for lr, t in self.tried.items()}

    @property
    def clipped(self) -> dict[float, float]:
        """Score of the best clipped value, by rate."""
        return {lr: t.clipped for lr, t in self.tried.items()}

    def others(self, lr: float) -> list[float]:
        """The two best other rates without clipping, lower or higher."""
        return sorted((r for r in self.without if r != lr), key=lambda r: self.without[r])[:2]

    def nearest(self, lr: float) -> Curve:
        """The configuration of the sweep whose rate is nearest."""
        return min(self.curves, key=lambda c: abs(math.log(c.lr / lr)))


def of_curve(c: Curve) -> Tried:
    """What the sweep found at one of its rates."""
    acting = [m for m in c.means.index if math.isfinite(m) and c.clipped[m].mean() > 0]
    best = min(acting, key=lambda m: c.means[m])
    return Tried(float(c.means[math.inf]), float(c.means[best]), float(best))


def score(row: Row) -> float:
    """The loss that counts; a failed run scores what its untrained model did."""
    return float(row["values"][-1 if row["state"] == "finished" else 0])


def pairs(sweep: Sweep) -> list[Pair]:
    """Every task and optimizer that learned something."""
    mine: dict[tuple[str, str], list[Curve]] = {}
    for c in curves(sweep):
        mine.setdefault((c.study, c.optimizer), []).append(c)
    rows: dict[tuple[str, str], list[Row]] = {}
    for row in sweep.rows:
        if row["arm"] in FURTHER:
            rows.setdefault((row["study"], row["optimizer"]), []).append(row)
    return [Pair(*key, tuple(found), tuple(rows.get(key, ()))) for key, found in mine.items()]


# --- the rates ----------------------------------------------------------------------------------


def rates_to_run(pair: Pair) -> list[float]:
    """Rates until the best has neighbours within a factor 2 on both sides, clipped and not."""
    begun = {row["lr"] for row in pair.rows if row["arm"] == "rate"} - set(pair.tried)
    if begun or len(pair.tried) >= len(pair.curves) + MOST_RATES:
        return sorted(begun)
    asked = [*around(pair.without), *around(pair.clipped)]
    rounded = dict.fromkeys(statistics.rounded(lr, 2) for lr in asked)
    return [lr for lr in rounded if lr not in pair.tried]


def around(losses: Mapping[float, float]) -> list[float]:
    """Rates still to try around the best one; the tool itself asks for lower ones only.

    >>> around({1.0: 3.0, 3.0: 1.0, 6.0: 2.0})
    [1.73...]
    >>> around({3.0: 2.0, 6.0: 1.0})
    [18.0]
    """
    top = max(losses)
    wanted = [top * factor for factor in unbracketed({lr / top: v for lr, v in losses.items()})]
    return [3 * top, *wanted] if best_of(losses) == top else wanted


def best_of(losses: Mapping[float, float]) -> float:
    """The rate with the lowest loss."""
    return min(losses, key=lambda lr: losses[lr])


# --- the sentence at a rate ---------------------------------------------------------------------


def places(pair: Pair) -> list[float]:
    """The rates where a sentence is asked for: those of the sweep, and where clipping does best."""
    return list(dict.fromkeys([*(c.lr for c in pair.curves), best_of(pair.clipped)]))


def arms_at(pair: Pair, lr: float) -> Arms:
    """What is compared at a rate."""
    best, c = pair.tried[lr].max_norm, pair.nearest(lr)
    suggestion = c.column(c.value(DEFAULT)) if c.lr == lr else best
    return Arms(
        none=(math.inf, 1.0),
        best=(best, 1.0),
        suggestion=(suggestion, 1.0),
        current=None,
        lower=tuple((math.inf, other / lr) for other in pair.others(lr)),
    )


def cells(pair: Pair, lr: float) -> set[tuple[float, float]]:
    """The same as (lr, max_norm)."""
    arms = arms_at(pair, lr)
    here = {(lr, max_norm) for max_norm, _ in (arms.none, arms.best, arms.suggestion)}
    return here | {(other, math.inf) for other in pair.others(lr)}


def verdict_at(pair: Pair, lr: float) -> Verdict:
    """What the tool says at a rate, from the fresh seeds of its arms."""
    arms, wanted = arms_at(pair, lr), cells(pair, lr)
    rates = [
        Trial(math.inf, other / lr, 0, "finished", "explore" if other == lr else "lr", value=mean)
        for other, mean in pair.without.items()
    ]
    fresh = [
        as_trial(row, lr)
        for row in pair.rows
        if row["arm"] == "confirm" and (row["lr"], float(row["max_norm"])) in wanted
    ]
    best = arms.best[0]  # the range is for exploring, which is over
    settings = Settings(24, arms.suggestion[0], low=best / 2, high=best * 2, lr=lr)
    return verdict(settings, [*rates, *fresh], arms)


def as_trial(row: Row, lr: float) -> Trial:
    """A stored run as the verdict sees it, its rate beside `lr`."""
    first, last = row["values"][0], row["values"][-1]
    return Trial(
        max_norm=float(row["max_norm"]),
        lr_factor=row["lr"] / lr,
        seed=row["seed"],
        state=state_of(last, first, "minimize"),
        stage="confirm",
        value=last,
        first_value=first,
        free=row["free"],
        clip_share=row["clipped"],
    )


def in_short(found: Verdict, pair: Pair) -> str:
    """The sentence in a few words; "better model" only where rates surround the best one."""
    is_open = found.kind == 1 and around(pair.without)
    return SENTENCES[4 if is_open else found.kind]


# --- tables -------------------------------------------------------------------------------------


def trainings(all_pairs: list[Pair]) -> pd.DataFrame:
    """A row a configuration of the sweep: its kind of rate, and what holds there."""
    regime = regimes([c for pair in all_pairs for c in pair.curves])
    rows = []
    for pair in all_pairs:
        for c in pair.curves:
            found = verdict_at(pair, c.lr)
            row = {
                "configuration": c.name,
                "rate": regime[c.name],
                "good for": in_short(found, pair),
            }
            row |= {"against none": found.suggestion_vs_none}
            row |= {"against the best": found.suggestion_vs_best.replace("best", "as good")}
            rows.append(row)
    return pd.DataFrame(rows)


def sentences_table(rows: pd.DataFrame) -> pd.DataFrame:
    """How many trainings each sentence holds for, by kind of rate."""
    table = counted(rows, "good for", SENTENCES.values())
    return table.rename_axis("what clipping was good for")


def suggestion_table(rows: pd.DataFrame) -> pd.DataFrame:
    """How the default's suggestion did on the fresh seeds, by kind of rate."""
    none = counted(rows, "against none", ("helps", "equal", "hurts", "undecided"))
    best = counted(rows, "against the best", ("as good", "worse", "undecided"))
    none.index = pd.Index([f"against no clipping: {word}" for word in none.index])
    best.index = pd.Index([f"against the best found: {word}" for word in best.index])
    return pd.concat([none, best]).rename_axis(DEFAULT)


def counted(rows: pd.DataFrame, column: str, order: Iterable[str]) -> pd.DataFrame:
    table = pd.crosstab(rows[column], rows["rate"])
    index = [name for name in order if name in table.index]
    columns = [regime for regime in REGIMES if regime in table]
    return table.reindex(index=index, columns=columns).rename_axis(columns=None)


def pairs_table(all_pairs: list[Pair]) -> pd.DataFrame:
    """A row a task and optimizer: both rates searched, and what holds where clipping is best."""
    rows = {}
    for pair in all_pairs:
        free, best = best_of(pair.without), best_of(pair.clipped)
        found = verdict_at(pair, best)
        same_rate = found.comparisons.get("best vs none")
        rows[f"{pair.study} {pair.optimizer}"] = {
            "rates tried": f"{len(pair.tried)}, {number(min(pair.tried))} to "
            f"{number(max(pair.tried))}",
            "best rate, none": number(free) + openness(pair.without),
            "best rate, clipped": number(best) + openness(pair.clipped),
            "max_norm": number(pair.tried[best].max_norm),
            "clipped - none, same rate": gap(same_rate),
            "clipped - none, each at its best": gap(same_rate)
            if free == best
            else gap(found.comparisons.get("lower 1 vs best"), -1),
            "margin": number(found.margin.loss),
            "what clipping was good for": in_short(found, pair),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("task")


def openness(losses: Mapping[float, float]) -> str:
    return " (open)" if around(losses) else ""


def gap(c: Comparison | None, sign: int = 1) -> str:
    """The difference of two arms with its interval, or their failures where these decide."""
    if c is None:
        return ""
    if c.reason == "reliability" or not c.n_finished:
        failed = (c.failed_a, c.failed_b)[::sign]
        return f"{failed[0]} and {failed[1]} of {c.n} failed"
    low, high = sorted((sign * c.low, sign * c.high))
    return f"{sign * c.difference:.2g} ({low:.2g} to {high:.2g})"


def told(all_pairs: list[Pair], *, names: bool = True) -> str:
    """The sentences of all pairs in one, with the names of the pairs or their number alone."""
    found: dict[str, list[str]] = {}
    for pair in all_pairs:
        short = in_short(verdict_at(pair, best_of(pair.clipped)), pair)
        found.setdefault(short, []).append(f"{pair.study} {pair.optimizer}")
    parts = [
        f"{short} {len(found[short])}" + (f" ({', '.join(found[short])})" if names else "")
        for short in SENTENCES.values()
        if short in found
    ]
    return f"Of {len(all_pairs)} pairs of task and optimizer: {'; '.join(parts)}."


# --- running ------------------------------------------------------------------------------------


def missing(sweep: Sweep) -> list[Unit]:
    """The runs of added rates that are not in the store yet, and after them the fresh seeds."""
    found = pairs(sweep)
    rates = [
        unit
        for pair in found
        for lr in rates_to_run(pair)
        for unit in units(sweep, pair, lr, "rate", limits_at(pair, lr), pair.seeds)
    ]
    if rates:
        return rates
    return [
        unit
        for pair in found
        for lr, limits in confirmed(pair).items()
        for unit in units(sweep, pair, lr, "confirm", limits, FRESH)
    ]


def limits_at(pair: Pair, lr: float) -> list[float]:
    """No clipping and one value at an added rate: what is best at the nearest rate of the sweep."""
    begun = [m for m in pair.limits(lr) if math.isfinite(m)]
    return [math.inf, *(begun or [of_curve(pair.nearest(lr)).max_norm])]


def confirmed(pair: Pair) -> dict[float, list[float]]:
    """Every max_norm that fresh seeds are for, by rate; no clipping first."""
    wanted = sorted(set().union(*(cells(pair, lr) for lr in places(pair))), reverse=True)
    return {lr: [m for other, m in wanted if other == lr] for lr, _ in wanted}


def units(  # noqa: PLR0917 - the store, and what is to be in it
    sweep: Sweep, pair: Pair, lr: float, arm: str, limits: list[float], seeds: Iterable[int]
) -> Iterator[Unit]:
    """The runs at a rate, a unit a seed; without those that are there."""
    c = Configuration(pair.study, pair.optimizer, lr, SMALLER.get(pair.study, {}))
    for seed in seeds:
        there = sweep.of(c, seed)
        left = tuple((arm, m) for m in limits if (arm, m) not in there)
        if left:
            yield Unit(c, seed, left, there.get((arm, math.inf)))


def run(sweep: Sweep, jobs: int) -> None:
    """Train what is missing; added rates may ask for more of them."""
    if not sweep.environments or sweep.environments[-1] != environment():
        sweep.environments.append(environment())
    while left := missing(sweep):
        arm = left[0].arms[0][0]
        print(f"{arm}: {sum(len(unit.arms) for unit in left)} runs to do", flush=True)
        run_stage(sweep, left, jobs, math.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "trainings", "pairs"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the processes that train
    sweep = Sweep.load(asked.results)
    if asked.what == "run":
        run(sweep, asked.jobs)
    elif asked.what == "pairs":
        print(pairs_table(pairs(sweep)).to_string(), told(pairs(sweep)), sep="\n\n")
    else:
        rows = trainings(pairs(sweep))
        print(sentences_table(rows).to_string(), suggestion_table(rows).to_string(), sep="\n\n")


if __name__ == "__main__":
    main()
