"""What every rule costs: tables from the stored sweep, one command a table.

python studies/rules.py rules       # every rule beside what people use
python studies/rules.py candidates  # the six candidates against the default
python studies/rules.py warmup      # how long a warm-up is enough
python studies/rules.py configurations
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from candidates import CANDIDATES, FEWEST, RULES, Norms, finite  # noqa: E402 - see sys.path
from sweep import FURTHER, ONLINE, RESULTS, SAME, WARMUP, Sweep, norms_of, warm_up  # noqa: E402

from normtune.rules import DEFAULT  # noqa: E402
from normtune.trials import LEARNED  # noqa: E402

FIXED = {"no clipping": math.inf, "0.5": 0.5, "1.0": 1.0, "5.0": 5.0, "10.0": 10.0}
LENGTHS = (0.05, 0.1, 0.25, 0.5, 1.0)  # shares of the schedule ...
STEPS = (50, 100, 200, 400)  # ... and counts of steps
ANSWERED = ("p10", "1.0", "no clipping", "AutoClip p10", "ZClip")
REGIMES = ("low", "searched", "too high")
EXPECTED = 0.1  # the share of steps that p90 is to clip


@dataclass(frozen=True)
class Curve:
    """One configuration: scores by max_norm over its seeds.

    Attributes:
        name: Such as ``"digits SGD 0.05"``.
        study: The study.
        optimizer: Its optimizer.
        lr: Its learning rate.
        steps: The length of its schedule.
        scores: The validation loss that counts; a row a seed, a column a max_norm.
        failed: Whether the run diverged or never learned.
        clipped: The share of the steps that the run clipped.
        others: Scores of what is no fixed max_norm; a column a method.
        others_failed: Whether those runs failed.
        untrained: Validation loss before the first step.
        norms: Norms of the whole unclipped run of the first seed.
    """

    name: str
    study: str
    optimizer: str
    lr: float
    steps: int
    scores: pd.DataFrame
    failed: pd.DataFrame
    clipped: pd.DataFrame
    others: pd.DataFrame
    others_failed: pd.DataFrame
    untrained: float
    norms: Norms

    @cached_property
    def means(self) -> pd.Series:
        """Mean score by max_norm."""
        return self.scores.mean()

    @property
    def best(self) -> float:
        """The max_norm with the lowest mean score."""
        return float(self.means.idxmin())

    @cached_property
    def range(self) -> float:
        """From the untrained model to the best."""
        return self.untrained - float(self.means.min())

    @cached_property
    def best_elsewhere(self) -> pd.Series:
        """By seed, the score of the max_norm that is best on the other seeds."""
        chosen = {s: self.scores.drop(index=s).mean().idxmin() for s in self.scores.index}
        return pd.Series({s: self.scores.loc[s, best] for s, best in chosen.items()})

    @cached_property
    def sd(self) -> float:
        """Of one run over seeds, pooled over the better half of the arms that never failed."""
        alive = self.scores.loc[:, ~self.failed.any()]
        better = alive.mean().nsmallest(max(1, len(alive.columns) // 2)).index
        return float(np.sqrt(alive[better].var(ddof=1).mean()))

    def value(self, rule: str, share: float = WARMUP) -> float:
        """What a rule makes of the warm-up; inf where too few norms were finite."""
        norms = warm_up(self.norms, self.steps, share)
        if len(finite(norms)) < FEWEST:
            return math.inf
        return RULES[rule](norms, self.optimizer)

    def column(self, max_norm: float) -> float:
        """The max_norm that was run for this one."""
        run = min(self.scores.columns, key=lambda c: distance(c, max_norm))
        if distance(run, max_norm) > math.log(SAME):
            message = f"{self.name} was not run at {max_norm:g}; run studies/sweep.py again"
            raise LookupError(message)
        return float(run)


def distance(a: float, b: float) -> float:
    """Between two max_norm, in logarithms."""
    return 0.0 if a == b else abs(math.log(a) - math.log(b))


# --- from rows to curves ------------------------------------------------------------------------


def frame(sweep: Sweep) -> pd.DataFrame:
    """The runs of a sweep; a failed run scores what its untrained model did."""
    data = pd.DataFrame([{k: v for k, v in r.items() if k != "norms"} for r in sweep.rows])
    data["max_norm"] = data["max_norm"].map(float)
    data["failed"] = data["state"] != "finished"
    data["first"] = data["values"].str[0]
    data["score"] = data["values"].str[-1].astype(float).where(~data["failed"], data["first"])
    return data


def curves(sweep: Sweep) -> list[Curve]:
    """Every configuration with at least two whole seeds that learned at some max_norm."""
    return [c for c in all_of(sweep) if learned(c)]


def hopeless(sweep: Sweep) -> list[str]:
    """The configurations that learned at no max_norm: no rule can be told from another there."""
    return [c.name for c in all_of(sweep) if not learned(c)]


def learned(c: Curve) -> bool:
    return c.range > LEARNED * abs(c.untrained)


def all_of(sweep: Sweep) -> list[Curve]:
    firsts = {
        (r["study"], r["optimizer"], r["lr"]): norms_of(r)
        for r in sweep.rows
        if r["seed"] == 0 and "norms" in r
    }
    data = frame(sweep)
    swept = data[~data["arm"].isin(FURTHER)]
    groups = swept.groupby(["study", "optimizer", "lr"], sort=False)
    found = [curve(key, runs, firsts[key]) for key, runs in groups]
    return [c for c in found if len(c.scores) >= 2]


def curve(key: tuple[str, str, float], runs: pd.DataFrame, norms: Norms) -> Curve:
    clip, other = runs[runs["arm"] == "clip"], runs[runs["arm"] != "clip"]

    def spread(part: pd.DataFrame, columns: str, values: str) -> pd.DataFrame:
        return part.pivot_table(index="seed", columns=columns, values=values).dropna()

    study, optimizer, lr = key
    return Curve(
        name=f"{study} {optimizer} {lr:g}",
        study=study,
        optimizer=optimizer,
        lr=lr,
        steps=int(runs["steps"].iloc[0]),
        scores=spread(clip, "max_norm", "score"),
        failed=spread(clip, "max_norm", "failed").astype(bool),
        clipped=spread(clip.fillna({"clipped": 0.0}), "max_norm", "clipped"),
        others=spread(other, "arm", "score"),
        others_failed=spread(other, "arm", "failed").astype(bool),
        untrained=float(runs["first"].mean()),
        norms=norms,
    )


def regimes(all_curves: list[Curve]) -> dict[str, str]:
    """By configuration: whether its rate is the best unclipped one, or below, or above it."""
    found = {}
    for c in all_curves:
        rates = [o for o in all_curves if (o.study, o.optimizer) == (c.study, c.optimizer)]
        searched = min(rates, key=lambda o: o.means[math.inf]).lr
        found[c.name] = REGIMES[1 + (c.lr > searched) - (c.lr < searched)]
    return found


# --- regret -------------------------------------------------------------------------------------


def regrets(all_curves: list[Curve]) -> pd.DataFrame:
    """A row a configuration and method: the share of the range lost, in sd, and failures."""
    regime = regimes(all_curves)
    rows = []
    for c in all_curves:
        columns = {rule: c.column(c.value(rule)) for rule in RULES}
        columns |= {name: c.column(value) for name, value in FIXED.items()}
        scored = {name: (c.scores[col], c.failed[col]) for name, col in columns.items()}
        scored |= {a: (c.others[a], c.others_failed[a]) for a in ONLINE if a in c.others}
        for name, (scores, failed) in scored.items():
            lost = float((scores - c.best_elsewhere).mean())
            rows.append(
                {
                    "method": name,
                    "configuration": c.name,
                    "study": c.study,
                    "optimizer": c.optimizer,
                    "regime": regime[c.name],
                    "max_norm": columns.get(name, math.nan),
                    "lost": lost / c.range,
                    "in sd": lost / c.sd,
                    "failed": int(failed.sum()),
                    "runs": len(failed),
                }
            )
    return pd.DataFrame(rows)


def over_tasks(part: pd.DataFrame, column: str = "lost") -> tuple[float, float, float]:
    """Mean over tasks of the mean over a task's configurations, with its bootstrap interval."""
    tasks = part.groupby("study")[column].mean().to_numpy()
    if len(tasks) < 2 or np.ptp(tasks) == 0:
        return (float(np.mean(tasks)) if len(tasks) else math.nan, math.nan, math.nan)
    drawn = bootstrap((tasks,), np.mean, method="percentile", n_resamples=2000, rng=0)
    found = drawn.confidence_interval
    return float(tasks.mean()), float(found.low), float(found.high)


def rules_table(data: pd.DataFrame) -> pd.DataFrame:
    """A row a method: share of the range lost by regime and optimizer, and failures."""
    searched, high = data[data["regime"] == "searched"], data[data["regime"] == "too high"]
    rows = {}
    for name in data["method"].unique():
        mine = searched[searched["method"] == name]
        above = high[high["method"] == name]
        low = data[(data["method"] == name) & (data["regime"] == "low")]
        rows[name] = {
            "searched": percent(*over_tasks(mine)),
            "SGD": percent(over_tasks(mine[mine["optimizer"] == "SGD"])[0]),
            "AdamW": percent(over_tasks(mine[mine["optimizer"] == "AdamW"])[0]),
            "in sd": tenths(mine["in sd"].median()),
            "low": percent(over_tasks(low)[0]),
            "too high": percent(*over_tasks(above)),
            "seeds": seeds_of(data[data["method"] == name]),
            "failed, too high": f"{above['failed'].sum()} of {above['runs'].sum()}",
            "failed, others": f"{mine['failed'].sum() + low['failed'].sum()} of "
            f"{mine['runs'].sum() + low['runs'].sum()}",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("rule")


def seeds_of(part: pd.DataFrame) -> str:
    """How many seeds stand behind the configurations of a method."""
    few, many = part["runs"].min(), part["runs"].max()
    return f"{few}" if few == many else f"{few} to {many}"


def percent(mean: float, low: float = math.nan, high: float = math.nan) -> str:
    """A share, with its interval where there is one.

    >>> percent(0.123, 0.1, 0.2)
    '12.3 % (10.0 to 20.0)'
    """
    plain, *ends = (tenths(100 * share) for share in (mean, low, high))
    if math.isnan(mean):
        return ""
    return f"{plain} %" if math.isnan(low) else f"{plain} % ({' to '.join(ends)})"


def tenths(value: float) -> str:
    """One decimal, and never -0.0."""
    return f"{round(value, 1) + 0.0:.1f}"


def short_table(data: pd.DataFrame) -> pd.DataFrame:
    """The short answer to "which rule": what each costs where the rate is right, and where not."""
    shown = data[data["method"].isin((DEFAULT, *ANSWERED))]
    right, high = (shown[shown["regime"] == regime] for regime in REGIMES[1:])
    table = {}
    for name in (DEFAULT, *ANSWERED):
        mine = high[high["method"] == name]
        table[name] = {
            "at the best of the learning rates swept": lost_by(right, name),
            "at learning rates that are too high": lost_by(high, name),
            "runs that failed there": f"{mine['failed'].sum()} of {mine['runs'].sum()}",
        }
    return pd.DataFrame(table).rename_axis("lost")


def lost_by(data: pd.DataFrame, name: str) -> str:
    return percent(over_tasks(data[data["method"] == name])[0])


def candidates_table(data: pd.DataFrame) -> pd.DataFrame:
    """The candidates against the default at the searched rate, and whether one replaces it."""
    rows = {}
    for name in [*CANDIDATES, *(rule for rule in RULES if rule not in (*CANDIDATES, DEFAULT))]:
        pairs = paired(data, name)
        searched = pairs[pairs["regime"] == "searched"]
        mean, low, high = over_tasks(searched, "difference")
        above = over_tasks(pairs[pairs["regime"] == "too high"], "difference")
        fails = pairs[(pairs["failed"] > 0) & (pairs["failed of the default"] == 0)]
        wins = high < 0 and fails.empty and name in CANDIDATES
        rows[name] = {
            "candidate": "yes" if name in CANDIDATES else "published",
            f"lost at the searched rate, minus that of {DEFAULT}": percent(mean, low, high),
            "at rates that are too high": percent(*above),
            f"fails where {DEFAULT} doesn't": ", ".join(fails["configuration"]) or "nowhere",
            f"replaces {DEFAULT}": "yes" if wins else "no",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("rule")


def paired(data: pd.DataFrame, name: str) -> pd.DataFrame:
    """A rule beside the default, a row a configuration."""
    mine = data[data["method"] == name].set_index("configuration")
    default = data[data["method"] == DEFAULT].set_index("configuration")
    mine = mine.assign(difference=mine["lost"] - default["lost"])
    return mine.assign(**{"failed of the default": default["failed"]}).reset_index()


# --- the length of the warm-up ------------------------------------------------------------------


def between(c: Curve, max_norm: float, values: pd.Series) -> float:
    """A value at a max_norm, interpolated in its logarithm; beyond the last one, no clipping."""
    runs = [m for m in c.scores.columns if math.isfinite(m)]
    if max_norm > max(runs):
        return float(values[math.inf])
    return float(np.interp(math.log(max_norm), np.log(runs), values[runs]))


def warmup_rows(all_curves: list[Curve], rule: str = DEFAULT) -> pd.DataFrame:
    """A row a configuration and length: what a shorter or longer warm-up would have given."""
    regime = regimes(all_curves)
    rows = []
    for c in all_curves:
        lengths = {f"{100 * share:g} %": share for share in LENGTHS}
        lengths |= {f"{n} steps": n / c.steps for n in STEPS if n <= c.steps}
        for length, share in lengths.items():
            value = c.value(rule, share)
            lost = (between(c, value, c.means) - c.means.min()) / c.range
            realised = between(c, value, c.clipped.mean())
            where = {"configuration": c.name, "study": c.study, "regime": regime[c.name]}
            rows.append(where | {"length": length, "lost": lost, "realised": realised})
    return pd.DataFrame(rows)


def misjudged(realised: pd.Series) -> float:
    """How often the share of steps clipped was off by more than 3 x from the 10 % of p90."""
    return float(((realised > 3 * EXPECTED) | (realised < EXPECTED / 3)).mean())


def warmup_table(rows: pd.DataFrame) -> pd.DataFrame:
    """By length: how many steps the value really clipped, and what it cost."""
    table = {}
    names = [f"{100 * share:g} %" for share in LENGTHS] + [f"{n} steps" for n in STEPS]
    for length in names:
        part = rows[rows["length"] == length]
        lost = {regime: part[part["regime"] == regime] for regime in REGIMES}
        realised = part["realised"]
        table[length] = {
            "trainings": len(part),
            "steps clipped over the run, median": percent(realised.median()),
            "quarter to three quarters": (
                f"{100 * realised.quantile(0.25):.1f} to {100 * realised.quantile(0.75):.1f} %"
            ),
            "off by more than 3 x": percent(misjudged(realised)),
            "lost, low": percent(over_tasks(lost["low"])[0]),
            "lost, searched": percent(over_tasks(lost["searched"])[0]),
            "lost, too high": percent(over_tasks(lost["too high"])[0]),
        }
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("warm-up")


# --- every configuration -------------------------------------------------------------------------


def configurations_table(all_curves: list[Curve]) -> pd.DataFrame:
    """A row a configuration."""
    regime = regimes(all_curves)
    rows = {}
    for c in all_curves:
        value = c.column(c.value(DEFAULT))
        lost = float((c.scores[value] - c.best_elsewhere).mean())
        rows[c.name] = {
            "rate": regime[c.name],
            "seeds": len(c.scores),
            "none": outcome(c, math.inf),
            "best": f"{outcome(c, c.best)} at {number(c.best)}",
            DEFAULT: f"{outcome(c, value)} at {number(value)}",
            "lost": percent(lost / c.range),
            "in sd": tenths(lost / c.sd),
            "clipped": percent(float(c.clipped[value].mean())),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("configuration")


def outcome(c: Curve, max_norm: float) -> str:
    """Mean loss of the runs that learned, and how many did not."""
    failed = int(c.failed[max_norm].sum())
    if failed == len(c.failed):
        return f"failed {failed} of {failed}"
    loss = number(float(c.scores[max_norm][~c.failed[max_norm]].mean()))
    return f"{loss} ({failed} of {len(c.failed)} failed)" if failed else loss


def number(value: float) -> str:
    """Three digits; infinity is no clipping."""
    return "none" if math.isinf(value) else f"{float(f'{value:.3g}'):g}"


TABLES: dict[str, Callable[[list[Curve]], pd.DataFrame]] = {
    "rules": lambda c: rules_table(regrets(c)),
    "candidates": lambda c: candidates_table(regrets(c)),
    "warmup": lambda c: warmup_table(warmup_rows(c)),
    "configurations": configurations_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    found = curves(Sweep.load(asked.results))
    print(TABLES[asked.table](found).to_string())


if __name__ == "__main__":
    main()
