"""What the benchmarks share: the machine in words, and Markdown tables."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Processor, cores and versions, in one line."""
    try:
        model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
        processor = model.partition(": ")[2]
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "numpy"))
    return f"{processor}, {cores} cores, Python {platform.python_version()}, {packages}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def publish(name: str, text: str, *, keep: bool) -> None:
    """Print a result, and keep it under `benchmarks/results/` unless it was a quick try."""
    print(text)
    if keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(f"{text}\n\nMeasured on {machine()}.\n", encoding="utf-8")
