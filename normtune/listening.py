"""Who is told of which parameters: recorders find their clip calls and steps through them.

Any thread may train; a parameter knows its recorders, by weak references.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


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


_lock = threading.Lock()
owners: dict[int, tuple[weakref.ref[Tensor], list[weakref.ref[Any]]]] = {}
_listeners: weakref.WeakSet[Any] = weakref.WeakSet()
_known_sets: dict[tuple[int, ...], tuple[weakref.ref[Any], ...]] = {}
resident: Resident | None = None

MOST_KNOWN = 10_000  # a loop that clips ever new lists of tensors must not fill the memory


def listen(listener: Listener, parameters: Iterable[Tensor]) -> None:
    """Tell `listener` of every clip call and step on `parameters`; kept by weak references."""
    reference = weakref.ref(listener)
    if not COMPILED.watched:
        COMPILED.watched = True
        COMPILED.drop()
    with _lock:
        _listeners.add(listener)
        for parameter in parameters:
            known = owners.get(id(parameter))
            if known is None or known[0]() is not parameter:
                forget = functools.partial(_forget, id(parameter))
                known = owners[id(parameter)] = (weakref.ref(parameter, forget), [])
            if all(other() is not listener for other in known[1]):
                known[1].append(reference)
        _known_sets.clear()
    impose_on_compiled()


def unlisten(listener: Listener) -> None:
    """Stop telling `listener`."""
    with _lock:
        _listeners.discard(listener)
        for key, (_, references) in list(owners.items()):
            references[:] = [r for r in references if r() not in (None, listener)]
            if not references:
                owners.pop(key, None)
        _known_sets.clear()
        for other in _listeners:
            other.overruled = False
    impose_on_compiled()
    if not _listeners and resident is None:
        COMPILED.watched = False
        COMPILED.drop()


def reside(somebody: Resident | None) -> None:
    """Show `somebody` every clip call and step, also on parameters that nobody listens to."""
    global resident  # noqa: PLW0603  one a process
    resident = somebody
    if resident is not None:
        COMPILED.watched = True
    else:
        COMPILED.imposed = 0.0


def impose_on_compiled() -> None:
    """A compiled clip can ask nobody, so what is imposed on each parameter is kept ready."""
    limits = COMPILED.imposed_on
    limits.clear()
    for key, (_, references) in list(owners.items()):
        for reference in references:  # the youngest wins
            limit = getattr(reference(), "max_norm", None)
            if limit is not None:
                limits[key] = limit


def listeners_of_thread() -> list[Any]:
    """All live listeners, for events that name no parameter."""
    return list(_listeners)


def nobody() -> bool:
    """Whether nobody wants to know of anything."""
    return not owners and resident is None


def _forget(key: int, gone: weakref.ref[Tensor]) -> None:
    known = owners.get(key)
    if known is not None and known[0] is gone:
        owners.pop(key, None)
        COMPILED.imposed_on.pop(key, None)
        _known_sets.clear()


def listeners_to(parameters: Sequence[Tensor]) -> list[Any]:
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


def listeners_to_clip(parameters: Sequence[Tensor]) -> list[Any]:
    """The listeners to a clip call's parameters; the resident may become one of them."""
    found = listeners_to(parameters)
    if resident is not None and parameters and resident.meet(found, parameters, None):
        found = listeners_to(parameters)
    return found


def _look_up(parameters: Sequence[Tensor]) -> tuple[weakref.ref[Any], ...]:
    found: dict[int, weakref.ref[Any]] = {}
    for parameter in parameters:
        known = owners.get(id(parameter))
        if known is not None and known[0]() is parameter:
            found |= {id(r()): r for r in known[1]}
    return tuple(found.values())


def listeners_to_step(optimizer: Any) -> list[Any]:
    """The listeners to an optimizer's parameters, the one that imposes at the end."""
    found = _of_groups(optimizer)
    if resident is not None and resident.meet(found, (), optimizer):
        found = _of_groups(optimizer)
    return found if len(found) < 2 else ranked(found)


def _of_groups(optimizer: Any) -> list[Any]:
    try:
        groups = optimizer.param_groups
        if len(groups) == 1:
            return listeners_to(groups[0]["params"])
        sets = [listeners_to(group["params"]) for group in groups]
        return list(dict.fromkeys(listener for some in sets for listener in some))
    except (AttributeError, LookupError, TypeError):
        return []  # an object that only looks like an optimizer, and is nobody's here


def ranked(listeners: list[Any]) -> list[Any]:
    """With the youngest that imposes a max_norm at the end, so that all others measure before."""
    imposing = [x for x in listeners if getattr(x, "max_norm", None) is not None]
    for listener in imposing:
        listener.overruled = listener is not imposing[-1]
    return [x for x in listeners if x not in imposing[-1:]] + imposing[-1:]
