"""What tests of whole fits share: small networks, fixed data, a pruner, a quiet Trainer, and callbacks of functions."""

from functools import partial

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_sap import FixedFraction, PruningCallback

BATCHES = 3  # in an epoch: 22 samples, 8 at a time
PRUNABLE = {"net.0.weight": 48, "net.3.weight": 24}  # of `mlp()` inside a Net
N = sum(PRUNABLE.values())  # of all prunable weights

# What `quiet_trainer` needs besides barebones=True, which wants to set these itself.
BAREBONES = {"barebones": True} | dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
)

OPTIMIZERS = {
    "SGD with momentum": partial(SGD, lr=0.1, momentum=0.9),
    "Adam": partial(Adam, lr=0.01),
    "AdamW": partial(AdamW, lr=0.01, weight_decay=0.1),
    "RMSprop": partial(RMSprop, lr=0.01, momentum=0.5),
    "Adagrad": partial(Adagrad, lr=0.1),  # has a state before its first step
}

NO_CAP = 1 - 2**-40  # a beta that never binds


def k_among_zeros(k, d, value=0.7, dtype=torch.float32):
    """Of d weights the last k are equal, and the others zero."""
    x = torch.zeros(d, dtype=dtype)
    x[-k:] = value
    return x


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def seeded(build, seed=1):
    """What `build` returns with weights that depend on the seed alone; the tests' own stream goes on untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


class Net(LightningModule):
    """Regression on random data, by `mlp()` unless another network is given."""

    def __init__(self, network=None, optimizer=OPTIMIZERS["SGD with momentum"]):
        super().__init__()
        self.net = seeded(mlp) if network is None else network
        self.optimizer = optimizer

    def loss(self, batch):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Scheduled(Net):
    """With a cosine over `period` epochs; `load_from_checkpoint` loads it too."""

    period = 6

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return [optimizer], [CosineAnnealingLR(optimizer, self.period)]


class Checked(Net):
    """Looks at the weights after every optimizer step."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.steps = []

    def look(self):
        self.steps.append((all_masked_are_zero(self.trainer, self), zeros_of(self)))

    def optimizer_step(self, *arguments, **options):
        super().optimizer_step(*arguments, **options)
        self.look()


class Watch(Callback):
    """Calls functions of (trainer, module) in hooks: ``Watch(on_train_epoch_start=lambda trainer, module: ...)``."""

    def __init__(self, **hooks):
        for hook, function in hooks.items():
            assert hasattr(Callback, hook)
            setattr(self, hook, lambda trainer, module, *_, function=function, **__: function(trainer, module))


class Crash(Exception):
    """The end of a run that is to be resumed."""


def crash():
    raise Crash


def crash_in(hook, epoch):
    return Watch(**{hook: lambda trainer, module: crash() if trainer.current_epoch == epoch else None})


class Rounds(Watch):
    """Copies of model and masks at the end of each epoch, by the first pruner's round: of each its last epoch stays."""

    def __init__(self, *pruners):
        self.pruners, self.states, self.masks = pruners, {}, {}
        super().__init__(on_train_epoch_end=self.take)

    def take(self, trainer, module):
        round = self.pruners[0].current_round()
        self.states[round] = copied(module.state_dict())
        self.masks[round] = [dict(pruner.masks) for pruner in self.pruners]


def data(samples=22, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(samples, 6, generator=generator), torch.randn(samples, 3, generator=generator))


def loader(samples=22, seed=2, batch_size=8):
    return DataLoader(data(samples, seed), batch_size)


def quiet_trainer(*callbacks, **options):
    usual = {"accelerator": "cpu", "devices": 1, "max_epochs": 4, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(callbacks=list(callbacks), **{**usual, **quiet, **options})


def fit(module, *callbacks, train=None, val=None, ckpt_path=None, **options):
    """Train, and return the Trainer."""
    trainer = quiet_trainer(*callbacks, **options)
    trainer.fit(module, loader() if train is None else train, val, ckpt_path=ckpt_path)
    return trainer


def half(**options):
    """A pruning by half after every epoch."""
    return PruningCallback(FixedFraction(0.5), **{"every_n_epochs": 1, **options})


def pruners(trainer):
    return [callback for callback in trainer.callbacks if isinstance(callback, PruningCallback)]


def parameters(module):
    """Names without what `torch.compile` adds."""
    return {name.replace("_orig_mod.", ""): parameter for name, parameter in module.named_parameters()}


def is_masked(state, masks):
    """Whether every pruned weight, by name, is exactly zero."""
    return all(not state[name][~mask].any() for name, mask in masks.items())


def all_masked_are_zero(trainer, module):
    """Whether every weight that a pruner of the Trainer has pruned is exactly zero."""
    masks = {name: mask for pruner in pruners(trainer) for name, mask in pruner.masks.items()}
    return is_masked({name: parameter.detach() for name, parameter in parameters(module).items()}, masks)


def copied(state):
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def zeros_of(module):
    return sum(int((parameters(module)[name] == 0).sum()) for name in PRUNABLE)


def survivors(pruner):
    return {name: int(mask.sum()) for name, mask in pruner.masks.items()}


def same(a, b):
    """Whether two mappings hold bit-equal tensors under the same names."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
