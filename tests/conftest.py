"""What all tests share."""

import os
import signal

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Two cores are shared by the test processes."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def postgres_server():
    """A real PostgreSQL on loopback; tests that need one are skipped where none is installed."""
    import postgres

    with postgres.running() as server:
        yield server
