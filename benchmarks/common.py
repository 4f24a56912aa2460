"""What the benchmarks share: options, clocks, memory, the machine in words, and Markdown tables."""

import argparse
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
RESULTS = Path(__file__).parent / "results"
CLOCK = {"cpu": "CPU time of the process, one thread", "cuda": "wall time up to the end of the device's work"}

torch.set_num_threads(1)  # in every process that a benchmark starts


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a short try that keeps nothing")


def hush() -> None:
    """Let Lightning be silent."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def now(device: str) -> float:
    """Seconds on the device's clock, with its work done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call: Callable[[], object], device: str) -> float:
    """How long a call takes."""
    start = now(device)
    call()
    return now(device) - start


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Median, least and most."""
    return "{} ({} to {})".format(*map(form.format, (statistics.median(values), min(values), max(values))))


def middle_half(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Median, lower and upper quartile."""
    lower, median, upper = statistics.quantiles(values)
    return "{} ({} to {})".format(*map(form.format, (median, lower, upper)))


def available() -> int:
    """Bytes of memory that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def resident(field: str) -> int:
    """Bytes of a field, such as VmRSS, of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def machine(device: str = "cpu") -> str:
    """Processor, cores and versions, in one line."""
    try:
        model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
        processor = model.partition(": ")[2]
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "numpy"))
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    return f"{gpu}{processor}, {cores} core{'s' if cores != 1 else ''}, Python {platform.python_version()}, {packages}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def publish(name: str, text: str, *, keep: bool, device: str = "cpu") -> None:
    """Print a result, and keep it under `benchmarks/results/` unless it was a quick try."""
    text = f"{text}\n\nMeasured on {machine(device)}.\n"
    print(text)
    if keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
