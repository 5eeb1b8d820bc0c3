"""Norms as text for a study: what is sent, what fits, and that it comes back as it was."""

import math

import numpy as np
import pytest
from finished_study import write_record

from normtune import parcels
from normtune.baseline import same_until_clipped
from normtune.records import NormRecord

TEXT_OF_MYSQL = 65_535


@pytest.fixture
def norms():
    """Norms as a float32 training gives them: their digits don't compress."""
    return np.float32(np.random.default_rng(0).lognormal(size=3000)).astype(float)


def there_and_back(file, until=None):
    parts, _ = parcels.pack(file, until)
    back = file.parent / "there" / file.name
    parcels.unpack(parts, back)
    return parts, NormRecord.load(back)


def test_a_record_comes_back_bit_for_bit(tmp_path, norms):
    """The file itself, in parts that also a TEXT of MySQL takes."""
    file = write_record(tmp_path / "run.norms.jsonl", norms, max_norm=2.0)
    parts, _ = there_and_back(file)
    assert (tmp_path / "there" / file.name).read_bytes() == file.read_bytes()
    assert all(len(part) < TEXT_OF_MYSQL for part in parts)
    assert all(part.isascii() for part in parts)
    assert not set('"\\\\') & set("".join(parts))  # JSON would make two characters of them


def test_of_a_clipped_run_what_proves_that_it_repeats_is_sent(tmp_path, norms):
    """Up to its first clipped step, and some more; the rest of the norms is in the facts."""
    limit = float(norms.max()) * 1.000002
    norms[2000] = 2 * limit
    file = write_record(tmp_path / "run.norms.jsonl", norms)
    record = NormRecord.load(file)
    for max_norm, sent in ((limit, 2002), (norms[0] / 2, 101), (math.inf, 3000), (1e9, 3000)):
        until = parcels.last_step(record, max_norm)
        _, part = there_and_back(file, until)
        assert len(part) == sent
        assert np.array_equal(part.norms, record.norms[: len(part)])
        assert same_until_clipped(record, part, max_norm)
    other = NormRecord.of(np.where(np.arange(3000) == 50, 0.5, norms))
    _, part = there_and_back(file, parcels.last_step(record, limit))
    assert not same_until_clipped(other, part, limit)


def test_what_is_too_long_is_cut_and_said(tmp_path, norms, monkeypatch):
    """The first steps are kept, with the header and what belongs to no step."""
    monkeypatch.setattr(parcels, "MOST", 20_000)
    file = write_record(tmp_path / "run.norms.jsonl", norms)
    with file.open("a") as lines:
        lines.write('{"finding": "x", "text": "said at the end"}\n')
    parts, until = parcels.pack(file)
    _, part = there_and_back(file)
    assert sum(map(len, parts)) <= 20_000
    assert part.steps[-1] == until
    assert 800 < until < 3000
    assert part.metadata["optimizer"] == "SGD"
    assert "said at the end" in (tmp_path / "there" / file.name).read_text()
