"""One run of a command: started as the study says, proved by its record, judged by its metric."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import numpy as np

from normtune import launch, orders, processes, storages
from normtune.errors import NormtuneError
from normtune.launch import Launched
from normtune.metrics import Metric, MetricError, Value, quoted
from normtune.orders import Orders
from normtune.records import NormRecord
from normtune.tasks import OUTPUT, THREAD_VARIABLES, Ending, Outcome, Task

WATCHED = "watched"  # the folder in a run's own for records and marks of its processes
COMMAND = "command.txt"
GRACE_SECONDS = 1.0  # less than the controller waits before it ends this process too
POLL_SECONDS = 0.1
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux
KILLED = 128 + signal.SIGKILL
DEAD_NORMS = 3  # non-finite ones at the end of a run that has diverged
GROWN = 10.0  # times the median: a last norm that bears out the nan that a script tells of
LAST_LINES = 12  # of an output, where the reason of a failure stands

_MEMORY = re.compile(
    r"out of memory|OutOfMemory|MemoryError|can't allocate memory|Cannot allocate memory"
    r"|std::bad_alloc|oom-kill|exitcode *: -9|Signal 9 \(SIGKILL\)",
    re.IGNORECASE,
)
_NOT_FINITE = re.compile(
    r"(?<![\w.])(?:nan|inf|infinity|non-?finite|not finite|diverged)(?![\w.(])", re.IGNORECASE
)

Judgement = tuple[Ending, str, Sequence[Value]]


def carry_out(task: Task) -> None:
    """Run the command of `task`, in a process made for it, and leave the outcome in its folder."""
    started = time.perf_counter()
    watched = task.folder / WATCHED
    shutil.rmtree(watched, ignore_errors=True)  # a warm-up has one folder for all its attempts
    watched.mkdir(parents=True)
    (task.folder / COMMAND).write_text(shlex.join(task.argv) + "\n", encoding="utf-8")
    ending, reason, values = _run(task, watched)
    seconds = round(time.perf_counter() - started, 3)
    Outcome(ending, tuple(values), reason, seconds).save(task.folder)


def _run(task: Task, watched: Path) -> Judgement:
    metric = Metric(task, watched)
    given = Orders(
        watched,
        max_norm=task.max_norm,
        lr_factor=task.lr_factor,
        seed=task.seed if task.seed_inside else None,
        steps=task.stop_after,
        metadata=task.metadata,
        stop_diverged=not task.finish_diverged,
    )
    kills = _kills()
    _adopt_orphans()
    signal.signal(signal.SIGTERM, _leave)
    try:
        launched = _await(task, given)
    except NormtuneError as error:
        return "unusable", str(error), ()
    finally:
        processes.end_descendants()
    return _judge(task, launched, metric, kills=_kills() - kills)


# --- running -----------------------------------------------------------------------------------


def environment(task: Task) -> dict[str, str]:
    """What a run finds in its environment, besides what normtune orders there."""
    env = {key: value for key, value in os.environ.items() if key != storages.VARIABLE}
    env |= dict.fromkeys(THREAD_VARIABLES, str(task.threads))
    env["PYTHONUNBUFFERED"] = "1"  # what a killed run printed last is in its output
    env.setdefault("PYTHONHASHSEED", str(task.seed))  # the order of sets is drawn from the seed
    devices = _devices(task)
    if devices:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return env


def _devices(task: Task) -> list[str]:
    """The GPUs of this run where several go at a time; a single run sees them all."""
    if task.slots < 2:
        return []
    gpus = _gpus()
    each = max(1, len(gpus) // task.slots)
    first = task.slot * each % max(1, len(gpus))
    return gpus[first : first + each]


def _gpus() -> list[str]:
    """The GPUs that a command would see, found without torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    n = len(re.findall(r"^GPU \d+:", listed.stdout, re.MULTILINE))
    return [str(i) for i in range(n)]


def _adopt_orphans() -> None:
    """A launcher that is killed leaves its workers to this process, which can then end them."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)


def _leave(number: int, _: FrameType | None) -> None:
    """Not from here: what the signal interrupts may be waiting for the command, with a lock."""
    signal.signal(number, signal.SIG_IGN)  # a second one would interrupt the ending
    raise SystemExit(128 + number)


def _await(task: Task, given: Orders) -> Launched:
    """The command after its end; where this process is to end, the command is ended, too."""
    launched = Launched(
        task.argv, given, cwd=task.home, environment=environment(task), own_group=False
    )
    looks = given.steps or given.stop_diverged
    try:
        while launched.wait(POLL_SECONDS if looks else None) is None:
            if launched.enough:
                launched.wait(launch.GRACE_SECONDS)
                launched.end()
            elif launched.diverged:
                launched.end(GRACE_SECONDS)
    finally:
        if launched.exit_code is None:
            launched.end(GRACE_SECONDS)
    return launched


def _kills() -> int:
    """How many processes the system has killed for want of memory."""
    try:
        found = re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text("ascii"), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


# --- judging -----------------------------------------------------------------------------------


def _judge(task: Task, launched: Launched, metric: Metric, *, kills: int) -> Judgement:
    found = launch.records_in(launched.orders.folder)
    if found:
        launch.merge(found[:1], task.record_path)
    record = NormRecord.load(found[0]) if found else None
    failed = list(orders.marks(launched.orders.folder, orders.FAILED).values())
    if failed:
        return "unusable", f"normtune could not work in this command: {failed[0]}", ()
    if launched.enough:
        return "stopped", f"{task.stop_after} warm-up steps are recorded", ()
    if launched.diverged:
        return "diverged", launched.diverged, ()
    if launched.exit_code:
        return _failed(task, launched.exit_code, record, kills=kills)
    if record is None:
        return "unusable", f"no step was seen: {launch.why_nothing(launched)}", ()
    for path in found:
        trouble = not_imposed(NormRecord.load(path), task)
        if trouble:
            return "unusable", trouble, ()
    if task.stop_after is not None:  # a warm-up needs no metric
        return "finished", "", ()
    return _measured(metric, record)


def not_imposed(record: NormRecord, task: Task) -> str:
    """Why a run must not count: what its own record says was imposed is not its arm.

    Args:
        record: The record that the run wrote.
        task: The run.

    Returns:
        The reason; empty where the run had its max_norm and its learning rate at every step.
    """
    imposed = record.metadata.get("imposed") is not None
    other = record.max_norm[record.max_norm != task.max_norm]
    if not imposed or len(other):
        had = f"{other[0]:g}" if imposed else "none"
        return f"max_norm {task.max_norm:g} was not imposed: the run's record says {had}"
    factor = float(record.metadata.get("lr_factor", 1.0))
    if factor != task.lr_factor:
        return f"the learning rate was scaled by {factor:g} instead of {task.lr_factor:g}"
    return ""


def _measured(metric: Metric, record: NormRecord) -> Judgement:
    """Finished or diverged, by the metric and by the last norms."""
    died = _died(record)
    try:
        values = metric.values()
    except MetricError as error:
        if died:
            return "diverged", "the gradient norm was no longer finite, and no value came", ()
        return "unusable", str(error), ()
    if not math.isfinite(values[-1][1]):
        return "diverged", f"the last value was {values[-1][1]}", values
    if died:
        return "diverged", "the gradient norm was no longer finite at the end", values
    return "finished", "", values


def _died(record: NormRecord) -> bool:
    last = record.norms[~record.skipped][-DEAD_NORMS:]
    return len(last) > 0 and not np.isfinite(last).any()


def _failed(task: Task, code: int, record: NormRecord | None, *, kills: int) -> Judgement:
    """Out of memory, diverged or crashed: what a command that failed shows."""
    output = task.folder / OUTPUT
    lines = _last_lines(output)
    said = quoted(output)
    if code == KILLED and not kills:
        return "crashed", f"killed (out of memory?); its output ends with {said}", ()
    memory = [line for line in lines if _MEMORY.search(line)]
    if code == KILLED or memory:
        return "crashed", f"out of memory: {(memory or [said])[-1].strip()[:200]}", ()
    if record is not None and _diverged(record, lines):
        return "diverged", f"it ended with exit code {code}: {said}", ()
    how = f"exit code {code}"
    if code > 128:
        with suppress(ValueError):
            how = f"{signal.Signals(code - 128).name}"
    return "crashed", f"ended with {how}; its output ends with {said or 'nothing'}", ()


def _last_lines(output: Path) -> list[str]:
    with suppress(OSError):
        text = output.read_text(encoding="utf-8", errors="replace")
        return [line for line in text.splitlines() if line.strip()][-LAST_LINES:]
    return []


def _diverged(record: NormRecord, lines: Sequence[str]) -> bool:
    """Non-finite norms at the end, or a script that says so after norms that had grown."""
    norms = record.norms[~record.skipped]
    if _died(record) or (len(norms) and not np.isfinite(norms[-1])):
        return True
    told = any(_NOT_FINITE.search(line) for line in lines)
    finite = record.finite
    return told and len(finite) > 0 and bool(norms[-1] >= GROWN * np.median(finite))
