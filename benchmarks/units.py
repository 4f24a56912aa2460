"""Whole units pruned as far as a tolerance allows, and taken out: what remains, how good it is, and how fast.

``python benchmarks/units.py --images FOLDER`` takes some twenty minutes on one core; without images the digits alone
are trained, which takes two. ``--quick`` is a short try.
"""

import argparse
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import common
import torch
from lightning.pytorch import Trainer, seed_everything
from tolerance_tasks import TASKS, Task, loaders, models
from torch import nn

from lightning_sap import SAPCallback, Tolerance, shrink

ROWS, SCOPES = 256, ("global", "layer")
TITLE = """CNNs of two and three convolutions with batch norms, `SAPCallback(structure="unit", tolerance=...)` of one
point below the dense network's accuracy, trained as long: three seeds each. Remaining: of the prunable weights, which
are those of the network that `shrink` gives. Accuracies are in points below the dense network: on the images that the
search looks at, and on others that were held out. Latency: {rows} images on one thread, the shrunk network's time over
the dense one's, best of 20 calls each, taken in turns.
"""


class Found(NamedTuple):
    """What came out of one seed."""

    remaining: float
    channels: list[int]
    searched: float
    held_out: float
    latency: float


def tasks(images: str) -> dict[str, Task]:
    """The networks that are pruned."""
    narrow, images_cnn = TASKS["digits, CNN"], TASKS["images, CNN"]
    digits = {
        "digits, 16-32": narrow,
        "digits, 64-128": replace(narrow, network=partial(models.CNN, (1, 8, 8), 10, hidden=(64, 128))),
    }
    return {**digits, "images, 8-16-32": images_cnn} if images else digits


def train(task: Task, images: str, seed: int, epochs: int, callbacks: list) -> tuple[nn.Module, list[float]]:
    """A trained module, and its accuracies on the part to search by and on the part held out."""
    seed_everything(seed, verbose=False)
    module, (train_data, search_by, held_out) = task.network(), loaders(task.data(images))
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, accelerator="cpu", devices=1, **common.QUIET)
    trainer.fit(module, train_data, search_by)
    scores = [trainer.validate(module, part, verbose=False)[0]["val_acc"] for part in (search_by, held_out)]
    return module.eval(), scores


def latency(small: nn.Module, dense: nn.Module, rows: torch.Tensor) -> float:
    """Time of the small network over that of the dense one."""
    times: list[list[float]] = [[], []]
    with torch.inference_mode():
        for _ in range(20):
            for network, of in zip((small, dense), times, strict=True):
                start = time.perf_counter()
                network(rows)
                of.append(time.perf_counter() - start)
    return min(times[0]) / min(times[1])


def run(task: Task, images: str, seed: int, epochs: int) -> dict[str, Found]:
    """By scope what came out of a seed."""
    dense, before = train(task, images, seed, epochs, [])
    rows, found = task.data(images)[1].tensors[0][:ROWS], {}
    for scope in SCOPES:
        sap = SAPCallback(structure="unit", scope=scope, tolerance=Tolerance("val_acc", task.drop, reference=before[0]))
        pruned, after = train(task, images, seed, epochs, [sap])
        small = shrink(pruned.network, rows)
        channels = [layer.out_channels for layer in small.modules() if isinstance(layer, nn.Conv2d)]
        searched, held_out = (100 * (b - a) for b, a in zip(before, after, strict=True))
        found[scope] = Found(sap.remaining, channels, searched, held_out, latency(small, dense.network, rows))
        print(seed, scope, before, found[scope], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", default="", help="folder, or a tar of it, with train/<class>/ and test/<class>/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a short try that keeps nothing")
    arguments = parser.parse_args()
    common.hush()
    rows = []
    for name, task in tasks("" if arguments.quick else arguments.images).items():
        epochs, seeds = (8, 1) if arguments.quick else (task.epochs, arguments.seeds)
        runs = [run(task, arguments.images, seed, epochs) for seed in range(seeds)]
        for scope in SCOPES:
            found = [of_seed[scope] for of_seed in runs]
            median = {field: statistics.median(getattr(f, field) for f in found) for field in ("remaining", "latency")}
            rows.append(
                [
                    f"{name}, {epochs} epochs",
                    scope,
                    f"{median['remaining']:.1%} ({', '.join(f'{f.remaining:.1%}' for f in found)})",
                    "; ".join("-".join(map(str, f.channels)) for f in found),
                    ", ".join(f"{f.searched:.1f}" for f in found),
                    ", ".join(f"{f.held_out:.1f}" for f in found),
                    f"{median['latency']:.2f} ({', '.join(f'{f.latency:.2f}' for f in found)})",
                ]
            )
    head = ("network", "scope", "remaining", "channels", "points lost", "points lost, held out", "latency")
    common.publish("units", f"{TITLE.format(rows=ROWS)}\n{common.table(head, rows)}", keep=not arguments.quick)


if __name__ == "__main__":
    main()
