"""A sweep of two made-up trainings, small enough to be worked out by hand."""

import math
import sys
from pathlib import Path

import numpy as np

STUDIES = Path(__file__).parent.parent / "studies"
sys.path.insert(0, str(STUDIES))

import sweep  # noqa: E402 - the studies are scripts, found through the line above

NORMS = np.linspace(1.0, 2.0, 101)
OTHERS = (1.1, 1.441, 1.5, 1.75, 1.95, 1.99, 3.0, 7.5, 0.5, 5.0)  # what rules and people ask for
# By max_norm, what a made-up training scores at a rate that is too high, and at the searched one.
LOSSES = {
    0.3: {1.0: 2.0, 1.9: 4.0, 10.0: 10.0, math.inf: 10.0},
    0.1: {1.0: 3.0, 1.9: 2.0, 10.0: 2.0, math.inf: 2.0},
    0.03: {1.0: 5.0, 1.9: 3.0, 10.0: 3.0, math.inf: 3.0},
}


def made_up(arm: str, lr: float, max_norm: float, seed: int, loss: float, study="made up"):  # noqa: PLR0917
    """A row as the sweep stores it; the untrained model scores 10."""
    value = loss + (0.1 * (seed % 100 - 1) if loss < 10 else 0.0)
    row = {
        "arm": arm,
        "state": "finished" if loss < 10 else "stuck",
        "values": [10.0, value],
        "free": False,
        "largest": 2.0,
        "clipped": 0.1,
        "study": study,
        "optimizer": "SGD",
        "lr": lr,
        "seed": seed,
        "max_norm": "inf" if math.isinf(max_norm) else max_norm,
        "steps": 404,
        "seconds": 1.0,
    }
    if math.isinf(max_norm) and arm == "clip":
        row["norms"] = list(NORMS) * 4
    return row


def made_up_sweep(path: Path) -> sweep.Sweep:
    """Two made-up studies, three rates and three seeds."""
    found = sweep.Sweep(path)
    found.environments.append(
        {"commit": "abc", "versions": {"torch": "2"}, "machine": "m", "date": "d"}
    )
    for study in ("made up", "another"):
        for lr, losses in LOSSES.items():
            extra = dict.fromkeys(OTHERS, losses[1.9])
            for seed in range(3):
                found.rows += [
                    made_up("clip", lr, v, seed, x, study) for v, x in (extra | losses).items()
                ]
                found.rows += [made_up(arm, lr, math.inf, seed, 2.5, study) for arm in sweep.ONLINE]
    return found
