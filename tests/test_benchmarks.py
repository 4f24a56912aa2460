"""The benchmarks behind the numbers of README and docs run, in their quick forms."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


LONG = ["adaptive_amounts.py", "growth.py", "memory.py", "monitoring.py", "one_pruning.py", "training_step.py"]
SCRIPTS = ["checkpoints.py", "digits_accuracy.py", *(pytest.param(name, marks=pytest.mark.full) for name in LONG)]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_quick_run_prints_a_table(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    before = sorted((BENCHMARKS / "results").iterdir())
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--quick"],
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "| --- |" in done.stdout
    assert sorted((BENCHMARKS / "results").iterdir()) == before
