"""Write README.md of the studies, and the answers in that of the project, from the stored sweep.

python studies/readme.py
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import searches  # noqa: E402 - found through the line above
from pictures import draw_curves, draw_regret  # noqa: E402
from purposes import (  # noqa: E402
    Pair,
    pairs,
    pairs_table,
    sentences_table,
    suggestion_table,
    told,
    trainings,
)
from rules import (  # noqa: E402
    Curve,
    candidates_table,
    configurations_table,
    curves,
    hopeless,
    regrets,
    rules_table,
    seeds_of,
    short_table,
    warmup_rows,
    warmup_table,
)
from sweep import FURTHER, ONLINE, RESULTS, Row, Sweep  # noqa: E402

ORDER = (
    "temporal_order",
    "diabetes",
    "digits",
    "randhie",
    "char_lm",
    "vowels",
    "transformer",
    "digits_rows",
)

TEXT = """# Studies

Eight real trainings that take seconds. They are examples of a study, the benchmark of normtune's
rules, and what its default rests on. This page is written by `python studies/readme.py` from
`studies/results/sweep.jsonl.gz`; `LOG.md` keeps what was tried and what failed.

| study | what it is |
|---|---|
{studies}

`normtune search studies/NAME.yaml` searches one, `python studies/NAME.py` trains it by itself. The
data come with packages (the extra `studies`; `vowels` also needs `pip install --no-deps aeon`).

## The sweep

{count}

`python studies/sweep.py` goes on with it where it stopped. Every run trains on one thread. A rule
sees the first quarter of the unclipped run of seed 0, and its value serves all seeds. Each was run
at exactly its value, and so were 0.5, 1, 5 and 10; nothing is interpolated. "Lost" is the mean over
seeds of the loss at the rule's value minus that at the best value, which is chosen on the other
seeds, as a share of the range between the untrained model and the best. A run that diverged or
never got 5 % below its first loss has failed and counts as the untrained model. The "searched" rate
is the best of the swept rates without clipping; with two or three rates a task and optimizer this
is a coarse search. Intervals are 95 %, bootstrapped over the eight tasks: with so few tasks they
are rough.

## Which rule

{rules}

![Share of the range lost, by rule](results/rules.png)

"searched" and "too high" are means over tasks with their interval, "SGD" and "AdamW" are parts of
"searched", "in sd" is the median at the searched rate in sd of one run, and "seeds" is how many
stand behind a configuration. A loss below 0 means that the rule beat the value that won on the
other seeds, which is noise where these are few. AutoClip (global, quantile 0.1) and ZClip (its
defaults, with its own cap of 1.0) come from their published packages and clip while they train;
"lr warm-up" clips nothing and lets the rate grow over the first tenth. `python studies/rules.py
rules` prints this table.

### Would another rule be a better default?

The candidates and how they would be judged were written into `LOG.md` before the sweep was read. A
candidate replaces p90 only if its difference at the searched rate excludes 0 and it fails nowhere
where p90 doesn't.

{candidates}

## How long a warm-up

p90 of the first part of the schedule: the share of steps that it clips over the whole run (10 % if
the warm-up spoke for the run), and what it loses. Losses here are interpolated between runs.

{warmup}

What counts is the share of the schedule: norms move on, mostly down. From less than half of it the
share of steps clipped was off by more than three times about every second time, from half of it on
rarely. Hence a search reads its whole unclipped run, which it has anyway, and a record that ends
before half of a known schedule is doubted. What the value costs depends on it less: at the searched
rate hardly, at other rates a longer warm-up loses less. Where only a warm-up is run, 200 steps are
the default: a quarter of these schedules or more.

## What clipping was good for

The six sentences of `normtune search`, by its own verdict (`normtune.comparison`). The sweep chose
the best clipped value of every configuration, and rates were added until the best one, with
clipping and without, had neighbours within a factor 2 on both sides. Six fresh seeds that chose
nothing confirm no clipping, the best value, p90, and the best two other rates without clipping,
lower or higher. The margin is one sd of a single run. How many of the {n} trainings each sentence
holds for:

{sentences}

The same seeds on p90, the suggestion:

{suggestions}

With both rates searched, at the rate where clipping does best. {told}

{pairs}

"(open)" marks rates that don't surround the best one. The differences are losses with the interval
of the verdict; a negative one is in favour of clipping. "Each at its best" sets clipping at its
best rate against no clipping at its own, which may be the same one.
`python studies/purposes.py run` trains what these tables need beyond the sweep.

## What a search says

`python studies/searches.py` searches four of these studies as a user would, with 60 trainings at
most and six fresh seeds or more for the arms that stay in the running.

{searches}

## Every configuration

![Loss over max_norm above the norms of the warm-up](results/curves.png)

Points are means over seeds within a band from the best to the worst seed, the ring is p90, and the
broken line is no clipping; below lie the norms of the warm-up. Green is a low rate, blue the
searched one, red and dark red are too high; a failed run counts as the untrained model.

{configurations}

"lost" and "clipped" (steps clipped over the whole run) are those of p90; losses are means of the
runs of the sweep that learned. The sentence comes from the fresh seeds.

Made with {environment}.
"""


MARK = "<!-- from the stored sweep, by studies/readme.py -->"
END = "<!-- until here -->"
SHORT = """Over {count} small trainings of {tasks} tasks (SGD and AdamW, {seeds} paired seeds each;
[the tables](studies/README.md)) this share of the range between the untrained and the best model
was lost:

{table}

What clipping was good for, its learning rate and that of no clipping both searched, by the six
sentences of `normtune search` on fresh seeds. {told}"""


def markdown(table: pd.DataFrame) -> str:
    """A table of text as Markdown, its index first."""
    head = [str(table.index.name or table.columns.name or ""), *map(str, table.columns)]
    rows = [[str(name), *map(str, row)] for name, *row in table.itertuples()]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def description(study: str) -> str:
    """The first sentence of a study's file."""
    tree = ast.parse((HERE / f"{study}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n\n")[0].replace("\n", " ")


def count(sweep: Sweep, all_curves: list[Curve]) -> str:
    """How much stands behind the numbers."""
    seeds = pd.Series([len(c.scores) for c in all_curves]).value_counts().sort_index()
    told = ", ".join(f"{n} with {k} seeds" for k, n in seeds.items())
    free = sum(row["free"] for row in sweep.rows)
    online = sum(row["arm"] in ONLINE for row in sweep.rows)
    further = sum(row["arm"] in FURTHER for row in sweep.rows)
    hours = sum(row["seconds"] for row in sweep.rows) / 3600
    out = ", ".join(hopeless(sweep)) or "none"
    return (
        f"{len(all_curves)} configurations of {len({c.study for c in all_curves})} studies "
        f"({told}); {len(sweep.rows)} runs, {free} of them copied from the unclipped run that they "
        f"equal bit for bit, {online} with AutoClip, ZClip or lr warm-up, {further} at added "
        f"learning rates and on fresh seeds; {hours:.1f} core hours. "
        f"Left out, since nothing learned there at any max_norm: {out}."
    )


def environment(sweep: Sweep) -> str:
    """What the last runs were made with, and the commits of all."""
    last: Row = sweep.environments[-1]
    commits = ", ".join(dict.fromkeys(e["commit"] or "unknown" for e in sweep.environments))
    versions = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
    return f"{versions} on {last['machine']}, {last['date']}; commits: {commits}"


def write(sweep: Sweep, folder: Path) -> str:
    """The page; its pictures go to `folder`."""
    found = curves(sweep)
    data = regrets(found)
    in_pairs = pairs(sweep)
    rows = trainings(in_pairs)
    good_for = rows.set_index("configuration")["good for"].rename("what clipping was good for")
    draw_curves(found, folder / "curves.png")
    draw_regret(data, folder / "rules.png")
    studies = "\n".join(f"| [{name}]({name}.py) | {description(name)} |" for name in ORDER)
    return TEXT.format(
        studies=studies,
        count=count(sweep, found),
        rules=markdown(rules_table(data)),
        candidates=markdown(candidates_table(data)),
        warmup=markdown(warmup_table(warmup_rows(found))),
        n=len(rows),
        sentences=markdown(sentences_table(rows)),
        suggestions=markdown(suggestion_table(rows)),
        told=told(in_pairs),
        pairs=markdown(pairs_table(in_pairs)),
        searches=markdown(searches.table(searches.load())),
        configurations=markdown(configurations_table(found).join(good_for)),
        environment=environment(sweep),
    )


def short(data: pd.DataFrame, in_pairs: list[Pair]) -> str:
    """The answers that the README of the project gives."""
    shown = data[data["method"].isin(short_table(data).columns)]
    return SHORT.format(
        count=data["configuration"].nunique(),
        tasks=data["study"].nunique(),
        seeds=seeds_of(shown),
        table=markdown(short_table(data)),
        told=told(in_pairs, names=False),
    )


def with_answers(page: str, answers: str) -> str:
    """A page whose marked part holds the answers."""
    before, _, rest = page.partition(MARK)
    _, end, after = rest.partition(END)
    if not end:
        message = f"the page must hold {MARK!r} and after it {END!r}"
        raise ValueError(message)
    return f"{before}{MARK}\n{answers}\n{END}{after}"


def main() -> None:
    sweep = Sweep.load()
    (HERE / "README.md").write_text(write(sweep, RESULTS.parent), encoding="utf-8")
    project = HERE.parent / "README.md"
    answers = short(regrets(curves(sweep)), pairs(sweep))
    project.write_text(with_answers(project.read_text(encoding="utf-8"), answers), encoding="utf-8")


if __name__ == "__main__":
    main()
