"""`Run`: what a user's `train(run)` is given, and how one training is carried out."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from normtune import gradients
from normtune.divergence import Divergence
from normtune.errors import StudyError
from normtune.pruning import Pruner
from normtune.recorder import NormRecorder
from normtune.tasks import THREAD_VARIABLES, Ending, Outcome, Task

Train = Callable[["Run"], Any]


class TrainError(StudyError):
    """A training that cannot be used as it is, whatever the arm and the seed."""


class RunEnded(BaseException):
    """Ends a run from within; no Exception, so that a loop's own handlers let it pass."""


class _Recorder(NormRecorder):
    """A recorder that tells its run of every step, and of its own failures."""

    run: Run
    divergence: Divergence | None = None

    def _arrived(self, norms: Sequence[tuple[str, float]]) -> None:
        if self.divergence is not None and not self.run.diverged:
            self.run.diverged = self.divergence.saw(norms)

    def step_ends(self, optimizer: Any) -> None:
        super().step_ends(optimizer)
        self.run._after_step()

    def _went_wrong(self, error: Exception) -> None:
        try:
            super()._went_wrong(error)
        except Exception:
            # A loop that swallows exceptions must not turn a run without its arm into a result.
            self.run._end("crashed", f"normtune could not apply this run's max_norm: {error!r}")


class Run:
    """One training with one max_norm, learning-rate factor and seed.

    Args:
        seed: The seed to draw everything from.
        params: ``params`` of the study file.
        device: Where to train.
        fraction: The share of the schedule to train, 0 to 1.
        max_norm: What is imposed: None leaves the loop's clipping, inf clips nothing.
        lr_factor: Multiplies the learning rate during the arithmetic of each step.
        record: The record file; None keeps the norms in memory.
        stop_after: End the training after so many steps.
        metadata: Facts for the header of the record.
        stop_diverged: End the training where its norms are no longer finite, or explode.
        pruner: Tells which reports are hopeless; None ends no run for that.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        params: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
        fraction: float = 1.0,
        max_norm: float | None = None,
        lr_factor: float = 1.0,
        record: str | os.PathLike[str] | None = None,
        stop_after: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        stop_diverged: bool = False,
        pruner: Pruner | None = None,
    ) -> None:
        self.seed = seed
        self.params: dict[str, Any] = dict(params or {})
        self.device = torch.device(device)
        self.fraction = fraction
        self.max_norm = max_norm
        self.lr_factor = lr_factor
        self.recorder: NormRecorder | None = None
        self.values: list[tuple[int, float]] = []
        self.ended: tuple[Ending, str] | None = None
        self.leave: Callable[[], None] | None = None
        self.diverged = ""  # why, where its norms say so
        self._stop_diverged = stop_diverged
        self._pruner = pruner
        self._record = record
        self._stop_after = stop_after
        self._metadata = dict(metadata or {})

    def watch(self, *optimizers: Any, metadata: Mapping[str, Any] | None = None) -> NormRecorder:
        """Record the norms of the optimizers' steps, and impose this run's max_norm and rate.

        Args:
            optimizers: All the optimizers of the training, in one call.
            metadata: Facts of your own for the header of the record, JSON values.

        Returns:
            The recorder; it is closed when the run ends.

        Raises:
            TrainError: If it is called twice, or without an optimizer.
        """
        if self.recorder is not None or not optimizers:
            message = "call run.watch once, with all optimizers of the training: run.watch(a, b)"
            raise TrainError(message)
        recorder = _Recorder(
            optimizers[0] if len(optimizers) == 1 else optimizers,
            self._record,
            max_norm=self.max_norm,
            lr_factor=self.lr_factor,
            metadata=self._metadata | dict(metadata or {}),
        )
        recorder.run = self
        if self._stop_diverged:
            recorder.divergence = Divergence(lambda: not gradients.all_finite(recorder._parameters))
        self.recorder = recorder
        return recorder

    def report(self, value: float, step: int | None = None) -> None:
        """Report the validation value so far; a non-finite one ends the run as diverged.

        Args:
            value: The validation value.
            step: The training step; a count of the reports without it.
        """
        self._stay_ended()
        number = _as_number(value, "run.report was given")
        self.values.append((len(self.values) + 1 if step is None else int(step), number))
        if not math.isfinite(number):
            self._end("diverged", f"the reported value was {number}")
        why = self._pruner.why(self.values) if self._pruner else ""
        if why:
            self._end("pruned", why)

    def _returned(self, value: object) -> None:
        """Take what `train` returned for its last report."""
        if value is None:
            return
        number = _as_number(value, "train returned")
        if not self.values or self.values[-1][1] != number:
            last = self.values[-1][0] if self.values else 0
            self.values.append((last + 1, number))

    def _after_step(self) -> None:
        self._stay_ended()
        if self.diverged:
            self._end("diverged", self.diverged)
        steps = self.recorder.n_steps if self.recorder is not None else 0
        if self._stop_after is not None and steps >= self._stop_after:
            self._end("stopped", f"{self._stop_after} warm-up steps are recorded")

    def _end(self, ending: Ending, reason: str) -> None:
        self._stay_ended()
        self.ended = (ending, reason)
        raise RunEnded(reason)

    def _stay_ended(self) -> None:
        """A loop that swallowed the end of its run goes on; the process then ends here."""
        if self.ended is not None:
            if self.leave is not None:
                self.leave()
            raise RunEnded(self.ended[1])


def _as_number(value: object, what: str) -> float:
    if not isinstance(value, str | bytes | bool):
        try:
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError):
            pass
    text = repr(value) if isinstance(value, str | bytes | bool | int | float) else ""
    kind = type(value).__name__
    message = f"{what} {text or 'a ' + kind} but needs the validation value as one number"
    raise TrainError(message)


# --- carrying out a task ----------------------------------------------------------------------


def carry_out(task: Task) -> None:
    """Train as `task` says, in a process made for it, and leave the outcome in its folder."""
    run = Run(
        seed=task.seed,
        params=task.params,
        device=_prepare(task),
        fraction=task.fraction,
        max_norm=task.max_norm,
        lr_factor=task.lr_factor,
        record=task.record_path,
        stop_after=task.stop_after,
        metadata=task.metadata,
        stop_diverged=not task.finish_diverged,
        pruner=task.pruner,
    )
    started = time.perf_counter()

    def leave() -> None:
        _outcome(run, started, run.ended or ("crashed", "")).save(task.folder)
        sys.stdout.flush()
        os._exit(0)

    run.leave = leave
    _outcome(run, started, _train(run, task)).save(task.folder)


def _train(run: Run, task: Task) -> tuple[Ending, str]:
    """How the training ended, and why."""
    try:
        run._returned(load_train(task.train, task.home)(run))
    except BaseException as error:
        if run.ended is None:
            return _explain(run, error)
    if run.ended is not None:
        return run.ended
    return _judge(run)


def _judge(run: Run) -> tuple[Ending, str]:
    if run.recorder is None:
        return "unusable", "train never called run.watch(optimizer): nothing could be clipped"
    if not run.recorder.n_steps:
        return "unusable", "the optimizer given to run.watch never made a step"
    if not run.values:
        message = "train reported nothing: call run.report(value) or return the validation value"
        return "unusable", message
    run.recorder.flush()
    if run.diverged:
        return "diverged", run.diverged
    value = run.values[-1][1]
    if not math.isfinite(value):
        return "diverged", f"the last value was {value}"
    return "finished", ""


def _explain(run: Run, error: BaseException) -> tuple[Ending, str]:
    if isinstance(error, TrainError):
        return "unusable", str(error)
    if isinstance(error, SystemExit) and not error.code:
        return _judge(run)
    traceback.print_exception(error)
    last = traceback.format_exception_only(error)[-1].strip()
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "crashed", f"out of memory: {last}"
    if isinstance(error, Exception) and _norms_died(run):
        return "diverged", f"the gradient norm was no longer finite, then {last}"
    return "crashed", last


def _norms_died(run: Run) -> bool:
    if run.recorder is None or not run.recorder.n_steps:
        return False
    record = run.recorder.record
    return not (record.skipped[-1] or np.isfinite(record.norms[-1]))


def _outcome(run: Run, started: float, how: tuple[Ending, str]) -> Outcome:
    seconds = time.perf_counter() - started
    if run.recorder is not None:
        run.recorder.close()
    return Outcome(how[0], tuple(run.values), how[1], round(seconds, 3))


def _prepare(task: Task) -> str:
    """Set threads, device and seeds before the user's module is imported; returns the device."""
    for name in THREAD_VARIABLES:
        os.environ[name] = str(task.threads)
    torch.set_num_threads(task.threads)
    device = _device(task)
    random.seed(task.seed)
    np.random.seed(task.seed % 2**32)  # noqa: NPY002 - for trainings that use the global one
    torch.manual_seed(task.seed)
    return device


def _device(task: Task) -> str:
    """The device of a run; parallel runs have a GPU each where there are several."""
    if task.device not in (None, "cuda"):
        return str(task.device)
    # Not torch.cuda.is_available(): it may initialize CUDA before the variable below is read.
    n = torch.cuda.device_count()
    if not n:
        return task.device or "cpu"
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    visible = named or [str(i) for i in range(n)]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[task.slot % len(visible)]
    return "cuda"


def load_train(train: str, home: Path) -> Train:
    """Import the function that a study names.

    Args:
        train: ``file.py:function`` or ``package.module:function``.
        home: The folder of the study file.

    Raises:
        TrainError: If there is no such function, with where it was looked for.
    """
    source, _, name = train.rpartition(":")
    is_file = source.endswith(".py") or "/" in source
    folder = (home / source).parent if is_file else home
    sys.path[:0] = [str(folder), *([] if is_file else [str(Path.cwd())])]
    module = _import_file(home / source) if is_file else _import_module(source, home)
    function = getattr(module, name, None)
    if not callable(function):
        raise TrainError(_no_function(module, name, train))
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        message = f"{name} of {source} must take one argument, as in def {name}(run)"
        raise TrainError(message) from None
    except ValueError:  # a builtin has no signature
        pass
    train_function: Train = function
    return train_function


def _import_file(file: Path) -> ModuleType:
    # A name of its own where the file is called like a module that is loaded already.
    name = f"_study_{file.stem}" if file.stem in sys.modules else file.stem
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        message = f"cannot import train: looked for the file {file}"
        raise TrainError(message)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise TrainError(_no_import(error, str(file))) from error
    return module


def _import_module(source: str, home: Path) -> ModuleType:
    try:
        return importlib.import_module(source)
    except Exception as error:
        looked = f"{source}, looked for in {home}, {Path.cwd()} and the installed packages"
        raise TrainError(_no_import(error, looked)) from error


def _no_import(error: Exception, what: str) -> str:
    traceback.print_exception(error)
    last = traceback.format_exception_only(error)[-1].strip()
    return f"cannot import train from {what}: {last}"


def _no_function(module: ModuleType, name: str, train: str) -> str:
    functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
    near = difflib.get_close_matches(name, functions, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{train}: {module.__file__} has no function {name!r}{hint}"
