"""What the figures are measured on: the paper's MLP on scikit-learn's digits."""

import logging
import warnings
from itertools import pairwise

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


class MLP(LightningModule):
    """The paper's MLP, for images of 8 x 8 pixels; its cosine schedule is as long as a round."""

    def __init__(self, epochs):
        super().__init__()
        self.epochs = epochs
        widths = (64, 128, 256, 10)
        first, second, last = (nn.Linear(*ends) for ends in pairwise(widths))
        self.layers = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)

    def training_step(self, batch):
        images, labels = batch
        return cross_entropy(self.layers(images), labels)

    def validation_step(self, batch):
        images, labels = batch
        scores = self.layers(images)
        self.log("val_loss", cross_entropy(scores, labels))
        self.log("val_acc", (scores.argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


def fit(callbacks, rounds, epochs):
    """Train an MLP for `rounds` prunings in rounds of that many epochs."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    pixels, digits = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16, digits, test_size=0.25, stratify=digits, random_state=0)
    train_x, val_x, train_y, val_y = (torch.as_tensor(part) for part in parts)
    trainer = Trainer(
        max_epochs=(rounds + 1) * epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(hasattr(callback, "best_model_path") for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(
        MLP(epochs),
        DataLoader(TensorDataset(train_x.float(), train_y), 64, shuffle=True),
        DataLoader(TensorDataset(val_x.float(), val_y), len(val_y)),
    )
    return trainer
