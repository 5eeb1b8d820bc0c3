"""What all tests share."""

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Two cores are shared by the test processes."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
