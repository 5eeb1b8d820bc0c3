"""Backward passes: how many there were, and whether anybody wrote to their gradients since."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normtune.events import Look, look
from normtune.listening import COMPILED

MOST_HOOKS = 24
# Looking for unseen changes costs 5 microseconds. A prime number of passes lies between two looks,
# since two losses or three, one after the other, must all be looked at.
LOOK_AT_FIRST, LOOK_EVERY = 32, 31
_untraced: list[Callable[..., None]] = []  # `saw` for the compiler, which must not trace it
_graph_task = torch._C._current_graph_task_id


class Backwards:
    """Counts backward passes by hooks on the first and the last parameter."""

    def __init__(self) -> None:
        self.count = 0
        self.alive = False
        self.after: dict[int, Look] = {}
        self.looking = True  # whether unseen changes after the last backward pass are looked for
        self.spoiled = ""  # what a backward pass has shown of the compiled clip call before it
        self._compiled = False  # whether compiled clip calls were seen
        self._task = -2
        self._handles: dict[int, Any] = {}

    def watch(self, parameters: Sequence[Tensor]) -> None:
        """Hook the first and the last of `parameters` that can get a gradient."""
        if not _untraced:
            _untraced.append(torch.compiler.disable(Backwards.saw))  # type: ignore[no-untyped-call]
        able = [p for p in parameters if p.requires_grad and p.is_leaf]
        for parameter in (able[0], able[-1]) if able else ():
            if id(parameter) not in self._handles and len(self._handles) < MOST_HOOKS:
                # `saw` belongs to this small object, which knows nothing of its recorder.
                handle = parameter.register_post_accumulate_grad_hook(self.saw)  # type: ignore[no-untyped-call]
                self._handles[id(parameter)] = handle

    def saw(self, parameter: Tensor) -> None:
        """Count the backward pass that has just reached `parameter`, once."""
        if torch.compiler.is_compiling():  # a compiled function called backward()
            _untraced[0](self, parameter)
            return
        task = _graph_task()
        if task != self._task:
            self._task = task
            self.alive = True
            self.count = n = self.count + 1
            self.looking = n <= LOOK_AT_FIRST or n % LOOK_EVERY == 0
        if COMPILED.total_norm is not None:
            self._look_at_compiled(parameter)
        if self.looking or self._compiled:
            if parameter.grad is not None:
                self.after[id(parameter)] = look(parameter)
        elif self.after:
            self.after.pop(id(parameter), None)

    def _look_at_compiled(self, parameter: Tensor) -> None:
        """A compiled clip call may have been given gradients that are now others."""
        sure, self._compiled = self._compiled, True
        if not COMPILED.acts_on((parameter,)):
            return
        before = self.after.get(id(parameter))
        if before is None and sure:  # a step has used up what was there
            self.spoiled = "clip-before-backward"
        elif before is not None and before.grad() is parameter.grad:
            self.spoiled = "clip-in-accumulation"
        COMPILED.drop()

    def written_since(self, ids: frozenset[int]) -> bool:
        """Whether a watched gradient of these was written to or replaced since `backward()`."""
        return any(s.changed() or s.replaced() for key, s in self.after.items() if key in ids)

    def used(self, ids: frozenset[int]) -> None:
        """A step has used the gradients of these; optimizers may write to them."""
        for key in [key for key in self.after if key in ids]:
            del self.after[key]

    def look_again(self) -> None:
        """Somebody has written to the watched gradients, and may."""
        parameters = [p for s in self.after.values() if (p := s.parameter()) is not None]
        self.after = {id(p): look(p) for p in parameters if p.grad is not None}

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
