"""The ranks of a distributed training: which one this is, and what a recorder settles with others.

Nothing here is a collective that a rank could wait for without end: ranks leave notes in the store
that their process group was made with.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from normtune.errors import NormtuneError

FIRST = 10  # steps whose norms the ranks compare
MEET_SECONDS = 10.0  # every rank has made its recorder by the first norm, or never will
MOST_COMPARED = 8  # ranks
ALIKE = 1e-3  # relative; a norm that all ranks computed differs in its last digits at most

_numbers = itertools.count()


def initialized() -> bool:
    """Whether this process is in a process group."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """The rank of this process, as its process group or else its launcher says."""
    if initialized():
        return torch.distributed.get_rank()
    return _number(os.environ.get("RANK"), 0)


def size() -> int:
    """How many ranks there are."""
    if initialized():
        return torch.distributed.get_world_size()
    return _number(os.environ.get("WORLD_SIZE"), 1)


def _number(text: str | None, default: int) -> int:
    return int(text) if text and text.isdecimal() else default


class Ranks:
    """What one recorder knows of its likes on the other ranks.

    Recorders are told apart by the order in which they are made, the same on every rank.
    """

    def __init__(self) -> None:
        self.rank, self.size = rank(), size()
        self.compared = self.posted = self.size == 1
        self._name = f"normtune/{next(_numbers)}"
        self._store: Any = None
        self._met = False
        self._meetings = 0  # norms that all ranks worked at
        if self.size > 1 and initialized():
            from torch.distributed.distributed_c10d import _get_default_store

            self._store = _get_default_store()
            if self._store is not None and self._store.add(f"{self._name}/here", 1) == self.size:
                self._settle("all")

    @property
    def grouped(self) -> bool:
        """Whether the ranks can be asked."""
        return self._store is not None

    def meet(self) -> None:
        """Make sure that all ranks record, before a norm that all of them must work at.

        Raises:
            NormtuneError: If some rank does not, or not any more: waiting for it would hang.
        """
        if self._store is None:
            return
        if not self._met:
            if self._verdict() != "all":
                message = (
                    "each rank of a sharded training must make its NormRecorder, not rank 0 alone: "
                    "the norm is made of all shards (only rank 0 writes the file)"
                )
                raise NormtuneError(message)
            self._met = True
        if self.left:
            message = "the recorder of another rank was closed, and the norm needs all shards"
            raise NormtuneError(message)
        self._meetings += 1

    def leave(self) -> bool:
        """Tell the other ranks that this one works at one norm more; whether that can be.

        One more, because another rank may have begun with it already. When that norm is there,
        every rank knows that it was the last.
        """
        if self._store is None:
            return False
        try:
            self._store.compare_set(f"{self._name}/last", "", str(self._meetings + 1))
        except RuntimeError:  # the process group is gone, and with it all that could be waited for
            return False
        return True

    @property
    def left(self) -> bool:
        """Whether some rank works at no norm any more."""
        key = f"{self._name}/last"
        if self._store is None or not self._store.check([key]):
            return False
        return self._meetings >= int(self._store.get(key))

    def _verdict(self) -> str:
        key = f"{self._name}/verdict"
        deadline = time.monotonic() + MEET_SECONDS
        while not self._store.check([key]):  # not store.wait, which complains on stderr
            if time.monotonic() > deadline:
                # Whoever asks first settles it for all, or one rank would go on alone.
                return self._settle("alone")
            time.sleep(0.01)
        return str(self._store.get(key).decode())

    def _settle(self, verdict: str) -> str:
        settled = self._store.compare_set(f"{self._name}/verdict", "", verdict)
        return str(settled.decode())

    # --- the first norms

    def different(self, norms: Sequence[float]) -> int | None:
        """Show this rank's first norms to the others; a rank whose own are others, as far as known.

        Rank 0 compares itself with the others, and they with rank 0.
        """
        if self._store is None:
            self.compared = self.posted = True
            return None
        if not self.posted:
            self._store.set(f"{self._name}/norms/{self.rank}", json.dumps([str(n) for n in norms]))
            self.posted = True
        others = range(1, min(self.size, MOST_COMPARED)) if self.rank == 0 else (0,)
        keys = {other: f"{self._name}/norms/{other}" for other in others}
        if not self._store.check(list(keys.values())):
            return None
        self.compared = True
        for other, key in keys.items():
            theirs = [float(n) for n in json.loads(self._store.get(key))]
            if not np.allclose(norms, theirs, rtol=ALIKE, atol=0.0, equal_nan=True):
                return other
        return None
