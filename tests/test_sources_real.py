"""Published logs of real runs give the values that they hold, where a folder of them is given."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from normtune import sources
from normtune.errors import NormtuneError, RecordError
from normtune.suggestion import suggest

LOGS = Path(os.environ.get("NORMTUNE_REAL_LOGS", ""))
SERIES = LOGS / "series.json"
pytestmark = pytest.mark.skipif(
    not SERIES.is_file(), reason="NORMTUNE_REAL_LOGS names no folder of logs"
)

KEYS = {
    "cs336_csv_BEFORE_AndyZhao2023_assignment1-basics_1.csv#after": "train/grad_norm_after_clip",
    "wandb_csv_export_SnappierCape_ds-marl-air-cargo_1.csv": "train/transporter/grad_norm_loss_objective",
    "pergroup_jsonl_Jayluci4_mamba-integer_1.jsonl": "grad/norm_gamma",
}
REFUSED = {
    "lf_trainer_log": "trainer_state.json",
    "torchtitan_console_inf": "inf or nan",
    "swin_log": "all 2622 are 0",
    "pergroup_jsonl": "one group of parameters",
    "fairseq_json": "23",
    "tb_csv_download_POSTCLIP": "already clipped",
    "wandb_csv_export": "6 gradient norms",
}
SAID = {
    "modded": "2 runs in the file",
    "custom_csv_layers": "one value in 5 steps",
    "cs336_csv": "also in this file: train/grad_norm_after_clip",
    "megatron_console": "max_norm 1 is stated",
    "mmcv_logjson": "max_norm 35 is stated",
    "fairseq": "clipping is off",
}


def series():
    return json.loads(SERIES.read_text()) if SERIES.is_file() else {}


def log(start):
    return next(LOGS.glob(f"{start}*"))


@pytest.mark.parametrize("name", series())
def test_values_are_those_of_the_log(name):
    """Every value, in the order of the file."""
    want = np.array([math.nan if value is None else value for value in series()[name]], dtype=float)
    path = LOGS / name.partition("#")[0]
    if not len(want):
        with pytest.raises(RecordError):
            sources.read(path)
        return
    got = sources.read(path, key=KEYS.get(name), attempt=0).norms
    np.testing.assert_array_equal(np.where(np.isfinite(got), got, np.nan), want)


@pytest.mark.parametrize(("start", "says"), REFUSED.items())
def test_refusals_say_why(start, says):
    """What carries no suggestion is refused for its own reason."""
    with pytest.raises(NormtuneError, match=says):
        suggest(sources.read(log(start)))


@pytest.mark.parametrize(("start", "says"), SAID.items())
def test_notes_say_what_is_special(start, says):
    """What was left out or stated stands in the notes."""
    assert any(says in note for note in sources.read(log(start)).origin.notes)


def test_one_run_in_several_formats_is_one_series():
    """JSON, text and TensorBoard of one run agree, and so do CSV and TensorBoard of another."""
    one = [sources.read(log(f"mmcv_{kind}_rohansd")).norms for kind in ("logjson", "log", "tb")]
    np.testing.assert_allclose(one[0], one[1], atol=5.1e-5)
    np.testing.assert_allclose(one[0], one[2], atol=5.1e-5)
    two = [sources.read(log(f"algoperf_{kind}")).norms for kind in ("csv", "tb_v2")]
    np.testing.assert_allclose(*two, rtol=1e-7)
