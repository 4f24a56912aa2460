"""What every test gets: the same clean state at its start, and a failure if it leaves something behind."""

import logging
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Set by Lightning and PyTorch and never unset: taken back quietly.
SET_BY_LIBRARIES = frozenset(
    {
        "CUBLAS_WORKSPACE_CONFIG",  # Trainer(deterministic=True)
        "PYTORCH_NVML_BASED_CUDA_CHECK",  # first import of Lightning
        "PL_GLOBAL_SEED",  # seed_everything
        "PL_SEED_WORKERS",
        "MASTER_ADDR",  # distributed strategies
        "MASTER_PORT",
        "WORLD_SIZE",
        "NODE_RANK",
        "LOCAL_RANK",
        "RANK",
        "OMP_NUM_THREADS",
        "KMP_DUPLICATE_LIB_OK",  # first use of OpenMP
        "KMP_INIT_AT_FORK",
        "CUDA_MODULE_LOADING",  # first use of CUDA
        "TORCHINDUCTOR_CACHE_DIR",  # torch.compile
        "TRITON_CACHE_DIR",
    }
)
OF_PYTEST = "PYTEST_CURRENT_TEST"  # pytest writes it anew for each phase of a test

os.environ.setdefault("MPLBACKEND", "Agg")  # no test opens a window

# The same examples on every run, however busy the machine is.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the full matrices too (make test-all)")


def pytest_runtest_setup(item):
    if item.get_closest_marker("full") and not item.config.getoption("--full"):
        pytest.skip("part of the full matrix: give --full")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("linux") and sys.platform != "linux":
        pytest.skip("needs Linux")


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(getattr(item, "module", None), "run_ranks"):  # several processes, ended by signals
            item.add_marker(pytest.mark.linux)


@pytest.fixture(scope="session")
def shared():
    """The folder of reference data that may stand beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the reference data is not beside the repository")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def lightning_logs_through_pytest():
    """Hand Lightning's log to pytest: out of sight while a test passes, and visible to `caplog`."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


@pytest.fixture(autouse=True)
def clean_state():
    """Seed, take one thread and an empty working directory; afterwards restore everything and name what leaked."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)  # not `seed_everything`, which writes to the environment
    home, threads, determinism = os.getcwd(), torch.get_num_threads(), _determinism()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        before = _watched()
        yield
        leaks = _differences(before, _watched())
        _restore(before)
        os.chdir(home)
    # Trainers leave these behind by design.
    _set_determinism(determinism)
    torch.set_num_threads(threads)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if leaks:
        pytest.fail("the test leaves behind: " + "; ".join(leaks), pytrace=False)


def _watched():
    """Everything a test must leave as it found it."""
    left_alone = ("SIGKILL", "SIGSTOP", "SIGALRM")  # the last is pytest-timeout's; Windows has none of them
    signals = signal.valid_signals() - {getattr(signal, name, None) for name in left_alone}
    return {
        "environment": {name: value for name, value in os.environ.items() if name != OF_PYTEST},
        "signal handlers": {number: signal.getsignal(number) for number in signals},
        "process": {
            "default dtype": torch.get_default_dtype(),
            "default device": torch.get_default_device(),
            "gradients enabled": torch.is_grad_enabled(),
            "working directory": os.getcwd(),
        },
    }


def _differences(before, after):
    """One line for each thing that is not as it was, in every group of `_watched`."""
    return [
        f"{group}: {name} was {before[group].get(name)!r} and is {after[group].get(name)!r}"
        for group in before
        for name in sorted({*before[group], *after[group]})
        if before[group].get(name) != after[group].get(name) and name not in SET_BY_LIBRARIES
    ]


def _restore(state):
    environment = state["environment"]
    for name in os.environ.keys() - environment.keys() - {OF_PYTEST}:
        del os.environ[name]
    os.environ.update(environment)
    for number, handler in state["signal handlers"].items():
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)
    torch.set_default_dtype(state["process"]["default dtype"])
    if torch.get_default_device() != state["process"]["default device"]:
        torch.set_default_device(state["process"]["default device"])
    torch.set_grad_enabled(state["process"]["gradients enabled"])


def _determinism():
    cudnn = torch.backends.cudnn
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warn_only, cudnn.deterministic, cudnn.benchmark


def _set_determinism(flags):
    algorithms, warn_only, deterministic, benchmark = flags
    torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = benchmark
