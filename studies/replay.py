"""The planner's search for a max_norm replayed on the stored trainings of the sweep.

Every configuration and seed of the sweep becomes an objective: the validation loss of one training
over max_norm. A value between two that were run is interpolated within that seed, in
log(max_norm); where one of the two failed, the nearer one stands for it, failures and all. From the
largest norm of the seed up it is the unclipped run, and below the lowest value that was run it is
that run. Each search sees one seed; its regret is what its value costs on the other seeds.

    python studies/replay.py --out studies/results
    python studies/replay.py --only digits --without GPSampler
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from candidates import Norms, finite  # noqa: E402 - found through the line above
from configurations import Configuration  # noqa: E402
from rules import Curve, curves  # noqa: E402
from sweep import RESULTS, Row, Sweep, is_free, norms_of  # noqa: E402

from normtune import rules  # noqa: E402
from normtune.arms import choose_arms, clipping_leads  # noqa: E402
from normtune.baseline import LEAST_NORMS, search_range  # noqa: E402
from normtune.plan import Planned, Settings, Trial, next_runs  # noqa: E402

RUNS = (6, 8, 10, 12)
LAST = RUNS[-1]
WORST = (
    20.0  # sd of one run: more than that is one and the same to a user, and would rule all means
)
RANGE = (1e-3, 1e3)  # what plain Optuna is given
REPEATS = {"TPE": 4, "random": 4}  # by the seed of the sampler; GPSampler takes too long for more
TARGET = 0.25  # sd
Objective = Callable[[float], Trial]
Search = Callable[["Replayed", Objective, int], list[float]]


@dataclass(frozen=True)
class Replayed:
    """The trainings of one configuration and seed.

    Attributes:
        curve: The configuration over all its seeds.
        seed: The seed that a search sees.
        rows: Its clipped runs by max_norm, inf without clipping.
        calm: The norms that suggestion and range come from: those of the unclipped run, or where
            it died early, of the one at the lowest rate, as of a gentle warm-up.
    """

    curve: Curve
    seed: int
    rows: Mapping[float, Row]
    calm: Norms

    @cached_property
    def settings(self) -> Settings:
        """The study that a user would have started."""
        norms = finite(self.calm)
        adaptive = self.curve.optimizer != "SGD"
        largest = finite(norms_of(self.rows[math.inf])).max(initial=0.0) or math.inf
        low, high = search_range(norms[norms > 0], largest=largest, adaptive=adaptive)
        return Settings(
            max_runs=LAST,
            explore_runs=LAST,
            suggestion=rules.p90(norms),
            low=low,
            high=high,
            seed=self.seed,
            adaptive=adaptive,
        )

    def train(self, max_norm: float) -> Trial:
        """One training of this seed."""
        row, value = self._found(max_norm)
        finished = row["state"] == "finished"
        return Trial(
            max_norm=max_norm,
            lr_factor=1.0,
            seed=self.seed,
            state=row["state"],
            stage="explore",
            value=value if finished else row["values"][-1],
            first_value=row["values"][0],
            largest_norm=math.inf if row["largest"] is None else row["largest"],
        )

    def cost(self, max_norm: float) -> float:
        """The loss of one training; a failed one counts as the untrained model."""
        row, value = self._found(max_norm)
        return value if row["state"] == "finished" else self.curve.untrained

    def _found(self, max_norm: float) -> tuple[Row, float]:
        """The stored run that stands for one, and the loss."""
        none = self.rows[math.inf]
        if math.isinf(max_norm) or is_free(max_norm, none):
            return none, none["values"][-1] or math.inf
        below, above, share = self._neighbours(max_norm)
        nearer = below if share < 0.5 else above
        if any(row["state"] != "finished" for row in (below, above)):
            return nearer, nearer["values"][-1] or math.inf
        return nearer, (1 - share) * below["values"][-1] + share * above["values"][-1]

    def _neighbours(self, max_norm: float) -> tuple[Row, Row, float]:
        x = math.log(max_norm)
        i = int(np.searchsorted(self._places, x))
        if i in (0, len(self._places)):
            row = self._in_order[min(i, len(self._places) - 1)]
            return row, row, 0.0
        a, b = self._places[i - 1 : i + 1]
        return self._in_order[i - 1], self._in_order[i], (x - a) / (b - a)

    @cached_property
    def _in_order(self) -> list[Row]:
        """The runs that clip, by max_norm, then the unclipped one."""
        none = self.rows[math.inf]
        clips = [c for c in sorted(self.rows) if math.isfinite(c) and not is_free(c, none)]
        return [self.rows[c] for c in (*clips, math.inf)]

    @cached_property
    def _places(self) -> list[float]:
        """Where they lie in log(max_norm); no clipping lies at its largest norm."""
        places = [math.log(float(row["max_norm"])) for row in self._in_order[:-1]]
        largest = self.rows[math.inf]["largest"]
        last = places[-1] if places else 0.0
        return [*places, max(last + 0.1, math.log(largest) if largest else -math.inf)]


def replayed(sweep: Sweep, curve: Curve, all_curves: list[Curve]) -> list[Replayed]:
    """The objectives of a configuration, one a seed."""
    lowest = min(
        (c for c in all_curves if (c.study, c.optimizer) == (curve.study, curve.optimizer)),
        key=lambda c: c.lr,
    )
    found = []
    for seed in curve.scores.index:
        rows = clipped(sweep, curve, seed)
        calm = norms_of(rows[math.inf])
        if len(finite(calm)) < LEAST_NORMS:
            calm = norms_of(clipped(sweep, lowest, seed)[math.inf])
        found.append(Replayed(curve, int(seed), rows, calm))
    return found


def clipped(sweep: Sweep, curve: Curve, seed: int) -> dict[float, Row]:
    """The runs of a configuration and seed by max_norm."""
    rows = sweep.of(Configuration(curve.study, curve.optimizer, curve.lr), seed)
    return {max_norm: row for (arm, max_norm), row in rows.items() if arm == "clip"}


# --- searches: the value that each would use after 1, 2, ... runs -----------------------------


def by_plan(of: Replayed, train: Objective, _: int) -> list[float]:
    """The explore stage of normtune; a run that it copies costs nothing."""
    trials: list[Trial] = []
    values: list[float] = []
    while runs := next_runs(of.settings, trials).runs:
        run: Planned = runs[0]
        if run.stage != "explore":
            break
        trial = train(run.max_norm)
        trials.append(Trial(**{**vars(trial), "free": run.free}))
        if not run.free:
            values.append(leader(of.settings, trials))
    return values


def leader(settings: Settings, trials: list[Trial]) -> float:
    """What one would use after these runs: the best value found, or no clipping."""
    best = choose_arms(settings, trials).best[0]
    return best if clipping_leads(settings, trials) else math.inf


def by_sampler(sampler: str) -> Search:
    """Plain Optuna: the value of the best single run."""

    def search(of: Replayed, train: Objective, repeat: int) -> list[float]:
        import optuna

        del of  # plain Optuna knows nothing of norms
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(sampler=getattr(optuna.samplers, sampler)(seed=repeat))
        values = []
        for _ in range(LAST):
            trial = study.ask()
            done = train(trial.suggest_float("max_norm", *RANGE, log=True))
            failed = done.value is None or not math.isfinite(done.value)
            study.tell(trial, done.first_value if failed else done.value)
            values.append(study.best_params["max_norm"])
        return values

    return search


def at(value: Callable[[Settings], float]) -> Search:
    """No search at all."""
    return lambda of, _train, _repeat: [value(of.settings)] * LAST


SEARCHES: dict[str, Search] = {
    "normtune": by_plan,
    "TPE": by_sampler("TPESampler"),
    "GPSampler": by_sampler("GPSampler"),
    "random": by_sampler("RandomSampler"),
    "p90, no search": at(lambda settings: settings.suggestion),
    "none, no search": at(lambda _: math.inf),
}


# --- regret -------------------------------------------------------------------------------------


def regret(objectives: list[Replayed], seed: int, max_norm: float) -> float:
    """What a value costs on the other seeds, above the best stored one there, in sd of one run."""
    others = [o for o in objectives if o.seed != seed]
    best = min(
        float(np.mean([o.cost(float(value)) for o in others]))
        for value in objectives[0].curve.scores.columns
    )
    cost = float(np.mean([o.cost(max_norm) for o in others]))
    return min((cost - best) / objectives[0].curve.sd, WORST)


def rows_of(objectives: list[Replayed], strategies: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The regret of each search, seed and repeat of a configuration."""
    curve = objectives[0].curve
    for strategy in strategies:
        for of in objectives:
            for repeat in range(REPEATS.get(strategy, 1)):
                key = zlib.crc32(f"{curve.name} {of.seed} {repeat}".encode())
                values = SEARCHES[strategy](of, of.train, key)
                values += [values[-1]] * (LAST - len(values))
                yield {"strategy": strategy, "study": curve.study, "name": curve.name} | {
                    "seed": of.seed,
                    **{str(n): regret(objectives, of.seed, values[n - 1]) for n in RUNS},
                }


def replay(sweep: Sweep, strategies: Iterable[str], only: str = "") -> pd.DataFrame:
    """All regrets; a row a configuration, seed, search and repeat."""
    strategies = list(strategies)
    found = curves(sweep)
    rows = [
        row
        for curve in found
        if curve.name.startswith(only) and curve.sd > 0  # not where hardly anything learned
        for row in rows_of(replayed(sweep, curve, found), strategies)
    ]
    data = pd.DataFrame(rows)
    keys = ["strategy", "study", "name", "seed"]
    return data.groupby(keys, sort=False).mean(numeric_only=True).reset_index()


def table(data: pd.DataFrame, runs: int) -> pd.DataFrame:
    """Mean regret by task and search, each configuration counting alike."""
    by = data.groupby(["study", "name", "strategy"], sort=False)[str(runs)].mean()
    by_study = by.groupby(["study", "strategy"], sort=False).mean().reset_index()
    wide = by_study.pivot_table(index="study", columns="strategy", values=str(runs), sort=False)
    kept = wide[[s for s in SEARCHES if s in wide]]
    return pd.concat([kept, kept.mean().to_frame("all").T])


def against(data: pd.DataFrame, runs: int, other: str = "TPE") -> pd.DataFrame:
    """The regret of normtune minus another's by task, with its standard error."""
    wide = data.pivot_table(index=["study", "name", "seed"], columns="strategy", values=str(runs))
    gap = (wide["normtune"] - wide[other]).rename("gap").reset_index()
    found = gap.groupby("study", sort=False)["gap"].agg(["mean", "sem", "size"])
    by_study = found["mean"]
    found.loc["all"] = [by_study.mean(), by_study.sem(), len(by_study)]
    return found


def result_of(data: pd.DataFrame) -> dict[str, Any]:
    """All tables as plain values."""
    return {
        "seeds": int(data.groupby("name")["seed"].nunique().min()),
        "configurations": int(data["name"].nunique()),
        "regret": {str(n): table(data, n).round(3).to_dict("index") for n in RUNS},
        "against": {
            other: {str(n): against(data, n, other).round(3).to_dict("index") for n in RUNS}
            for other in ("TPE", "GPSampler", "random")
            if other in set(data["strategy"])
        },
    }


def markdown(result: dict[str, Any]) -> str:
    """The tables as a page."""
    strategies = list(next(iter(result["regret"][str(LAST)].values())))
    lines = [
        "# The search replayed on stored trainings",
        "",
        f"Written by `studies/replay.py`: {result['configurations']} configurations of the sweep,",
        f"{result['seeds']} seeds each, which are searched in turn. Regret is what the value found",
        f"costs on the other seeds, in sd of one run and at most {WORST:g}; every configuration of",
        f"a task counts alike. Plain Optuna searches {RANGE[0]:g} to {RANGE[1]:g}.",
        "",
        f"normtune minus plain TPE after {LAST} runs; the target is at most {TARGET} sd by task.",
        "",
        "| task | difference | +- | |",
        "|---|---|---|---|",
    ]
    for task, row in result["against"]["TPE"][str(LAST)].items():
        reached = "" if row["mean"] <= TARGET else "missed"
        lines.append(f"| {task} | {row['mean']:+.2f} | {row['sem']:.2f} | {reached} |")
    for n in RUNS:
        lines += ["", f"Mean regret after {n} runs.", ""]
        lines += ["| task | " + " | ".join(strategies) + " |", "|---" * (len(strategies) + 1) + "|"]
        for task, row in result["regret"][str(n)].items():
            lines.append(f"| {task} | " + " | ".join(f"{row[s]:.2f}" for s in strategies) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="the stored sweep")
    parser.add_argument("--only", default="", help="configurations whose names start so")
    parser.add_argument("--without", nargs="*", default=[], choices=list(SEARCHES))
    parser.add_argument("--out", type=Path, help="folder for replay.json and replay.md")
    asked = parser.parse_args()
    strategies = [s for s in SEARCHES if s not in asked.without]
    result = result_of(replay(Sweep.load(asked.results), strategies, asked.only))
    page = markdown(result)
    print(page)
    if asked.out:
        (asked.out / "replay.json").write_text(json.dumps(result, indent=1) + "\n")
        (asked.out / "replay.md").write_text(page)


if __name__ == "__main__":
    main()
