"""What adaptive amounts buy: how sparse SAP gets a network at one point of accuracy, beside fixed ones and one shot.

``python benchmarks/adaptive_amounts.py`` takes some minutes for scikit-learn's digits; ``--images FOLDER_OR_TAR`` adds
colour images in ``train/<class>/`` and ``test/<class>/``, which take an hour. ``--quick`` trains a few epochs of
everything on few digits, and keeps nothing.
"""

import argparse
import statistics
import sys
from pathlib import Path

import common
import images
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import models

from lightning_sap import FixedFraction, PruningCallback, SAPCallback

TOLERANCE = 0.01
FRACTIONS = (0.1, 0.2, 0.35, 0.5, 0.7)
SHOTS = (0.5, 0.7, 0.8, 0.9, 0.95)
NOTES = """How many weights remain in the sparsest network that is at most one point below the dense one, which was
trained for as many epochs from the same seed; {seeds} seeds. Every method has the same number of epochs and prunes each
layer by itself; SAP and the fixed fractions have as many rounds as the library plans by default.

- SAP, untuned: `SAPCallback()`.
- fixed: `PruningCallback(FixedFraction(f))` for f in {fractions}; the best of these five has the least median.
- one shot: the same with one pruning, half-way, for f in {shots}.

A network is one round's end. The accuracy is that on the held-out images, which also choose the round; 100% remaining
means that no pruned network was within the point.
"""


def digits(arguments):
    """Training images, training labels, held-out images and labels."""
    pixels, labels = images.digits()
    return pixels[:1197], labels[:1197], pixels[1197:], labels[1197:]


TASKS = {  # images, network, epochs
    "digits, MLP": (digits, lambda: models.MLP((1, 8, 8), 10), 80),
    "images, MLP": (
        lambda arguments: images.colour_images(arguments.images),
        lambda: models.MLP((3, 32, 32), 10, lr=0.02),
        24,
    ),
    "images, CNN": (
        lambda arguments: images.colour_images(arguments.images),
        lambda: models.CNN((3, 32, 32), 10, hidden=(8, 16, 32), lr=0.05),
        24,
    ),
}


def contenders(epochs):
    """By name, what is beside the dense network."""
    found = {"SAP, untuned": SAPCallback}
    for f in FRACTIONS:
        found[f"fixed {f}"] = lambda f=f: PruningCallback(FixedFraction(f))
    for f in SHOTS:
        found[f"one shot {f}"] = lambda f=f: PruningCallback(FixedFraction(f), rounds=1, every_n_epochs=epochs // 2)
    return found


def train(make, data, epochs, seed, device, callbacks):
    """Held-out accuracy at the end."""
    seed_everything(seed, verbose=False)
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, accelerator=device, devices=1, **common.QUIET)
    train_data, held_out = TensorDataset(*data[:2]), TensorDataset(*data[2:])
    trainer.fit(make(), DataLoader(train_data, 128, shuffle=True), DataLoader(held_out, 1000))
    return float(trainer.callback_metrics["val_acc"])


def remaining(pruner, dense):
    """Share of the weights of the sparsest round within the tolerance of the dense accuracy; 1.0 if there is none."""
    sound = [r.remaining for r in pruner.history if r.metrics["val_acc"] >= dense - TOLERANCE - 1e-6]
    return min(sound, default=1.0)


def rows_of(task, arguments, seeds):
    read, make, epochs = TASKS[task]
    data, epochs = read(arguments), arguments.epochs or epochs
    if arguments.quick:
        data, epochs = [part[:128] for part in data], 8
    left = {name: [] for name in contenders(epochs)}
    dense = []
    for seed in range(seeds):
        dense.append(train(make, data, epochs, seed, arguments.device, []))
        for name, contender in contenders(epochs).items():
            pruner = contender()
            train(make, data, epochs, seed, arguments.device, [pruner])
            left[name].append(remaining(pruner, dense[-1]))
    best = {
        kind: min((n for n in left if n.startswith(kind)), key=lambda n: statistics.median(left[n]))
        for kind in ("SAP", "fixed", "one shot")
    }
    accuracy = ", ".join(f"{a:.1%}" for a in dense)
    for name, values in left.items():
        median = f"{statistics.median(values):.1%}"
        mark = f"**{median}**" if name in best.values() else median
        yield f"{task}, {epochs} epochs (dense {accuracy})", name, mark, ", ".join(f"{v:.1%}" for v in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_options(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="of every training; default: 80 for the digits, 24 for the images")
    parser.add_argument("--images", help="folder, or a tar of it, with train/<class>/ and test/<class>/")
    arguments = parser.parse_args()
    common.hush()
    seeds = 1 if arguments.quick else arguments.seeds
    tasks = [task for task in TASKS if arguments.images or not task.startswith("images")]
    rows = [row for task in tasks for row in rows_of(task, arguments, seeds)]
    head = ("task", "method", "remaining, median", "of each seed")
    notes = NOTES.format(seeds=seeds, fractions=", ".join(map(str, FRACTIONS)), shots=", ".join(map(str, SHOTS)))
    common.publish("adaptive_amounts", f"{notes}\n{common.table(head, rows)}", keep=not arguments.quick)


if __name__ == "__main__":
    main()
