"""Draws `tolerance_light.png` and `tolerance_dark.png`: the rounds of the search in `examples/digits.py`.

`python docs/figures/tolerance.py` in the root of the repository; needs what the examples need, takes half a minute on
one core, and writes the logs of both trainings to `outputs/digits`.
"""

import importlib.util
import warnings
from pathlib import Path

import torch

from lightning_sap import PQIMonitor, SAPCallback, Tolerance

HERE = Path(__file__).resolve().parent


def demo():
    """The demo, whose file has the name of another beside this one."""
    spec = importlib.util.spec_from_file_location("demo", HERE.parents[1] / "examples" / "digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    train, monitor = demo().train, PQIMonitor(monitor="val_acc", verbose=False)
    reference = train("dense", [])["val_acc"]
    train("pruned", [SAPCallback(tolerance=Tolerance("val_acc", 0.01, reference=reference)), monitor])
    for theme in ("light", "dark"):
        monitor.plot(dark=theme == "dark").savefig(HERE / f"tolerance_{theme}.png", dpi=135)


if __name__ == "__main__":
    main()
