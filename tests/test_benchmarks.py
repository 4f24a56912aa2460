"""The benchmarks behind the numbers of README and docs run, in their quick forms."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


LONG = [
    "adaptive_amounts.py",
    "algorithms.py",
    "growth.py",
    "memory.py",
    "monitoring.py",
    "one_pruning.py",
    "semi_structured.py",
    "tolerance.py",
    "training_step.py",
    "units.py",
]
SCRIPTS = [
    "checkpoints.py",
    "deploy.py",
    "digits_accuracy.py",
    "small_file.py",
    *(pytest.param(name, marks=pytest.mark.full) for name in LONG),
]


def curves(folder):
    """Sixteen runs whose index falls, rises and, in every other one, falls with the accuracy again."""
    falls, holds = (0.3, 0.2, 0.15, 0.12, 0.15, 0.2, 0.25, 0.1, 0.05, 0.01), (0.3, 0.2, 0.15, *[0.12] * 7)
    rounds = {
        True: [(index, acc) for index, acc in zip(falls, (*[0.95] * 7, 0.5, 0.2, 0.1), strict=True)],
        False: [(index, 0.95) for index in holds],
    }
    runs = [
        {
            **{"arch": "ab"[i % 2], "scope": "layer", "policy": "fixed", "rewind": None},
            "rounds": [
                {
                    **{"val_acc": acc, "val_loss": 1 - acc, "pqi": index, "remaining": 1 - 0.09 * t},
                    "layers": {"w": [index, 1000 - 90 * t, 1000]},
                }
                for t, (index, acc) in enumerate(rounds[i % 16 < 8])
            ],
        }
        for i in range(16)
    ]
    file = folder / "curves.json"
    file.write_text(json.dumps(runs))
    return file


@pytest.fixture
def summary(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("summary")
    del sys.modules["summary"], sys.modules["common"]


def test_the_rows_that_the_docs_begin_with_are_those_of_the_tables(summary):
    assert (BENCHMARKS / "results" / "summary.md").read_text(encoding="utf-8") == summary.table()


def test_the_table_of_the_readme_is_that_of_the_benchmark(summary):
    text = (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if " epochs | " in line]
    assert len(rows) == 6
    for task, fixed, search in rows:
        found = summary.cell("tolerance", "remaining, median", task, "search")
        assert search.partition(",")[0].strip("*") == found
        lines = (BENCHMARKS / "results" / "tolerance.md").read_text(encoding="utf-8").splitlines()
        best = next(line for line in lines if line.startswith(f"| {task} | best fixed")).split("|")[3].strip()
        assert fixed == {"100.0%": "none"}.get(best, best)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("script", [*SCRIPTS, "phase_halves.py"])
def test_a_quick_run_prints_a_table(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    before = sorted((BENCHMARKS / "results").iterdir())
    data = ["--curves", str(curves(tmp_path))] if script == "phase_halves.py" else []
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--quick", *data],
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "| --- |" in done.stdout
    assert sorted((BENCHMARKS / "results").iterdir()) == before
