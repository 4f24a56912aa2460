"""The tasks of the tolerance benchmark: data in three parts, a network, and how its result is judged."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import images
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import models

Parts = tuple[TensorDataset, TensorDataset, TensorDataset]  # to train on, to search by, held out


class Characters(LightningModule):
    """A transformer of two layers that predicts the next character; 104,448 prunable weights."""

    VOCABULARY, CONTEXT, WIDTH = 96, 64, 64

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(self.VOCABULARY, self.WIDTH)
        self.positions = nn.Parameter(torch.zeros(self.CONTEXT, self.WIDTH))
        layer = nn.TransformerEncoderLayer(
            self.WIDTH, 4, 4 * self.WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(self.WIDTH, self.VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(self.CONTEXT))

    def loss(self, batch: list[Tensor]) -> Tensor:
        before, after = batch
        scores = self.head(self.layers(self.embedding(before) + self.positions, mask=self.mask, is_causal=True))
        return F.cross_entropy(scores.flatten(0, 1), after.flatten())

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: list[Tensor]) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.01)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        data: Makes the three parts, given where the colour images are.
        network: Makes the network.
        epochs: Of every training.
        seeds: How many.
        chosen_on: Whether the defaults were chosen on it; else it only scores.
        metric: Which logged value judges a network; its name in testing begins with ``test`` instead of ``val``.
        mode: Whether that is better when larger.
        drop: How much worse than the dense network is still sound.
        pretrained: Epochs that the network was trained before, dense; 0: it starts from nothing.
        network_before: Makes the network for that.
    """

    data: Callable[[str], Parts]
    network: Callable[[], LightningModule]
    epochs: int
    seeds: int
    chosen_on: bool
    metric: str = "val_acc"
    mode: str = "max"
    drop: float = 0.01
    pretrained: int = 0
    network_before: Callable[[], LightningModule] | None = None


def loaders(parts: Parts) -> list[DataLoader]:
    """Batches of 128 images or 32 texts, cut from the tensors at once."""

    def batches(part: TensorDataset, size: int, sampler) -> DataLoader:
        return DataLoader(part, batch_size=None, sampler=BatchSampler(sampler(part), size, drop_last=False))

    size = 32 if parts[0].tensors[0].dtype == torch.int64 else 128
    return [batches(parts[0], size, RandomSampler), *(batches(p, 500, SequentialSampler) for p in parts[1:])]


@cache
def digits(path: str) -> Parts:
    """1,197 images of 8 x 8 to train on, 400 to search by, 200 held out."""
    return _cut(*images.digits(), 1197, 1597)


@cache
def colour_images(path: str) -> Parts:
    """The images of ``train/``; every other one of ``test/`` to search by, and the rest held out."""
    train, train_labels, test, labels = images.colour_images(path)
    halves = (TensorDataset(test[i::2], labels[i::2]) for i in (0, 1))
    return TensorDataset(train, train_labels), *halves


@cache
def characters(path: str) -> Parts:
    """Python's own help texts, in pieces of 64 characters: 1,600 to train on, 320 to search by, 320 held out."""
    text = "\n".join(topics[name] for name in sorted(topics))
    common = sorted(set(text), key=lambda c: (-text.count(c), c))[: Characters.VOCABULARY - 1]
    codes = {character: code for code, character in enumerate(common)}
    tokens = torch.tensor([codes.get(character, len(common)) for character in text])
    pieces = tokens[: len(tokens) // 65 * 65].view(-1, 65)
    pieces = pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))]
    return _cut(pieces[:2240, :-1], pieces[:2240, 1:], 1600, 1920)


def _cut(inputs: Tensor, targets: Tensor, first: int, second: int) -> Parts:
    ranges = (slice(first), slice(first, second), slice(second, None))
    train, search, held_out = (TensorDataset(inputs[part], targets[part]) for part in ranges)
    return train, search, held_out


def digits_cnn(**training):
    return models.CNN((1, 8, 8), 10, hidden=(16, 32), **training)


TASKS = {
    "digits, MLP": Task(digits, lambda: models.MLP((1, 8, 8), 10), 80, 5, chosen_on=True),
    "digits, CNN": Task(digits, digits_cnn, 60, 5, chosen_on=False),
    "images, MLP": Task(colour_images, lambda: models.MLP((3, 32, 32), 10, lr=0.02), 24, 3, chosen_on=True),
    "images, CNN": Task(
        colour_images, lambda: models.CNN((3, 32, 32), 10, hidden=(8, 16, 32), lr=0.05), 24, 3, chosen_on=False
    ),
    "characters, transformer": Task(characters, Characters, 24, 3, False, "val_loss", "min", 0.02),
    "digits, CNN, trained before": Task(
        digits, lambda: digits_cnn(lr=0.02), 30, 3, False, pretrained=60, network_before=digits_cnn
    ),
}
