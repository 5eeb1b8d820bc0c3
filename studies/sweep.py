"""Every configuration over a grid of max_norm and none, with paired seeds.

It can be stopped at any time and goes on where it stopped; what is there is never trained again.

    python studies/sweep.py --seeds 5 --jobs 2            # hours; -> studies/results/sweep.jsonl.gz
    python studies/sweep.py --only digits --minutes 5
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from candidates import FEWEST, RULES, Norms, finite  # noqa: E402 - found through the line above
from configurations import CONFIGURATIONS, Configuration  # noqa: E402

from normtune import statistics  # noqa: E402
from normtune.trials import state_of  # noqa: E402

RESULTS = HERE / "results" / "sweep.jsonl.gz"
WARMUP = 0.25  # share of the schedule that the rules see
FIXED = (1.0, 10.0, 0.5, 5.0)  # what people use
SAME = 1.001  # values are rounded to 4 digits: within this factor they are one
NEAR_GRID = 1.5  # a point of the grid within this factor of a value that runs anyway is left out
DECADES = {"SGD": 0.5, "AdamW": 1.0}  # between two values of the grid; Adam depends little on it
ONLINE = ("AutoClip p10", "ZClip", "lr warm-up")  # arms beside "clip", one of the grid
FURTHER = ("rate", "confirm")  # arms that purposes.py adds: they are clipped runs, too
PACKAGES = ("torch", "numpy", "scikit-learn", "statsmodels", "aeon", "autoclip", "zclip")
Row = dict[str, Any]


# --- which runs ---------------------------------------------------------------------------------


def warm_up(norms: Norms, steps: int, share: float = WARMUP) -> Norms:
    """The norms of the first steps of a schedule."""
    return norms[: max(FEWEST, round(share * steps))]


def grid(norms: Norms, optimizer: str) -> list[float]:
    """Values from median / 100 to 10 x the median, evenly in their logarithm."""
    exponents = np.arange(-2.0, 1.01, DECADES[optimizer])
    return [float(np.median(finite(norms)) * 10**e) for e in exponents]


def values_to_run(norms: Norms, optimizer: str) -> list[float]:
    """No clipping first, then every rule at its very value, what people use, and the grid.

    Args:
        norms: Those of the warm-up of the first seed, which stand for all seeds.
        optimizer: Its class.
    """
    values = [math.inf]
    enough = len(finite(norms)) >= FEWEST
    asked = [rule(norms, optimizer) for rule in RULES.values()] if enough else []
    between = grid(norms, optimizer) if enough else []
    for value in (*asked, *FIXED):
        add(value, values, SAME)
    for value in between:
        add(value, values, NEAR_GRID)
    return values


def add(value: float, values: list[float], near: float) -> None:
    """Append `value` where nothing is within the factor `near` of it."""
    if value > 0 and not any(1 / near < value / other < near for other in values):
        values.append(statistics.rounded(value, 4))


def is_free(max_norm: float, unclipped: Row) -> bool:
    """Whether the run would be the unclipped one bit for bit."""
    largest = unclipped["largest"]
    return largest is not None and max_norm > 1.000001 * largest + 1e-6


# --- one run ------------------------------------------------------------------------------------


def train_once(configuration: Configuration, seed: int, arm: str, max_norm: float) -> Row:
    """Train once and tell it as a row."""
    from normtune.run import Run, RunEnded, load_train

    train = load_train(f"{configuration.study}.py:train", HERE)
    steps = (train.__globals__["DEFAULTS"] | configuration.params)["steps"]  # type: ignore[attr-defined]
    run = Run(seed=seed, params=configuration.params, max_norm=max_norm)
    if arm in ONLINE:
        run.watch = lambda optimizer, **_: attach(arm, optimizer, steps)  # type: ignore[method-assign, assignment]
    started = time.process_time()
    with suppress(RunEnded):
        train(run)
    row = as_row(run, arm)
    if arm in FURTHER:
        row.pop("norms", None)  # those of the grid serve the rules; these would fill the file
    row |= {"study": configuration.study, "optimizer": configuration.optimizer}
    row |= {
        "lr": configuration.lr,
        "seed": seed,
        "max_norm": plain(max_norm) or "inf",
        "steps": steps,
    }
    return row | {"seconds": round(time.process_time() - started, 2)}


def as_row(run: Any, arm: str) -> Row:
    """What a run reported and recorded."""
    values = [value for _, value in run.values]
    row: Row = {
        "arm": arm,
        "state": state_of(values[-1], values[0], "minimize"),
        "values": [plain(value, 6) for value in values],
        "free": False,
    }
    if run.recorder is None:
        return row
    record = run.recorder.record
    run.recorder.close()
    limit = run.max_norm
    row["largest"] = plain(float(np.max(record.norms)), 8)  # None where one was not finite
    row["clipped"] = round(statistics.clip_share(record.finite, limit), 4)
    if math.isinf(limit):
        row["norms"] = [plain(norm, 5) for norm in record.norms]
    return row


def plain(number: float, digits: int = 6) -> float | None:
    """A number for strict JSON; None where it is not finite."""
    return statistics.rounded(number, digits) if math.isfinite(number) else None


def attach(arm: str, optimizer: Any, steps: int) -> None:
    """Let something else than normtune see every step, as its own package has it."""
    before = {
        "AutoClip p10": auto_clip,
        "ZClip": z_clip,
        "lr warm-up": lambda o: warm_rate(o, steps),
    }[arm](optimizer)

    def hook(*_: object) -> None:
        before()

    optimizer.register_step_pre_hook(hook)


def auto_clip(optimizer: Any) -> Callable[[], object]:
    from autoclip.torch import QuantileClip

    parameters = optimizer.param_groups[0]["params"]
    clipper = QuantileClip(parameters, quantile=0.1, history_length=10_000, global_threshold=True)
    return clipper.step


def z_clip(optimizer: Any) -> Callable[[], object]:
    from torch import nn
    from zclip import ZClip

    model = nn.ParameterList(optimizer.param_groups[0]["params"])
    clipper = ZClip()
    return lambda: clipper.step(model)


def warm_rate(optimizer: Any, steps: int) -> Callable[[], object]:
    """The rate grows evenly over the first tenth of the steps; nothing is clipped."""
    group, length, step = optimizer.param_groups[0], steps / 10, 0
    rate = group["lr"]

    def before() -> None:
        nonlocal step
        step += 1
        group["lr"] = rate * min(1.0, step / length)

    return before


# --- the store ----------------------------------------------------------------------------------


@dataclass
class Sweep:
    """All rows so far, and the file that holds them.

    Attributes:
        path: A gzipped JSONL file; its first line has the environments that the rows point to.
        rows: One a run.
        environments: What the rows were made with.
    """

    path: Path = RESULTS
    rows: list[Row] = field(default_factory=list)
    environments: list[Row] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path = RESULTS) -> Sweep:
        """The stored sweep, or an empty one."""
        if not path.exists():
            return cls(path)
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            head, *rows = (json.loads(line) for line in stream)
        return cls(path, rows, head["environments"])

    def save(self) -> None:
        """Write all rows; a reader finds the whole file or the one before."""
        lines = [{"environments": self.environments}, *self.rows]
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        temporary = self.path.with_suffix(".tmp")
        self.path.parent.mkdir(exist_ok=True)
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
        temporary.replace(self.path)

    def of(self, configuration: Configuration, seed: int) -> dict[tuple[str, float], Row]:
        """The rows of a configuration and seed, by arm and max_norm."""
        key = (configuration.study, configuration.optimizer, configuration.lr, seed)
        return {
            (row["arm"], float(row["max_norm"])): row
            for row in self.rows
            if (row["study"], row["optimizer"], row["lr"], row["seed"]) == key
        }

    def add(self, rows: Iterable[Row]) -> None:
        """Take rows in and write the file."""
        at = len(self.environments) - 1
        self.rows += [row | {"environment": at} for row in rows]
        self.save()


def environment() -> Row:
    """What may change the numbers."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    commit = git("describe", "--always", "--exclude", "*")
    changed = git("status", "--porcelain", "--", "*.py", "../normtune")  # not the results
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": f"{commit}-dirty" if changed else commit,
        "machine": platform.machine(),
        "threads": 1,
        "versions": versions,
    }


def git(*arguments: str) -> str:
    """What git says here; empty outside of a repository."""
    command = ["git", *arguments]
    done = subprocess.run(command, check=False, cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip()


# --- the sweep ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """Runs of one configuration and seed that belong together."""

    configuration: Configuration
    seed: int
    arms: tuple[tuple[str, float], ...]
    unclipped: Row | None


def carry_out(unit: Unit) -> list[Row]:
    """Train the arms of a unit; those that cannot clip are copied from the unclipped run."""
    rows, unclipped = [], unit.unclipped
    for arm, max_norm in unit.arms:
        if arm not in ONLINE and unclipped is not None and is_free(max_norm, unclipped):
            copied = {k: v for k, v in unclipped.items() if k not in ("norms", "environment")}
            row = copied | {
                "arm": arm,
                "max_norm": plain(max_norm),
                "clipped": 0.0,
                "free": True,
                "seconds": 0.0,
            }
        else:
            row = train_once(unit.configuration, unit.seed, arm, max_norm)
        if max_norm == math.inf and arm not in ONLINE:
            unclipped = row
        rows.append(row)
    return rows


def stages(seeds: int) -> list[tuple[str, int]]:
    """What comes first: the first seed unclipped; the others' packages one seed behind.

    >>> stages(2)
    [('none', 0), ('clip', 0), ('clip', 1), ('online', 0), ('online', 1)]
    """
    order = [(float(seed), "clip", seed) for seed in range(seeds)]
    order += [(seed + 1.5, "online", seed) for seed in range(seeds)]
    return [("none", 0), *((kind, seed) for _, kind, seed in sorted(order))]


def missing(sweep: Sweep, configuration: Configuration, kind: str, seed: int) -> Unit:
    """The runs of a stage that are not in the store yet."""
    there = sweep.of(configuration, seed)
    none = ("clip", math.inf)
    if kind == "none":
        wanted = [none]
    elif kind == "online":
        wanted = [(arm, math.inf) for arm in ONLINE]
    else:
        first = sweep.of(configuration, 0)[none]
        norms = norms_of(first)
        values = values_to_run(warm_up(norms, first["steps"]), configuration.optimizer)
        wanted = [("clip", value) for value in values]
    arms = tuple(arm for arm in wanted if arm not in there)
    return Unit(configuration, seed, arms, there.get(none))


def norms_of(row: Row) -> Norms:
    """The norms of an unclipped run, nan where they were not finite."""
    return np.array([math.nan if norm is None else norm for norm in row["norms"]])


def use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def run_stage(sweep: Sweep, units: list[Unit], jobs: int, until: float) -> bool:
    """Carry out the units of a stage; False where the time is over."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), use_one_thread) as pool:
        futures = {pool.submit(carry_out, unit): unit for unit in units}
        for future in as_completed(futures):
            unit, rows = futures[future], future.result()
            sweep.add(rows)
            spent = sum(row["seconds"] for row in rows)
            name = f"{unit.configuration.name:28} seed {unit.seed}"
            print(f"{name}  {len(rows):2d} runs  {spent:5.1f} s", flush=True)
            if time.monotonic() > until:
                pool.shutdown(cancel_futures=True)
                return False
    return True


def chosen(only: str) -> Iterator[Configuration]:
    return (c for c in CONFIGURATIONS if not only or c.name.startswith(only))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--only", default="", help="configurations whose names start so")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the processes that train
    sweep = Sweep.load(asked.results)
    if not sweep.environments or sweep.environments[-1] != environment():
        sweep.environments.append(environment())
    until = time.monotonic() + 60 * asked.minutes
    for kind, seed in stages(asked.seeds):
        units = [missing(sweep, c, kind, seed) for c in chosen(asked.only)]
        units = [unit for unit in units if unit.arms]
        print(f"{kind}, seed {seed}: {sum(len(u.arms) for u in units)} runs to do", flush=True)
        if units and not run_stage(sweep, units, asked.jobs, until):
            return


if __name__ == "__main__":
    main()
