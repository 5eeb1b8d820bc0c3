"""Which file of a run's folder holds its norms."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from normtune.records import SUFFIX
from normtune.sources.keys import role
from normtune.sources.mlflow import metric_name
from normtune.sources.tables import Asked

MOST_ENTRIES = 50_000
MOST_TRIED = 40
DEEPEST = 8
_TEXT = (".log", ".txt", ".out", ".err")
_SKIPPED = frozenset(
    {".git", "__pycache__", "node_modules", ".venv", "site-packages", ".ipynb_checkpoints"}
)
_EVENTS = re.compile(r"events\.out\.tfevents|\.tfevents")


@dataclass(frozen=True)
class Candidate:
    """One source in a folder: a file, or the event files of one run in their order.

    Attributes:
        paths: The files.
        rank: How good such a source is; lower is better.
        order: Which of several of one rank is the latest; higher is later.
    """

    paths: tuple[Path, ...]
    rank: int
    order: tuple[float, ...]


def candidates(folder: Path, key: str | None = None) -> list[Candidate]:
    """The sources below `folder`, the best first; links are followed, but never twice.

    Args:
        folder: Where to look.
        key: The norm that is asked for, which may be a metric that no name gives away.
    """
    files = list(_files(folder))
    events = [path for path in files if _EVENTS.search(path.name)]
    found = [_of_events(group) for group in _by_folder(events)]
    for path in files:
        rank = None if _EVENTS.search(path.name) else _rank(path, key)
        if rank is not None:
            found.append(Candidate((path,), rank, _order(path)))
    return sorted(found, key=lambda c: (c.rank, tuple(-n for n in c.order), str(c.paths[0])))


def also(rest: Sequence[str]) -> list[str]:
    """What else the folder holds, in words."""
    if not rest:
        return []
    more = f" and {len(rest) - 5} more" if len(rest) > 5 else ""
    return [f"not read: {', '.join(rest[:5])}{more}"]


def refusal(folder: Path, refusals: Sequence[str]) -> str:
    """Why a folder gives no norms."""
    if not refusals:
        return (
            f"{folder} holds no log that normtune knows: no record, trainer_state.json, "
            "metrics.csv, event file, .wandb file, mlruns, JSON Lines or text log"
        )
    more = len(refusals) - 1
    return refusals[0] + (
        f" (and {more} more source{'s' * (more > 1)} without norms)" if more else ""
    )


def _files(folder: Path) -> list[Path]:
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    waiting = [(folder, 0)]
    entries = 0
    while waiting:
        current, depth = waiting.pop()
        try:
            status = current.stat()
            if (status.st_dev, status.st_ino) in seen or depth > DEEPEST:
                continue
            seen.add((status.st_dev, status.st_ino))
            inside = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in inside:
            entries += 1
            if entries > MOST_ENTRIES:
                return found
            if _is_folder(entry):
                if entry.name not in _SKIPPED:
                    waiting.append((Path(entry.path), depth + 1))
            elif _is_new_file(entry, seen):
                found.append(Path(entry.path))
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_new_file(entry: os.DirEntry[str], seen: set[tuple[int, int]]) -> bool:
    try:
        status = entry.stat()
        place = (status.st_dev, status.st_ino)
        if not entry.is_file() or status.st_size == 0 or place in seen:
            return False
        seen.add(place)
    except OSError:
        return False
    return True


def _by_folder(paths: Sequence[Path]) -> list[list[Path]]:
    groups: dict[Path, list[Path]] = {}
    for path in paths:
        groups.setdefault(path.parent, []).append(path)
    return list(groups.values())


def _of_events(group: Sequence[Path]) -> Candidate:
    paths = tuple(sorted(group, key=lambda path: (_time(path), path.name)))
    return Candidate(paths, 4, (_time(paths[-1]), *_order(paths[-1])))


_CONFIGS = frozenset(
    {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "generation_config.json",
        "special_tokens_map.json",
        "args.json",
        "training_args.json",
        "wandb-metadata.json",
        "hparams.json",
    }
)
_RANKS: tuple[tuple[int, Callable[[Path], bool]], ...] = (
    (0, lambda path: path.name.endswith((SUFFIX, SUFFIX + ".gz"))),
    (1, lambda path: path.name == "trainer_state.json"),
    (2, lambda path: path.name in ("metrics.csv", "measurements.csv", "progress.csv")),
    (3, lambda path: path.suffix == ".wandb"),
    (
        5,
        lambda path: (
            path.name.endswith((".jsonl", ".log.json", ".jsonl.gz"))
            or path.parent.name == "vis_data"
        ),
    ),
    (5, lambda path: path.name in ("metrics.json", "scalars.json", "result.json", "log.json")),
    (6, lambda path: path.suffix in (".csv", ".tsv")),
    (7, lambda path: path.name == "output.log"),
    (8, lambda path: path.suffix in _TEXT or path.name.endswith((".log.gz", ".txt.gz"))),
    (9, lambda path: path.suffix == ".json" and path.name not in _CONFIGS),
)


def _rank(path: Path, key: str | None) -> int | None:
    if "metrics" in path.parts and "mlruns" in path.parts:
        name = metric_name(str(path))
        return 2 if role(name) != "other" or Asked(key).matches(name) else None
    return next((rank for rank, fits in _RANKS if fits(path)), None)


def _order(path: Path) -> tuple[float, ...]:
    """Later runs and checkpoints first: by the numbers in the path, then by time of writing.

    A finished run's trainer_state.json lies above its checkpoints and is the longest.
    """
    try:
        written = path.stat().st_mtime
    except OSError:
        written = 0.0
    if path.name == "trainer_state.json" and not path.parent.name.startswith("checkpoint-"):
        return (float("inf"), written)
    return (*map(float, _numbers(path.parent.name)), written)


def _time(path: Path) -> float:
    """The time in the name of an event file."""
    return float(next(iter(_numbers(path.name)), 0))


def _numbers(name: str) -> list[int]:
    return [int(text[:15]) for text in re.findall(r"\d+", name)]
