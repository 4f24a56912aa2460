"""Draws `rounds_*.png` and `layers_*.png`: a network pruned too hard, stopped and put back, on scikit-learn's digits.

`python docs/figures/phases.py` in the root of the repository; needs scikit-learn and matplotlib, takes half a minute
on one core, and prints the report that docs/phases.md shows.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from digits import fit

from lightning_sap import FixedFraction, PQIMonitor, PruningCallback


def main():
    monitor = PQIMonitor(monitor="val_acc", verbose=False)
    with TemporaryDirectory() as folder:
        sap = PruningCallback(FixedFraction(0.4), rounds=20, every_n_epochs=6, scope="global", dirpath=folder)
        fit([sap, monitor], rounds=20, epochs=6)
    for kind in ("rounds", "layers"):
        for theme in ("light", "dark"):
            figure = monitor.plot(kind, dark=theme == "dark")
            figure.savefig(Path(__file__).with_name(f"{kind}_{theme}.png"), dpi=135)
    sys.stdout.write("\n\n".join(monitor.report().split("\n\n")[:-2]))  # without the plan, which comes last


if __name__ == "__main__":
    main()
