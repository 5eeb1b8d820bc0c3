"""The one dispatcher of a process that sees every clip call and every optimizer step.

It is installed once and stays. Listeners (recorders) are found through the parameters, so a
training thread finds its own; only the nesting of calls is kept per thread.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from normtune import gradients
from normtune.errors import NormtuneError

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep  # noqa: PTH100, PTH120  compared with frames
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep  # noqa: PTH100, PTH120
_STEP_FILE = os.path.join("torch", "optim", "optimizer.py")  # noqa: PTH118


@dataclass(eq=False, slots=True)
class ClipCall:
    """One clip call of the user's loop, seen before it changes a gradient.

    Attributes:
        site: ``file:line`` of the call.
        kind: ``"norm"``, ``"given"`` (`clip_grads_with_norm_` called directly) or ``"value"``.
        parameters: What the call was given, as a list.
        grads: The gradients among them.
        asked: The max_norm (or clip_value) that the loop asked for.
        norm_type: The p of the norm; None where a direct call does not say.
        total_norm: The norm that torch computed or was given; None for a value clip.
        plain: Whether its gradients are dense, of one device and one dtype.
        value: The norm as a number, where that costs no waiting and is in fp32 or wider.
    """

    site: str
    kind: str
    parameters: list[Tensor]
    grads: list[Tensor]
    asked: float
    norm_type: float | None
    total_norm: Tensor | None
    plain: bool = False
    value: float | None = None


class Listener(Protocol):
    """What the dispatcher tells a recorder.

    Attributes:
        max_norm: What it imposes, None for nothing.
        overruled: Whether another one, made later, imposes its own on the same parameters.
    """

    max_norm: float | None
    overruled: bool

    def clip_begins(self, call: ClipCall) -> float | None:
        """A clip call on this listener's parameters; the max_norm to use, None for the loop's."""

    def clip_ends(self, call: ClipCall) -> None:
        """The same call, after it scaled the gradients or left them."""

    def clip_failed(self, call: ClipCall) -> None:
        """The call raised because its norm was not finite (``error_if_nonfinite=True``)."""

    def clip_found_nothing(self, call: ClipCall) -> None:
        """A clip call was given no parameter at all."""

    def step_begins(self, optimizer: Any, *, closure: bool) -> None:
        """The outermost step of an optimizer begins; its gradients are ready unless `closure`."""

    def closure_begins(self, optimizer: Any) -> None:
        """The closure of the running step is about to compute gradients."""

    def closure_ends(self, optimizer: Any) -> None:
        """The closure of the running step has computed gradients."""

    def step_ends(self, optimizer: Any) -> None:
        """The outermost step has ended."""

    def step_failed(self, optimizer: Any) -> None:
        """The step raised; told only for optimizers given to `tell_failures`."""

    def unscaled(self, optimizer: Any, scale: Tensor, *, done: bool) -> None:
        """A GradScaler has divided the gradients by its scale, or unless `done` does so next."""

    def step_skipped(self, optimizer: Any) -> None:
        """A GradScaler left the step out because of a non-finite gradient."""


class Resident(Protocol):
    """Who records without being asked for each optimizer: the recorder of a watched command."""

    def meet(self, listeners: Sequence[Any], parameters: Sequence[Tensor], optimizer: Any) -> bool:
        """A clip call or step with these listeners; True where another one listens from now on."""


class _Compiled:
    """What a clip call inside a compiled function leaves behind: one slot, not a list of calls.

    A spy that appended or looked listeners up would recompile at every step.
    """

    total_norm: Tensor | None = None
    parameters: Sequence[Tensor] = ()  # what that call was given
    asked: float = 0.0  # the max_norm that it was asked for
    watched: bool = False  # whether any recorder is open, for the compiler to guard on
    imposed: float = 0.0  # on all of a watched command: 0.0 leaves its value, inf only measures

    def __init__(self) -> None:
        self.imposed_on: dict[int, float] = {}  # parameter -> what its recorder imposes

    def acts_on(self, parameters: Sequence[Tensor]) -> bool:
        """Whether a call waits here that was given some of `parameters`."""
        if self.total_norm is None:
            return False
        ids = set(map(id, self.parameters))
        return any(id(p) in ids for p in parameters)

    def limit(self, parameters: Sequence[Tensor]) -> float:
        """What is imposed on a call with these parameters, 0.0 for nothing; part of the graph."""
        if self.imposed == 0.0 and self.imposed_on and parameters:
            return self.imposed_on.get(id(parameters[0]), 0.0)
        return self.imposed

    def drop(self) -> None:
        """Forget the call."""
        self.total_norm, self.parameters = None, ()


COMPILED = _Compiled()


class _Local(threading.local):
    def __init__(self) -> None:
        self.steps: list[list[Any]] = []  # the listeners of each step that runs, outermost first


_local = _Local()
_lock = threading.Lock()
_owners: dict[int, tuple[weakref.ref[Tensor], list[weakref.ref[Any]]]] = {}
_listeners: weakref.WeakSet[Any] = weakref.WeakSet()
_known_sets: dict[tuple[int, ...], tuple[weakref.ref[Any], ...]] = {}
_resident: Resident | None = None
_installed = False
_original: dict[str, Callable[..., Any]] = {}

MOST_KNOWN = 10_000  # a loop that clips ever new lists of tensors must not fill the memory


def listen(listener: Listener, parameters: Iterable[Tensor]) -> None:
    """Tell `listener` of every clip call and step on `parameters`; kept by weak references."""
    install()
    if "torch.distributed.fsdp" in sys.modules:
        _watch_fsdp()
    reference = weakref.ref(listener)
    if not COMPILED.watched:
        COMPILED.watched = True
        COMPILED.drop()
    with _lock:
        _listeners.add(listener)
        for parameter in parameters:
            known = _owners.get(id(parameter))
            if known is None or known[0]() is not parameter:
                forget = functools.partial(_forget, id(parameter))
                known = _owners[id(parameter)] = (weakref.ref(parameter, forget), [])
            if all(other() is not listener for other in known[1]):
                known[1].append(reference)
        _known_sets.clear()
    impose_on_compiled()


def unlisten(listener: Listener) -> None:
    """Stop telling `listener`."""
    with _lock:
        _listeners.discard(listener)
        for key, (_, references) in list(_owners.items()):
            references[:] = [r for r in references if r() not in (None, listener)]
            if not references:
                _owners.pop(key, None)
        _known_sets.clear()
        for other in _listeners:
            other.overruled = False
    impose_on_compiled()
    if not _listeners and _resident is None:
        COMPILED.watched = False
        COMPILED.drop()


def reside(resident: Resident | None) -> None:
    """Show `resident` every clip call and step, also on parameters that nobody listens to."""
    global _resident  # noqa: PLW0603  one a process
    install()
    _resident = resident
    if resident is not None:
        COMPILED.watched = True
    else:
        COMPILED.imposed = 0.0


def impose_on_compiled() -> None:
    """A compiled clip can ask nobody, so what is imposed on each parameter is kept ready."""
    limits = COMPILED.imposed_on
    limits.clear()
    for key, (_, references) in list(_owners.items()):
        for reference in references:  # the youngest wins
            limit = getattr(reference(), "max_norm", None)
            if limit is not None:
                limits[key] = limit


def listeners_of_thread() -> list[Any]:
    """All live listeners, for events that name no parameter."""
    return list(_listeners)


def _nobody() -> bool:
    """Whether nobody wants to know of anything."""
    return not _owners and _resident is None


def _forget(key: int, gone: weakref.ref[Tensor]) -> None:
    known = _owners.get(key)
    if known is not None and known[0] is gone:
        _owners.pop(key, None)
        COMPILED.imposed_on.pop(key, None)
        _known_sets.clear()


def _listeners_to(parameters: Sequence[Tensor]) -> list[Any]:
    """The listeners to any of the parameters, the eldest first."""
    n = len(parameters)
    if n == 0:
        return []
    # Walking a thousand parameters at every step would be felt, so a set is known by four numbers.
    key = (n, id(parameters[0]), id(parameters[n >> 1]), id(parameters[-1]))
    references = _known_sets.get(key)
    if references is None:
        if len(_known_sets) >= MOST_KNOWN:
            _known_sets.clear()
        references = _known_sets[key] = _look_up(parameters)
    if len(references) == 1:  # nearly always
        listener = references[0]()
        return [] if listener is None else [listener]
    return [listener for r in references if (listener := r()) is not None]


def _clip_listeners(parameters: Sequence[Tensor]) -> list[Any]:
    found = _listeners_to(parameters)
    if _resident is not None and parameters and _resident.meet(found, parameters, None):
        found = _listeners_to(parameters)
    return found


def _look_up(parameters: Sequence[Tensor]) -> tuple[weakref.ref[Any], ...]:
    found: dict[int, weakref.ref[Any]] = {}
    for parameter in parameters:
        known = _owners.get(id(parameter))
        if known is not None and known[0]() is parameter:
            found |= {id(r()): r for r in known[1]}
    return tuple(found.values())


# --- where a call stands -----------------------------------------------------------------------

# (code, instruction) -> its name; the code is kept, so that no other gets its id.
_sites: dict[tuple[int, int], tuple[CodeType, str]] = {}
_inner: dict[str, bool] = {}


def call_site() -> str:
    """``file:line`` of the innermost frame that is neither torch's nor normtune's.

    To be called by what torch's wrapper or a method of normtune has called: three frames that
    need not be looked at.
    """
    frame = sys._getframe(3)
    known = _sites.get((id(frame.f_code), frame.f_lasti))
    return known[1] if known is not None else _new_site(frame)


def _new_site(innermost: FrameType) -> str:
    frame: FrameType | None = innermost
    while frame is not None:
        file = frame.f_code.co_filename
        ours = _inner.get(file)
        if ours is None:
            ours = _inner[file] = _is_inner(file)
        if not ours:
            break
        frame = frame.f_back
    if frame is None:
        return "unknown"
    name = _site_name(frame.f_code.co_filename, frame.f_lineno)
    if frame is innermost:
        if len(_sites) >= MOST_KNOWN:
            _sites.clear()
        _sites[(id(frame.f_code), frame.f_lasti)] = (frame.f_code, name)
    return name


def _is_inner(file: str) -> bool:
    made = ("<frozen ", "<eval_with_key>")  # not <string>, <stdin>, <ipython-input-1-...>
    return file.startswith((_HERE, _TORCH, *made)) or file.endswith("contextlib.py")


def _site_name(file: str, line: int) -> str:
    here = os.getcwd() + os.sep  # noqa: PTH109  a plain string to compare with
    short = file[len(here) :] if file.startswith(here) else "/".join(Path(file).parts[-2:])
    return f"{short}:{line}"


# --- clip calls --------------------------------------------------------------------------------


def spy_clip_grad_norm_(
    parameters: Any,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,  # noqa: FBT001, FBT002  torch's own signature
    foreach: bool | None = None,  # noqa: FBT001  torch's own signature
) -> Tensor:
    """Stands in for the body of `torch.nn.utils.clip_grad_norm_`, inside torch's own no_grad."""
    original: Callable[..., Tensor] = _original["clip_grad_norm_"]
    if torch.compiler.is_compiling() or (not _owners and _resident is None):
        return original(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    as_list = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not as_list:
        _tell_nothing(call_site(), float(max_norm))
        return original(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    listeners = _listeners_to(as_list) if _resident is None else _clip_listeners(as_list)
    if not listeners:
        return original(as_list, max_norm, norm_type, error_if_nonfinite, foreach)
    grads = [g for p in as_list if (g := p.grad) is not None]
    plain = bool(grads) and foreach is not False and gradients.is_plain(grads)
    p, asked = float(norm_type), max_norm if type(max_norm) is float else _as_float(max_norm)
    call = ClipCall(call_site(), "norm", as_list, grads, asked, p, None, plain)
    try:
        total_norm = gradients.torch_total_norm(grads, p, error_if_nonfinite, foreach, plain=plain)
    except RuntimeError:
        _tell_failed(listeners, call)
        raise
    call.total_norm = total_norm
    if plain and grads[0].is_cpu and grads[0].dtype not in gradients.HALF:
        call.value = total_norm.item()
    _clip(call, listeners, max_norm, foreach)
    return total_norm


def _spy_clip_grads_with_norm_(
    parameters: Any,
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,  # noqa: FBT001  torch's own signature
) -> None:
    original = _original["_clip_grads_with_norm_"]
    if torch.compiler.is_compiling():
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if COMPILED.watched:
            COMPILED.total_norm = total_norm
            COMPILED.parameters = parameters
            COMPILED.asked = max_norm
        imposed = COMPILED.limit(parameters)
        if imposed == 0.0:
            original(parameters, max_norm, total_norm, foreach)
        elif imposed != float("inf"):
            original(parameters, imposed, total_norm, foreach)
        return
    if _nobody():
        original(parameters, max_norm, total_norm, foreach)
        return
    as_list = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    listeners = _clip_listeners(as_list)
    if not listeners:
        original(as_list, max_norm, total_norm, foreach)
        return
    grads = [p.grad for p in as_list if p.grad is not None]
    asked = _as_float(max_norm)
    call = ClipCall(call_site(), "given", as_list, grads, asked, None, total_norm)
    call.plain = bool(grads) and foreach is not False and gradients.is_plain(grads)
    _clip(call, listeners, max_norm, foreach)


def _spy_clip_grad_value_(
    parameters: Any,
    clip_value: float,
    foreach: bool | None = None,  # noqa: FBT001  torch's own signature
) -> None:
    original = _original["clip_grad_value_"]
    if torch.compiler.is_compiling() or _nobody():
        original(parameters, clip_value, foreach)
        return
    as_list = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    listeners = _clip_listeners(as_list)
    if not listeners:
        original(as_list, clip_value, foreach)
        return
    grads = [p.grad for p in as_list if p.grad is not None]
    call = ClipCall(call_site(), "value", as_list, grads, _as_float(clip_value), 2.0, None)
    limit = _ask(listeners, call)
    if limit is None:
        original(as_list, clip_value, foreach)
    elif limit != float("inf") and grads:
        clip_now(as_list, grads, limit, foreach=foreach)
    _tell_end(listeners, call)


def _clip(
    call: ClipCall,
    listeners: list[Any],
    max_norm: Any,
    foreach: bool | None,  # noqa: FBT001  torch's own argument
) -> None:
    """Scale as the loop asked, or as a listener imposes."""
    limit = listeners[0].clip_begins(call) if len(listeners) == 1 else _ask(listeners, call)
    assert call.total_norm is not None  # noqa: S101  only value clips have none
    if limit is None:
        limit = max_norm
    elif limit == float("inf"):
        _tell_end(listeners, call)
        return
    if call.plain and (type(limit) is float or isinstance(limit, int | float)):
        gradients.clip_(call.grads, limit, call.total_norm, call.value)
    else:
        _original["_clip_grads_with_norm_"](call.parameters, limit, call.total_norm, foreach)
    _tell_end(listeners, call)


@torch.no_grad()
def clip_now(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    max_norm: float,
    *,
    norm_type: float = 2.0,
    foreach: bool | None = None,
    scale: Tensor | None = None,
) -> None:
    """Clip as `torch.nn.utils.clip_grad_norm_` would, bit for bit, unseen by the spies."""
    if any(g.layout != torch.strided for g in grads) or _on_several_meshes(grads):
        # torch clips none of these, but a max_norm for such a training is a fair question
        total = _unscaled(gradients.total_norm(grads, norm_type), scale)
        gradients.scale_each(grads, gradients.coefficient(max_norm, total))
        return
    plain = foreach is not False and gradients.is_plain(grads)
    total = gradients.torch_total_norm(grads, norm_type, False, foreach, plain=plain)
    total = _unscaled(total, scale)
    if plain:
        gradients.clip_(grads, max_norm, total)
    else:
        _original["_clip_grads_with_norm_"](list(parameters), max_norm, total, foreach)


def _on_several_meshes(grads: Sequence[Tensor]) -> bool:
    meshes = {getattr(g, "device_mesh", None) for g in grads}
    return len(meshes) > 1


def _unscaled(norm: Tensor, scale: Tensor | None) -> Tensor:
    return norm if scale is None else norm / scale.to(norm.device)


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _ask(listeners: list[Any], call: ClipCall) -> float | None:
    """What the listeners impose; the youngest that imposes anything wins."""
    limit = None
    for listener in _ranked(listeners) if len(listeners) > 1 else listeners:
        wanted = listener.clip_begins(call)
        limit = wanted if wanted is not None else limit
    return limit


def _tell_end(listeners: list[Any], call: ClipCall) -> None:
    for listener in listeners:
        listener.clip_ends(call)


def _tell_failed(listeners: list[Any], call: ClipCall) -> None:
    for listener in listeners:
        listener.clip_failed(call)


def _tell_nothing(site: str, asked: float) -> None:
    call = ClipCall(site, "norm", [], [], asked, None, None)
    for listener in listeners_of_thread():
        listener.clip_found_nothing(call)


# --- steps -------------------------------------------------------------------------------------

# The hooks as a compiled step runs them, where the compiler must not trace them. Always to go
# through torch's wrapper for that would cost 4 us a call, cold.
_untraced: dict[str, Callable[..., Any]] = {}


def _before_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling():
        return _untraced["_before_step"](optimizer, args, kwargs)
    if not _owners and _resident is None:  # `_nobody`, but a step of a small model is short
        return None
    steps = _local.steps
    if steps and _truly_nested():
        steps.append([])
        return None
    listeners = _step_listeners(optimizer)
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


def _after_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        _untraced["_after_step"](optimizer, args, kwargs)
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
    return bool(_local.steps) and _step_frames() > 0


def _truly_nested() -> bool:
    """Whether an outer step really runs; one that raised has left its entry behind."""
    return _step_frames() > 1


def _step_frames() -> int:
    frame: FrameType | None = sys._getframe(1)
    count = 0
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("wrapper", "normtune_step") and (
            code.co_filename.endswith(_STEP_FILE) or code.co_filename.startswith(_HERE)
        ):
            count += 1
        frame = frame.f_back
    return count


def _step_listeners(optimizer: Any) -> list[Any]:
    found = _listeners_to_step(optimizer)
    if _resident is not None and _resident.meet(found, (), optimizer):
        found = _listeners_to_step(optimizer)
    return found if len(found) < 2 else _ranked(found)


def _listeners_to_step(optimizer: Any) -> list[Any]:
    try:
        groups = optimizer.param_groups
        if len(groups) == 1:
            return _listeners_to(groups[0]["params"])
        sets = [_listeners_to(group["params"]) for group in groups]
        return list(dict.fromkeys(listener for some in sets for listener in some))
    except (AttributeError, LookupError, TypeError):
        return []  # an object that only looks like an optimizer, and is nobody's here


def _ranked(listeners: list[Any]) -> list[Any]:
    """With the youngest that imposes a max_norm at the end, so that all others measure before."""
    imposing = [x for x in listeners if getattr(x, "max_norm", None) is not None]
    for listener in imposing:
        listener.overruled = listener is not imposing[-1]
    return [x for x in listeners if x not in imposing[-1:]] + imposing[-1:]


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
        changed = _before_step(self, (self, *args), kwargs)
        if changed is not None:
            (_, *args), kwargs = changed
        result = function(self, *args, **kwargs)
        _after_step(self, (), {})
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
            for listener in _step_listeners(self):
                listener.step_failed(self)
            raise

    guarded_step.tells_failures = True  # type: ignore[attr-defined]
    optimizer.step = MethodType(guarded_step, optimizer)  # as torch's learning-rate schedulers do


# --- GradScaler --------------------------------------------------------------------------------


def _watch_scaler() -> None:
    scaler = torch.amp.GradScaler
    unscale, step = scaler.unscale_, scaler.step

    @functools.wraps(unscale)
    def normtune_unscale(self: Any, optimizer: Any) -> Any:
        result = unscale(self, optimizer)
        if self._enabled and not _nobody() and not _inside_scaler_step():
            _tell_unscaled(self, optimizer)
        return result

    @functools.wraps(step)
    def normtune_scaler_step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        target = gradients.unwrapped(optimizer)
        known = hasattr(target, "param_groups") and not _nobody()
        listeners = _step_listeners(target) if known else []
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
        for listener in _step_listeners(target):
            listener.unscaled(target, scaler._get_scale_async(), done=True)


# --- FSDP1 -------------------------------------------------------------------------------------

NEVER_CLIPS = 1e38  # FSDP1 makes nan of every gradient at inf, where its norm overflows


def _watch_fsdp() -> None:
    """FSDP1 clips its shards by its own arithmetic, in a method of the model."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    clip = FullyShardedDataParallel.clip_grad_norm_
    if getattr(clip, "visible_to_normtune", False):
        return

    @functools.wraps(clip)
    def normtune_clip(self: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        parameters = list(self.parameters())
        listeners = _clip_listeners(parameters)
        handles = getattr(self, "_all_handles", None) or ()
        if not listeners or not any(h.uses_sharded_strategy for h in handles):
            return clip(self, max_norm, norm_type)  # torch's own clip, seen there
        return _clip_fsdp(self, clip, parameters, listeners, (max_norm, norm_type))

    normtune_clip.visible_to_normtune = True  # type: ignore[attr-defined]
    FullyShardedDataParallel.clip_grad_norm_ = normtune_clip  # type: ignore[method-assign]


def _clip_fsdp(
    model: Any,
    clip: Callable[..., Any],
    parameters: list[Tensor],
    listeners: list[Any],
    asked: tuple[float, float],
) -> Tensor:
    max_norm, norm_type = asked
    imposed = [m for x in listeners if (m := getattr(x, "max_norm", None)) is not None]
    limit = min(imposed[-1], NEVER_CLIPS) if imposed else max_norm
    total_norm: Tensor = clip(model, limit, norm_type)
    grads = [p.grad for p in parameters if p.grad is not None]
    call = ClipCall(
        call_site(), "given", parameters, grads, _as_float(max_norm), float(norm_type), total_norm
    )
    _ask(listeners, call)  # only now is the norm known, and clipped is what it was
    _tell_end(listeners, call)
    return total_norm


# --- installation ------------------------------------------------------------------------------


def install() -> None:
    """Install the dispatcher; a second call changes nothing, and nothing takes it away again.

    Raises:
        NormtuneError: If this version of torch is built differently from those that were tried.
    """
    global _installed  # noqa: PLW0603  one dispatcher per process
    with _lock:
        if _installed:
            return
        for name, spy in {
            "clip_grad_norm_": spy_clip_grad_norm_,
            "_clip_grads_with_norm_": _spy_clip_grads_with_norm_,
            "clip_grad_value_": _spy_clip_grad_value_,
        }.items():
            _original[name] = _replace_wrapped(getattr(clip_grad, name), spy)
        for hook in (_before_step, _after_step):
            _untraced[hook.__name__] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _watch_scaler()
        _installed = True


def _replace_wrapped(function: Any, spy: Any) -> Callable[..., Any]:
    """Put `spy` into the closure of torch's ``no_grad`` wrapper; returns what stood there.

    Every reference to the function, early-bound or not, goes through that one cell.
    """
    names = function.__code__.co_freevars if isinstance(function, FunctionType) else ()
    if "func" not in names or function.__closure__ is None:
        message = (
            f"torch {torch.__version__} builds {getattr(function, '__name__', function)} in a way "
            "that this normtune does not know; please update normtune"
        )
        raise NormtuneError(message)
    cell = function.__closure__[names.index("func")]
    original: Callable[..., Any] = cell.cell_contents
    cell.cell_contents = spy
    return original
