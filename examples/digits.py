"""Prune a network on scikit-learn's digits as far as its accuracy allows, beside a dense one trained just as long.

Nothing is downloaded. Run it with ``make demo``, or ``python examples/digits.py``.
"""

import logging
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_sap import PQIMonitor, SAPCallback, Tolerance

EPOCHS, FOLDER, DROP = 120, "outputs/digits", 0.01  # of validation accuracy: one point


class Net(LightningModule):
    """An MLP with 43,520 prunable weights, SGD and one cosine over all of training."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def test_step(self, batch):
        self.log("test_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)]


def train(name: str, callbacks: list, seed: int = 0, model: Net | None = None) -> dict[str, float]:
    """Train a network, a new one unless one is given, for all epochs, and return how well it validates and tests."""
    seed_everything(seed, verbose=False)
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
    train_data, val_data, test_data = random_split(data, [1197, 300, 300], torch.Generator().manual_seed(0))
    trainer = Trainer(
        max_epochs=EPOCHS, callbacks=callbacks, logger=TensorBoardLogger(FOLDER, name=name, version=""),
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=10,
    )  # fmt: skip
    trainer.fit(model := model or Net(), DataLoader(train_data, 128, shuffle=True), DataLoader(val_data, 300))
    validated = trainer.validate(model, DataLoader(val_data, 300), verbose=False)[0]
    return validated | trainer.test(model, DataLoader(test_data, 300), verbose=False)[0]


def main() -> None:
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers|.*LeafSpec|.*exists and is not")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "Tip:" not in r.getMessage())
    torch.set_num_threads(1)  # the networks are so small that more threads only wait for one another
    dense = train("dense", [])
    # as sparse as can be, at most one point worse than the dense network
    sap = SAPCallback(tolerance=Tolerance("val_acc", DROP, reference=dense["val_acc"]))
    monitor = PQIMonitor(monitor="val_acc", log_layers=True)
    pruned = train("pruned", [sap, monitor])
    for name, kind in (("pqi", "rounds"), ("layers", "layers")):
        monitor.plot(kind).savefig(f"{FOLDER}/{name}.png", dpi=150)
    for part in ("val", "test"):
        before, after = dense[f"{part}_acc"], pruned[f"{part}_acc"]
        print(f"{part + ' accuracy':13}  dense {before:.1%}   pruned to {sap.remaining:.1%} of the weights {after:.1%}")
    print(f"figures        {FOLDER}/pqi.png, {FOLDER}/layers.png")
    print(f"curves         .venv/bin/tensorboard --logdir {FOLDER}")


if __name__ == "__main__":
    main()
