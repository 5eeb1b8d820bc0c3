"""The notebook of the docs: sound, and made from its script as it stands."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib").use("Agg")
ROOT = Path(__file__).parent.parent
WRITTEN = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("maker", ROOT / "docs" / "make_notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers_of(outputs):
    """The suggested values that a cell showed."""
    return re.findall(r"suggested max_norm ([0-9.]+)", json.dumps(outputs))


def test_its_cells_give_what_it_shows(maker, monkeypatch):
    """Run again, every quick cell gives the same kinds of output and the same suggestion."""
    monkeypatch.chdir(ROOT)
    made = maker.notebook(maker.SOURCE.read_text(encoding="utf-8"), slow=False)
    assert [c["source"] for c in made["cells"]] == [c["source"] for c in WRITTEN["cells"]]
    ran = [(a, b) for a, b in zip(made["cells"], WRITTEN["cells"], strict=True) if a.get("outputs")]
    assert len(ran) >= 5
    for new, old in ran:
        kinds = [[set(o.get("data", "s")) for o in c["outputs"]] for c in (new, old)]
        assert kinds[0] == kinds[1]
    assert numbers_of(ran[-1][0]) == numbers_of(ran[-1][1]) != []


def test_it_shows_results_and_pictures():
    """Tables for the eye, pictures, and a verdict; and it stays small."""
    shown = [o for c in WRITTEN["cells"] for o in c.get("outputs", ())]
    assert sum("image/png" in o.get("data", {}) for o in shown) == 3
    assert sum("text/html" in o.get("data", {}) for o in shown) == 4
    assert "fresh seed" in json.dumps(shown)
    assert (ROOT / "docs" / "tour.ipynb").stat().st_size < 500_000


def test_it_is_a_notebook():
    """Jupyter's own schema accepts it."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbformat.validate(nbformat.from_dict(WRITTEN))
