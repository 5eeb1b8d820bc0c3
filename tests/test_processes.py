"""Runs as processes: that they end, with all that they started."""

import time

from small_study import carried_out, gone, task_for

from normtune.processes import Child, end_all


def test_a_run_takes_what_it_started_along(tmp_path):
    """Processes that a training left behind end with it."""
    body = "import subprocess\nprint(subprocess.Popen(['sleep', '300']).pid)\nos._exit(1)"
    body = body.replace("print(", "print(flush=True, *[").replace(".pid)", ".pid])")
    task = task_for(tmp_path, body)
    carried_out(task)
    left = int((task.folder / "output.txt").read_text())
    assert gone(left)


def test_runs_end_at_once(tmp_path):
    """A training that ignores SIGTERM is ended all the same."""
    body = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(1, flush=True)\n"
    task = task_for(tmp_path, body + "while True: time.sleep(1)")
    child = Child(task)
    output = task.folder / "output.txt"
    deadline = time.monotonic() + 60
    while not (output.exists() and output.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    end_all([child])
    assert not child.running
    assert child.outcome().reason == "killed (out of memory?)"
