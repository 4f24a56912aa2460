"""Fits whose rounds are saved, and what must not change where something is refused."""

from functools import partial

from helpers import Rounds, Scheduled, copied, fit, same
from torch import nn
from torch.optim import SGD

from lightning_sap import FixedFraction, PruningCallback


class Decaying(Scheduled):
    period = 2  # that of a round


def wide():
    """Its files have some 700 kB: weights and momenta, and the masks."""
    network = nn.Sequential(nn.Linear(6, 8000), nn.BatchNorm1d(8000), nn.ReLU(), nn.Linear(8000, 3))
    return Decaying(network, partial(SGD, lr=1e-4, momentum=0.9))


def archiving_half(**options):
    """A pruning by half in three rounds of two epochs, each saved."""
    return PruningCallback(
        FixedFraction(0.5),
        **{"rounds": 2, "every_n_epochs": 2, "lr_schedule": "restart", "save_rounds": True, **options},
    )


def archived(folder, module=None, pruner=None, *callbacks, **options):
    """A fit with three saved rounds: module, pruner, what the rounds were, and the Trainer (which has to be kept)."""
    module, pruner = module or Decaying(), pruner or archiving_half()
    rounds = Rounds(pruner)
    trainer = fit(module, pruner, *callbacks, rounds, **{"max_epochs": 6, "default_root_dir": folder, **options})
    return module, pruner, rounds, trainer


def snapshot(module, *pruners):
    """All that must not change where something is refused."""
    return copied(module.state_dict()), [
        (dict(p.masks), p.remaining, p.current_round(), list(p.history)) for p in pruners
    ]


def unchanged(before, module, *pruners):
    state, others = before
    now, found = snapshot(module, *pruners)
    return same(state, now) and all(same(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(others, found, strict=True))


def bytes_of(folder):
    """By name the bytes of every file in a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def said(warned, text):
    return [str(warning.message) for warning in warned if text in str(warning.message)]
