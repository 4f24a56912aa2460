"""What tests of gathered scores share: the scores of each epoch's end, and what a plain loop says that they are."""

import torch
from helpers import Net, Watch, parameters
from torch import nn
from torch.optim import SGD

from lightning_sap.sharding import whole


def still(parameters):
    """An optimizer under which weights stay as they are."""
    return SGD(parameters, lr=0.0)


class Sum(Net):
    """Its loss is the sum of its outputs."""

    def loss(self, batch):
        return self.net(batch[0]).sum()


def two_layers():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    net[0].weight.data = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    net[1].weight.data = torch.tensor([[2.0, -8.0]])
    return net


class Scores(Watch):
    """Copies of the scores that are there at the end of each epoch, by epoch."""

    def __init__(self, pruner):
        self.pruner, self.found = pruner, {}
        super().__init__(on_train_epoch_end=self.take)

    def take(self, trainer, module):
        session = self.pruner.session
        if not session.state.gathered:
            return
        scored = session.gathering.scored(session, module, session.tensors(module))
        self.found[trainer.current_epoch] = {
            name: tensor.importance.scores(name, tensor.weight).clone() for name, tensor in scored.items()
        }

    @property
    def last(self):
        return self.found[max(self.found)]


def hooks_of(module):
    """How many forward hooks are on its layers."""
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def state_of(pruner):
    """Copies of what is gathered."""
    return {k: {n: whole(t).clone() for n, t in sums.items()} for k, sums in pruner.session.state.gathered.items()}


def plain_loop(module, optimizer, steps, counted, names, *, divide=None, clip=None):
    """Train by hand; each step is a list of batches, and each loss is divided by their number, or as given.

    Returns Taylor's and Wanda's scores of the last ``counted`` steps.
    """
    weights, inputs = {name: parameters(module)[name] for name in names}, {name: [] for name in names}
    layers = {name: module.get_submodule(name.rpartition(".")[0]) for name in names}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, args, __, name=name: inputs[name].append(args[0].detach()))
    taylor = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for i, batches in enumerate(steps):
        if i == len(steps) - counted:
            inputs.update({name: [] for name in names})
        optimizer.zero_grad()
        for batch in batches:
            (module.loss(batch) / (divide or len(batches))).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        if i >= len(steps) - counted:
            for name, weight in weights.items():
                taylor[name] += (weight * weight.grad).detach().abs() / counted
        optimizer.step()
    norms = {name: torch.cat(inputs[name]).square().sum(0).sqrt() for name in names}
    return {"taylor": taylor, "wanda": {n: weights[n].detach().abs() * norms[n] for n in names}}
