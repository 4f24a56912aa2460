"""What each rank does in the tests of runs that are stopped."""

import os

import pytest
import torch
from helpers import Crash, Watch, crash
from lightning.pytorch.strategies import ModelParallelStrategy
from resuming import kill, plain
from stopping import Scripted, outcome, stopped
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


class Sharded(Scripted):
    def configure_model(self):
        if not isinstance(self.net, FSDPModule):
            for part in (self.net[3], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def killed(rank, folder):
    """One process, in the validation of the round with the verdict."""
    stopped(folder, "collapse", Watch(on_validation_start=lambda t, _: kill() if t.current_epoch == 5 else None))


def of_engine(engine):
    """Options of the Trainer, and the module."""
    if engine == "ddp":
        return {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}  # the same data on both ranks
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return {"devices": 2, "strategy": strategy, "use_distributed_sampler": False, "module": Sharded()}


def stopping(rank, folder):
    """By engine and kind, a run and the same resumed after a crash behind the verdict."""
    ddp = {kind: through(folder / kind, kind, "ddp") for kind in ("collapse", "compression")}
    return {**ddp, "fsdp2": through(folder / "fsdp2", "collapse", "fsdp2") if torch.__version__ >= "2.9" else None}


def through(folder, kind, engine):
    found = stopped(folder / "whole", kind, **of_engine(engine))
    whole = outcome(found)
    die = Watch(on_train_end=lambda t, m: crash())
    with pytest.raises(Crash):
        stopped(folder / "first", kind, die, **of_engine(engine))
    file = folder / "first" / "train-epoch-end" / "last.ckpt"
    again = stopped(folder / "second", kind, ckpt_path=file, **of_engine(engine))
    rounds = {}
    for round in (0, 2, 1) if engine == "fsdp2" else ():
        found.pruner.restore_round(round)
        rounds[round] = plain(found.module.state_dict()), plain(found.pruner.masks), found.pruner.remaining
    return {
        "whole": whole,
        "resumed": outcome(again),
        "states": {round: plain(state) for round, state in found.rounds.states.items()},
        "masks": {round: plain(masks[0]) for round, masks in found.rounds.masks.items()},
        "restored": rounds,
        "remaining": [record.remaining for record in found.pruner.history],
        "folders": [os.path.isdir(record.path) for record in found.pruner.history],
        "files": sorted(os.listdir(folder / "whole" / "rounds")),
        "sharded": isinstance(next(iter(found.pruner.masks.values())), DTensor),
    }
