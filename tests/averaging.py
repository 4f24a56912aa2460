"""A network that is trained, and a copy of it that follows it."""

import torch
from helpers import seeded
from lightning.pytorch import LightningModule
from timm.utils.model_ema import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel


class Keeping(LightningModule):
    """A network and a copy of it that follows it, made from it as is said."""

    decay = 0.9

    def __init__(self, make, held=lambda module: module.net.parameters()):
        super().__init__()
        self.net = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
        self.copy, self.held = make(self.net), held

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def optimizer_step(self, *arguments, **options):
        super().optimizer_step(*arguments, **options)
        self.follow()

    def follow(self):
        if isinstance(self.copy, AveragedModel):
            self.copy.update_parameters(self.net)
        elif isinstance(self.copy, ModelEmaV2 | ModelEmaV3):
            self.copy.update(self.net)
        else:
            with torch.no_grad():
                for slow, fast in zip(self.copy.parameters(), self.net.parameters(), strict=True):
                    slow.lerp_(fast, 1 - self.decay)

    def configure_optimizers(self):
        return SGD(self.held(self), lr=0.1, momentum=0.9)
