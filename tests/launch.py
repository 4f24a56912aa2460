"""Runs one function in several processes at once, as `torchrun` would start them, and never leaves one behind."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 90  # seconds
# A server imports all of it once, and each rank is a fork of it.
CONTEXT = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
if sys.platform != "win32":
    CONTEXT.set_forkserver_preload(["torch", "lightning.pytorch", "lightning_sap", "sklearn.datasets"])


def run_ranks(function, folder, world=2, limit=LIMIT, gpu=False):
    """What `function(rank, folder)` returns in each of so many processes, by rank; it is named `module:function`.

    A rank that fails fails the call, with its output; the others are killed. They see no GPU unless told.
    """
    port, deadline = _free_port(), time.monotonic() + limit
    ranks = [_start(function, folder, rank, world, port, gpu) for rank in range(world)]
    try:
        codes = [None] * world
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.1)
            codes = [process.exitcode for process in ranks]
        outputs = "\n".join(f"--- rank {rank}\n{_log(folder, rank).read_text()[-6000:]}" for rank in range(world))
        assert codes == [0] * world, f"{outputs}\nexit codes by rank, within {limit} s: {codes}"
    finally:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):  # its group is named after it, and may outlive it
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _log(folder, rank):
    return folder / f"rank{rank}.log"


def _start(function, folder, rank, world, port, gpu):
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "NODE_RANK": 0, "MASTER_PORT": port}
    environment = {
        **os.environ,
        **{name: str(value) for name, value in places.items()},
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""}),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    _log(folder, rank).touch()
    process = CONTEXT.Process(target=_work, args=(function, folder, environment))
    process.start()
    return process


def _work(function, folder, environment):
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    rank, (module, _, name) = int(os.environ["RANK"]), function.partition(":")
    log = os.open(_log(folder, rank), os.O_WRONLY)
    os.dup2(log, 1), os.dup2(log, 2)
    rank_zero_only.rank = rank  # Lightning looks when it is imported
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        result = getattr(importlib.import_module(module), name)(rank, folder)
        torch.save(result, folder / f"rank{rank}.pt")
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(1)  # not by way of the process group, where another rank may keep this one waiting
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # none leaves while another waits for it; ending the group hangs in PyTorch 2.6
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)  # threads of gloo that outlive the group may abort an orderly exit
