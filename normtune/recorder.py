"""`NormRecorder`: records the unclipped gradient norm of every step of a training loop."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from normtune import (
    clipping,
    findings,
    gradients,
    interception,
    listening,
    optimizers,
    ranks,
    records,
    stepping,
)
from normtune.belt import Belt
from normtune.buffer import SURE_AFTER, Buffer
from normtune.errors import NormtuneError, RecordError
from normtune.events import Measured
from normtune.learning_rates import ScaledRates
from normtune.records import FileStore, Finding, MemoryStore, NormRecord
from normtune.watcher import Watcher

if TYPE_CHECKING:
    from typing_extensions import Self

    from normtune.suggestion import Suggestion

FLUSH_EVERY = 100  # steps
FLUSH_SECONDS = 2.0
LARGEST_HALF = 65504.0


class NormRecorder(Watcher):
    """Records the unclipped norm of every step, however the loop clips.

    Args:
        optimizer: One optimizer or several, anything with ``param_groups``, or for a loop without
            an optimizer a module or its parameters.
        path: The record file, by custom ``*.norms.jsonl``; without it the record stays in memory.
        max_norm: None leaves the loop's clipping as it is; `math.inf` clips nothing; a number is
            used wherever the loop would have clipped, else right before the step.
        norm_type: The p of the norms that normtune measures; a clip call keeps its own.
        measure: ``"step"`` sees clip calls and steps; ``"backward"`` takes the norm as each
            backward pass leaves it, for loops that clip by their own arithmetic.
        groups: Also record the norm of each of these: a module (one per parameter), a mapping
            of names to parameters, ``model.named_parameters()``, or ``"param_groups"``.
        flush_every: Steps between two writes; each reads the device at most once.
        resume: Continue the last attempt in `path`: steps count on from there.
        metadata: Facts of your own for the header (batch size, commit, ...), JSON values;
            ``schedule_steps``, the length of the training, lets a short record be doubted.
        lr_factor: Multiplies the learning rates during the arithmetic of each step only.

    Raises:
        ValueError: If an argument cannot be meant.
        RecordError: If `path` cannot be written.

    Example:
        >>> import torch, normtune
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> recorder = normtune.NormRecorder(optimizer)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 4)).sum().backward()
        ...     optimizer.step()
        >>> len(recorder.record)
        3
    """

    def __init__(
        self,
        optimizer: Any,
        path: str | os.PathLike[str] | None = None,
        *,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        measure: Literal["step", "backward"] = "step",
        groups: optimizers.Groups | None = None,
        flush_every: int = FLUSH_EVERY,
        resume: bool = False,
        metadata: Mapping[str, Any] | None = None,
        lr_factor: float = 1.0,
    ) -> None:
        _check(measure=measure, norm_type=norm_type, flush_every=flush_every, lr_factor=lr_factor)
        if max_norm is not None:
            max_norm = _positive(max_norm)
        found, parameters = optimizers.targets(optimizer)
        names = optimizers.group_names(groups, found)
        super().__init__(
            found,
            parameters,
            norm_type=float(norm_type),
            measure=measure,
            each=bool(names),
            lr_factor=lr_factor,
        )
        self._flush_every = flush_every
        self._taken: set[str] = set()
        self._name(found)
        self._findings: dict[tuple[str, str], Finding] = {}
        self._complained: set[str] = set()
        self._closed = False
        self._lingers = False  # it is over, but other ranks may wait for it in one norm more
        self._flushed_at = time.monotonic()
        self._metadata = dict(metadata or {})
        continues, counts = _last_steps(path) if resume else ({}, {})
        head = self._header(max_norm) | continues
        self._ranks = ranks.Ranks()
        self._path = self._path_of_rank(path)
        self._buffer = Buffer(self._store(head), names, self._norm_type)
        self._count_on(counts)
        # Not weakref.finalize: a forked child of multiprocessing ends without running those.
        last = (self._buffer, self._findings)
        self._finalizer = Finalize(self, _finish, last, exitpriority=0)
        self._attach(self._optimizers, self._parameters)
        self.max_norm = max_norm

    # --- what the user calls

    @property
    def max_norm(self) -> float | None:
        """The max_norm that normtune imposes: None is the loop's own, inf clips nothing."""
        return self._max_norm

    @max_norm.setter
    def max_norm(self, value: float | None) -> None:
        if value is not None:
            value = _positive(value)
        self._max_norm = value
        listening.impose_on_compiled()

    @property
    def n_steps(self) -> int:
        """How many steps were seen, of the series with most of them."""
        return self._buffer.n_steps

    @property
    def record(self) -> NormRecord:
        """The norms so far.

        Raises:
            RecordError: If no step was seen yet.
        """
        self.flush()
        return self._buffer.store.record()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was found about the loop's clip calls so far."""
        return tuple(self._findings.values())

    def suggest(self, **options: Any) -> Suggestion:
        """Suggest a max_norm from the norms so far.

        Args:
            options: As for `normtune.suggest`.

        Returns:
            The suggestion.
        """
        from normtune.suggestion import suggest

        return suggest(self.record, **options)

    def clip_after(self, n_steps: int, rule: str | Callable[..., float] | None = None) -> None:
        """Record `n_steps` steps unclipped, then clip at the max_norm suggested from them.

        Against a warm-up that dies, a norm above 100 x the running median is clipped at 10 x the
        median and a step with a non-finite norm is left out; both are marked in the record. This
        reads the device at every step of the warm-up.

        Args:
            n_steps: Length of the warm-up, at least 30 steps.
            rule: As for `normtune.suggest`.

        Raises:
            ValueError: If `n_steps` is less.
        """
        if not isinstance(n_steps, int) or n_steps < 30:
            message = f"n_steps must be a whole number of at least 30 but got {n_steps!r}"
            raise ValueError(message)
        self._belt = Belt(self.n_steps + n_steps, rule)
        self.max_norm = math.inf

    def clip_grad_norm_(
        self,
        parameters: Tensor | Iterable[Tensor],
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,  # noqa: FBT001, FBT002  torch's own signature
        foreach: bool | None = None,  # noqa: FBT001  torch's own signature
    ) -> Tensor:
        """Clip as `torch.nn.utils.clip_grad_norm_` does, bit for bit, and record the norm.

        Args:
            parameters: The parameters whose gradients are clipped.
            max_norm: The limit; the recorder's own `max_norm`, if set, takes its place.
            norm_type: The p of the norm.
            error_if_nonfinite: Whether a non-finite norm raises.
            foreach: As in torch.

        Returns:
            The total norm before clipping, as torch returns it.
        """
        known = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # a torch.no_grad() would be felt in small models
        try:
            return clipping.spy_clip_grad_norm_(
                parameters, max_norm, norm_type, error_if_nonfinite, foreach
            )
        finally:
            torch._C._set_grad_enabled(known)

    def add(self, optimizer: Any) -> None:
        """Record another optimizer of the same training too, in series of its own.

        Args:
            optimizer: As for the recorder itself.
        """
        found, parameters = optimizers.targets(optimizer)
        found = [o for o in found if id(o) not in self._names]
        known = {id(p) for p in self._parameters}
        added = [p for p in parameters if id(p) not in known]
        self._name(found)
        self._optimizers += found
        self._parameters += added
        self._attach(found, added)

    def record_norm(self, norm: float | Tensor) -> None:
        """Record the norm of a step that an engine (DeepSpeed, Megatron) knows itself.

        Args:
            norm: The total norm before clipping; a tensor stays on its device until the next flush.
        """
        series = self._pairing.own_series("given", self._parameters, "given")
        if isinstance(norm, Tensor):
            norm = gradients.on_host(gradients.whole(norm.detach()).clone())
        self._keep(Measured(series, norm if isinstance(norm, Tensor) else float(norm)), None)
        self._maybe_flush()

    def flush(self) -> None:
        """Read the waiting norms from the device, in one go, and write them."""
        self._flushed_at = time.monotonic()
        norms = self._buffer.flush()
        self._name_overflows(norms)
        self._arrived(norms)
        if not self._ranks.compared:
            self._compare_ranks()
        self._buffer.tell(self._findings, last=self._closed)
        error = self._buffer.store.error
        if error is not None:
            self._complain_once(f"cannot write its record for now: {error.strerror}")

    def _name_overflows(self, norms: Sequence[tuple[str, float]]) -> None:
        """Where torch's own norm is fp16, it is inf for what fp32 holds."""
        for series, norm in norms if self._pairing.half_sites else ():
            site = self._pairing.half_sites.get(series)
            if site is not None and LARGEST_HALF < norm < math.inf:
                self._report("half-precision-overflow", site)

    def _arrived(self, norms: Sequence[tuple[str, float]]) -> None:
        """Look at what a flush brought to the host; the recorder of a run looks for its end."""

    def close(self) -> None:
        """Write what waits and stop watching; the optimizer is as before."""
        if self._closed:
            return
        self._closed = True
        self._commit_stepless()
        for rates in self._rates.values():
            rates.restore()
        with suppress(Exception):
            self.flush()
            if self._ranks.posted and not self._ranks.compared:
                self._write_own_file()  # rank 0 may be another training for all that is known
        if not self._buffer.store.close():
            self._complain_once(f"could not write all of the record: {self._buffer.store.error}")
        self._finalizer.cancel()
        self._max_norm = None
        listening.impose_on_compiled()
        if self._pairing.meet is None or not self._ranks.leave():
            self._detach()
        self._lingers = True

    def _detach(self) -> None:
        listening.unlisten(self)
        self._pairing.backwards.close()
        self._hold(self._optimizers, held=False)

    def __repr__(self) -> str:
        names = "+".join(optimizers.name_of(o) for o in self._optimizers) or "no optimizer"
        found = "".join(f"\n  {finding.text}" for finding in self.findings)
        return f"NormRecorder({names}, {self.n_steps} steps, max_norm={self._max_norm}){found}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """What a later recorder needs to continue this record after a restart."""
        self.flush()
        store = self._buffer.store
        return {
            "attempt": store.head["attempt"],
            "steps": dict(self._buffer.counts),
            "max_norm": self._max_norm,
            "warmup": self._belt.state() if self._belt else None,
            "kept": store.state() if isinstance(store, MemoryStore) else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the attempt that `state` comes from; steps count on from there.

        Args:
            state: What `state_dict` gave.
        """
        counts = {str(k): int(v) for k, v in state["steps"].items()}
        store = self._buffer.store
        facts = {k: v for k, v in store.head.items() if k not in ("normtune", "attempt", "time")}
        facts |= {"continues": state["attempt"], "step": max(counts.values(), default=0)}
        store.close()
        again = self._store(records.header(**facts))
        if isinstance(again, MemoryStore) and state.get("kept"):
            again.load(state["kept"])
        self._buffer.drop()
        self._buffer.restart(again)
        self._count_on(counts)
        self.max_norm = state.get("max_norm")
        warmup = state.get("warmup")
        self._belt = Belt.of(warmup) if warmup else None

    def _count_on(self, counts: Mapping[str, int]) -> None:
        self._buffer.counts.update(counts)
        self._buffer.start = max(counts.values(), default=0)

    # --- attaching

    def _attach(self, found: Sequence[Any], parameters: Sequence[Tensor]) -> None:
        interception.listen(self, parameters)
        self._hold(found, held=True)
        for optimizer in found:
            stepping.watch_unhooked(optimizer)
            if self._lr_factor != 1.0:
                self._rates[id(optimizer)] = ScaledRates(optimizer, self._lr_factor)
                stepping.tell_failures(optimizer)
        if self._measure == "backward":
            self._watch_backward(parameters)
        else:
            self._pairing.backwards.watch(parameters)
        if any(gradients.is_shared(p) for p in parameters):
            self._pairing.meet = self._ranks.meet

    def _name(self, found: Sequence[Any]) -> None:
        """Name the series of each optimizer after its class, with a number where there are more."""
        several = [optimizers.name_of(o) for o in found]
        for optimizer, kind in zip(found, several, strict=True):
            name = f"{kind} 1" if several.count(kind) > 1 else kind
            k = 2
            while name in self._taken:
                name, k = f"{kind} {k}", k + 1
            self._names[id(optimizer)] = name
            self._taken.add(name)

    def _hold(self, found: Iterable[Any], *, held: bool) -> None:
        """Live as long as the optimizer, also where the user keeps no name for the recorder."""
        for optimizer in found:
            if isinstance(optimizer, torch.optim.Optimizer):  # its copies leave this out
                holders = vars(optimizer).setdefault("_normtune_recorders", [])
                holders[:] = [h for h in holders if h is not self] + [self] * held

    # --- the belt of a warm-up

    def _step_over(self) -> None:
        if self._belt is not None:
            self._end_warmup()
        if not self._lingers:
            self._maybe_flush()
        elif self._ranks.left:
            self._detach()

    def _end_warmup(self) -> None:
        belt = self._belt
        if belt is None or self.n_steps < belt.until:
            return
        self._belt = None
        try:
            suggestion = self.suggest(rule=belt.rule)
        except (NormtuneError, ValueError) as error:
            self._max_norm = math.inf
            _warn(f"normtune found no max_norm in the warm-up and goes on unclipped: {error}")
            return
        self.max_norm = suggestion.max_norm

    # --- the buffer

    def _keep(self, measured: Measured, optimizer: Any) -> None:
        if self._lingers:
            return
        belted = self._belt is not None and self._under_belt(self._belt, measured)
        self._buffer.keep(measured, self._max_norm, optimizers.rate(optimizer), belted)

    def _under_belt(self, belt: Belt, measured: Measured) -> bool:
        """Whether the belt acted on this step."""
        if measured.skipped is not False:
            return False
        value = float(measured.norm)
        acted = belt.limit(value) != math.inf
        belt.saw(value)
        return acted

    def _maybe_flush(self) -> None:
        if self._lingers:
            return
        waiting = len(self._buffer.waiting)
        due = waiting >= self._flush_every
        if waiting and not due:
            due = time.monotonic() - self._flushed_at > FLUSH_SECONDS
            due = due or (not self._ranks.posted and self.n_steps >= ranks.FIRST)
        if due:
            self.flush()

    # --- findings and failures

    def _report(self, kind: str, site: str, **facts: object) -> None:
        known = self._findings.get((kind, site))
        text = findings.sentence(kind, site, **facts) if known is None else known.text
        count = 1 if known is None else known.count + 1
        first = self.n_steps + 1 if known is None else known.step
        known_kind = findings.KINDS[kind]
        sure = known_kind.at_once or count >= SURE_AFTER or self.n_steps < SURE_AFTER
        blocks = known_kind.blocks and sure
        self._findings[(kind, site)] = Finding(kind, text, site, first, count, blocks)

    def _went_wrong(self, error: Exception) -> None:
        """Only where normtune imposes something may it end the run: its arm was not applied."""
        if self._max_norm is not None or self._rates:
            raise error
        self._stop(error)

    def _stop(self, error: Exception) -> None:
        """Record no more; but other ranks may have begun with one norm more that needs this one."""
        if self._lingers:
            self._failed = True
            self._detach()
            return
        helps = False
        if self._pairing.meet is not None:
            with suppress(Exception):
                helps = self._ranks.leave()
        self._lingers, self._failed = helps, not helps
        reason = f"{type(error).__name__}: {error}"
        self._complain_once(f"stopped recording, training goes on ({reason})")

    def _complain_once(self, sentence: str) -> None:
        what = sentence.partition(":")[0]  # a disk may refuse for several reasons in turn
        if what not in self._complained:
            self._complained.add(what)
            _warn(f"normtune {sentence}")

    # --- the header, and starting again

    def _header(self, max_norm: float | None) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "norm_type": self._norm_type,
            "torch": str(torch.__version__),  # a plain string for checkpoints
            "world_size": ranks.size(),
            "parameters": sum(p.numel() for p in self._parameters),
            "tensors": len(self._parameters),
            "imposed": max_norm,
            "lr_factor": self._lr_factor if self._lr_factor != 1.0 else None,
            "metadata": self._metadata or None,
        }
        facts |= optimizers.facts(self._optimizers)
        if self._parameters:
            facts["dtype"] = str(self._parameters[0].dtype).removeprefix("torch.")
        return records.header(**facts)

    # --- the other ranks

    def _path_of_rank(self, path: str | os.PathLike[str] | None) -> Path | None:
        """Rank 0 writes the file; another rank has one only where its norms are its own."""
        if path is None or self._ranks.rank == 0:
            return None if path is None else Path(path)
        own = Path(path)
        name = own.name.removesuffix(records.SUFFIX)
        return own.with_name(f"{name}.rank{self._ranks.rank}{records.SUFFIX}")

    def _store(self, head: dict[str, Any]) -> FileStore | MemoryStore:
        follows = self._ranks.grouped and self._ranks.rank > 0
        if self._path is None or follows:
            return MemoryStore(head)
        return FileStore(self._path, head)

    def _compare_ranks(self) -> None:
        """Whether all ranks recorded the same first norms, as those of one training must."""
        if self.n_steps < ranks.FIRST:
            return
        try:
            first = self._buffer.store.record().norms[: ranks.FIRST]
            other = self._ranks.different(first.tolist())
        except Exception:  # the process group is gone
            self._ranks.compared = self._ranks.posted = True
            return
        if other is None:
            return
        self._report("ranks-differ", "", own=self._ranks.rank, other=other)
        self._write_own_file()

    def _write_own_file(self) -> None:
        store = self._buffer.store
        if isinstance(store, MemoryStore) and self._path is not None:
            self._buffer.store = store.to_file(self._path)


def _warn(sentence: str) -> None:
    try:
        warnings.warn(sentence, stacklevel=4)
    except UserWarning:  # warnings are errors here, and none may leave a hook
        print(sentence, file=sys.stderr)  # noqa: T201


def _finish(buffer: Buffer, findings: dict[tuple[str, str], Finding]) -> None:
    """Write what waits when a recorder that nobody closed goes away, or the program ends."""
    with suppress(Exception):
        buffer.flush()
        buffer.tell(findings, last=True)
        buffer.store.close()


def _last_steps(path: str | os.PathLike[str] | None) -> tuple[dict[str, Any], dict[str, int]]:
    """What the header of a resumed record says, and its steps so far; empty for a new file."""
    if path is None or not Path(path).exists():
        return {}, {}
    try:
        attempt, steps = records.last_steps(path)
    except RecordError:
        return {}, {}
    return ({"continues": attempt, "step": max(steps.values())}, steps) if steps else ({}, {})


def _check(*, measure: str, norm_type: float, flush_every: int, lr_factor: float) -> None:
    if measure not in ("step", "backward"):
        message = f'measure must be "step" or "backward" but got {measure!r}'
        raise ValueError(message)
    if not (isinstance(norm_type, int | float) and norm_type > 0):
        message = f"norm_type must be a number above 0 but got {norm_type!r}"
        raise ValueError(message)
    if not isinstance(flush_every, int) or flush_every < 1:
        message = (
            f"flush_every must be a whole number of steps, at least 1, but got {flush_every!r}"
        )
        raise ValueError(message)
    if not (isinstance(lr_factor, int | float) and 0 < lr_factor < math.inf):
        message = f"lr_factor must be a finite number above 0 but got {lr_factor!r}"
        raise ValueError(message)


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        message = f"max_norm must be a number above 0, inf or None but got {value!r}"
        raise ValueError(message)
    return float(value)


def record_norm(norm: float | Tensor) -> None:
    """Record the norm of a step that the engine of a training knows itself.

    It goes to the recorder that is open; with several, call `NormRecorder.record_norm`.

    Args:
        norm: The total norm before clipping, such as ``engine.get_global_grad_norm()``.

    Raises:
        ValueError: If not exactly one recorder is open.
    """
    recorders = [r for r in listening.listeners_of_thread() if isinstance(r, NormRecorder)]
    if len(recorders) != 1:
        message = (
            f"record_norm needs exactly one open recorder but found {len(recorders)}; "
            "make one with normtune.NormRecorder(optimizer, path), or call its own record_norm"
        )
        raise ValueError(message)
    recorders[0].record_norm(norm)
