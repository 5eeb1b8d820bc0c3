"""Writes docs/loops.md: every kind of loop in loops.py, run, with its recorded and its true norm."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import loops
import torch

from normtune.errors import SuggestionError
from normtune.recorder import NormRecorder
from normtune.records import Finding
from normtune.suggestion import suggest

PAGE = Path(__file__).parent.parent / "docs" / "loops.md"
ENOUGH = 60  # steps to suggest from
STEP = 7  # neither among the steps that some loops skip nor the last

HEAD = """\
# Every kind of loop

The norm that normtune records is the true norm before clipping, whatever the loop does. This table
comes from running each loop of `tests/loops.py` (`python tests/loops_table.py`, and a test keeps it
current): the recorded norm of step {step}, the true one, taken in fp64 right after `backward()`, and
what normtune says about the loop. An empty last column means that there is nothing to say;
**refused** means that normtune suggests no `max_norm` from such a record, and why.

| loop | recorded norm | true norm | what normtune says |
|---|---|---|---|
"""

TAIL = """
In every row parameters and random state are bit-identical with and without a recorder. Where the
loop clips all its parameters by torch's norm clipping, an imposed `max_norm` gives bit for bit what
torch's own call at that value gives.

## What this table cannot show

- **CUDA graphs of a whole step.** Python hooks run when the graph is captured and never at its
  replay, and a capturing stream cannot be read. While a stream captures, normtune does nothing but
  note it: the record says that those steps are missing, and no `max_norm` is suggested. Record a run
  without the graph.
- **DeepSpeed, Megatron, apex O2, fairseq.** Their inner optimizers step on copies or shards whose
  gradients are assigned, already clipped or partial. normtune sees that no backward pass reached
  those parameters, says so and suggests nothing. Hand it the engine's own norm, which is the true
  one: `normtune.record_norm(engine.get_global_grad_norm())`.
- **Engines that clip by their own arithmetic** (NeMo, nanotron, timm's adaptive clipping): record
  with `measure="backward"`, as in the row above.
- **One process is not a cluster.** Sharded gradients (DTensor) are reduced over their mesh before
  they are read, on all ranks at the same steps; this table runs in one process.
- **On a GPU** no step waits for the device: norms stay there until the next flush, which reads them
  in one go. A norm that fp32 cannot square (above 1e19, below 1e-23 for a single number) is taken
  again in fp64 on the CPU only.
"""


def run(case: loops.Case) -> tuple[NormRecorder, list[float]]:
    """The loop once, watched; its recorder and the true norms."""
    made: list[NormRecorder] = []
    torch._dynamo.reset()
    torch.manual_seed(0)

    def watch(optimizer: object) -> NormRecorder:
        made.append(NormRecorder(optimizer, **dict(case.options)))  # type: ignore[arg-type]
        return made[-1]

    _, true = case.loop(watch, loops.CLIP)
    made[0].close()
    return made[0], true


def table_row(case: loops.Case) -> str:
    """One line of the table."""
    recorder, true = run(case)
    expected = number(true[STEP - 1]) if true else "there is none"
    clauses = [clause(finding) for finding in recorder.findings]
    if case.refused:
        found = "refused"
        clauses += [] if any(f.blocks for f in recorder.findings) else [refusal(case)]
    else:
        record = recorder.record
        found = number(float(record.norms[list(record.steps).index(STEP)]))
    return f"| {case.name} | {found} | {expected} | {'; '.join(clauses)} |"


def refusal(case: loops.Case) -> str:
    """Why `suggest` refuses the norms of a longer run."""
    usual = loops.batches.__defaults__
    loops.batches.__defaults__ = (ENOUGH, torch.float32)
    try:
        recorder, _ = run(case)
        suggest(recorder.record)
    except SuggestionError as error:
        return f"**refused**: {first_clause(str(error))}"
    finally:
        loops.batches.__defaults__ = usual
    message = f"{case.name} should have been refused"
    raise AssertionError(message)


def clause(finding: Finding) -> str:
    """Without the place of the call, the reason and the advice."""
    text = finding.text.replace(f"the clip call at {finding.site} ", "the clip call ")
    first = first_clause(text)
    return f"**refused**: {first}" if finding.blocks else first


def first_clause(text: str) -> str:
    """What is wrong, without the reason and the advice."""
    return re.split(r"; |: |, so |, and |\. ", text)[0]


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:#.4g}" if math.isfinite(value) else str(value)


def page() -> str:
    """The whole page."""
    rows = "\n".join(table_row(case) for case in loops.CASES)
    return HEAD.format(step=STEP) + rows + "\n" + TAIL


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")
