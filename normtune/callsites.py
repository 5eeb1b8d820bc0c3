"""Where in the user's code a call stands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import CodeType, FrameType

import torch

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep  # noqa: PTH100, PTH120  compared with frames
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep  # noqa: PTH100, PTH120
_STEP_FILE = os.path.join("torch", "optim", "optimizer.py")  # noqa: PTH118
MOST_KNOWN = 10_000  # a notebook makes new code at every run of a cell

# (code, instruction) -> its name; the code is kept, so that no other gets its id.
_sites: dict[tuple[int, int], tuple[CodeType, str]] = {}
_inner: dict[str, bool] = {}  # file -> whether it is torch's or normtune's


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


def step_frames() -> int:
    """How many optimizer steps run in this thread, one inside the other."""
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
