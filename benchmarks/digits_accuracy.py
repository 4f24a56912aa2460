"""Test accuracy of the demo's pruned network against its dense baseline, over several seeds.

``python benchmarks/digits_accuracy.py`` takes about a minute and a half; ``--quick`` takes one seed and a tenth of the
epochs, and keeps no result.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import common
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import digits  # the demo itself, with its options

from lightning_sap import SAPCallback, Tolerance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    seeds = 1 if arguments.quick else arguments.seeds
    digits.EPOCHS = 12 if arguments.quick else digits.EPOCHS
    torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    common.hush()
    rows = []
    with tempfile.TemporaryDirectory() as digits.FOLDER:
        for seed in range(seeds):
            dense = digits.train("dense", [], seed)
            sap = SAPCallback(tolerance=Tolerance("val_acc", digits.DROP, reference=dense["val_acc"]))
            pruned = digits.train("pruned", [sap], seed)["test_acc"]
            dense = dense["test_acc"]
            rows.append((seed, 100 * dense, 100 * pruned, 100 * (pruned - dense), 100 * sap.remaining))
    rows.append(("median", *(statistics.median(column) for column in list(zip(*rows, strict=True))[1:])))
    head = ("seed", "dense, test accuracy (%)", "pruned (%)", "difference (points)", "remaining weights (%)")
    text = common.table(head, [[row[0], *(f"{value:.2f}" for value in row[1:])] for row in rows])
    title = f"Scikit-learn's digits, the demo's MLP and options, {digits.EPOCHS} epochs each, 300 test images.\n\n"
    common.publish("digits_accuracy", title + text, keep=not arguments.quick)


if __name__ == "__main__":
    main()
