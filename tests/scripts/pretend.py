"""Stands in for a training where a test is about the study around it: the same record, no torch."""

import json
import math
import os
import random
import signal  # noqa: F401  for the statement of the second argument
import subprocess  # noqa: F401
import sys
import time  # noqa: F401
from pathlib import Path

orders = json.loads(os.environ["NORMTUNE_ORDERS"])
run = os.environ["NORMTUNE_RUN"]
seed = orders["seed"] if orders["seed"] is not None else int(sys.argv[1])
max_norm, lr = float(orders["max_norm"]), 0.1
draw = random.Random(seed)  # noqa: S311
norms = [draw.lognormvariate(0.0, 0.5) for _ in range(40)]
value = 1.0 + 0.1 * math.log(min(max_norm, 3.0)) ** 2 + 0.01 * draw.random()
said = {"lr_factor": orders["lr_factor"]} if orders["lr_factor"] != 1 else {}


def record():
    """Write what normtune would have written."""
    head = {"normtune": 1, "attempt": "a", "optimizer": "SGD", "norm_type": 2.0, **said}
    rows = [{"step": i, "norm": norm} for i, norm in enumerate(norms, 1)]
    rows[0] |= {"max_norm": max_norm if math.isfinite(max_norm) else "inf", "imposed": True}
    if lr is not None:
        rows[0]["lr"] = lr
    for row in rows:
        if not math.isfinite(row["norm"]):
            row |= {"norm": None, "kind": "nan"}
    with Path(run, f"rank0-{os.getpid()}.norms.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in [head, *rows])


print(f"epoch 0 val loss {2 * value:.4f}")
if len(sys.argv) > 2:
    exec(sys.argv[2])  # noqa: S102  what the test is about
record()
print(f"epoch 1 val loss {value:.4f}")
