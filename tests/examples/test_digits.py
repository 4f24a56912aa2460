"""The demo: what it prints, and what it leaves."""

import importlib
import re
from pathlib import Path

import pytest
import torch


@pytest.fixture
def digits(examples):
    """The demo, which trains on one thread."""
    threads = torch.get_num_threads()
    yield importlib.import_module("digits")
    torch.set_num_threads(threads)


def percent(line):
    return [float(number) for number in re.findall(r"([\d.]+)%", line)]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec:FutureWarning")
def test_the_demo_takes_a_round_back_and_hands_back_a_sparse_network_within_a_point(digits, capsys):
    pytest.importorskip("matplotlib")
    digits.main()
    printed = capsys.readouterr().out
    assert "taken back" in printed
    back, rounds = map(int, re.search(r"Rounds taken back: (\d+) of (\d+)", printed).groups())
    assert 1 <= back <= rounds / 2
    held = int(re.search(r"The module holds round (\d+)", printed)[1])
    assert 1 <= held < rounds
    dense, remaining, pruned = percent(next(line for line in printed.splitlines() if line.startswith("val accuracy")))
    assert pruned >= dense - 1.1  # a point, and what is rounded
    assert remaining < 10
    for name in ("pqi.png", "layers.png"):
        assert Path("outputs", "digits", name).stat().st_size > 10_000
