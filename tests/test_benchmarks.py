"""The benchmarks behind the numbers of README and docs run, in their quick form."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["digits_accuracy.py", "memory.py"])
def test_a_quick_run_prints_a_table(script, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    before = sorted((BENCHMARKS / "results").iterdir())
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--quick"], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "| --- |" in done.stdout
    assert sorted((BENCHMARKS / "results").iterdir()) == before
