"""Which norm belongs to which step, and what is wrong with a clip call's place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from normtune import gradients
from normtune.backwards import Backwards
from normtune.events import (
    EachNorm,
    Event,
    Measured,
    Norm,
    Series,
    Step,
    distinct,
    had_these,
    looks,
    row_of,
    spread,
    uncovered,
)
from normtune.listening import ClipCall

MANY_SETS = 8  # more parameter sets than this at one site: a loop that clips one by one
MOST_PENDING = 64  # events that wait for a step; the oldest give way


class Report(Protocol):
    """Takes a finding: its kind, the site it is about, and facts for its sentence."""

    def __call__(self, kind: str, site: str, **facts: object) -> None:
        """Report it."""


class Pairing:
    """The clip calls of one recorder that wait for their step.

    Args:
        report: Called with every finding.
        norm_type: The p of the norms that normtune itself measures.
        each: Whether the norm of each parameter is wanted too.
    """

    def __init__(self, report: Report, *, norm_type: float = 2.0, each: bool = False) -> None:
        self.backwards = Backwards()
        self.events: list[Event] = []
        self.meet: Callable[[], None] | None = None  # called before ranks must work together
        self.failed: tuple[Series, int] | None = None
        self._report = report
        self._norm_type = norm_type
        self._each = each
        self.half_sites: dict[str, str] = {}  # series -> the clip call whose own norm is fp16
        self._series: dict[tuple[Any, ...], Series] = {}
        self._past: set[str] = set()  # series of models that are gone
        self._stepped: dict[int, int] = {}  # optimizer -> backward count at its last step
        self._owner: dict[int, int] = {}  # parameter -> the optimizer that steps it
        self._waiting: list[Measured] = []
        self._ids: dict[int, tuple[int, frozenset[int]]] = {}  # optimizer -> its parameters
        self._silent_steps = 0
        self._scaler_steps = False  # a GradScaler writes to gradients right before the step
        self._written = False  # whether anything had before
        self.step_site = ""

    # --- clip calls

    def clip_begins(self, call: ClipCall) -> Event | None:
        """Turn a clip call into an event; None where it acts on no gradient of any step."""
        if not call.grads:
            self._nothing_to_clip(call)
            return None
        # First of all, since other ranks may wait for this one's part of it.
        p = call.norm_type if call.norm_type is not None else self._norm_type
        norm, each = self._norm_of_call(call, p)
        series = self._series_of(call)
        total = call.total_norm
        if call.value is None and total is not None and total.dtype == torch.float16:
            self.half_sites[series.name] = call.site
        event = Event(series, norm, each, call.kind, call.asked, self.backwards.count)
        if call.kind == "given":
            event.given = call.total_norm
        if self._after_its_step(call):
            self._misplaced(call.site)
            return None
        self._add(event)
        return event

    def clip_ends(self, event: Event, call: ClipCall) -> None:
        """Remember how the call left the gradients."""
        with_grad = call.parameters
        if len(call.grads) < len(with_grad):
            with_grad = [p for p in with_grad if p.grad is not None]
        event.looks = looks(with_grad, call.grads)

    def _add(self, event: Event) -> None:
        if self.events:
            now, alive = self.backwards.count, self.backwards.alive
            left = [e for e in self.events if not e.used or (alive and e.backward >= now)]
            if not left:  # nearly always
                self.events = [event]
                return
            self.events = left[-MOST_PENDING:]
            event.repeats = any(had_these(e, event, now, sure=alive) for e in self.events)
        self.events.append(event)

    def _misplaced(self, site: str) -> None:
        """No backward pass stands between the last step and this clip call."""
        if _earlier_line(site, self.step_site):
            self._before_backward(site)
        else:
            self._after_step(site)

    def _after_step(self, site: str) -> None:
        self._report("clip-after-step", site)

    def _before_backward(self, site: str) -> None:
        self._report("clip-before-backward", site)

    def _nothing_to_clip(self, call: ClipCall) -> None:
        self._report("clip-without-gradients", call.site)

    def _after_its_step(self, call: ClipCall) -> bool:
        if not self.backwards.alive:
            return False
        now = self.backwards.count
        for i in spread(len(call.parameters)):
            owner = self._owner.get(id(call.parameters[i]))
            if owner is None or self._stepped.get(owner) != now:
                return False
        return True

    def _series_of(self, call: ClipCall) -> Series:
        some, n = call.parameters, len(call.parameters)
        key = (call.site, call.kind, n, id(some[0]), id(some[n >> 1]), id(some[-1]))
        known = self._series.get(key)
        if known is None:
            known = self._grown_series(call) or self._new_series(call)
            self._series[key] = known
        return known

    def _grown_series(self, call: ClipCall) -> Series | None:
        """The series of an earlier call at this site on a part or more of the same parameters.

        A training that unfreezes layers goes on with its series; one line that clips the parts
        of a model one after the other keeps a series for each.
        """
        ids = frozenset(map(id, call.parameters))
        now = {e.series for e in self.events if e.backward == self.backwards.count and not e.used}
        for series in self._series.values():
            same_site = series.name.split(" (")[0] == call.site
            if same_site and series not in now and not ids.isdisjoint(series.ids):
                series.ids, series.tensors = ids, len(ids)
                return series
        return None

    def _new_series(self, call: ClipCall) -> Series:
        ids = frozenset(map(id, call.parameters))
        if len(ids) < len(call.parameters):
            twice = len(call.parameters) - len(ids)
            self._report("duplicate-parameters", call.site, n=twice)
        taken = self._past | {series.name for series in self._series.values()}
        name, k = call.site, 2
        while name in taken:
            name, k = f"{call.site} ({k})", k + 1
        if call.kind == "value":
            self._report("clip-by-value", call.site)
        by = {"norm": "clip", "value": "value clip"}.get(call.kind, call.kind)
        return Series(
            name=name,
            by=by,
            norm_type=call.norm_type if call.norm_type is not None else self._norm_type,
            ids=ids,
            tensors=len(ids),
            parameters=sum(p.numel() for p in {id(p): p for p in call.parameters}.values()),
        )

    def _norm_of_call(self, call: ClipCall, norm_type: float) -> tuple[Norm, EachNorm | None]:
        given = call.total_norm
        value, alone = call.value, not self._each and self.meet is None
        if alone and value is not None and 0.0 < value < math.inf:
            return value, None
        if given is None or (call.kind == "norm" and (self._each or given.dtype in gradients.HALF)):
            with_grad = [p for p in call.parameters if p.grad is not None]
            norm, each = self.measure(with_grad, norm_type)
            return norm, each
        if self.meet is not None and gradients.is_shared(given):
            self.meet()
        given = gradients.whole(given.detach())
        norm = gradients.on_host(given)
        if isinstance(norm, Tensor):
            return norm.clone(), None  # the caller may write to its own
        if call.kind == "norm" and not 0.0 < norm < math.inf:
            norm = gradients.rescued(given, call.grads, norm_type).item()
        return norm, None

    def measure(
        self, parameters: Sequence[Tensor], norm_type: float | None = None
    ) -> tuple[Norm, EachNorm | None]:
        """The norm of these parameters' gradients as they are now."""
        p = self._norm_type if norm_type is None else norm_type
        grads = [q.grad for q in parameters if q.grad is not None]
        if self.meet is None:
            total = gradients.measured(grads, p)
        else:
            self.meet()
            total = gradients.on_host(gradients.total_norm(grads, p, like=parameters))
        if not self._each or not grads:
            return total, None
        norms = gradients.norms_of_each(grads, p)
        stacked = torch.stack([n.to(norms[0].device) for n in norms])
        return total, EachNorm(tuple(map(id, parameters)), stacked)

    def stand_in(self, parameters: Sequence[Tensor]) -> None:
        """Where this step went wrong here: do this rank's part of the norm that others wait for."""
        now = self.backwards.count
        clipped = any(not e.used and e.backward == now for e in self.events)
        if self.meet is not None and not clipped:
            self.measure(parameters)

    # --- backward passes and scalers

    def backward_ended(self, parameters: Sequence[Tensor]) -> Event | None:
        """Take the norm as a backward pass leaves it (``measure="backward"``)."""
        with_grad = [p for p in parameters if p.grad is not None]
        if not with_grad:
            return None
        series = self.own_series("backward", with_grad, "backward")
        norm, each = self.measure(with_grad)
        now = self.backwards.count
        seen = looks(with_grad, gradients.gradients_of(with_grad))
        event = Event(series, norm, each, "backward", math.nan, now, seen)
        self.events = [e for e in self.events if e.kind != "backward"]
        self.events.append(event)
        return event

    def unscaled(self, parameters: Sequence[Tensor], scale: Tensor, *, done: bool) -> None:
        """A GradScaler divides these gradients: earlier clip calls saw them scaled."""
        if done:
            self.backwards.look_again()
        else:
            self._scaler_steps = True
            self._written = self.backwards.written_since(frozenset(map(id, parameters)))
        ids = {id(p) for p in parameters}
        for event in self.events:
            fresh = not event.used and event.backward == self.backwards.count
            if fresh and event.scale is None and ids & event.series.ids:
                event.scale = scale.detach().clone()
                if event.kind != "backward":
                    self._report("clip-on-scaled-gradients", event.series.name)

    # --- steps

    def step(
        self, optimizer: Any, parameters: Sequence[Tensor], name: str, *, compiled: bool = False
    ) -> Step:
        """Pair the gradients that an optimizer is about to use with the clip calls before it.

        Args:
            optimizer: The optimizer.
            parameters: What it steps.
            name: What to call it in findings.
            compiled: Whether a compiled function has clipped them, unseen.
        """
        ids = self._ids_of(optimizer, parameters)
        if self.backwards.spoiled:
            self._report(self.backwards.spoiled, "a compiled function")
            self.backwards.spoiled = ""
        with_grad = [p for p in parameters if p.grad is not None]
        valid = self._valid_events(ids) if self.events else []
        result = Step(rows=self._waiting, uncovered=with_grad, clipped=bool(valid))
        self._waiting = []
        if valid:
            result.rows += self._rows_of([e for e in valid if not e.used])
            result.uncovered = uncovered(with_grad, ids, valid)
            result.partly = bool(result.uncovered)
            for event in valid:
                event.used = True
        elif self.meet is not None:
            result.uncovered = list(parameters)  # other ranks may have gradients of them
        elif not with_grad:
            self._report("no-gradients", name)
        elif self.backwards.looking and not compiled:
            self._look_for_unseen_changes(with_grad, ids, name)
        return result

    def is_idle(self) -> bool:
        """Whether a step's gradients need only be measured: nobody clipped them, nothing is due."""
        due = self.events or self._waiting or self.failed or self.backwards.spoiled
        return not (due or self._each or self.meet)

    def look(self, optimizer: Any, parameters: Sequence[Tensor], with_grad: list[Tensor]) -> None:
        """Look for changes of the gradients that nobody saw, where that is due."""
        if self.backwards.looking:
            ids = self._ids_of(optimizer, parameters)
            self._look_for_unseen_changes(with_grad, ids, type(optimizer).__name__)

    def _ids_of(self, optimizer: Any, parameters: Sequence[Tensor]) -> frozenset[int]:
        n, ids = self._ids.get(id(optimizer), (-1, frozenset[int]()))
        if n != len(parameters):
            ids = frozenset(map(id, parameters))
            self._ids[id(optimizer)] = (len(parameters), ids)
            self._owner.update(dict.fromkeys(ids, id(optimizer)))
        return ids

    def step_done(self, optimizer: Any) -> None:
        """The optimizer has used its gradients."""
        self._stepped[id(optimizer)] = self.backwards.count
        self._scaler_steps = False
        if self.backwards.after:
            self.backwards.used(self._ids.get(id(optimizer), (0, frozenset[int]()))[1])

    def forget(self, optimizer: Any) -> None:
        """A new optimizer may have the number of one that is gone."""
        self._ids.pop(id(optimizer), None)
        self._stepped.pop(id(optimizer), None)

    def forget_all(self) -> None:
        """All models so far are gone, and the numbers of their parameters are given out again."""
        self._past |= {series.name for series in self._series.values()}
        for known in (self._series, self._ids, self._stepped, self._owner):
            known.clear()
        self.events.clear()
        self.backwards.close()

    def own_series(self, name: str, parameters: Sequence[Tensor], by: str = "step") -> Series:
        """The series of what normtune measures itself."""
        key = (name, by)
        known = self._series.get(key)
        if known is None:
            numbers = sum(p.numel() for p in parameters)
            ids = frozenset(map(id, parameters))
            known = Series(name, by, self._norm_type, ids, len(parameters), numbers)
            self._series[key] = known
        return known

    def compiled_series(self, parameters: Sequence[Tensor]) -> Series:
        """The series of a clip call inside a compiled function, one for each set of parameters."""
        ids = frozenset(map(id, parameters))
        key = ("compiled clip", ids)
        known = self._series.get(key)
        if known is None:
            numbers = sum(p.numel() for p in parameters)
            n = 1 + sum(series.by == "compiled clip" for series in self._series.values())
            name = "compiled clip" if n == 1 else f"compiled clip ({n})"
            known = Series(name, "compiled clip", self._norm_type, ids, len(ids), numbers)
            self._series[key] = known
        return known

    def _valid_events(self, mine: frozenset[int]) -> list[Event]:
        """For each series among the waiting events the one that this step's gradients prove."""
        sets: dict[Series, list[Event]] = {}
        for event in self.events:
            if not mine.isdisjoint(event.series.ids):
                sets.setdefault(event.series, []).append(event)
        valid = [self._valid(events) for events in sets.values()]
        return [event for event in valid if event is not None]

    def _valid(self, events: list[Event]) -> Event | None:
        """The event with the unclipped norm of the gradients as they are now, None where none."""
        last = events[-1]
        if last.kind == "backward":  # the loop may put other tensors in place of the gradients
            return last if last.backward == self.backwards.count else None
        if last.replaced():
            self._stale([e for e in events if not e.used])
            return None
        if last.used and not self.backwards.alive and last.changed():
            self.events = [e for e in self.events if e not in events]
            return None  # other gradients in the same tensors
        ran_since = self.backwards.alive and self.backwards.count > last.backward
        if last.changed() and ran_since:
            self._backward_after_clip(events)
            return None
        current = [e for e in events if e.backward == last.backward and not e.replaced()]
        older = [e for e in events if e.backward < last.backward and not e.used]
        if older and self.backwards.alive:
            self._older_events(older, last)
        over = older + current[1:]  # the same gradients once more, clipped already
        self.events = [e for e in self.events if e not in over]
        return current[0]

    def _stale(self, events: list[Event]) -> None:
        """The clip call saw other gradients than the step uses."""
        for event in events:
            self.events.remove(event)
        if not events:
            return
        site = events[-1].series.name
        if _earlier_line(self.step_site, site):  # seen before the backward passes were counted
            self._after_step(site)
        else:
            self._before_backward(site)

    def _backward_after_clip(self, events: list[Event]) -> None:
        last = events[-1]
        self.events = [e for e in self.events if e not in events]
        stepped = [self._stepped.get(self._owner.get(i, 0), 0) for i in last.series.ids]
        if last.backward == max(stepped, default=0):
            # zero_grad(set_to_none=False) keeps the tensors, so only the backward count tells.
            self._before_backward(last.series.name)
        elif last.imposed != math.inf:
            self._accumulation(last)

    def _older_events(self, older: list[Event], last: Event) -> None:
        if older[-1].replaced():  # the loop dropped those gradients and began again
            self._waiting += [
                Measured(e.series, e.norm, e.each, e.asked, skipped=True) for e in older
            ]
        elif last.imposed != math.inf:
            self._accumulation(last)

    def _accumulation(self, event: Event) -> None:
        site = event.series.name
        self._report("clip-in-accumulation", site)

    def _rows_of(self, events: list[Event]) -> list[Measured]:
        own = [e for e in events if not e.repeats]
        sites: dict[str, list[Event]] = {}
        for event in own:
            sites.setdefault(event.series.name.split(" (")[0], []).append(event)
        rows: list[Measured] = []
        for site, group in sites.items():
            if len(group) > MANY_SETS:
                rows.append(self._one_by_one(site, group))
            else:
                if len({e.series for e in group if e.kind == "norm"}) > 1:
                    self._report("clip-by-parts", site, n=len(group))
                rows += [row_of(e) for e in distinct(group)]
        return rows

    def _one_by_one(self, site: str, events: list[Event]) -> Measured:
        self._report("clip-one-by-one", site, n=len(events))
        first = events[0].series
        key = (site, "one by one")
        ids = frozenset().union(*(e.series.ids for e in events))
        numbers = sum(e.series.parameters for e in events)
        series = self._series.setdefault(
            key, Series(f"{site} (all)", "clip", first.norm_type, ids, len(ids), numbers)
        )
        norms = [torch.as_tensor(e.norm) for e in events]
        norm = gradients.on_host(gradients.combined(norms, first.norm_type))
        return Measured(series, norm, None, events[0].asked)

    def _look_for_unseen_changes(
        self, with_grad: list[Tensor], ids: frozenset[int], name: str
    ) -> None:
        """Gradients that no backward pass made, or that changed since, unseen by any clip call."""
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return  # the reduction over ranks wrote to them
        if not self.backwards.alive:
            self._look_for_copies(with_grad, name)
            return
        if self._written if self._scaler_steps else self.backwards.written_since(ids):
            self._report("changed-in-place", name)

    def _look_for_copies(self, with_grad: list[Tensor], name: str) -> None:
        """Hooks that never fire on plain parameters: the gradients are assigned from elsewhere."""
        self._silent_steps += 1
        plain = all(type(with_grad[i]) in gradients.PLAIN for i in spread(len(with_grad)))
        if with_grad and plain and self._silent_steps >= MANY_SETS:
            self._report("unknown-gradients", name)


def _earlier_line(site: str, other: str) -> bool:
    """Whether `site` stands above `other` in one file."""
    file, _, line = site.rpartition(":")
    other_file, _, other_line = other.rpartition(":")
    return file == other_file and line.isdigit() and int(line) < int(other_line or 0)
