"""Damaged logs give values or one line of refusal: no other exception, and no hang."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_samples import SAMPLES

from normtune import sources
from normtune.errors import NormtuneError
from normtune.sources.clipping import in_text
from normtune.sources.keys import role
from normtune.sources.numbers import number, whole
from normtune.suggestion import FEWEST, suggest

LONGEST = 5.0  # seconds
REAL = Path(os.environ.get("NORMTUNE_REAL_LOGS", ""))
MUTATIONS = int(os.environ.get("NORMTUNE_FUZZ", "600"))
_SPLICES = (
    b"\x00", b"\xff", b"\n", b"\r", b"{", b"}", b'"', b",", b"nan", b"-inf", b"1e999", b"grad_norm", b"'grad_norm': ",
    b"norm: ", b"step: ", b"\x1b[31m", b"[rank1]:", b"9" * 400, b"[" * 2000, b'{"a":' * 2000, b"grad norm " * 500,
    b"Epoch [1][", b"\x1f\x8b", b"\xff\xfe", b"[step=", b"clip_grad=", b"1,234,", b"0x1F",
)  # fmt: skip


def contents():
    own = [sample.content for sample in SAMPLES]
    real = [path.read_bytes()[:120_000] for path in sorted(REAL.glob("*_*")) if REAL.name]
    return own + real


def damaged(content, other, draw):
    """`content` after a few random cuts, flips, repeats and splices."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(data) + 1)
        span = min(draw.choice((1, 4, 40, 4000)), len(data) - at)
        kind = draw.randrange(6)
        if kind == 0:
            del data[at : at + span]
        elif kind == 1:
            data[at : at + span] = draw.randbytes(span)
        elif kind == 2:
            data[at:at] = draw.choice(_SPLICES) * draw.choice((1, 1, 3))
        elif kind == 3:
            data[at:at] = data[max(0, at - span) : at] * 2
        elif kind == 4:
            start = draw.randrange(len(other) + 1)
            data[at:at] = other[start : start + 4000]
        else:
            del data[at:]
    return bytes(data)


def survive(path):
    """Read, list and suggest; what is raised must be a refusal of one line, and quick."""
    began, refusal = time.perf_counter(), ""
    try:
        record = sources.read(path)
        assert len(record.norms) == len(record.steps) > 0
        assert not (record.norms < 0).any()
        suggestion = suggest(record)
        assert np.isfinite(suggestion.max_norm)
        assert len(record.finite) >= FEWEST
    except (NormtuneError, ValueError) as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert time.perf_counter() - began < LONGEST


@pytest.mark.parametrize("seed", range(MUTATIONS // 100))
def test_damaged_logs_are_survived(tmp_path, seed):
    """A hundred random damages of sample logs, of real ones too where they are given."""
    draw = random.Random(seed)  # noqa: S311 - damages need no secrecy
    logs = contents()
    path = tmp_path / "log"
    for _ in range(100):
        path.write_bytes(damaged(draw.choice(logs), draw.choice(logs), draw))
        survive(path)


@given(st.binary(max_size=2000))
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_bytes_are_survived(tmp_path, content):
    """Bytes of any kind are refused or read."""
    (tmp_path / "log").write_bytes(content)
    survive(tmp_path / "log")


_LINE = st.one_of(
    st.text(max_size=60),
    st.builds("step {} grad_norm {}".format, st.integers(), st.floats()),
    st.builds('{{"step": {}, "grad_norm": {}}}'.format, st.integers(), st.floats()),
    st.builds("{},{},{}".format, st.integers(), st.floats(), st.text(max_size=5)),
)


@given(st.lists(_LINE, max_size=60))
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_lines_are_survived(tmp_path, lines):
    """Lines of every family in any mixture are refused or read."""
    (tmp_path / "log").write_text("\n".join(lines), encoding="utf-8", errors="replace")
    survive(tmp_path / "log")


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_is_survived(text):
    """Names, numbers and statements of any text are judged without an exception."""
    role(text)
    number(text)
    whole(text)
    in_text(text.encode(errors="replace"))


@pytest.mark.parametrize(
    "content",
    [
        b"{" * 1_000_000,
        b"[" * 1_000_000,
        b'{"a":' * 200_000,
        b"norm" * 500_000,
        b"grad_norm " * 200_000,
        b"grad " * 400_000 + b"norm",
        b"norm: " + b"1" * 2_000_000,
        b"norm" + b" " * 2_000_000 + b"1",
        b"clip_grad" * 200_000,
        b"clip_grad" + b"." * 2_000_000,
        b"'" * 2_000_000 + b"norm",
        b"step grad_norm 1\n" * 100_000,
        (b"a" * 70_000 + b" norm 1\n") * 30,
        b"step," + b"grad_norm," * 100_000 + b"\n1,2\n",
        b"\x1b[" * 1_000_000 + b"norm",
        b"1,2\n" * 300_000,
        b'"' * 1_000_000 + b"\n1,2\n",
    ],
    ids=range(17),
)  # fmt: skip
def test_hostile_logs_do_not_hang(tmp_path, content):
    """Long repetitions, on which a careless pattern takes for ever, take seconds at most."""
    path = tmp_path / "log"
    path.write_bytes(content)
    survive(path)
