"""`NormRecorder`: records the unclipped gradient norm of every step of a training loop."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from normtune import findings, gradients, interception, optimizers, ranks, records
from normtune.belt import Belt
from normtune.buffer import SURE_AFTER, Buffer
from normtune.errors import NormtuneError, RecordError
from normtune.interception import COMPILED, ClipCall
from normtune.learning_rates import ScaledRates
from normtune.pairing import EachNorm, Event, Measured, Norm, Pairing, Series, Step, divided
from normtune.records import FileStore, Finding, MemoryStore, NormRecord

if TYPE_CHECKING:
    from typing_extensions import Self

    from normtune.suggestion import Suggestion

FLUSH_EVERY = 100  # steps
FLUSH_SECONDS = 2.0
NO_RATE = "cannot scale the learning rate: this training steps without an optimizer that has one"


class NormRecorder:
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
        metadata: Facts of your own for the header (batch size, commit, ...), JSON values.
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
        self._optimizers, self._parameters = optimizers.targets(optimizer)
        self._norm_type = float(norm_type)
        self._measure = measure
        self._flush_every = flush_every
        names = optimizers.group_names(groups, self._optimizers)
        self._lr_factor = lr_factor
        self._rates: dict[int, ScaledRates] = {}
        self._names: dict[int, str] = {}
        self._taken: set[str] = set()
        self._name(self._optimizers)
        self._pairing = Pairing(self._report, norm_type=self._norm_type, each=bool(names))
        self._findings: dict[tuple[str, str], Finding] = {}
        self._complained: set[str] = set()
        self._belt: Belt | None = None
        self._set_aside: list[tuple[Tensor, Tensor]] = []
        self._event: Event | None = None
        self._closure_rows: int | None = None
        self._in_closure = False
        self._stepping = False
        self._failed = False
        self._closed = False
        self._lingers = False  # closed, but other ranks may wait for it in one norm more
        self.steps_begun = 0
        self._flushed_at = time.monotonic()
        self._max_norm: float | None = None
        self._metadata = dict(metadata or {})
        self._clipped_after: int | None = None  # the backward pass that an imposed clip followed
        self._skip_after: int | None = None  # the backward pass whose step the belt leaves out
        self._own: dict[tuple[int, bool], Series] = {}
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
        self._impose_on_compiled()

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
        """Suggest a max_norm from the norms so far; `options` as for `normtune.suggest`."""
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
        with torch.no_grad():
            return interception.spy_clip_grad_norm_(
                parameters, max_norm, norm_type, error_if_nonfinite, foreach
            )

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
        self._buffer.flush()
        if not self._ranks.compared:
            self._compare_ranks()
        self._buffer.tell(self._findings, last=self._closed)
        error = self._buffer.store.error
        if error is not None:
            self._complain_once(f"cannot write its record for now: {error.strerror}")

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
        self._impose_on_compiled()
        if self._pairing.meet is None or not self._ranks.leave():
            self._detach()
        self._lingers = True

    def _detach(self) -> None:
        interception.unlisten(self)
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
        """Continue the attempt that `state` comes from; steps count on from there."""
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
            interception.watch_unhooked(optimizer)
            if self._lr_factor != 1.0:
                self._rates[id(optimizer)] = ScaledRates(optimizer, self._lr_factor)
                interception.tell_failures(optimizer)
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

    def _watch_backward(self, parameters: Sequence[Tensor]) -> None:
        """Measure at the end of each backward pass that reaches one of the parameters."""
        self_ref = weakref.ref(self)
        state = {"task": -2}

        def normtune_end() -> None:
            recorder = self_ref()
            if recorder is not None:
                recorder._guarded(recorder._backward_ended)

        def normtune_backward(parameter: Tensor) -> None:
            recorder = self_ref()
            task = torch._C._current_graph_task_id()
            if recorder is None or task == state["task"]:
                return
            state["task"] = task
            recorder._pairing.backwards.saw(parameter)
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(normtune_end)

        backwards = self._pairing.backwards
        for parameter in parameters:
            if parameter.requires_grad and parameter.is_leaf:
                handle = parameter.register_post_accumulate_grad_hook(normtune_backward)  # type: ignore[no-untyped-call]
                backwards._handles[id(parameter)] = handle

    def _backward_ended(self) -> None:
        event = self._pairing.backward_ended(self._parameters)
        if event is not None and not self._optimizers:
            event.used = True
            self._keep(Measured(event.series, event.norm, event.each), None)
            self._maybe_flush()

    def _impose_on_compiled(self) -> None:
        """A compiled clip can look nothing up; all recorders of a process share one value."""
        values = {
            other._max_norm
            for other in interception.listeners_of_thread()
            if isinstance(other, NormRecorder) and other._max_norm is not None
        }
        COMPILED.imposed = values.pop() if len(values) == 1 else 0.0

    # --- clip calls

    def clip_begins(self, call: ClipCall) -> float | None:
        """See `interception.Listener`."""
        limit: float | None = self._guarded(self._clip_begins, call)
        return limit

    def _clip_begins(self, call: ClipCall) -> float | None:
        self._settle_failed_clip()
        event = None
        inside = self._stepping and not self._in_closure and interception.inside_step()
        if self._measure == "step" and not inside:
            event = self._pairing.clip_begins(call)
        self._event = event
        if self._max_norm is None:
            return None
        if event is not None and event.repeats and self._max_norm != math.inf:
            return math.inf  # these gradients are clipped already
        limit = self._limit(event.norm) if event is not None else self._max_norm
        if event is None and limit != math.inf:
            self._clipped_after = self._pairing.backwards.count
        if limit == 0.0:
            self._skip_after, limit = self._pairing.backwards.count, math.inf
        if event is not None:
            event.imposed = limit
        return limit

    def clip_ends(self, call: ClipCall) -> None:
        """See `interception.Listener`."""
        event, self._event = self._event, None
        if event is not None:
            self._guarded(self._pairing.clip_ends, event, call)
            if not self._optimizers:
                self._guarded(self._commit_stepless, keep_last=True)

    def clip_failed(self, call: ClipCall) -> None:
        """See `interception.Listener`."""
        self._guarded(self._clip_failed, call)

    def _clip_failed(self, call: ClipCall) -> None:
        self._settle_failed_clip()
        # Not the call itself: it holds all gradients.
        self._pairing.failed = (self._pairing._series_of(call), self._pairing.backwards.count)

    def clip_found_nothing(self, call: ClipCall) -> None:
        """See `interception.Listener`."""
        self._guarded(self._report, "clip-nothing", call.site)

    def _settle_failed_clip(self) -> None:
        """A clip call that raised on a non-finite norm, and no step followed: a skipped step."""
        failed, self._pairing.failed = self._pairing.failed, None
        if failed is not None and self._pairing.backwards.count > failed[1]:
            self._keep(Measured(failed[0], math.nan, skipped=True), None)

    def _commit_stepless(self, *, keep_last: bool = False) -> None:
        """Without an optimizer each clip call is a step, final when the next one comes."""
        if self._optimizers and self.steps_begun:
            return
        events = [e for e in self._pairing.events if not e.used and e.kind != "backward"]
        if keep_last:
            newest = events[-1] if events else None
            events = [e for e in events if newest and e.backward < newest.backward]
        if events and self._lr_factor != 1.0:
            raise NormtuneError(NO_RATE)
        for row in self._pairing._rows_of(events):
            self._keep(row, None)
        for event in events:
            event.used = True
        self._maybe_flush()

    # --- steps

    def step_begins(self, optimizer: Any, *, closure: bool) -> None:
        """See `interception.Listener`."""
        self._guarded(self._step_begins, optimizer, closure=closure)

    def _step_begins(self, optimizer: Any, *, closure: bool) -> None:
        self.steps_begun += 1
        self._stepping, self._in_closure = True, False  # the last step may have raised
        self._give_back_gradients()
        if _capturing(optimizers.parameters(optimizer)):
            self._report("graph-capture", "")
            return
        if torch._C._current_graph_task_id() != -1:
            self._report("step-in-backward", optimizers.name_of(optimizer))
            return
        if closure:
            self._closure_rows = 0
            return
        self._gradients_ready(optimizer)
        self._scale_rates(optimizer)

    def closure_begins(self, optimizer: Any) -> None:
        """See `interception.Listener`."""
        self._in_closure = True
        rates = self._rates.get(id(optimizer))
        if rates is not None:
            rates.restore()

    def closure_ends(self, optimizer: Any) -> None:
        """See `interception.Listener`."""
        self._in_closure = False
        self._guarded(self._closure_ended, optimizer)

    def _closure_ended(self, optimizer: Any) -> None:
        first = self._closure_rows == 0
        self._closure_rows = (self._closure_rows or 0) + 1
        if self._closure_rows == 2:
            self._report("lbfgs", optimizers.name_of(optimizer))
        self._gradients_ready(optimizer, record=first)
        self._scale_rates(optimizer)

    def step_ends(self, optimizer: Any) -> None:
        """See `interception.Listener`."""
        self._stepping = False
        self._guarded(self._step_ends, optimizer)

    def _step_ends(self, optimizer: Any) -> None:
        rates = self._rates.get(id(optimizer))
        if rates is not None:
            rates.restore()
        self._give_back_gradients()
        self._closure_rows = None
        self._pairing.step_done(optimizer)
        self._end_warmup()
        self._maybe_flush()
        if self._lingers and self._ranks.left:
            self._detach()

    def step_failed(self, optimizer: Any) -> None:
        """See `interception.Listener`."""
        self._stepping, self._in_closure, self._closure_rows = False, False, None
        if id(optimizer) in self._rates:
            self._rates[id(optimizer)].restore()
        self._give_back_gradients()

    def step_skipped(self, optimizer: Any) -> None:
        """See `interception.Listener`."""
        self._guarded(self._step_skipped, optimizer)

    def _step_skipped(self, optimizer: Any) -> None:
        step = self._pairing.step(
            optimizer, optimizers.parameters(optimizer), optimizers.name_of(optimizer)
        )
        rows = step.rows or [Measured(self._own_series(optimizer), math.nan)]
        for row in rows:
            row.skipped = True
            self._keep(row, optimizer)
        self._pairing.step_done(optimizer)
        self._maybe_flush()

    def unscaled(self, optimizer: Any, scale: Tensor) -> None:
        """See `interception.Listener`."""
        self._guarded(self._pairing.unscaled, optimizers.parameters(optimizer), scale)

    def _scale_rates(self, optimizer: Any) -> None:
        rates = self._rates.get(id(optimizer))
        if rates is not None:
            rates.scale()
        elif self._lr_factor != 1.0:
            raise NormtuneError(NO_RATE)

    def _gradients_ready(self, optimizer: Any, *, record: bool = True) -> None:
        """The gradients are those that the step will use: pair, measure, clip."""
        self._settle_failed_clip()
        parameters = optimizers.parameters(optimizer)
        if self.steps_begun <= 3:
            self._pairing.step_site = interception.call_site()
            self._pairing.backwards.watch([p for p in parameters if p.grad is not None])
        scale, found_inf = optimizers.amp_marks(optimizer)
        self._listen_to_new(parameters)
        compiled = COMPILED.total_norm is not None
        name = optimizers.name_of(optimizer)
        step = self._pairing.step(optimizer, parameters, name, compiled=compiled)
        if compiled:
            self._take_compiled(step.rows, parameters)
            step.clipped, step.uncovered = True, []
        limit = None
        if step.uncovered:
            limit = self._measure_rest(step, optimizer, scale)
        if record:
            for row in step.rows:
                row.skipped = row.skipped or (False if found_inf is None else found_inf)
                self._keep(row, optimizer)
        # A loop that leaves such a step out by itself must not lose its next one.
        skip = self._skip_after == self._pairing.backwards.count
        self._skip_after = None
        if skip or limit == 0.0:
            self._set_gradients_aside(parameters)
        elif step.uncovered and not step.clipped and limit not in (None, math.inf):
            self._clip_rest(step.uncovered, limit, scale)
        elif self._measure == "backward" and self._max_norm is not None:
            self._impose_unseen(parameters, scale)

    def _impose_unseen(self, parameters: Sequence[Tensor], scale: Tensor | None) -> None:
        """With ``measure="backward"`` no clip call need come: impose right before the step."""
        called = self._clipped_after == self._pairing.backwards.count
        if called or (self._max_norm == math.inf and self._belt is None):
            return
        with_grad = [p for p in parameters if p.grad is not None]
        norm, _ = self._pairing.measure(with_grad)
        limit = self._limit(norm if scale is None else divided(norm, scale))
        if limit == 0.0:
            self._set_gradients_aside(parameters)
        elif limit not in (None, math.inf):
            self._clip_rest(with_grad, limit, scale)

    def _listen_to_new(self, parameters: Sequence[Tensor]) -> None:
        """Parameters that were added to the optimizer meanwhile."""
        if len(parameters) > len(self._parameters):
            known = {id(p) for p in self._parameters}
            added = [p for p in parameters if id(p) not in known]
            self._parameters += added
            interception.listen(self, added)

    def _measure_rest(self, step: Step, optimizer: Any, scale: Tensor | None) -> float | None:
        """Measure what no clip call covers; the max_norm to clip it at."""
        if _unseen_shards(step.uncovered):
            self._report("fsdp1-shards", optimizers.name_of(optimizer))
            if self._max_norm is not None:
                raise NormtuneError(findings.KINDS["fsdp1-shards"].sentence.format(site="FSDP1"))
            return None
        norm, each = self._pairing.measure(step.uncovered)
        if scale is not None:
            norm = divided(norm, scale)
            each = EachNorm(each.ids, each.norms / scale.to(each.norms.device)) if each else None
        series = self._own_series(optimizer, step.uncovered, rest=step.partly)
        step.rows.append(Measured(series, norm, each))
        return None if self._max_norm is None else self._limit(norm)

    def _clip_rest(self, uncovered: Sequence[Tensor], limit: float, scale: Tensor | None) -> None:
        grads = gradients.gradients_of(uncovered)
        p = self._norm_type
        interception.clip_now(uncovered, grads, limit, norm_type=p, scale=scale)

    def _set_gradients_aside(self, parameters: Sequence[Tensor]) -> None:
        """Without gradients the step changes nothing, neither parameters nor momentum."""
        self._set_aside = [(p, p.grad) for p in parameters if p.grad is not None]
        for parameter, _ in self._set_aside:
            parameter.grad = None

    def _give_back_gradients(self) -> None:
        """A step that the belt left out had no gradients; the loop finds them where they were."""
        for parameter, grad in self._set_aside:
            if parameter.grad is None:
                parameter.grad = grad
        self._set_aside = []

    def _take_compiled(self, rows: list[Measured], parameters: Sequence[Tensor]) -> None:
        total, COMPILED.total_norm = COMPILED.total_norm, None
        assert total is not None  # noqa: S101  looked at by the caller
        series = self._pairing.own_series("compiled clip", parameters, "compiled clip")
        norm = gradients.on_host(gradients.whole(total.detach()).clone())
        rows[:] = [Measured(series, norm)]

    def _own_series(
        self, optimizer: Any, parameters: Sequence[Tensor] | None = None, *, rest: bool = False
    ) -> Series:
        known = self._own.get((id(optimizer), rest))
        if known is not None:
            return known
        name = self._names.get(id(optimizer)) or optimizers.name_of(optimizer)
        if rest:
            name = f"{name}, not clipped"
        series = self._pairing.own_series(name, parameters or optimizers.parameters(optimizer))
        self._own[(id(optimizer), rest)] = series
        return series

    # --- the belt of a warm-up

    def _limit(self, norm: Norm) -> float | None:
        """The max_norm for gradients of this norm."""
        if self._belt is None:
            return self._max_norm
        limit = self._belt.limit(float(norm))
        return self._max_norm if limit == math.inf else limit

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
        belted = False
        if self._belt is not None and measured.skipped is False:
            value = float(measured.norm)
            belted = self._belt.limit(value) != math.inf
            self._belt.saw(value)
        self._buffer.keep(
            measured,
            max_norm=_in_force(self._max_norm, measured.asked),
            imposed=self._max_norm is not None,
            lr=optimizers.rate(optimizer),
            belted=belted,
        )

    def _maybe_flush(self) -> None:
        waiting = len(self._buffer)
        if not self._ranks.posted and self.n_steps >= ranks.FIRST:
            self.flush()
            return
        late = waiting and time.monotonic() - self._flushed_at > FLUSH_SECONDS
        if late or waiting >= self._flush_every:
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

    def _guarded(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `function`; nothing that goes wrong in it may end the user's training.

        Only where normtune imposes something does a failure end the run: its arm was not applied.
        """
        if self._failed:
            return None
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if self._max_norm is not None or self._rates:
                raise
            self._failed = True
            if self._lingers:
                self._detach()
                return None
            with suppress(Exception):
                self._ranks.leave()
            reason = f"{type(error).__name__}: {error}"
            self._complain_once(f"stopped recording, training goes on ({reason})")
            return None

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


def _in_force(imposed: float | None, asked: float | None) -> float:
    if imposed is not None:
        return imposed
    if asked is None:
        return math.inf
    return asked if asked > 0 else math.nan


def _unseen_shards(parameters: Sequence[Tensor]) -> bool:
    """Whether FSDP1 keeps only a part of these gradients here, which no total can be made of."""
    return bool(getattr(parameters[0], "_fsdp_flattened", False)) and ranks.size() > 1


def _capturing(parameters: Sequence[Tensor]) -> bool:
    on_cuda = bool(parameters) and parameters[0].is_cuda
    return on_cuda and torch.cuda.is_current_stream_capturing()


def record_norm(norm: float | Tensor) -> None:
    """Record the norm of a step that the engine of a training knows itself.

    It goes to the recorder that is open; with several, call `NormRecorder.record_norm`.

    Args:
        norm: The total norm before clipping, such as ``engine.get_global_grad_norm()``.

    Raises:
        ValueError: If not exactly one recorder is open.
    """
    recorders = [r for r in interception.listeners_of_thread() if isinstance(r, NormRecorder)]
    if len(recorders) != 1:
        message = (
            f"record_norm needs exactly one open recorder but found {len(recorders)}; "
            "make one with normtune.NormRecorder(optimizer, path), or call its own record_norm"
        )
        raise ValueError(message)
    recorders[0].record_norm(norm)
