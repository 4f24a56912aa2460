"""Optimizers from PyTorch and from the packages that people install, each made of parameters alone."""

from functools import partial

import torch
from prodigyopt import Prodigy
from pytorch_optimizer import SAM, OrthoGrad, ScheduleFreeWrapper
from pytorch_optimizer import Lookahead as SlowFirstLookahead  # has its slow weights from the start
from schedulefree import AdamWScheduleFree, SGDScheduleFree
from timm.optim import Lookahead as SlowLaterLookahead  # makes them at its k-th step
from torch.optim import LBFGS, SGD, Adafactor, Adagrad, Adam, AdamW, RMSprop


def slow_later(parameters):
    return SlowLaterLookahead(Adam(parameters, lr=0.02), k=3)


def slow_first(parameters, **options):
    return SlowFirstLookahead(SGD(parameters, lr=0.1, momentum=0.9), k=3, **options)


PLAIN = {
    "SGD with momentum": partial(SGD, lr=0.1, momentum=0.9),
    "Adam": partial(Adam, lr=0.01),
    "AdamW with amsgrad": partial(AdamW, lr=0.01, amsgrad=True),
    "Adagrad": partial(Adagrad, lr=0.1, initial_accumulator_value=0.1),
    "Adafactor": partial(Adafactor, lr=0.1),
    "centred RMSprop": partial(RMSprop, lr=0.01, centered=True, momentum=0.5),
    "LBFGS": partial(LBFGS, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"),
    "Prodigy": Prodigy,
}
if hasattr(torch.optim, "Muon"):  # from PyTorch 2.9
    PLAIN["Muon"] = lambda parameters: torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=0.01)
SCHEDULE_FREE = {
    "schedule-free AdamW": partial(AdamWScheduleFree, lr=0.02, weight_decay=0.1, warmup_steps=3),
    "schedule-free SGD": partial(SGDScheduleFree, lr=0.5),
}
SLOW_LATER = {
    "timm's Lookahead": slow_later,
    "timm's Lookahead of Prodigy": lambda parameters: SlowLaterLookahead(Prodigy(parameters), k=3),
}
SLOW_FIRST = {
    "pytorch_optimizer's Lookahead": slow_first,
    "pytorch_optimizer's Lookahead with momentum": partial(slow_first, pullback_momentum="pullback"),
    "Lookahead of Lookahead": lambda parameters: SlowFirstLookahead(slow_first(parameters), k=2),
}
WRAPPED = {
    "schedule-free wrapper of Adam": lambda parameters: ScheduleFreeWrapper(Adam(parameters, lr=0.01)),
    "OrthoGrad of Adam": lambda parameters: OrthoGrad(Adam(parameters, lr=0.01)),
}
SHARP = {"SAM": lambda parameters: SAM(parameters, Adam, lr=0.01)}
REAL = {**PLAIN, **SCHEDULE_FREE, **SLOW_LATER, **SLOW_FIRST, **WRAPPED, **SHARP}


def take_step(optimizer, loss_of):
    """One step as the optimizer's manual has it, with gradients of a function that gives the loss."""

    def closure():
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    if isinstance(optimizer, SAM):
        closure()
        optimizer.first_step(zero_grad=True)
        closure()
        optimizer.second_step()
    elif isinstance(optimizer, LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
