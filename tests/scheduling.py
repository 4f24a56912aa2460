"""Fits that write down the options of their optimizer at every step, and the schedules for them."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader, IterableDataset

from lightning_sap import FixedFraction, PruningCallback

BATCHES = 5  # 32 samples, 7 at a time
E = 3  # epochs of a round


def sgd(parameters):
    return SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters):
    return AdamW(parameters, lr=0.1, weight_decay=0.01)


class Recording(LightningModule):
    """Writes down the options of its optimizer at every step."""

    def __init__(self, schedule, optimizer=sgd, **config):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.schedule, self.optimizer, self.config = schedule, optimizer, config
        self.trace = []

    def training_step(self, batch, batch_idx):
        self.log("constant", 1.0)
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        optimizer.register_step_pre_hook(lambda optimizer, *_: self.trace.append(seen(optimizer)))
        if self.schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule(optimizer), "monitor": "constant", **self.config},
        }


def seen(optimizer):
    """What a schedule may change: learning rate, momentum (or the first beta) and weight decay."""
    group = optimizer.param_groups[0]
    momentum = group["betas"][0] if "betas" in group else group["momentum"]
    return float(group["lr"]), momentum, group["weight_decay"]


def pruning(lr_schedule="restart", rounds=2, every_n_epochs=E, **options):
    return PruningCallback(
        FixedFraction(0.25), rounds=rounds, every_n_epochs=every_n_epochs, lr_schedule=lr_schedule, **options
    )


def fit(module, *callbacks, max_epochs=3 * E, data=None, validation=None, ckpt_path=None, **options):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(
        module, DataLoader(torch.randn(32, 4), batch_size=7) if data is None else data, validation, ckpt_path=ckpt_path
    )
    return module.trace


def rates(trace):
    return [lr for lr, *_ in trace]


def per_epoch(trace, batches=BATCHES):
    """The learning rate of each epoch, in which it does not change."""
    epochs = [rates(trace[i : i + batches]) for i in range(0, len(trace), batches)]
    assert all(len(set(epoch)) == 1 for epoch in epochs)
    return [epoch[0] for epoch in epochs]


def thirds(trace):
    n = len(trace) // 3
    assert len(trace) == 3 * n
    return trace[:n], trace[n : 2 * n], trace[2 * n :]


class Shrinking(LRScheduler):
    """A user's own: it keeps its values in a list and changes it in place, and the weight decay with it."""

    def __init__(self, optimizer, factors=(1.0, 0.9, 0.7, 0.4, 0.1), decay=0.01):
        self.left, self.decay = list(factors), decay
        super().__init__(optimizer)

    def get_lr(self):
        factor = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        for group in self.optimizer.param_groups:
            group["weight_decay"] += self.decay
        return [base * factor for base in self.base_lrs]


def warmed_up_cosine(optimizer):
    warmup = LinearLR(optimizer, start_factor=0.1, total_iters=2)
    return SequentialLR(optimizer, [warmup, CosineAnnealingLR(optimizer, T_max=6)], milestones=[2])


def chained(optimizer):
    return ChainedScheduler([ConstantLR(optimizer, factor=0.5, total_iters=2), ExponentialLR(optimizer, gamma=0.8)])


SCHEDULES = {
    "StepLR": lambda o: StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: MultiStepLR(o, milestones=[1, 2, 4], gamma=0.5),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, T_max=4),
    "CosineAnnealingWarmRestarts": lambda o: CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2),
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=0.3, total_steps=E * BATCHES),
    "LambdaLR": lambda o: LambdaLR(o, lambda tick: 1 / (1 + tick)),
    "SequentialLR": warmed_up_cosine,
    "ChainedScheduler": chained,
    "a user's own": Shrinking,
}


class Stream(IterableDataset):
    """Batches without a length."""

    LENGTH = 4

    def __iter__(self):
        return iter(torch.ones(self.LENGTH, 4))


def plateau(optimizer):
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
