"""Runs one function in several processes at once, as `torchrun` would start them, and never leaves one behind."""

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 90  # seconds; importing Lightning takes most of what is needed


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
            codes = [process.poll() for process, _ in ranks]
        outputs = "\n".join(f"--- rank {rank}\n{output.read_text()[-6000:]}" for rank, (_, output) in enumerate(ranks))
        assert codes == [0] * world, f"{outputs}\nexit codes by rank, within {limit} s: {codes}"
    finally:
        for process, _ in ranks:
            with contextlib.suppress(ProcessLookupError):  # its group is named after it, and may outlive it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
    output = folder / f"rank{rank}.log"
    with output.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, function, str(folder)],
            env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    return process, output


def _work(function, folder):
    rank, (module, _, name) = int(os.environ["RANK"]), function.partition(":")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        result = getattr(importlib.import_module(module), name)(rank, Path(folder))
        torch.save(result, Path(folder) / f"rank{rank}.pt")
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(1)  # not by way of the process group, where another rank may keep this one waiting
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)  # threads of gloo that outlive the group may abort an orderly exit


if __name__ == "__main__":
    _work(sys.argv[1], sys.argv[2])
