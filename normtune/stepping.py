"""The hooks of optimizer steps, and of the GradScaler that runs them."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from types import FrameType, FunctionType, MethodType
from typing import Any

import torch

from normtune import gradients, listening
from normtune.callsites import step_frames
from normtune.errors import NormtuneError
from normtune.listening import COMPILED, listeners_to_step


class _Local(threading.local):
    def __init__(self) -> None:
        self.steps: list[list[Any]] = []  # the listeners of each step that runs, outermost first


_local = _Local()

# The hooks as a compiled step runs them, where the compiler must not trace them. Always to go
# through torch's wrapper for that would cost 4 us a call, cold.
untraced: dict[str, Callable[..., Any]] = {}


def before_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Torch's pre-hook of every optimizer; gives back other arguments where there is a closure."""
    if torch.compiler.is_compiling():
        return untraced["before_step"](optimizer, args, kwargs)
    if not listening.owners and listening.resident is None:  # `nobody`: a short step feels it
        return None
    steps = _local.steps
    if steps and _truly_nested():
        steps.append([])
        return None
    listeners = listeners_to_step(optimizer)
    steps[:] = [listeners]
    if not listeners:
        return None
    closure = _closure_of(args, kwargs) if kwargs or len(args) > 1 else None
    for listener in listeners:
        listener.step_begins(optimizer, closure=closure is not None)
    if closure is None:
        if COMPILED.total_norm is not None:
            _drop_compiled(optimizer)
        return None
    return _with_closure(args, kwargs, _watched(closure, optimizer, listeners))


def after_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Torch's post-hook of every optimizer."""
    if torch.compiler.is_compiling():
        untraced["after_step"](optimizer, args, kwargs)
        return
    steps = _local.steps
    if not steps:
        return
    listeners = steps.pop()
    if steps:
        return
    for listener in listeners:
        listener.step_ends(optimizer)


def inside_step() -> bool:
    """Whether a step of this thread really runs, or only one that raised was seen to begin."""
    return bool(_local.steps) and step_frames() > 0


def _truly_nested() -> bool:
    """Whether an outer step really runs; one that raised has left its entry behind."""
    return step_frames() > 1


def _closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    closure = kwargs.get("closure")
    if closure is None and len(args) > 1:
        closure = args[1]
    return closure if callable(closure) else None


def _with_closure(args: tuple[Any, ...], kwargs: dict[str, Any], closure: Any) -> Any:
    if kwargs.get("closure") is not None:
        return args, kwargs | {"closure": closure}
    return (args[0], closure, *args[2:]), kwargs


def _watched(closure: Any, optimizer: Any, listeners: list[Any]) -> Any:
    @functools.wraps(closure)
    def watched(*args: Any, **kwargs: Any) -> Any:
        for listener in listeners:
            listener.closure_begins(optimizer)
        result = closure(*args, **kwargs)
        for listener in listeners:
            listener.closure_ends(optimizer)
        if COMPILED.total_norm is not None:
            _drop_compiled(optimizer)
        return result

    return watched


def _drop_compiled(optimizer: Any) -> None:
    """All listeners have seen what a compiled clip call left for this step."""
    if COMPILED.acts_on([p for group in optimizer.param_groups for p in group["params"]]):
        COMPILED.drop()


def watch_unhooked(optimizer: Any) -> None:
    """Make the steps of an object without torch's step hooks visible.

    Its class is changed, once, and not the object: a copy or a pickle of it stays what it is.

    Raises:
        NormtuneError: If it has no ``step`` that can be wrapped.
    """
    kind, step = type(optimizer), getattr(optimizer, "step", None)
    initialized = isinstance(optimizer, torch.optim.Optimizer) and hasattr(
        optimizer, "_optimizer_step_pre_hooks"
    )
    if step is None or (initialized and getattr(kind.step, "hooked", False)):
        return
    if getattr(step, "visible_to_normtune", False):
        return
    own = getattr(optimizer, "__dict__", {}).get("step")
    try:
        if own is None and isinstance(getattr(kind, "step", None), FunctionType):
            kind.step = _visible(kind.step)
        else:
            optimizer.step = MethodType(
                _visible(lambda _, *args, **kw: step(*args, **kw)), optimizer
            )
    except (AttributeError, TypeError):
        message = f"cannot watch the steps of {kind.__name__}: its step is read-only"
        raise NormtuneError(message) from None


def _visible(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def normtune_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        changed = before_step(self, (self, *args), kwargs)
        if changed is not None:
            (_, *args), kwargs = changed
        result = function(self, *args, **kwargs)
        after_step(self, (), {})
        return result

    normtune_step.visible_to_normtune = True  # type: ignore[attr-defined]
    return normtune_step


def tell_failures(optimizer: Any) -> None:
    """Tell the listeners when a step of `optimizer` raises: torch's post-hook does not run then."""
    step = optimizer.step
    if getattr(step, "tells_failures", False):
        return

    @functools.wraps(step)
    def guarded_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)
        except BaseException:
            for listener in listeners_to_step(self):
                listener.step_failed(self)
            raise

    guarded_step.tells_failures = True  # type: ignore[attr-defined]
    optimizer.step = MethodType(guarded_step, optimizer)  # as torch's learning-rate schedulers do


# --- GradScaler --------------------------------------------------------------------------------


def watch_scaler() -> None:
    """Tell listeners when a GradScaler has unscaled their gradients or left a step out."""
    scaler = torch.amp.GradScaler
    unscale, step = scaler.unscale_, scaler.step

    @functools.wraps(unscale)
    def normtune_unscale(self: Any, optimizer: Any) -> Any:
        result = unscale(self, optimizer)
        if self._enabled and not listening.nobody() and not _inside_scaler_step():
            _tell_unscaled(self, optimizer)
        return result

    @functools.wraps(step)
    def normtune_scaler_step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        target = gradients.unwrapped(optimizer)
        known = hasattr(target, "param_groups") and not listening.nobody()
        listeners = listeners_to_step(target) if known else []
        if not self._enabled or not listeners:
            return step(self, optimizer, *args, **kwargs)
        ready = self._per_optimizer_states[id(optimizer)]["stage"].name == "READY"
        before = [getattr(listener, "steps_begun", 0) for listener in listeners]
        if ready:
            for listener in listeners:
                listener.unscaled(target, self._get_scale_async(), done=False)
        result = step(self, optimizer, *args, **kwargs)
        for listener, steps in zip(listeners, before, strict=True):
            if getattr(listener, "steps_begun", 0) == steps:
                listener.step_skipped(target)
        return result

    scaler.unscale_ = normtune_unscale  # type: ignore[method-assign]
    scaler.step = normtune_scaler_step  # type: ignore[method-assign]


def _inside_scaler_step() -> bool:
    """Whether `GradScaler.step` itself unscales now: it has told the listeners already."""
    frame: FrameType | None = sys._getframe(2)
    depth = 0
    while frame is not None and depth < 4:
        if frame.f_code.co_name == "normtune_scaler_step":
            return True
        frame, depth = frame.f_back, depth + 1
    return False


def _tell_unscaled(scaler: Any, optimizer: Any) -> None:
    target = gradients.unwrapped(optimizer)
    if hasattr(target, "param_groups"):
        for listener in listeners_to_step(target):
            listener.unscaled(target, scaler._get_scale_async(), done=True)
