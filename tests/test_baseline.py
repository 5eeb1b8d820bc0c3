"""What recorded norms give a search."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune.baseline import first_steps, norm_facts, same_until_clipped, search_range
from normtune.records import NormRecord, row
from normtune.suggestion import suggest
from normtune.tasks import RECORD

NORMS = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50)


@given(NORMS, st.booleans())
def test_the_range_reaches_below_the_norms_and_up_to_the_largest(norms, adaptive):
    """It holds the median, starts below every norm, and ends at 10 medians of a part at most."""
    low, high = search_range(norms, largest=max(norms), adaptive=adaptive)
    median = float(np.median(norms))
    assert low <= median / 100
    assert low < min(norms)
    early = float(np.median(norms[: max(len(norms) // 4, min(30, len(norms)))]))
    assert max(median, early) <= high <= 10 * max(median, early)


def test_the_range_of_norms_that_fall_reaches_what_mattered_while_it_learned():
    """A run that has learned ends with tiny norms; the early ones still are in the range."""
    norms = np.concatenate([np.full(100, 3.0), np.full(300, 0.01)])
    assert search_range(norms, largest=40.0, adaptive=False) == (1e-4, 30.0)


def test_the_first_steps_of_a_record():
    """The first steps are those of the record, array by array."""
    record = NormRecord.of(np.arange(1.0, 11.0), lr=np.arange(10.0))
    first = first_steps(record, 4)
    assert first.norms.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert first.lr.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert len(first) == len(first.max_norm) == len(first.skipped) == 4
    assert len(first_steps(record, None)) == 10


def test_the_first_steps_of_a_run_are_doubted_by_its_length():
    """Less than half of the unclipped run is named beside the suggestion; all of it is not."""
    record = NormRecord.of(np.random.default_rng(0).lognormal(0.0, 0.3, 600), lr=0.1)
    assert any("step 100 of 600" in text for text in suggest(first_steps(record, 100)).doubts)
    assert not any("of 600:" in text for text in suggest(first_steps(record, None)).doubts)


@pytest.mark.parametrize(
    ("own", "same"),
    [([1.0, 2.0, 5.0, 9.0], True), ([1.0, 2.0, 4.0, 9.0], False), ([1.0, 2.5, 5.0, 9.0], False)],
)
def test_runs_repeat_until_the_first_clipped_step(own, same):
    """The norm of the first clipped step is still that of the unclipped run; later ones differ."""
    base = NormRecord.of([1.0, 2.0, 5.0, 7.0])
    assert same_until_clipped(base, NormRecord.of(own), 3.0) is same


def _write(folder, lines):
    (folder / RECORD).write_text("\n".join([str(line) for line in lines]) + "\n")


def test_norm_facts_of_a_run(tmp_path):
    """Largest and smallest norm, and numpy's share of norms above a max_norm."""
    rng = np.random.default_rng(0)
    norms = rng.lognormal(size=200)
    head = '{"normtune": 1, "attempt": "a"}'
    _write(tmp_path, [head, *(row(i + 1, float(n)) for i, n in enumerate(norms))])
    facts = norm_facts(tmp_path, 1.5)
    assert facts["largest_norm"] == norms.max()
    assert facts["smallest_norm"] == norms.min()
    assert facts["clip_share"] == np.mean(norms > 1.5)
    assert facts["kept"] == pytest.approx(np.minimum(1, 1.5 / norms).mean(), abs=1e-5)
    assert norm_facts(tmp_path, math.inf)["clip_share"] == 0.0
    assert norm_facts(tmp_path / "nowhere", 1.0) == {}


def test_largest_norm_looks_at_every_clip_site(tmp_path):
    """A run that clips at two places has the larger of both norms, and inf where one died."""
    head = '{"normtune": 1, "attempt": "a"}'
    rows = [row(1, 2.0), row(1, 9.0, series="b.py:7"), row(2, 3.0)]
    _write(tmp_path, [head, *rows])
    assert norm_facts(tmp_path, 4.0)["largest_norm"] == 9.0
    _write(tmp_path, [head, *rows, row(2, math.nan, series="b.py:7")])
    assert norm_facts(tmp_path, 4.0)["largest_norm"] == math.inf
