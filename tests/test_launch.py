"""What runs in several processes is bounded in time and leaves nothing behind, however it ends."""

import os
import socket
import subprocess
import sys
import time

import pytest
from launch import run_ranks


def with_a_child(rank, folder, then):
    """Every rank starts a process of its own; rank 0 holds the port, and rank 1 says what comes next."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / f"pids{rank}").write_text(f"{os.getpid()} {child.pid}")
    if rank == 0:
        held = socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"])))
        (folder / "port").write_text(str(held.getsockname()[1]))
    while not all((folder / name).exists() for name in ("pids0", "pids1", "port")):
        time.sleep(0.01)
    if rank == 1:
        then()
    time.sleep(600)


def hang(rank, folder):
    with_a_child(rank, folder, lambda: None)


def fail(rank, folder):
    with_a_child(rank, folder, lambda: 1 / 0)


def end(rank, folder):
    """Both come to their end and leave a process behind."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / f"pids{rank}").write_text(f"{os.getpid()} {child.pid}")
    return rank


def is_running(pid):
    """A process that ended and that nobody has asked for yet does not count."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def still_running(folder):
    pids = [int(pid) for rank in range(2) for pid in (folder / f"pids{rank}").read_text().split()]
    assert len(pids) == 4
    deadline = time.monotonic() + 5  # the kernel takes a moment
    while (left := list(filter(is_running, pids))) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="asks /proc which processes run")
class TestNothingIsLeft:
    @pytest.mark.parametrize(
        ("how", "limit", "codes"), [("hang", 8, "[None, None]"), ("fail", 90, "[None, 1]")], ids=["hang", "fail"]
    )
    def test_nothing_is_left_of_ranks_that_hang_or_fail(self, tmp_path, how, limit, codes):
        started = time.monotonic()
        with pytest.raises(AssertionError) as error:
            run_ranks(f"test_launch:{how}", tmp_path, limit=limit)
        assert time.monotonic() - started < limit + 5
        assert f"exit codes by rank, within {limit} s: {codes}" in str(error.value)
        assert ("ZeroDivisionError" in str(error.value)) == (how == "fail")
        assert still_running(tmp_path) == []
        socket.create_server(("127.0.0.1", int((tmp_path / "port").read_text()))).close()

    def test_nothing_is_left_of_ranks_that_end_well(self, tmp_path):
        assert run_ranks("test_launch:end", tmp_path) == [0, 1]
        assert still_running(tmp_path) == []
