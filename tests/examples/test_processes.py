"""The example app in two processes: every config and every kind of data, and the command as the docs have it."""

import os
import re
import subprocess
import sys

import pytest
import torch
from launch import ROOT, run_ranks

NAMES = [path.stem for path in sorted((ROOT / "examples" / "configs").glob("*.yaml"))]
NAMES += ["digits", "fashion_mnist", "cifar10", "image_folder"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks("app:run_all", tmp_path_factory.mktemp("ranks"), limit=300)


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_and_prunes_alike_without_advice(ranks, name):
    first, second = (found[name] for found in ranks)
    for found in (first, second):
        assert found["advice"] == []
        assert found["rounds"] == [0, 1, 2]
        assert found["masked"]
        assert found["samples"] == (found["images"] + 1) // 2  # each process has a half of the images
    assert first["remaining"] == second["remaining"] < 1
    assert first["validated"] == second["validated"]
    assert all(torch.equal(mask, second["masks"][key]) for key, mask in first["masks"].items())


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_the_command(tmp_path, strategy):
    command = "python examples/train.py fit --config examples/configs/digits_mlp.yaml --trainer.devices 2"
    assert command + " --trainer.strategy ddp" in (ROOT / "README.md").read_text()
    assert command + " --trainer.strategy ddp" in (ROOT / "examples" / "README.md").read_text()
    words = [str(ROOT / word) if word.startswith("examples/") else word for word in command.split()[1:]]
    short = ["--trainer.max_epochs=10", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    done = subprocess.run(
        [sys.executable, *words, "--trainer.strategy", strategy, *short],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "prunable: 43,520 weights" in done.stderr
    advice = [line for line in done.stderr.splitlines() if re.search(r"\.py:\d+: ", line)]
    assert [line for line in advice if "LeafSpec" not in line and "many workers" not in line] == []
