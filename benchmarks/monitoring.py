"""What monitoring costs: the time in PQIMonitor's hooks, as a share of an epoch of 100 steps of ViT-B/16.

``python benchmarks/monitoring.py`` takes some minutes and 4 GiB; ``--quick`` takes a small MLP, and keeps nothing.
"""

import argparse
import functools
import itertools
import statistics

import common
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import vit_b_16
from training_step import Net, mlp

from lightning_sap import PQIMonitor, SAPCallback

EPOCH = 100  # steps
NOTES = """Time that an epoch spends in the hooks of `PQIMonitor`, over that of {epoch} training steps with SGD and
momentum. {clock}; median of {epochs} epochs, with the least and the most. There is a validation loop and a logger;
beside `SAPCallback`, the weights are pruned once before.
"""
MODELS = {"vit_b_16": (vit_b_16, (4, 3, 224, 224), 3, 4), "mlp": (mlp, (128, 784), 3, 2)}  # shape, steps, epochs
CONTENDERS = {
    "`PQIMonitor()`": lambda: [PQIMonitor()],
    "`PQIMonitor(log_layers=True)`": lambda: [PQIMonitor(log_layers=True)],
    "`PQIMonitor()` beside `SAPCallback`": lambda: [SAPCallback(rounds=1, every_n_epochs=1), PQIMonitor()],
}


class Watched(Net):
    def validation_step(self, batch):
        self.log("val_loss", self.training_step(batch))


class Clock(Callback):
    """When the batches of the latest epoch began."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.starts.clear()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.starts.append(common.now(pl_module.device.type))

    def median(self):
        return statistics.median(b - a for a, b in itertools.pairwise(self.starts))


class Totals(Callback):
    """At the start of each epoch, what the hooks have taken so far."""

    def __init__(self, spent) -> None:
        self.spent, self.at_starts = spent, []

    def on_train_epoch_start(self, trainer, pl_module):
        self.at_starts.append(sum(self.spent))

    def on_train_end(self, trainer, pl_module):
        self.at_starts.append(sum(self.spent))


def watch(callback, spent, device):
    """Add up the time in the hooks of a callback."""
    for name in dir(callback):
        if name.startswith("on_"):
            setattr(callback, name, _timed(getattr(callback, name), spent, device))


def _timed(hook, spent, device):
    @functools.wraps(hook)
    def timed(*arguments):
        spent.append(common.seconds(lambda: hook(*arguments), device))

    return timed


def measured(model, contender, device):
    """Seconds in the monitor's hooks in every epoch but the first, and the median step."""
    make, shape, steps, epochs = MODELS[model]
    callbacks, spent, clock = CONTENDERS[contender](), [], Clock()
    watch(callbacks[-1], spent, device)
    totals = Totals(spent)
    data = TensorDataset(torch.randn(steps * shape[0], *shape[1:]), torch.randint(10, (steps * shape[0],)))
    trainer = Trainer(
        max_epochs=epochs + 1, callbacks=[totals, *callbacks, clock], accelerator=device, devices=1,
        num_sanity_val_steps=0, limit_val_batches=1, log_every_n_steps=1,
        **{**common.QUIET, "logger": CSVLogger("outputs/benchmarks")},
    )  # fmt: skip
    trainer.fit(Watched(make()), DataLoader(data, shape[0]), DataLoader(data, shape[0]))
    return [b - a for a, b in zip(totals.at_starts[1:], totals.at_starts[2:], strict=False)], clock.median()


def rows_of(model, device):
    for contender in CONTENDERS:
        spent, step = measured(model, contender, device)
        shares = common.spread([100 * s / (EPOCH * step) for s in spent], "{:.3f}")
        yield model, contender, f"{1e3 * statistics.median(spent):.1f} ms", f"{1e3 * step:.0f} ms", f"{shares}%"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_options(parser)
    arguments = parser.parse_args()
    common.hush()
    device, model = arguments.device, "mlp" if arguments.quick else "vit_b_16"
    head = ("model", "callbacks", "hooks, each epoch", "a training step", f"hooks over {EPOCH} steps")
    notes = NOTES.format(epoch=EPOCH, clock=common.CLOCK[device], epochs=MODELS[model][3])
    text = f"{notes}\n{common.table(head, list(rows_of(model, device)))}"
    common.publish(f"monitoring_{device}", text, keep=not arguments.quick, device=device)


if __name__ == "__main__":
    main()
