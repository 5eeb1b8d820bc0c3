"""The planner and the verdict on simulated trainings whose truth is known.

A world is one training: its gradient norms, how its validation loss depends on max_norm (seven
shapes) and on the learning rate, how noisy its seeds are and how often its runs fail. Losses are
in sd of one run, so a regret of 1 is what one seed changes. Worlds for tuning and worlds for
scoring differ in their seeds and in the ranges that their parameters are drawn from; thresholds in
normtune were chosen on the first, the tables come from the second.

    python studies/simulation.py --out studies/results      # scoring worlds
    python studies/simulation.py --tuning --worlds 40
"""

from __future__ import annotations

import argparse
import json
import math
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from normtune.arms import choose_arms, clipping_leads
from normtune.comparison import Verdict, verdict
from normtune.fresh import Runs, margin_of
from normtune.plan import Planned, Settings, Trial, free_from, next_runs

SHAPES = (
    "plateau with cliff",
    "divergence above",
    "U inside the norms",
    "lower is better",
    "higher is better",
    "flat",
    "U below the norms",
)
HELPING = tuple(s for s in SHAPES if s not in ("flat", "higher is better"))
RATE_KINDS = ("better model", "rate too high", "lower rate")
CORRELATIONS = (0.0, 0.5, 0.8)
FINAL, FIRST = 60.0, 160.0  # loss of the best run and of the first report, in sd of one run
FAILED = 20.0  # what a failed run costs in a regret, in sd

# Ranges for (height, width, noise ratio, gap of "better model"); scoring differs from tuning.
RANGES = {
    "tuning": {"height": (3, 12), "width": (0.4, 0.9), "ratio": 0.3, "gap": (2, 10), "at": 0.0},
    "scoring": {"height": (2.5, 15), "width": (0.3, 1.1), "ratio": 0.4, "gap": (2, 10), "at": 0.1},
}


@dataclass(frozen=True)
class World:
    """One simulated training."""

    shape: str
    rate_kind: str
    number: int
    ranges: str = "tuning"
    correlation: float | None = None  # between arms, over seeds; drawn from 0 to .9 if None
    noise_ratio: float | None = None  # sd of unclipped over sd of clipped runs; drawn if None
    stuck: float | None = None  # probability that an unclipped run never learns; drawn if None
    current: bool = False

    @cached_property
    def p(self) -> dict[str, float]:
        """All that was drawn for this world; u is log10(max_norm / median norm)."""
        key = zlib.crc32(f"{self.ranges} {self.shape} {self.rate_kind}".encode())
        rng = np.random.default_rng([key, self.number])
        ranges: dict[str, Any] = RANGES[self.ranges]
        median = 10 ** rng.uniform(-1.5, 1.5)
        spread = rng.uniform(0.3, 1.0)
        norms = median * np.exp(
            spread * rng.standard_normal(400) + rng.uniform(-0.5, 0.5) * np.linspace(-1, 1, 400)
        )
        p = {
            "median": float(np.median(norms)),
            "p90": float(np.percentile(norms, 90)),
            "largest": float(norms.max()),
            "smallest": float(norms.min()),
            "height": rng.uniform(*ranges["height"]),
            "width": rng.uniform(*ranges["width"]),
        }
        top = math.log10(p["largest"] / p["median"])
        bottom = math.log10(p["smallest"] / p["median"])
        at = ranges["at"]
        p |= {
            "top": top,
            "cliff": rng.uniform(-0.7, 0.6 * top) - at,
            "center": {
                "U inside the norms": rng.uniform(-0.6, 0.3) + at,
                "U below the norms": rng.uniform(max(bottom - 1, -1.8), max(bottom, -1.0)) - at,
            }.get(self.shape, rng.uniform(-1.5, -0.8)),
            "slope": rng.uniform(2, 6),
            "p_fail": rng.uniform(0.5, 1.0),
            "rate": rng.uniform(-1.3, -0.3) - at / 2,
            "under": rng.uniform(1, 8),
            "gap": math.exp(rng.uniform(*np.log(ranges["gap"]))),
            "offset": rng.uniform(-0.3, 0.3),
            "ratio": math.exp(rng.normal(0, ranges["ratio"])),
            "rho": rng.uniform(0, 0.9),
            "stuck": rng.uniform(0.05, 0.3) if rng.random() < 0.25 else 0.0,
        }
        given = {"ratio": self.noise_ratio, "rho": self.correlation, "stuck": self.stuck}
        p |= {name: value for name, value in given.items() if value is not None}
        if self.shape in ("flat", "higher is better"):
            p["stuck"] = self.stuck or 0.0
        return p

    # --- the truth -----------------------------------------------------------------------------

    def clipped(self, max_norm: float) -> float:
        """True mean loss of runs that finish at the study's own rate, in sd above the best shape.

        From the largest norm up it is that of no clipping.
        """
        p = self.p
        u = min(math.log10(max_norm / p["median"]), p["top"]) if max_norm < math.inf else p["top"]
        low = p["slope"] * max(0.0, -1.3 - u)  # too small a step trains slowly
        if self.shape == "plateau with cliff":
            return low + p["height"] / (1 + math.exp(-(u - p["cliff"]) * 12))
        if self.shape == "divergence above":
            return low + 0.3 * p["slope"] * max(0.0, p["cliff"] - 0.5 - u)
        if self.shape in ("U inside the norms", "U below the norms"):
            return p["height"] * (1 - math.exp(-(((u - p["center"]) / p["width"]) ** 2)))
        if self.shape == "lower is better":
            return p["slope"] * max(0.0, u - p["center"])
        if self.shape == "higher is better":
            return p["slope"] * max(0.0, min(0.5, p["top"]) - u)
        return 0.0

    def p_failed(self, max_norm: float, factor: float = 1.0) -> float:
        """Probability that a run diverges or gets stuck."""
        p = self.p
        u = min(math.log10(max_norm / p["median"]), p["top"]) if max_norm < math.inf else p["top"]
        if self.shape == "divergence above" and u > p["cliff"]:
            hot = math.log10(factor) > p["rate"] / 3  # a rate well below survives
            return p["p_fail"] if hot else 0.0
        if self.shape == "flat":
            return p["stuck"]
        return p["stuck"] if u > p["top"] - 0.3 and factor > 0.5 else 0.0

    @cached_property
    def best(self) -> tuple[float, float]:
        """The best max_norm and its cost (true loss and what its failures cost)."""
        values = [*np.geomspace(self.low, self.p["largest"], 400), math.inf]
        costs = [self.cost(c) for c in values]
        i = int(np.argmin(costs))
        return float(values[i]), costs[i]

    def cost(self, max_norm: float, factor: float = 1.0) -> float:
        """True mean loss plus what failures cost."""
        return self.mean(max_norm, factor) + FAILED * self.p_failed(max_norm, factor)

    def mean(self, max_norm: float, factor: float = 1.0) -> float:
        """True mean loss of runs that finish."""
        if factor == 1.0:
            return self.clipped(max_norm)
        if max_norm >= self.p["largest"]:
            return self.unclipped(factor)
        small = self.p["under"] * (math.log10(factor) / 0.5) ** 2
        return min(self.clipped(max_norm) + small, self.unclipped(factor) + 0.3)

    def unclipped(self, factor: float) -> float:
        """True mean loss without clipping at a multiple of the study's learning rate."""
        p = self.p
        v, best = math.log10(factor), p["rate"]
        start = self.clipped(math.inf)
        if self.rate_kind == "flat":
            return start
        if self.rate_kind == "rate is right":
            return start + p["under"] * (v / 0.5) ** 2
        clip = min(self.clipped(float(c)) for c in np.geomspace(self.low, p["largest"], 60))
        gap = {"better model": p["gap"], "rate too high": p["offset"], "lower rate": -p["gap"]}
        bottom = clip + gap[self.rate_kind]
        if v < best:
            return bottom + p["under"] * ((best - v) / 0.5) ** 2
        above = start if self.shape != "divergence above" else bottom + p["height"]
        return bottom + max(above - bottom, 0.0) * ((v - best) / -best) ** 2

    # --- what a user would have ----------------------------------------------------------------

    @property
    def low(self) -> float:
        """The lower end of the searched range, as the search sets it for SGD."""
        return min(self.p["median"] / 100, self.p["smallest"] / 30)

    def settings(self, max_runs: int, **other: Any) -> Settings:
        """The study of this world."""
        return Settings(
            max_runs=max_runs,
            suggestion=self.p["p90"],
            low=self.low,
            high=min(self.p["largest"], 10 * self.p["median"]),
            current=1.3 * self.p["median"] if self.current else None,
            **other,
        )

    def train(self, run: Planned) -> Trial:
        """One training: its value depends on world, arm and seed alone."""
        p = self.p
        largest = p["largest"] * math.exp(0.05 * self._draw("largest", run.seed)[0])
        clips = run.max_norm < free_from(largest, half_precision=False)
        max_norm = run.max_norm if clips else math.inf
        seed_effect = self._draw("seed", run.seed)[0]
        own, luck = self._draw(f"{max_norm:.9g} {run.lr_factor:.9g}", run.seed)
        failed = _uniform(luck) < self.p_failed(max_norm, run.lr_factor)
        wide = min(math.log10(min(max_norm, largest) / p["median"]), p["top"]) > 0.3
        sd = p["ratio"] if wide and run.lr_factor == 1.0 else 1.0
        noise = sd * (math.sqrt(p["rho"]) * seed_effect + math.sqrt(1 - p["rho"]) * own)
        value = FINAL + self.mean(max_norm, run.lr_factor) + noise
        diverged = failed and self.shape == "divergence above"
        return Trial(
            max_norm=run.max_norm,
            lr_factor=run.lr_factor,
            seed=run.seed,
            state="diverged" if diverged else "stuck" if failed else "finished",
            stage=run.stage,
            value=None if diverged else FIRST - 1.0 if failed else value,
            free=run.free,
            largest_norm=math.inf if diverged else largest,
            smallest_norm=p["smallest"],
            first_value=FIRST,
        )

    def _draw(self, name: str, seed: int) -> tuple[float, float]:
        key = zlib.crc32(f"{self.shape} {self.rate_kind} {self.ranges} {name}".encode())
        draws = np.random.default_rng([key, self.number, seed]).standard_normal(2)
        return float(draws[0]), float(draws[1])


def _uniform(normal: float) -> float:
    return 0.5 * (1 + math.erf(normal / math.sqrt(2)))


def study(world: World, settings: Settings) -> list[Trial]:
    """A whole search, one slot."""
    trials: list[Trial] = []
    while runs := next_runs(settings, trials).runs:
        trials += [world.train(run) for run in runs]
    return trials


# --- search: how good is the value found ------------------------------------------------------


def found_by_plan(world: World, runs: int) -> list[float]:
    """Cost of the value that explore leads with, after 1, 2, ... runs."""
    settings = world.settings(runs, explore_runs=runs)
    trials: list[Trial] = []
    costs = []
    while planned := next_runs(settings, trials).runs:
        if planned[0].stage != "explore":
            break
        for run in planned:
            trials.append(world.train(run))
            if not run.free:
                costs.append(world.cost(leader(settings, trials)))
    return costs


def leader(settings: Settings, trials: list[Trial]) -> float:
    """What one would use after these runs: the best value found, or no clipping."""
    best = choose_arms(settings, trials).best[0]
    return best if clipping_leads(settings, trials) or len(trials) < 3 else math.inf


def found_by_grid(world: World, runs: int) -> list[float]:
    del runs
    grid = np.geomspace(1e-3, 1e3, 9)
    values = [_value(world, float(c)) for c in grid]
    return [world.cost(float(grid[int(np.argmin(values[: i + 1]))])) for i in range(9)]


def found_by_random(world: World, runs: int) -> list[float]:
    """Random search over learning rate (down to a hundredth) and max_norm."""
    rng = np.random.default_rng([world.number, 7])
    points = [(10 ** rng.uniform(-3, 3), 10 ** rng.uniform(-2, 0)) for _ in range(runs)]
    values = [_value(world, c, r) for c, r in points]
    return [world.cost(*points[int(np.argmin(values[: i + 1]))]) for i in range(runs)]


def found_by_optuna(sampler: str) -> Callable[[World, int], list[float]]:
    def search(world: World, runs: int) -> list[float]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        made = getattr(optuna.samplers, sampler)(seed=world.number)
        s = optuna.create_study(sampler=made)
        costs = []
        for _ in range(runs):
            trial = s.ask()
            s.tell(trial, _value(world, trial.suggest_float("max_norm", 1e-3, 1e3, log=True)))
            costs.append(world.cost(s.best_params["max_norm"]))
        return costs

    return search


def _value(world: World, max_norm: float, factor: float = 1.0) -> float:
    """What a plain objective returns: a failed run as the loss it started from."""
    trial = world.train(Planned(max_norm, factor, 0, "explore", free=False, reason=""))
    return FIRST if trial.value is None else trial.value


SEARCHES: dict[str, Callable[[World, int], list[float]]] = {
    "normtune explore": found_by_plan,
    "p90, no search": lambda world, runs: [world.cost(world.p["p90"])] * runs,
    "none, no search": lambda world, runs: [world.cost(math.inf)] * runs,
    "grid of 9": found_by_grid,
    "random (lr, max_norm)": found_by_random,
    "TPE": found_by_optuna("TPESampler"),
    "GPSampler": found_by_optuna("GPSampler"),
}


def search_table(
    ranges: str, worlds: int, strategies: Iterable[str], *, runs: int = 15
) -> list[dict[str, Any]]:
    """Regret and share within one sd of the best, by strategy and shape."""
    rows = []
    for name in strategies:
        search = SEARCHES[name]
        by_shape: dict[str, list[list[float]]] = defaultdict(list)
        for world in search_worlds(ranges, worlds):
            costs = search(world, runs)
            costs += [costs[-1]] * (runs - len(costs))
            by_shape[world.shape].append([c - world.best[1] for c in costs])
        rows += [_search_row(name, shape, regrets) for shape, regrets in by_shape.items()]
        rows.append(_search_row(name, "all", [r for rs in by_shape.values() for r in rs]))
    return rows


def search_worlds(ranges: str, worlds: int) -> Iterable[World]:
    for shape in SHAPES:
        for i in range(worlds):
            yield World(shape, "better model" if shape in HELPING else "flat", i, ranges)


def _search_row(name: str, shape: str, regrets: list[list[float]]) -> dict[str, Any]:
    table = np.array(regrets)
    within = (table <= 1.0).mean(axis=0)
    n = len(regrets)
    return {
        "strategy": name,
        "shape": shape,
        "worlds": n,
        "within": {str(k): round(float(within[k - 1]), 3) for k in (6, 8, 10, 12, 15)},
        "se": round(float(np.sqrt(within[11] * (1 - within[11]) / n)), 3),
        "regret": round(float(np.minimum(table[:, 11], FAILED).mean()), 3),
        "median_regret": round(float(np.median(table[:, 11])), 3),
    }


# --- verdicts ---------------------------------------------------------------------------------


def verdict_cells(ranges: str, worlds: int) -> dict[str, list[World]]:
    """Worlds by what is true of them."""
    n = worlds
    cells = {
        kind: [
            World(HELPING[i % len(HELPING)], kind, i, ranges, current=i % 2 == 1)
            for i in range(2 * n)
        ]
        for kind in RATE_KINDS
    }
    cells["nothing differs"] = [World("flat", "flat", i, ranges, stuck=0.0) for i in range(2 * n)]
    cells["nothing differs, runs get stuck"] = [
        World("flat", "flat", i, ranges, stuck=0.15) for i in range(n)
    ]
    cells["placebo"] = [
        World("flat", "flat", 5_000 + i, ranges, stuck=0.0, noise_ratio=1.0) for i in range(n)
    ]
    cells["clipping hurts"] = [
        World("higher is better", "rate is right", i, ranges) for i in range(n)
    ]
    for rho in CORRELATIONS:
        cells[f"equal suggestion, correlation {rho}"] = [
            World("flat", "flat", 10_000 + i, ranges, correlation=rho, stuck=0.0) for i in range(n)
        ]
    return cells


def six_seeds(ranges: str, worlds: int) -> list[dict[str, Any]]:
    """A truly equal suggestion against another value at exactly six fresh seeds, three arms."""
    rows = []
    for rho in CORRELATIONS:
        said = []
        for i in range(worlds):
            world = World("flat", "flat", 20_000 + i, ranges, correlation=rho, stuck=0.0)
            settings = world.settings(30)
            other = world.p["median"] / 3
            arms = (math.inf, settings.suggestion, other)
            trials = [
                world.train(
                    Planned(c, 1.0, seed, "confirm" if seed else "explore", free=False, reason="")
                )
                for seed in range(7)
                for c in arms
            ]
            runs = Runs(settings, trials)
            c = runs.compare((settings.suggestion, 1.0), (other, 1.0), margin=margin_of(runs).loss)
            said.append("worse" if c.relation == "worse" else "as good" if c.as_good else "open")
        rows.append({"correlation": rho, "worlds": worlds, "said": _shares(said)})
    return rows


def judge(world: World, max_runs: int) -> tuple[Verdict, list[Trial], Settings]:
    settings = world.settings(max_runs)
    trials = study(world, settings)
    return verdict(settings, trials), trials, settings


def verdict_table(ranges: str, worlds: int, budgets: Iterable[int]) -> list[dict[str, Any]]:
    """How often each sentence was said, by truth and budget."""
    rows = []
    for budget in budgets:
        for truth, cell in verdict_cells(ranges, worlds).items():
            judged = [judge(world, budget) for world in cell]
            rows.append(_verdict_row(truth, budget, cell, judged))
    return rows


def _verdict_row(
    truth: str,
    budget: int,
    cell: list[World],
    judged: list[tuple[Verdict, list[Trial], Settings]],
) -> dict[str, Any]:
    n = len(cell)
    kinds = Counter(str(v.kind) for v, _, _ in judged)
    equal = [
        v.suggestion_vs_best
        for world, (v, _, _) in zip(cell, judged, strict=True)
        if v.suggestion_vs_best != "best"
        and abs(world.cost(world.p["p90"]) - world.cost(v.best)) < 0.05
    ]
    regrets = [
        min(world.cost(v.best), world.cost(math.inf)) - world.best[1]
        for world, (v, _, _) in zip(cell, judged, strict=True)
    ]
    return {
        "truth": truth,
        "budget": budget,
        "worlds": n,
        "correlation": cell[0].correlation,
        "kinds": {k: round(kinds[k] / n, 3) for k in ("1", "2", "3", "4", "5", "6", "none")},
        "vs_none": _shares(v.suggestion_vs_none for v, _, _ in judged),
        "vs_best": _shares(v.suggestion_vs_best for v, _, _ in judged),
        "equal_suggestions": len(equal),
        "equal_vs_best": _shares(equal),
        "runs": round(float(np.mean([sum(not t.free for t in ts) for _, ts, _ in judged])), 1),
        "seeds": round(float(np.mean([len(v.seeds) for v, _, _ in judged])), 2),
        "within": round(float(np.mean(np.array(regrets) <= 1.0)), 3),
    }


def _shares(words: Iterable[str]) -> dict[str, float]:
    counts = Counter(words)
    n = sum(counts.values())
    return {word: round(count / n, 3) for word, count in sorted(counts.items())}


# --- the table of targets ------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One target: what was measured, of how many, and whether it is reached."""

    what: str
    target: str
    share: float
    n: int
    reached: bool

    @property
    def se(self) -> float:
        """Standard error of the share; never 0."""
        return math.sqrt(max(self.share * (1 - self.share), 0.25 / self.n) / self.n)


def at_most(what: str, share: float, n: int, limit: float) -> Row:
    return Row(what, f"at most {limit:.2f}", share, n, share <= limit)


def at_least(what: str, share: float, n: int, limit: float) -> Row:
    return Row(what, f"at least {limit:.2f}", share, n, share >= limit)


def target_rows(result: dict[str, Any]) -> list[Row]:
    """The targets of the search, verdict and placebo rows."""
    rows = [
        at_least(
            f"within one sd after 12 runs: {r['shape']}",
            r["within"]["12"],
            r["worlds"],
            0.95 if r["shape"] == "all" else 0.90,
        )
        for r in result.get("search", [])
        if r["strategy"] == "normtune explore"
    ]
    for r in result.get("verdicts", []):
        rows += _verdict_targets(r)
    rows += [
        at_most(
            "equal suggestion left open at 6 seeds, correlation 0.5",
            r["said"].get("open", 0.0),
            r["worlds"],
            0.35,
        )
        for r in result.get("six_seeds", [])
        if r["correlation"] == 0.5
    ]
    return rows


def _verdict_targets(r: dict[str, Any]) -> list[Row]:
    n, kinds, truth = r["worlds"], r["kinds"], r["truth"]
    at = f"budget {r['budget']}: "
    if truth == "better model":
        goal = {24: 0.60, 40: 0.85}.get(r["budget"], 0.0)
        return [at_least(at + "better model found", kinds["1"], n, goal)]
    if truth in ("rate too high", "lower rate"):
        return [at_most(f"{at}false better model ({truth})", kinds["1"], n, 0.10)]
    if truth.startswith("nothing differs"):
        claims = kinds["1"] + kinds["3"] + kinds["4"]
        helps = r["vs_none"].get("helps", 0.0)
        return [
            at_most(f"{at}false help of clipping, {truth}", claims, n, 0.05),
            at_most(f"{at}false help of the suggestion, {truth}", helps, n, 0.05),
        ]
    if truth == "placebo":
        said = sum(kinds[k] for k in ("1", "2", "3", "4"))
        return [at_most(at + "placebo: any sentence but equal or undecided", said, n, 0.05)]
    if truth.startswith("equal suggestion"):
        open_ = r["vs_best"].get("undecided", 0.0)
        rows = [at_most(f"{at}{truth}: called worse", r["vs_best"].get("worse", 0.0), n, 0.05)]
        if r["correlation"] == 0.5 and r["budget"] >= 40:
            rows.append(at_most(f"{at}{truth}: left undecided", open_, n, 0.35))
        return rows
    return []


def markdown(result: dict[str, Any]) -> str:
    """The result as a page of tables."""
    lines = [
        "# The planner and the verdict in simulation",
        "",
        f"Written by `studies/simulation.py`: {result['ranges']} worlds, {result['worlds']} of",
        "each shape or cell (twice that in the first four cells). +- is one standard error.",
        "",
        "| what | target | measured | |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {r.what} | {r.target} | {r.share:.3f} +- {r.se:.3f} ({r.n}) "
        f"| {'' if r.reached else 'missed'} |"
        for r in target_rows(result)
    ]
    lines += [
        "",
        "Search: share within one sd of the best after 6, 8, 10, 12, 15 runs, at one rate.",
        "",
        "| strategy | shape | 6 | 8 | 10 | 12 | 15 | +- at 12 | mean regret at 12 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['strategy']} | {r['shape']} | "
        + " | ".join(f"{v:.2f}" for v in r["within"].values())
        + f" | {r['se']:.3f} | {r['regret']:.2f} |"
        for r in result.get("search", [])
    ]
    lines += [
        "",
        "Verdicts: share of studies that end with each sentence (1 better model, 2 lower",
        "rate, 3 rate too high, 4 helps here, 5 equal, 6 undecided), then the suggestion",
        "against no clipping and against the best found.",
        "",
        "| runs | truth | n | 1 | 2 | 3 | 4 | 5 | 6 | runs used | seeds | to none | to best |",
        "|" + "---|" * 13,
    ]
    lines += [
        f"| {r['budget']} | {r['truth']} | {r['worlds']} | "
        + " | ".join(f"{r['kinds'][k]:.2f}" for k in "123456")
        + f" | {r['runs']} | {r['seeds']} | {_words(r['vs_none'])} | {_words(r['vs_best'])} |"
        for r in result.get("verdicts", [])
    ]
    if "six_seeds" in result:
        lines += ["", "A truly equal suggestion at exactly six seeds and three arms:", ""]
        lines += [
            f"- correlation {r['correlation']}: {_words(r['said'])} (n = {r['worlds']})"
            for r in result["six_seeds"]
        ]
    return "\n".join(lines) + "\n"


def _words(shares: dict[str, float]) -> str:
    return ", ".join(f"{word} {share:.2f}" for word, share in shares.items())


def merged(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The result with what an earlier call measured on as many of the same worlds."""
    old = json.loads(path.read_text()) if path.exists() else {}
    if any(old.get(key) != result[key] for key in ("ranges", "worlds")):
        return result
    strategies = {row["strategy"] for row in result.get("search", [])}
    budgets = {row["budget"] for row in result.get("verdicts", [])}
    search = [r for r in old.get("search", []) if r["strategy"] not in strategies]
    verdicts = [r for r in old.get("verdicts", []) if r["budget"] not in budgets]
    return (
        old
        | result
        | {
            "search": [*search, *result.get("search", [])],
            "verdicts": [*verdicts, *result.get("verdicts", [])],
            "seconds": old.get("seconds", 0) + result["seconds"],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tuning", action="store_true", help="worlds that thresholds may see")
    parser.add_argument("--worlds", type=int, default=100, help="worlds of each shape or cell")
    parser.add_argument("--budgets", type=int, nargs="*", default=[24, 40])
    parser.add_argument("--only", choices=("search", "verdict"))
    parser.add_argument("--strategy", nargs="*", default=list(SEARCHES), choices=list(SEARCHES))
    parser.add_argument("--out", type=Path, help="folder for simulation.json and simulation.md")
    arguments = parser.parse_args()
    ranges = "tuning" if arguments.tuning else "scoring"
    start = time.perf_counter()
    result: dict[str, Any] = {"ranges": ranges, "worlds": arguments.worlds}
    if arguments.only != "verdict":
        result["search"] = search_table(ranges, arguments.worlds, arguments.strategy)
    if arguments.only != "search":
        result["verdicts"] = verdict_table(ranges, arguments.worlds, arguments.budgets)
        result["six_seeds"] = six_seeds(ranges, arguments.worlds)
    result["seconds"] = round(time.perf_counter() - start)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        result = merged(arguments.out / "simulation.json", result)
        (arguments.out / "simulation.json").write_text(json.dumps(result, indent=1) + "\n")
    page = markdown(result)
    print(page)
    if arguments.out:
        (arguments.out / "simulation.md").write_text(page)


if __name__ == "__main__":
    main()
