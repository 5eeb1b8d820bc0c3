"""Commands as they are: true norms, their own exit code, output and signals, and why none came."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from frameworks_table import holds
from typer.testing import CliRunner

from normtune import launch, orders
from normtune.cli import app
from normtune.errors import NormtuneError
from normtune.launch import Launched, NothingRecordedError, record_command
from normtune.orders import Orders
from normtune.records import NormRecord

SCRIPTS = Path(__file__).parent / "scripts"
PYTHON = sys.executable
LIMIT_SECONDS = 150.0


@pytest.fixture(autouse=True)
def _quiet_libraries(monkeypatch):
    """One thread, no downloads, and no coverage of a child's own start."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def recorded(folder, *command, **options):
    """The command recorded in `folder`, and the norms that it wrote there itself."""
    before = Path.cwd()
    os.chdir(folder)
    limit = threading.Timer(LIMIT_SECONDS, end_children)
    limit.start()
    try:
        with (folder / "output.txt").open("w") as output:
            done = record_command([str(part) for part in command], stdout=output, **options)
    finally:
        limit.cancel()
        os.chdir(before)
    truth = folder / "truth.txt"
    return done, np.loadtxt(truth) if truth.exists() else None


def end_children():
    """A command that hangs must not hang the tests."""
    for child in psutil.Process().children(recursive=True):
        child.kill()


def alone(folder, script, *arguments):
    """The script in this process, unwatched."""
    argv, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    finally:
        sys.argv = argv


def same(a, b):
    a, b = torch.load(a), torch.load(b)
    return all(torch.equal(a[key], b[key]) for key in a)


# --- scripts that nobody edits -----------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A script with arguments and its own clipping."""
    folder = tmp_path_factory.mktemp("clips")
    os.environ["OMP_NUM_THREADS"] = "1"
    script = [PYTHON, SCRIPTS / "clips.py", "--truth", "truth.txt", "--save", "model.pt"]
    return folder, *recorded(folder, *script)


def test_a_script_with_its_own_clipping_gives_its_unclipped_norms(clips):
    """Every step is there, with the value that the script asked for."""
    _, done, truth = clips
    np.testing.assert_allclose(done.record.norms, truth, rtol=1e-5)
    holds("`normtune record`, script with its own clipping", done.record.norms, truth)
    assert done.record.series.startswith("scripts/clips.py:")
    assert done.record.current == 0.5
    assert done.suggestion.max_norm > 0


def test_the_command_keeps_its_output_folder_and_parameters(clips, capsys):
    """It prints what it prints, writes where it writes, and learns what it learns."""
    folder, done, _ = clips
    alone(folder, "clips.py", "--save", folder / "alone.pt")
    assert (folder / "output.txt").read_text() == capsys.readouterr().out
    assert same(folder / "model.pt", folder / "alone.pt")
    assert done.exit_code == 0
    left = {path.name for path in folder.iterdir()}
    assert left == {"output.txt", "truth.txt", "model.pt", "alone.pt", "clips.norms.jsonl"}


def test_an_imposed_max_norm_and_learning_rate_need_no_flag_of_the_script(tmp_path):
    """The parameters are those of a script that was told so by its own flags, bit for bit."""
    given = Orders(tmp_path, max_norm=0.3, lr_factor=0.5)
    script = [PYTHON, str(SCRIPTS / "clips.py"), "--lr", "0.1", "--save", str(tmp_path / "a.pt")]
    with Launched(script, given, stdout=subprocess.DEVNULL) as launched:
        assert launched.wait(60) == 0
    alone(tmp_path, "clips.py", "--lr", 0.05, "--clip", 0.3, "--save", tmp_path / "b.pt")
    assert same(tmp_path / "a.pt", tmp_path / "b.pt")
    record = NormRecord.load(launch.records_in(tmp_path)[0])
    assert set(record.max_norm) == {0.3}


def test_a_script_without_clipping_is_recorded_and_its_exit_code_is_its_own(tmp_path, capfd):
    """A script that ends with 7 at its fortieth step still gives its norms, through the CLI."""
    output = tmp_path / "run.norms.jsonl"
    script = [PYTHON, str(SCRIPTS / "clips.py"), "--clip", "0", "--fail-at", "39"]
    done = CliRunner().invoke(app, ["record", "--output", str(output), "--", *script])
    assert done.exit_code == 7
    assert "recorded 40 unclipped norms" in done.stdout
    assert "suggested max_norm" in done.stdout
    assert "exit code 7" in done.stderr
    assert "step 20 loss" in capfd.readouterr().out
    assert np.isinf(NormRecord.load(output).max_norm).all()


def test_a_script_without_an_optimizer_object_is_recorded_by_its_clip_calls(tmp_path):
    """A hand-written update after clip_grad_norm_ has a norm a step all the same."""
    script = [PYTHON, SCRIPTS / "by_hand.py", "--truth", "truth.txt"]
    done, truth = recorded(tmp_path, *script)
    np.testing.assert_allclose(done.record.norms, truth, rtol=1e-5)
    holds("`normtune record`, script without an optimizer object", done.record.norms, truth)
    assert done.record.metadata["by"] == "clip"
    assert done.record.metadata.get("optimizer") is None


def test_a_training_in_a_forked_process_and_two_in_a_row_are_told_apart(tmp_path):
    """A forked child of multiprocessing runs no exit handlers; its last steps are kept all the same."""
    done, _ = recorded(tmp_path, PYTHON, SCRIPTS / "forks.py")
    path = tmp_path / done.path
    child, parent = NormRecord.load(path, attempt=1), NormRecord.load(path, attempt=2)
    assert len(child) == len(parent) == 35
    assert np.array_equal(child.norms, parent.norms)
    assert parent.series == "SGD"
    again = NormRecord.load(path, attempt=2, series="SGD 2")
    assert np.array_equal(again.norms, parent.norms)


@pytest.mark.slow
def test_a_lightning_script_gives_its_unclipped_norms(tmp_path):
    """Its Trainer clips in the closure of the step; the norms are from before."""
    pytest.importorskip("lightning", reason="needs the extra lightning")
    done, truth = recorded(tmp_path, PYTHON, SCRIPTS / "with_lightning.py", "--truth", "truth.txt")
    np.testing.assert_allclose(done.record.norms, truth, rtol=1e-5)
    holds("`normtune record`, Lightning script", done.record.norms, truth)
    assert done.record.current == 0.5


@pytest.mark.slow
def test_a_hugging_face_trainer_script_gives_the_norms_that_it_logs(tmp_path):
    """With logging_steps=1 the Trainer's own log has every norm, from before clipping."""
    pytest.importorskip("transformers", reason="needs the extra transformers")
    done, _ = recorded(tmp_path, PYTHON, SCRIPTS / "with_trainer.py", "--output", tmp_path)
    logged = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    norms = [float(line["grad_norm"]) for line in logged if "grad_norm" in line]
    np.testing.assert_allclose(done.record.norms, norms, rtol=1e-3)  # it logs four digits
    holds("`normtune record`, Hugging Face Trainer script", done.record.norms, norms)
    assert done.record.current == 1.0


@pytest.mark.slow
def test_an_accelerate_launch_with_accumulation_gives_the_norm_of_each_sum(tmp_path):
    """The launcher starts the script in a process of its own."""
    pytest.importorskip("accelerate", reason="needs the extra accelerate")
    options = "--cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [Path(PYTHON).parent / "accelerate", "launch", *options.split()]
    done, truth = recorded(
        tmp_path, *command, SCRIPTS / "with_accelerate.py", "--truth", "truth.txt"
    )
    np.testing.assert_allclose(done.record.norms, truth, rtol=1e-5)
    holds("`normtune record`, accelerate launch", done.record.norms, truth)


# --- several ranks -----------------------------------------------------------------------------


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def spawned(tmp_path_factory):
    """A script that starts its two ranks by mp.spawn."""
    os.environ["OMP_NUM_THREADS"] = "1"
    script = [PYTHON, SCRIPTS / "ddp.py", "--spawn", 2, "--port", free_port()]
    return recorded(tmp_path_factory.mktemp("spawned"), *script, "--truth", "truth.txt")


@pytest.mark.slow
def test_mp_spawn_inside_the_script_is_followed(spawned):
    """The processes that torch.multiprocessing spawns are watched, and rank 0 writes."""
    done, truth = spawned
    np.testing.assert_allclose(done.record.norms, truth, rtol=1e-5)
    holds("`normtune record`, mp.spawn", done.record.norms, truth)


@pytest.mark.slow
def test_torchrun_with_two_ranks_gives_one_record_and_ends_after_the_steps_asked_for(
    spawned, tmp_path
):
    """Rank 0 writes; both ranks end at the same step, so that none waits for the other."""
    torchrun = [Path(PYTHON).parent / "torchrun", "--nproc-per-node", 2]
    torchrun += ["--master-port", free_port(), SCRIPTS / "ddp.py", "--steps", 10**6]
    done, _ = recorded(tmp_path, *torchrun, steps=40)
    _, truth = spawned  # the same script and seeds
    np.testing.assert_allclose(done.record.norms, truth[:40], rtol=1e-5)
    holds("`normtune record`, torchrun with 2 processes", done.record.norms, truth)
    assert done.exit_code == 0
    assert done.record.metadata["world_size"] == 2
    assert not [note for note in done.record.origin.notes if "other start" in note]


# --- kills and signals -------------------------------------------------------------------------


@pytest.mark.slow
def test_twenty_kills_at_random_moments_cost_at_most_one_flush_each(tmp_path):
    """Every record reads back, and holds all but the steps since its last flush."""
    command = [PYTHON, str(SCRIPTS / "killed.py"), "20", "1"]
    with Launched(command, Orders(tmp_path), stdout=subprocess.PIPE) as launched:
        output, _ = launched._process.communicate(timeout=90)
    lost = {}
    for line in output.decode().splitlines():
        pid, steps = map(int, line.split())
        path = tmp_path / f"rank0-{pid}.norms.jsonl"
        rows = path.read_text().count('"norm":') if path.exists() else 0
        if rows:
            assert len(NormRecord.load(path)) == rows
        lost[pid] = steps - rows
    assert len(lost) == 20
    assert max(lost.values()) <= 101  # the hundred of a flush, and the step that was under way
    assert min(lost.values()) >= -1


WAITS = """
    import signal, sys, time
    def stop(number, frame):
        print("got", number, flush=True)
        sys.exit(5)
    signal.signal(signal.{name}, stop)
    print("ready", flush=True)
    time.sleep(30)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_are_handed_on_and_the_commands_answer_is_awaited(name, tmp_path):
    """The command handles Ctrl-C and SIGTERM in its own way, once, and its exit code is kept."""
    script = textwrap.dedent(WAITS.format(name=name))
    normtune = [PYTHON, "-m", "normtune", "record", "--", PYTHON, "-c", script]
    process = subprocess.Popen(
        normtune, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(getattr(signal, name))
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert output == f"got {int(getattr(signal, name))}\n"
    assert process.returncode == 5
    assert "nothing was recorded" in errors
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_a_signal_ends_gets_the_exit_code_of_a_shell(tmp_path):
    """128 + 9 for SIGKILL."""
    with pytest.raises(NothingRecordedError) as caught:
        recorded(tmp_path, "sh", "-c", "kill -9 $$")
    assert caught.value.exit_code == 137


def test_ending_a_command_ends_all_that_it_started(tmp_path):
    """A child of the command does not outlive it, even one that ignores SIGTERM."""
    shell = f"trap '' TERM; (sleep 60 & echo $! > {tmp_path}/pid; wait) & wait"
    with Launched(["sh", "-c", shell], Orders(tmp_path)) as launched:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
            time.sleep(0.02)
        launched.end(grace=0.2)
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(child)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


# --- processes without torch -------------------------------------------------------------------


def test_a_process_without_torch_loads_nothing_of_normtune(tmp_path):
    """It leaves a mark, and neither its modules nor its path say that normtune was there."""
    probe = "import sys; print([m for m in sys.modules if 'normtune' in m], sys.path)"
    given = Orders(tmp_path)
    watched = subprocess.run(
        [PYTHON, "-c", probe], env=given.environment(), capture_output=True, text=True, check=True
    )
    plain = subprocess.run([PYTHON, "-c", probe], capture_output=True, text=True, check=True)
    assert watched.stdout == plain.stdout
    assert len(orders.marks(tmp_path, orders.PYTHON)) == 1


def test_an_existing_sitecustomize_still_runs(tmp_path, monkeypatch):
    """The one that Python would have found is found, by its own name."""
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.mine = __file__\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probe = "import sitecustomize; print(mine == sitecustomize.__file__)"
    done = subprocess.run(
        [PYTHON, "-c", probe],
        env=Orders(tmp_path).environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "True\n"


# --- nothing recorded --------------------------------------------------------------------------

OPTIMIZER = "import torch; torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1)"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["true"], "no Python process of true saw normtune"),
        ([PYTHON, "-I", "-c", "pass"], "was started with -I"),
        (["env", "-i", PYTHON, "-c", "pass"], "with a cleared environment"),
        ([PYTHON, "-c", "pass"], "torch was not imported by its Python process"),
        (
            [PYTHON, "-c", f"{OPTIMIZER}; exit(3)"],
            "no step was taken before the command ended with",
        ),
    ],
    ids=["no Python", "-I", "env -i", "no torch", "no step"],
)
def test_a_command_that_gives_no_norms_is_told_why(command, words, tmp_path):
    """One of the known reasons, and nothing is left behind."""
    with pytest.raises(NothingRecordedError) as caught:
        recorded(tmp_path, *command)
    assert words in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"output.txt"}


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (orders.OVER, '{"optimizers": 0, "steps": 0}', "no optimizer of torch.optim was made"),
        (orders.PYTHON, "", "killed before their first step"),
        (orders.FAILED, "OSError: no room", "could not work in a process of true: OSError"),
    ],
)
def test_the_marks_of_the_processes_tell_the_reason(kind, text, words, tmp_path):
    """Torch was imported by a process that left these marks."""
    with Launched(["true"], Orders(tmp_path)) as launched:
        launched.wait(10)
    for mark, said in ((orders.PYTHON, ""), (orders.TORCH, ""), (kind, text)):
        orders.mark(tmp_path, mark, said)
    assert words in launch.why_nothing(launched)


def test_a_command_that_fails_early_is_not_told_of_its_optimizer(tmp_path):
    """Its own error is the reason."""
    with Launched(["false"], Orders(tmp_path)) as launched:
        launched.wait(10)
    for mark, said in ((orders.PYTHON, ""), (orders.TORCH, ""), (orders.OVER, '{"optimizers": 0}')):
        orders.mark(tmp_path, mark, said)
    assert "exit code 1 before it made an optimizer" in launch.why_nothing(launched)


def test_steps_without_gradients_are_the_reason_where_they_are(tmp_path):
    """What was found about the steps is said instead of a guess."""
    script = "p = torch.nn.Parameter(torch.ones(2)); torch.optim.SGD([p], lr=1).step()"
    with pytest.raises(NothingRecordedError, match="ran without any gradient"):
        recorded(tmp_path, PYTHON, "-c", f"import torch; {script}")


def test_a_command_that_cannot_be_started_is_one_line(tmp_path):
    """A misspelt program is named."""
    with pytest.raises(NormtuneError, match="cannot start pyhton: No such file"):
        recorded(tmp_path, "pyhton", "train.py")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-norm", "-1", "--", "true"], "max_norm must be a number above 0"),
        (["--steps", "0", "--", "true"], "steps must be at least 1"),
        (["--steps", "5", "study.yaml"], "are for commands"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments, words, tmp_path, monkeypatch):
    """What was asked, what came, and what to do."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["record", *arguments])
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_records_are_merged_so_that_the_longest_is_read(tmp_path):
    """Each stays an attempt; a torn last line of a killed process costs only itself."""
    from normtune.records import RecordWriter, dumps, header, row

    for name, n in (("rank0-1", 40), ("rank1-2", 40), ("rank0-3", 50)):
        writer = RecordWriter(tmp_path / f"{name}.norms.jsonl")
        writer.write([dumps(header(attempt=name))])
        writer.write([row(i, 1.0 + i) for i in range(1, n + 1)])
        writer.close()
    with (tmp_path / "rank0-3.norms.jsonl").open("a") as file:
        file.write('{"step": 51, "nor')
    found = launch.records_in(tmp_path)
    assert [path.name.partition(".")[0] for path in found] == ["rank0-3", "rank0-1", "rank1-2"]
    launch.merge(found, tmp_path / "all.norms.jsonl")
    assert len(NormRecord.load(tmp_path / "all.norms.jsonl")) == 50
    assert NormRecord.load(tmp_path / "all.norms.jsonl", attempt=2).metadata["attempt"] == "rank0-1"


def test_a_command_may_be_recorded_from_a_thread(tmp_path):
    """Signals can only be handled in the main thread; elsewhere they are left alone."""
    caught = []

    def record():
        with pytest.raises(NothingRecordedError) as error:
            record_command(["true"], output=tmp_path / "x.norms.jsonl")
        caught.append(error.value.exit_code)

    thread = threading.Thread(target=record)
    thread.start()
    thread.join(20)
    assert caught == [0]
