"""Draws `pqi_curve.png`: the PQ Index of a lottery ticket's rounds on scikit-learn's digits.

`python docs/figures/pqi_curve.py` in the root of the repository; needs scikit-learn and matplotlib, takes about a
minute on one core.
"""

import logging
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sap import FixedFraction, PQIMonitor, PruningCallback

ROUNDS, EPOCHS, BATCH, LR = 30, 10, 64, 0.1


class MLP(LightningModule):
    """The paper's MLP, for images of 8 x 8 pixels."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10)
        )  # fmt: skip

    def training_step(self, batch):
        images, labels = batch
        return cross_entropy(self.layers(images), labels)

    def validation_step(self, batch):
        images, labels = batch
        self.log("val_acc", (self.layers(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


def main():
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    seed_everything(0)
    pixels, digits = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16, digits, test_size=0.25, stratify=digits, random_state=0)
    train_x, val_x, train_y, val_y = (torch.as_tensor(part) for part in parts)
    train = DataLoader(TensorDataset(train_x.float(), train_y), BATCH, shuffle=True)
    val = DataLoader(TensorDataset(val_x.float(), val_y), len(val_y))

    sap = PruningCallback(FixedFraction(0.2), rounds=ROUNDS, every_n_epochs=EPOCHS, rewind_weights="init")
    monitor = PQIMonitor(monitor="val_acc")
    trainer = Trainer(
        max_epochs=(ROUNDS + 1) * EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[sap, monitor],
    )
    trainer.fit(MLP(), train, val)
    monitor.plot().savefig(Path(__file__).with_name("pqi_curve.png"), dpi=120)
    for row in monitor.rows():
        print(
            "{round:3d} pqi {pqi:.4f} layer mean {layer_mean:.4f} remaining {remaining:.4%} acc {metric:.4f}".format(
                **row
            )
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
