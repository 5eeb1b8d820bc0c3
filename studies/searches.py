"""Whole searches of shipped studies, every compared arm on at least six fresh seeds.

What each found is kept in studies/results/searches.json, and README.md has its table. A search
takes minutes; one that was interrupted goes on in the same folder.

    python studies/searches.py --folder somewhere digits_rows temporal_order
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from sweep import environment  # noqa: E402 - found through the line above

from normtune.results import SearchResult, about_suggestion  # noqa: E402
from normtune.search import search  # noqa: E402
from normtune.study import load_study, save_study, study_of  # noqa: E402

RESULTS = HERE / "results" / "searches.json"
STUDIES = ("digits_rows", "temporal_order", "diabetes", "vowels")
MAX_RUNS, MIN_SEEDS = 60, 6


def prepared(name: str, folder: Path, *, max_runs: int, min_seeds: int) -> Path:
    """The study in a folder of its own, with this budget and a run at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / f"{name}.py", folder)
    config = load_study(HERE / f"{name}.yaml").config
    keys = config.model_dump(exclude_defaults=True)
    keys["search"] = {"max_runs": max_runs, "min_seeds": min_seeds, "jobs": 1}
    study = study_of(folder / f"{name}.yaml", keys)
    save_study(study, keys)
    return study.path


def plain(result: SearchResult) -> dict[str, Any]:
    """What is kept of a search: everything but the single trainings and the storage."""
    kept = result.to_dict()
    trained = [t for t in result.trials if not t.free and t.ended]
    for key in ("trials", "storage", "study"):
        del kept[key]
    return kept | {
        "about": about_suggestion(result),
        "trained": len(trained),
        "free": sum(t.free for t in result.trials),
        "seconds": round(sum(t.seconds for t in trained if math.isfinite(t.seconds))),
        "environment": environment(),
    }


def table(found: dict[str, Any]) -> pd.DataFrame:
    """One row a study: the sentence and what is said of the suggestion."""
    rows = {
        name: {
            "learning rate": f"{r['settings']['lr']:g}",
            "trainings": f"{r['trained']}, {r['free']} copied",
            "fresh seeds": _seeds(r["verdict"]["arms"]),
            "it says": r["verdict"]["sentence"],
            "the suggestion": r["about"],
        }
        for name, r in found.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("study")


def _seeds(arms: list[dict[str, Any]]) -> str:
    """How many fresh seeds the arms had."""
    seeds = sorted({arm["seeds"] for arm in arms})
    return f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"


def load() -> dict[str, Any]:
    """The stored searches by study; none before the first."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", default=list(STUDIES))
    parser.add_argument("--folder", type=Path, required=True, help="for storages and runs")
    parser.add_argument("--max-runs", type=int, default=MAX_RUNS)
    parser.add_argument("--min-seeds", type=int, default=MIN_SEEDS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    for name in asked.studies:
        path = prepared(
            name, asked.folder / name, max_runs=asked.max_runs, min_seeds=asked.min_seeds
        )
        result = search(path)
        print(result, flush=True)
        known = json.loads(asked.out.read_text()) if asked.out.exists() else {}
        asked.out.write_text(json.dumps(known | {name: plain(result)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
