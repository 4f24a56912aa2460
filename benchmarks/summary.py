"""The five rows that the page of benchmarks begins with, picked out of the tables under `results/`.

`python benchmarks/summary.py` after any of the others; takes no time.
"""

import re

from common import RESULTS


def cell(name: str, column: str, *cells: str) -> str:
    """What the first table with that column has there, in its first row that begins with these cells."""
    lines = (RESULTS / f"{name}.md").read_text(encoding="utf-8").splitlines()
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head = next(row for row in rows if column in row)
    found = next(row for row in rows if row[: len(cells)] == [*cells])
    return found[head.index(column)]


def middle(text: str) -> str:
    """A median without the spread behind it."""
    return re.sub(r" \(.*?\)", "", text)


def rows() -> list[tuple[str, str, str]]:
    """What is measured, ours, and what stands beside it."""
    search = ("tolerance", "remaining, median", "digits, MLP, 80 epochs")
    half = ("one_pruning_cpu", "time", "resnet50 (25.5 M)", "global", "half (50%)")
    step = ("training_step_cpu", "time of a step", "resnet18, batches of (32, 3, 32, 32)")
    return [
        (
            "weights left within a point of validation accuracy, MLP on digits",
            f"{cell(*search, 'search')} by the search, nothing tuned",
            f"{cell(*search, 'best fixed 0.2, global')} by the best of ten fixed fractions",
        ),
        (
            "one pruning of half of ResNet-50, whole network",
            middle(cell(*half, "ours")),
            f"{middle(cell(*half, 'global_unstructured'))} by `global_unstructured`",
        ),
        (
            "a training step of ResNet-18 under masks, 32 images; the dense step is 1",
            middle(cell(*step, "ours")),
            f"{middle(cell(*step, 'ModelPruning'))} by `ModelPruning`",
        ),
        (
            "memory after 30 prunings, as multiples of the model; dense training takes 3",
            middle(cell("memory", "round 30", "ours")),
            f"{middle(cell('memory', 'round 30', '`ModelPruning`'))} by `ModelPruning`",
        ),
        (
            "file of a ResNet-50 without nine tenths of its weights; the dense file is 1",
            f"{cell('deploy', '`same`', '90%')} packed bit for bit, {cell('deploy', '`int8`', '90%')} in eight bits",
            f"{cell('deploy', 'zlib-6 of the dense file', '90%')} by zlib",
        ),
    ]  # fmt: skip


def table() -> str:
    """The rows in Markdown."""
    lines = ["| | here | beside it |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows())]
    return "\n".join(lines) + "\n"


def main() -> None:
    (RESULTS / "summary.md").write_text(table(), encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
