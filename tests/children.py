"""What the tests run in processes of their own."""

import os
import sys
import time


def hand_made_steps(optimizer, parameter, n, first=1):
    """Steps on gradients with the norms first, first + 1, ..., and no autograd in it."""
    import torch

    for i in range(first, first + n):
        parameter.grad = torch.tensor([float(i)])
        optimizer.step()


def watched(path, **options):
    import torch

    from normtune.recorder import NormRecorder

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    return NormRecorder(optimizer, path, **options), optimizer, parameter


def train_until_killed(path, told):
    """Tell every step that was flushed; somebody kills this process."""
    recorder, optimizer, parameter = watched(path, flush_every=3)
    step = 0
    while True:
        hand_made_steps(optimizer, parameter, 3, step + 1)
        step += 3
        told.value = step
        assert len(recorder._buffer.waiting) == 0


ENDINGS = {"end": 0, "unheld": 0, "exception": 1, "sys.exit": 3}


def train_and_forget(path, how):
    """Seven steps, and no close() at all."""
    recorder, optimizer, parameter = watched(path)
    hand_made_steps(optimizer, parameter, 7)
    if how == "unheld":
        del recorder
    elif how == "exception":
        raise KeyboardInterrupt
    sys.exit(ENDINGS[how])


def end_in_every_way(folder):
    """A program for each ending, forked before it makes anything; prints their exit codes."""
    import torch._dynamo  # noqa: F401  loaded once for all: every optimizer needs it

    for how in ENDINGS:
        pid = os.fork()
        if not pid:
            train_and_forget(os.path.join(folder, f"{how}.norms.jsonl"), how)  # noqa: PTH118
        print(how, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def fork_while_recording(path):
    """A child that trains on, one that does nothing, and the parent, each at its own file."""
    recorder, optimizer, parameter = watched(path)
    hand_made_steps(optimizer, parameter, 5)  # these wait in the buffer
    for trains in (True, False):
        pid = os.fork()
        if not pid:
            if trains:
                hand_made_steps(optimizer, parameter, 4, 101)
                recorder.flush()
            else:
                recorder.flush()
                recorder.close()
            os._exit(0)
        os.waitpid(pid, 0)
    hand_made_steps(optimizer, parameter, 2, 6)
    recorder.close()


def train_on_a_filling_disk(path):
    """No room for a while, then room again; training must not notice."""
    import resource
    import signal
    import warnings

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    recorder, optimizer, parameter = watched(path, flush_every=5)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, hard))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hand_made_steps(optimizer, parameter, 40)
    assert len([w for w in caught if "cannot write its record" in str(w.message)]) == 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    hand_made_steps(optimizer, parameter, 10, 41)
    recorder.close()


def train_slowly(path, told):
    """A step now and then, for whoever reads the file meanwhile."""
    recorder, optimizer, parameter = watched(path, flush_every=1)
    for step in range(1, 60):
        hand_made_steps(optimizer, parameter, 1, step)
        told.value = step
        time.sleep(0.005)
    recorder.close()
