"""A run whose accuracy and index follow a script, so that its verdict is known; all else in it is really trained."""

from typing import Any, NamedTuple

import pytest
import torch
from helpers import Net, Rounds, fit, loader, same
from lightning.pytorch.loggers.logger import DummyLogger
from resuming import plain, savers

from lightning_sap import FixedFraction, PQIMonitor, PruningCallback
from lightning_sap.callbacks.monitor.stopping import Verdict

# Accuracy of the rounds: far below its best since round 4, seen in round 5; the last within two hundredths of it is 3.
COLLAPSING = (0.50, 0.90, 0.95, 0.94, 0.60, 0.50, 0.40, 0.30)
STEADY = (0.50, 0.90, 0.95, 0.94, 0.95, 0.94, 0.95, 0.94)
# Spread of the weights, by which the index falls and rises: the turn, in round 5, is seen in round 8.
TURNING = (2.2, 1.7, 1.4, 1.2, 1.1, 1.05, 1.1, 1.2, 1.35, 1.5, 1.6)


class Scripted(Net):
    """The surviving weights of a layer are as many powers of e, over a spread that is given for each round."""

    def __init__(self, scores=COLLAPSING, spreads=None, every=1):
        super().__init__()
        self.scores, self.spreads, self.every = scores, spreads, every

    def now(self, script):
        return script[min(self.trainer.current_epoch // self.every, len(script) - 1)]

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_acc", self.now(self.scores), sync_dist=True)

    def on_train_batch_end(self, *_):
        if self.spreads is not None:
            for layer in (self.net[0], self.net[3]):
                weight = layer.weight.detach()
                alive = weight != 0
                weight[alive] = torch.linspace(0, self.now(self.spreads), int(alive.sum())).exp()


class Outcome(NamedTuple):
    """What came of a run; the Trainer has to be kept, or the module of the latest fit is gone."""

    module: Any
    pruner: Any
    monitor: Any
    rounds: Any
    trainer: Any


def pruner_of(fraction=0.2, **options):
    return PruningCallback(FixedFraction(fraction), **{"every_n_epochs": 1, **options})


def monitor_of(**options):
    return PQIMonitor(**{"monitor": "val_acc", "verbose": False, **options})


def run(folder, *callbacks, module=None, pruner=None, monitor=None, order=1, val=True, **options):
    """Eight rounds of one epoch unless told otherwise."""
    module, pruner = module or Scripted(), pruner or pruner_of()
    monitor = monitor or PQIMonitor(monitor="val_acc", verbose=False)
    rounds = Rounds(pruner)
    trainer = fit(
        module,
        *[pruner, monitor][::order],
        rounds,
        *callbacks,
        val=loader(seed=3) if val else None,
        **{"max_epochs": 8, "default_root_dir": folder, "num_sanity_val_steps": 0, **options},
    )
    return Outcome(module, pruner, monitor, rounds, trainer)


COLLAPSE = Verdict("collapse", 5, "Since round 4 the metric is far from its best: 0.5 after 0.95.", 3)
LINE = "pqi: Stopped after round 5: collapse. Since round 4 the metric is far from its best: 0.5 after 0.95."

KINDS = {  # of a run that is stopped: its script, and how many rounds it may have
    "collapse": {},
    "collapse, rewound": {"rewind_weights": "init"},
    "compression": {"fraction": 0.1},
}
LAST = {"collapse": 5, "collapse, rewound": 5, "compression": 8}  # the round with the verdict


def stopped(folder, kind, *callbacks, module=None, **options):
    """A run with a file of every hook of every epoch."""
    scripts = {"compression": (STEADY, TURNING)}
    stop_on = kind if kind == "compression" else "collapse"
    return run(
        folder,
        *callbacks,
        *savers(folder, alike=False),
        module=module or Scripted(*scripts.get(kind, ())),
        pruner=pruner_of(**KINDS[kind]),
        monitor=PQIMonitor(monitor="val_acc", stop_on=stop_on, verbose=False),
        max_epochs=11,
        enable_checkpointing=True,
        logger=DummyLogger(),
        **options,
    )


def holds(found, round):
    """Whether module and pruner are as they were at the end of a round."""
    return same(found.module.state_dict(), found.rounds.states[round]) and same(
        found.pruner.masks, found.rounds.masks[round][0]
    )


def stays(found, epochs=8):
    """Whether a run came to its end, with its last round in the module."""
    return found.trainer.current_epoch == epochs and found.monitor.verdict is None and holds(found, epochs - 1)


def stays_in(found):
    """Metrics of the rounds of a run that came to its end."""
    assert found.monitor.verdict is None
    assert found.trainer.current_epoch == 8
    return [pytest.approx(record.metrics["val_acc"]) for record in found.pruner.history]


def lines(caplog, text):
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


def outcome(found):
    """All that must not depend on where a run was cut off, or on how many processes it had."""
    return {
        "verdict": found.monitor.verdict,
        "weights": plain(found.module.state_dict()),
        "masks": plain(found.pruner.masks),
        "rounds": [{**row, "seconds": None, "path": None} for row in found.pruner.history.rows()],
        "rows": found.monitor.rows(),
        "epochs": found.trainer.current_epoch,
        "round": found.pruner.current_round(),
    }


def differences(a, b):
    tensors = ("weights", "masks")
    return [key for key in a if not (same(a[key], b[key]) if key in tensors else a[key] == b[key])]
