"""What a recorder does at each clip call and each step: pair, measure, impose."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from normtune import clipping, findings, gradients, interception, optimizers, ranks, stepping
from normtune.belt import Belt
from normtune.callsites import call_site
from normtune.errors import NormtuneError
from normtune.events import EachNorm, Event, Measured, Norm, Series, Step, divided
from normtune.learning_rates import ScaledRates
from normtune.listening import COMPILED, ClipCall
from normtune.pairing import Pairing

FIRST_STEPS = 3  # whose place in the code is looked up
NO_RATE = "cannot scale the learning rate: this training steps without an optimizer that has one"


class Watcher(ABC):
    """The listener of the dispatcher behind a recorder; see `listening.Listener`.

    Args:
        found: The optimizers.
        parameters: Their parameters, or those of a loop without an optimizer.
        norm_type: The p of the norms that normtune measures.
        measure: ``"step"`` or ``"backward"``.
        each: Whether the norm of each parameter is wanted.
        lr_factor: What the learning rates are multiplied by.
    """

    def __init__(
        self,
        found: list[Any],
        parameters: list[Tensor],
        *,
        norm_type: float,
        measure: Literal["step", "backward"],
        each: bool,
        lr_factor: float,
    ) -> None:
        self.max_norm: float | None
        self.overruled = False
        self.steps_begun = 0
        self._optimizers, self._parameters = found, parameters
        self._norm_type = norm_type
        self._measure = measure
        self._lr_factor = lr_factor
        self._rates: dict[int, ScaledRates] = {}
        self._names: dict[int, str] = {}
        self._pairing = Pairing(self._report, norm_type=norm_type, each=each)
        self._max_norm: float | None = None
        self._belt: Belt | None = None
        self._failed = False  # normtune itself, in a hook
        self._set_aside: list[tuple[Tensor, Tensor]] = []
        self._event: Event | None = None
        self._closure_rows: int | None = None
        self._in_closure = False
        self._stepping = False
        self._clipped_after: int | None = None  # the backward pass that an imposed clip followed
        self._began_after = -1  # the backward pass that the running step follows
        self._skip_after: int | None = None  # the backward pass whose step the belt leaves out
        self._own: dict[tuple[int, bool], Series] = {}
        self._compiled: set[int] = set()  # clipped unseen, and not yet used by a step

    # --- what the recorder does with it

    @abstractmethod
    def _keep(self, measured: Measured, optimizer: Any) -> None:
        """Take one measured step into the record."""

    @abstractmethod
    def _maybe_flush(self) -> None:
        """Write what waits, if it is time."""

    @abstractmethod
    def _step_over(self) -> None:
        """A step is done: end a warm-up, write what waits, if it is time."""

    @abstractmethod
    def _report(self, kind: str, site: str, **facts: object) -> None:
        """Take a finding."""

    @abstractmethod
    def _went_wrong(self, error: Exception) -> None:
        """Take an error of normtune's own, which may not end the user's training."""

    def _guarded(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `function`; what runs at every step has the same lines of its own, for speed."""
        if self._failed:
            return None
        try:
            return function(*args, **kwargs)
        except Exception as error:
            self._went_wrong(error)
            return None

    # --- backward passes

    def _watch_backward(self, parameters: Sequence[Tensor]) -> None:
        """Measure at the end of each backward pass that reaches one of the parameters."""
        self_ref = weakref.ref(self)
        state = {"task": -2}

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def normtune_end() -> None:
            recorder = self_ref()
            if recorder is not None:
                recorder._guarded(recorder._backward_ended)

        def normtune_backward(parameter: Tensor) -> None:
            if torch.compiler.is_compiling():  # a compiled function called backward()
                untraced(parameter)
                return
            recorder = self_ref()
            task = torch._C._current_graph_task_id()
            if recorder is None or task == state["task"]:
                return
            state["task"] = task
            recorder._pairing.backwards.saw(parameter)
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(normtune_end)

        untraced = torch.compiler.disable(normtune_backward)  # type: ignore[no-untyped-call]
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

    # --- clip calls

    def clip_begins(self, call: ClipCall) -> float | None:
        """See `listening.Listener`."""
        if self._failed:
            return None
        try:
            return self._clip_begins(call)
        except Exception as error:
            self._went_wrong(error)
            return None

    def _clip_begins(self, call: ClipCall) -> float | None:
        if self._pairing.failed is not None:
            self._settle_failed_clip()
        event = None
        inside = self._stepping and not self._in_closure and stepping.inside_step()
        if self._measure == "step" and not inside:
            event = self._pairing.clip_begins(call)
        self._event = event
        if self._max_norm is None or not self._imposes(call.site):
            return None
        again = inside and self._began_after == self._pairing.backwards.count
        if again or (event is not None and event.repeats and self._max_norm != math.inf):
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
        """See `listening.Listener`."""
        event, self._event = self._event, None
        if event is None or self._failed:
            return
        try:
            self._pairing.clip_ends(event, call)
            if not self._optimizers:
                self._commit_stepless(keep_last=True)
        except Exception as error:
            self._went_wrong(error)

    def clip_failed(self, call: ClipCall) -> None:
        """See `listening.Listener`."""
        self._guarded(self._clip_failed, call)

    def _clip_failed(self, call: ClipCall) -> None:
        self._settle_failed_clip()
        # Not the call itself: it holds all gradients.
        self._pairing.failed = (self._pairing._series_of(call), self._pairing.backwards.count)

    def clip_found_nothing(self, call: ClipCall) -> None:
        """See `listening.Listener`."""
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
            if not keep_last:  # closing
                return
            raise NormtuneError(NO_RATE)
        for row in self._pairing._rows_of(events):
            self._keep(row, None)
        for event in events:
            event.used = True
        self._maybe_flush()

    # --- steps

    def step_begins(self, optimizer: Any, *, closure: bool) -> None:
        """See `listening.Listener`."""
        if self._failed:
            return
        try:
            self._step_begins(optimizer, closure)
        except Exception as error:
            self._went_wrong(error)

    def _step_begins(self, optimizer: Any, closure: bool) -> None:  # noqa: FBT001  called often
        self.steps_begun += 1
        self._stepping, self._in_closure = True, False  # the last step may have raised
        self._began_after = self._pairing.backwards.count
        if self._set_aside:
            self._give_back_gradients()
        parameters = optimizers.parameters(optimizer)
        if parameters and parameters[0].is_cuda and torch.cuda.is_current_stream_capturing():
            self._report("graph-capture", "")
            return
        if torch._C._current_graph_task_id() != -1:
            self._report("step-in-backward", optimizers.name_of(optimizer))
            return
        if closure:
            self._closure_rows = 0
            self._scale_rates(optimizer)  # LBFGS reads its rate before it calls the closure
            return
        if not self._only_measured(optimizer, parameters):
            self._gradients_ready(optimizer, parameters)
        if self._lr_factor != 1.0:
            self._scale_rates(optimizer)

    def _only_measured(self, optimizer: Any, parameters: list[Tensor]) -> bool:
        """Measure a step that nobody clipped and nothing is imposed on, in as few lines as can be.

        Most steps of a loop without clipping are such; what is done here `_gradients_ready` would
        do too, but a small model feels each line of it.

        Returns:
            Whether this step was one of them; nothing was done otherwise.
        """
        series = self._own.get((id(optimizer), False))
        if (
            series is None
            or self._max_norm is not None
            or self._compiled
            or COMPILED.total_norm is not None
            or not self._pairing.is_idle()
            or self.steps_begun <= FIRST_STEPS
            or self._measure != "step"
            or len(parameters) > len(self._parameters)
            or getattr(optimizer, "grad_scale", None) is not None
            or getattr(optimizer, "found_inf", None) is not None
        ):
            return False
        grads = [g for p in parameters if (g := p.grad) is not None]
        if not grads:
            return False
        if self._pairing.backwards.looking:
            self._pairing.look(optimizer, parameters, grads)
        self._keep(Measured(series, gradients.measured(grads, self._norm_type)), optimizer)
        return True

    def closure_begins(self, optimizer: Any) -> None:
        """See `listening.Listener`."""
        self._in_closure = True
        rates = self._rates.get(id(optimizer))
        if rates is not None:
            rates.restore()

    def closure_ends(self, optimizer: Any) -> None:
        """See `listening.Listener`."""
        self._in_closure = False
        self._guarded(self._closure_ended, optimizer)

    def _closure_ended(self, optimizer: Any) -> None:
        first = self._closure_rows == 0
        self._closure_rows = (self._closure_rows or 0) + 1
        if self._closure_rows == 2:
            self._report("lbfgs", optimizers.name_of(optimizer))
        self._gradients_ready(optimizer, optimizers.parameters(optimizer), record=first)
        self._scale_rates(optimizer)

    def step_ends(self, optimizer: Any) -> None:
        """See `listening.Listener`."""
        self._stepping = False
        if self._failed:
            return
        try:
            self._step_ends(optimizer)
        except Exception as error:
            self._went_wrong(error)

    def _step_ends(self, optimizer: Any) -> None:
        if id(optimizer) in self._rates:
            self._rates[id(optimizer)].restore()
        if self._set_aside:
            self._give_back_gradients()
        self._closure_rows = None
        self._pairing.step_done(optimizer)
        self._step_over()

    def step_failed(self, optimizer: Any) -> None:
        """See `listening.Listener`."""
        self._stepping, self._in_closure, self._closure_rows = False, False, None
        if id(optimizer) in self._rates:
            self._rates[id(optimizer)].restore()
        self._give_back_gradients()

    def step_skipped(self, optimizer: Any) -> None:
        """See `listening.Listener`."""
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

    def unscaled(self, optimizer: Any, scale: Tensor, *, done: bool) -> None:
        """See `listening.Listener`."""
        parameters = optimizers.parameters(optimizer)
        self._guarded(self._pairing.unscaled, parameters, scale, done=done)

    def _scale_rates(self, optimizer: Any) -> None:
        rates = self._rates.get(id(optimizer))
        if rates is not None:
            rates.scale()
        elif self._lr_factor != 1.0:
            raise NormtuneError(NO_RATE)

    def _gradients_ready(
        self, optimizer: Any, parameters: list[Tensor], *, record: bool = True
    ) -> None:
        """The gradients are those that the step will use: pair, measure, clip."""
        scale, found_inf = optimizers.amp_marks(optimizer)
        try:
            step = self._paired(optimizer, parameters)
        except Exception:
            self._pairing.stand_in(parameters)
            raise
        limit = None
        if step.uncovered:
            limit = self._measure_rest(step, optimizer, scale)
        if record:
            for row in step.rows:
                if found_inf is not None:
                    row.skipped = row.skipped or found_inf
                self._keep(row, optimizer)
        # A loop that leaves such a step out by itself must not lose its next one.
        skip = self._skip_after == self._pairing.backwards.count
        self._skip_after = None
        if skip or limit == 0.0:
            self._set_gradients_aside(parameters)
        elif step.uncovered and not step.clipped and limit not in (None, math.inf):
            self._clip_rest(step.uncovered, limit, scale)
        elif self._measure == "backward" and self._imposes(optimizers.name_of(optimizer)):
            self._impose_unseen(parameters, scale)

    def _paired(self, optimizer: Any, parameters: list[Tensor]) -> Step:
        """What clip calls have measured of these gradients, and what is left."""
        if self._pairing.failed is not None:
            self._settle_failed_clip()
        if self.steps_begun <= FIRST_STEPS:
            self._pairing.step_site = call_site()
            self._pairing.backwards.watch([p for p in parameters if p.grad is not None])
        self._listen_to_new(parameters)
        compiled = COMPILED.acts_on(parameters)
        name = optimizers.name_of(optimizer)
        known = self._compiled  # mostly empty
        unseen = compiled or (bool(known) and any(id(p) in known for p in parameters))
        step = self._pairing.step(optimizer, parameters, name, compiled=unseen)
        if compiled:
            step.rows = [self._compiled_row()]
        if self._compiled:
            self._leave_compiled_out(step)
        return step

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
        return self._limit(norm) if self._imposes(optimizers.name_of(optimizer)) else None

    def _imposes(self, site: str) -> bool:
        """Whether this recorder has a max_norm, and the last word."""
        if self._max_norm is not None and self.overruled:
            self._report("overruled", site)
            return False
        return self._max_norm is not None

    def _clip_rest(self, uncovered: Sequence[Tensor], limit: float, scale: Tensor | None) -> None:
        grads = gradients.gradients_of(uncovered)
        p = self._norm_type
        clipping.clip_now(uncovered, grads, limit, norm_type=p, scale=scale)

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

    def _compiled_row(self) -> Measured:
        total = COMPILED.total_norm
        assert total is not None  # noqa: S101  looked at by the caller
        self._compiled = set(map(id, COMPILED.parameters))
        series = self._pairing.compiled_series(COMPILED.parameters)
        norm = gradients.on_host(gradients.whole(total.detach()).clone())
        return Measured(series, norm, asked=COMPILED.asked)

    def _leave_compiled_out(self, step: Step) -> None:
        """What a compiled clip call, for this step or one before, has measured and clipped."""
        ids = set(map(id, step.uncovered))
        if self._compiled.isdisjoint(ids):
            return
        step.clipped = True
        step.uncovered = [p for p in step.uncovered if id(p) not in self._compiled]
        step.partly = bool(step.uncovered)
        self._compiled -= ids

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

    def _limit(self, norm: Norm) -> float | None:
        """The max_norm for gradients of this norm."""
        if self._belt is None:
            return self._max_norm
        limit = self._belt.limit(float(norm))
        return self._max_norm if limit == math.inf else limit


def _unseen_shards(parameters: Sequence[Tensor]) -> bool:
    """Whether FSDP1 keeps only a part of these gradients here, which no total can be made of."""
    return bool(getattr(parameters[0], "_fsdp_flattened", False)) and ranks.size() > 1
