"""Draws `pqi_curve_*.png`: the PQ Index over the rounds of a lottery ticket, on scikit-learn's digits.

`python docs/figures/pqi_curve.py` in the root of the repository; needs scikit-learn and matplotlib, takes half a
minute on one core.
"""

import sys
from pathlib import Path

from digits import fit

from lightning_sap import FixedFraction, PQIMonitor, PruningCallback


def main():
    sap = PruningCallback(FixedFraction(0.2), rounds=30, every_n_epochs=10, scope="layer", rewind_weights="init")
    monitor = PQIMonitor(monitor="val_acc", stop_on=None)
    fit([sap, monitor], rounds=30, epochs=10)
    for theme in ("light", "dark"):
        monitor.plot(dark=theme == "dark").savefig(Path(__file__).with_name(f"pqi_curve_{theme}.png"), dpi=145)
    for row in monitor.rows():
        values = "index {pqi:.3f}, layer mean {layer_mean:.3f}, remaining {remaining:.2%}, val_acc {metric:.3f}"
        sys.stdout.write(f"round {row['round']}: {values.format(**row)}\n")


if __name__ == "__main__":
    main()
