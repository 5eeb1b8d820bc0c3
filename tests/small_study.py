"""A study whose trainings take a tenth of a second, for the tests of the search."""

from __future__ import annotations

import os
import time
from pathlib import Path

import optuna

from normtune.processes import Child, end_all, first_to_end
from normtune.tasks import Outcome, Task

LINEAR = """
import os, sys, time, torch

def setup(run, lr=0.1):
    torch.manual_seed(run.seed)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=run.params.get("lr", lr))
    run.watch(optimizer)
    return model, optimizer

def step(model, optimizer):
    optimizer.zero_grad()
    loss = (model(torch.randn(4, 3)) - 1).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()
"""

TRAINING = """
import math, os, random, sys, time
import torch

def train(run):
    torch.manual_seed(run.seed)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=run.params.get("lr", 0.2))
    run.watch(optimizer)
    x = torch.randn(64, 4)
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(64, 1)

    def loss_of(rows):
        return (model(x[rows]) - y[rows]).square().mean()

    run.report(loss_of(slice(None)).item(), 0)
    for step in range(1, run.params.get("steps", 60) + 1):
        {before}
        rows = torch.randint(64, (4,))
        optimizer.zero_grad()
        loss_of(rows).backward()
        optimizer.step()
        if step % 20 == 0:
            run.report(loss_of(slice(None)).item(), step)
    {after}
"""


def write_study(
    folder: Path, *, before: str = "pass", after: str = "pass", source: str = "", **keys: object
) -> Path:
    """Write a training and its study file.

    Args:
        folder: Where.
        before: A statement before each step.
        after: A statement after the last step.
        source: The whole training instead.
        keys: Keys of the study file, as YAML text.
    """
    folder.mkdir(exist_ok=True)
    text = source or TRAINING.replace("{before}", before).replace("{after}", after)
    (folder / "t.py").write_text(text)
    known = {"train": "t.py:train", "warmup_steps": 40, "threads": 1, "search": "{max_runs: 8}"}
    lines = [f"{key}: {value}" for key, value in {**known, **keys}.items() if value is not None]
    path = folder / "s.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends in time; a zombie has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        except (ProcessLookupError, FileNotFoundError):
            return True
        if status.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def task_for(folder: Path, body: str, **how: object) -> Task:
    """A task whose `train(run)` has this body, with ``setup`` and ``step`` at hand."""
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    (folder / "t.py").write_text(f"{LINEAR}\ndef train(run):\n{lines}\n")
    known = {"folder": folder / "run", "train": "t.py:train", "home": folder, "seed": 0}
    return Task(**{**known, **how})


def carried_out(task: Task) -> Outcome:
    """The outcome of a task in a process of its own."""
    child = Child(task)
    try:
        assert first_to_end([child], timeout=60)
    finally:
        end_all([child])
    return child.outcome()


def optuna_study(path: Path) -> optuna.Study:
    """The Optuna study of a study file, opened by Optuna itself."""
    return optuna.load_study(study_name="s", storage=f"sqlite:///{path.parent}/s.db")
