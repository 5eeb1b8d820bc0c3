"""The recorder that nobody made: in each process of a watched command, for whatever steps there."""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normtune import gradients, interception, optimizers, orders, ranks, records
from normtune.divergence import Divergence
from normtune.errors import NormtuneError
from normtune.listening import COMPILED, ClipCall
from normtune.orders import Orders
from normtune.recorder import NormRecorder

if TYPE_CHECKING:
    from typing_extensions import Self

EARLY = (1, 10, 30)  # steps to write at once: a short script that leaves by os._exit() has those


def start() -> None:
    """Watch this process from now on, as its environment orders; called when torch is imported."""
    given = Orders.of_environment()
    interception.reside(_Resident(given))
    if given.seed is not None:
        _seed(given.seed)
    orders.mark(given.folder, orders.TORCH)


def _seed(seed: int) -> None:
    import random

    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - for scripts that use the global one
    torch.manual_seed(seed)


class _Weakly(list[Any]):
    """A list that keeps nothing alive: a script that makes model after model must not fill up."""

    def __init__(self, items: Iterable[Any]) -> None:
        super().__init__(map(_reference, items))

    def __iter__(self) -> Iterator[Any]:
        living = (reference() for reference in super().__iter__())
        return (item for item in living if item is not None)

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index)()

    def __iadd__(self, items: Iterable[Any]) -> Self:  # type: ignore[misc]
        self.extend(map(_reference, items))
        return self


def _reference(item: Any) -> Any:
    try:
        return weakref.ref(item)
    except TypeError:  # __slots__ without __weakref__
        return lambda: item


@dataclass(eq=False)
class _Trained:
    """What an optimizer of a class has trained, in the series of a name."""

    kind: str
    parameters: _Weakly
    name: str

    def same_as(self, other: _Trained) -> bool:
        """Whether the same parameters, not only others at their addresses, are trained alike."""
        mine, its = list(self.parameters), list(other.parameters)
        same = len(mine) == len(its) and all(p is q for p, q in zip(mine, its, strict=True))
        return same and self.kind == other.kind


class _Recorder(NormRecorder):
    """A recorder that keeps nothing alive and tells its resident of every step."""

    resident: _Resident | None = None
    divergence: Divergence | None = None

    def __init__(self, target: Any, path: Path, **options: Any) -> None:
        self._known_names: list[_Trained] = []
        super().__init__(target, path, **options)
        self._optimizers = _Weakly(self._optimizers)
        self._parameters = _Weakly(self._parameters)
        self._described: set[str] = set()

    def add(self, optimizer: Any) -> None:
        """Take on what a later part of the script trains."""
        if not any(True for _ in self._parameters):  # the models so far are gone, and their hooks
            self._pairing.forget_all()
            self._known_names.clear()
        for target in optimizer if isinstance(optimizer, list) else [optimizer]:
            self._pairing.forget(target)
            self._names.pop(id(target), None)
            for rest in (False, True):
                self._own.pop((id(target), rest), None)
        super().add(optimizer)

    def _name(self, found: Sequence[Any]) -> None:
        """An optimizer that a script makes anew for the same parameters goes on with the series."""
        super()._name(found)
        for optimizer in found:
            name, kind = self._names[id(optimizer)], optimizers.name_of(optimizer)
            known = _Trained(kind, _Weakly(optimizers.parameters(optimizer)), name)
            before = [k for k in self._known_names if k.same_as(known)]
            if before and self.resident is not None and self.resident.rebuilt(optimizer):
                self._names[id(optimizer)] = before[-1].name
                self._taken.discard(name)
            else:
                self._known_names.append(known)

    def step_ends(self, optimizer: Any) -> None:
        super().step_ends(optimizer)
        if self.resident is not None:
            self.resident.stepped(self)

    def clip_ends(self, call: ClipCall) -> None:
        super().clip_ends(call)
        if self.resident is not None and not self.steps_begun:
            self.resident.stepped(self)

    def _arrived(self, norms: Sequence[tuple[str, float]]) -> None:
        why = self.divergence.saw(norms) if self.divergence is not None else ""
        if why and self.resident is not None:
            self.divergence = None
            self.resident.diverged(why)

    def _path_of_rank(self, path: Any) -> Path:
        return Path(path)  # it names the rank already

    def _hold(self, found: Iterable[Any], *, held: bool) -> None:
        """The resident holds it."""

    def _keep(self, measured: Any, optimizer: Any) -> None:
        name = measured.series.name
        if optimizer is not None and name not in self._described:
            self._described.add(name)
            self._describe(name, optimizer)
        super()._keep(measured, optimizer)

    def _describe(self, series: str, optimizer: Any) -> None:
        """The header knows the first optimizer only, and none where a clip call came first."""
        facts = optimizers.facts([optimizer])
        if facts["optimizer"] != self._buffer.store.head.get("optimizer"):
            facts.pop("lr", None)
            self._buffer.store.declare(records.strict({"series": series} | facts))


class _Resident:
    """Attaches one recorder to all that a thread of this process trains.

    Args:
        given: The orders of the command.
    """

    def __init__(self, given: Orders) -> None:
        self._orders = given
        self._recorders: list[_Recorder] = []
        self._of_thread = threading.local()  # what two threads train must not meet in one recorder
        # Each optimizer, and how many steps were taken before it was made.
        self._built: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._n_built = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._idle = False
        self._ended = False
        self._pid = os.getpid()
        self._at_exit = 0  # the process that will come to `over`
        self._watch_construction()
        if given.max_norm is not None:
            COMPILED.imposed = given.max_norm
        atexit.register(self.over)

    @property
    def recorder(self) -> _Recorder | None:
        """The recorder of this thread."""
        return getattr(self._of_thread, "recorder", None)

    # --- what the dispatcher shows

    def meet(self, listeners: Sequence[Any], parameters: Sequence[Tensor], optimizer: Any) -> bool:
        """See `listening.Resident`."""
        if self._ended:  # the loop swallowed its end
            _leave()
        if self._idle:
            return False
        listens = any(isinstance(listener, _Recorder) for listener in listeners)
        if listens and (optimizer is None or optimizer in self._known):
            return False
        try:
            with self._lock:
                return self._take_on(parameters, optimizer)
        except Exception as error:
            return self._give_up(error)

    def _take_on(self, parameters: Sequence[Tensor], optimizer: Any) -> bool:
        found = [optimizer] if optimizer is not None else self._owners(parameters)
        if found and not any(optimizers.parameters(o) for o in found):
            return False
        target = found or list(parameters)
        if self.recorder is None:
            self._of_thread.recorder = self._made(target)
        else:
            self.recorder.add(target)
        for one in found:
            self._known.add(one)
        return True

    def _owners(self, parameters: Sequence[Tensor]) -> list[Any]:
        ids = set(map(id, parameters))
        return [o for o in list(self._built) if any(id(p) in ids for p in optimizers.parameters(o))]

    def _made(self, target: Any) -> _Recorder:
        given = self._orders
        recorder = _Recorder(
            target,
            _new_file(given.folder),
            max_norm=given.max_norm,
            lr_factor=given.lr_factor,
            metadata=given.metadata,
        )
        recorder.resident = self
        if given.stop_diverged:
            recorder.divergence = Divergence(lambda: not gradients.all_finite(recorder._parameters))
        self._recorders.append(recorder)
        return recorder

    def _give_up(self, error: Exception) -> bool:
        """Without its arm a run must not count, so it ends; a mere recording never disturbs."""
        self._idle = True
        reason = f"{type(error).__name__}: {error}"
        orders.mark(self._orders.folder, orders.FAILED, reason)
        if self._orders.imposes:
            message = f"normtune could not take part in this training ({reason})"
            raise NormtuneError(message) from error
        return False

    def _watch_construction(self) -> None:
        """Know every optimizer, because the first clip call comes before the first step."""
        initialize, restore = Optimizer.__init__, Optimizer.__setstate__

        @functools.wraps(initialize)
        def normtune_init(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            initialize(optimizer, *args, **kwargs)
            self._count(optimizer)

        @functools.wraps(restore)
        def normtune_setstate(optimizer: Optimizer, state: dict[str, Any]) -> None:
            restore(optimizer, state)
            self._count(optimizer)

        Optimizer.__init__ = normtune_init  # type: ignore[method-assign, assignment]
        Optimizer.__setstate__ = normtune_setstate  # type: ignore[method-assign, assignment]

    def _count(self, optimizer: Optimizer) -> None:
        self._n_built += 1
        with suppress(TypeError):  # an optimizer that cannot be hashed or referred to weakly
            self._built[optimizer] = self.recorder.steps_begun if self.recorder else 0

    def rebuilt(self, optimizer: Any) -> bool:
        """Whether it was made after others had stepped."""
        with suppress(TypeError):
            return self._built.get(optimizer, 0) > 0
        return False

    # --- the end

    def stepped(self, recorder: _Recorder) -> None:
        """After each recorded step."""
        self._pid = os.getpid()
        if self._at_exit != self._pid:  # multiprocessing ends its forked children without atexit
            self._at_exit = self._pid
            Finalize(None, self.over, exitpriority=0)
        if recorder.n_steps in EARLY:
            recorder.flush()
        enough = self._orders.steps
        if enough and recorder.n_steps >= enough:
            self._end()

    def diverged(self, why: str) -> None:
        """Say so; the parent ends the command, of which this may be one rank of many."""
        orders.mark(self._orders.folder, orders.DIVERGED, why)

    def _end(self) -> None:
        """End this process as sys.exit() would; one that goes on in spite of it is left at once."""
        self._ended = True
        self.over()
        orders.mark(self._orders.folder, orders.ENOUGH)
        if threading.current_thread() is not threading.main_thread():
            _leave()
        raise SystemExit(0)

    def over(self) -> None:
        """Write what waits, and say what this process had."""
        if self._pid != os.getpid():
            return  # a forked child that trained nothing
        for recorder in self._recorders:
            recorder.close()
        self._idle = True
        steps = max((recorder.n_steps for recorder in self._recorders), default=0)
        had = {"optimizers": self._n_built, "steps": steps}
        orders.mark(self._orders.folder, orders.OVER, json.dumps(had))


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _new_file(folder: Path) -> Path:
    """An empty record file that no other process has, on no other machine either."""
    for attempt in itertools.count():
        name = f"rank{ranks.rank()}-{os.getpid()}" + (f"-{attempt}" if attempt else "")
        path = folder / f"{name}{records.SUFFIX}"
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            continue
        return path
    raise AssertionError
