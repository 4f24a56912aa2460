"""What tests of searches share: a network whose score is given by epoch, and a pruner that searches by it."""

import torch
from helpers import Net, loader, quiet_trainer
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_sap import FixedFraction, PruningCallback, Tolerance

SCORES = [0.9, 0.9, 0.9, 0.5]  # by epoch: the last round is not sound


class Scored(Net):
    """Logs a score from a list, by epoch."""

    def __init__(self, scores=SCORES, period=None):
        super().__init__()
        self.scores, self.period = scores, period

    def validation_step(self, batch, batch_idx):
        epoch = min(self.trainer.current_epoch, len(self.scores) - 1)
        if self.scores[epoch] is not None:
            self.log("val_acc", torch.tensor(self.scores[epoch], dtype=torch.float32))

    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
        if self.period is None:
            return optimizer
        return [optimizer], [CosineAnnealingLR(optimizer, self.period)]


def searching(tolerance=None, **options):
    """A quarter of each layer goes, times the scale, after every epoch."""
    usual = {"tolerance": tolerance or Tolerance("val_acc"), "scope": "layer"}
    if "every_n_steps" not in options:
        usual["every_n_epochs"] = 1
    return PruningCallback(FixedFraction(0.25), **{**usual, **options})


def search(*callbacks, scores=SCORES, pruner=None, module=None, ckpt_path=None, **options):
    """As many epochs as there are scores, unless told otherwise; returns module, pruner and Trainer."""
    module, pruner = module or Scored(scores), pruner or searching()
    usual = {"max_epochs": len(scores), "num_sanity_val_steps": 0}
    trainer = quiet_trainer(pruner, *callbacks, **{**usual, **options})
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return module, pruner, trainer
