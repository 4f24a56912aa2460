"""One run that saves a file at every hook and can be resumed from any of them, and what came of it, to the last bit."""

import os
import signal

import helpers
import pytest
import torch
from helpers import Crash, Net, Watch, crash, fit, loader, quiet_trainer
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR
from torch.utils.data import DataLoader, Dataset

from lightning_sap import GrowAndPrune, PQIMonitor, PruningCallback, SAPCallback
from lightning_sap.sharding import whole

EPOCHS, STEPS = 6, 18  # two prunings in three rounds of two epochs, three batches each

GROWS = "grow-"  # before the kind of a run in which parts of the network are opened again
KINDS = [(kind, rewind) for kind in ("SGD-cosine", "AdamW-OneCycle") for rewind in (None, "init", 1)]
FILES = [f"{hook}/epoch={epoch}" for hook in ("validation-end", "train-epoch-end") for epoch in range(EPOCHS - 1)]
FILES += [f"step/step={step}" for step in range(1, STEPS)]

STATE = "lightning_sap/sap"
STATE_KEYS = {
    "masks", "plan", "round", "first_epoch", "first_step", "steps", "epoch", "epoch_steps",
    "count", "pqi_after_pruning", "first_weights", "kept", "search", "answer", "undone", "pruning", "stop",
    "history", "metrics", "folder", "parent", "run", "lr", "note", "schedules", "options", "waiting", "trained",
    "replaced", "first_bits", "copies", "companions", "finest", "others", "gathered", "version", "writer",
}  # fmt: skip

STEPS_OF_A_PRUNING = {
    "decide": "lightning_sap.callbacks.pruning.decisions.decide",
    "measure": "lightning_sap.callbacks.pruning.held.summary",
    "rewind weights": "lightning_sap.callbacks.pruning.snapshots.restore_weights_",
    "mask": "lightning_sap.callbacks.pruning.carrying._carry_out_",
    "rewind schedules": "lightning_sap.rewind.replay.Replay.rewind_",
    "warn": "lightning_sap.callbacks.pruning.emptied.warn_of_empty_units",
}


class Alike(Dataset):
    """Batches that are all alike: Lightning restarts a plain DataLoader when it resumes in mid-epoch."""

    def __init__(self, seed, batches=3):
        self.data, self.batches = helpers.data(8, seed), batches

    def __len__(self):
        return 8 * self.batches

    def __getitem__(self, index):
        return self.data[index % 8]


class Resumable(Net):
    def __init__(self, kind, sharded=False):
        super().__init__()
        self.kind, self.sharded = kind, sharded

    def configure_model(self):
        if self.sharded and not isinstance(self.net, FSDPModule):
            for part in (self.net[3], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        if self.kind == "steps-SGD-cosine":
            optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
            schedule = CosineAnnealingLR(optimizer, STEPS)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        if self.kind == "SGD-cosine":
            optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
            return {"optimizer": optimizer, "lr_scheduler": CosineAnnealingLR(optimizer, EPOCHS)}
        optimizer = AdamW(self.parameters(), lr=0.01)
        if self.kind == "steps-AdamW-linear":
            schedule = LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        schedule = OneCycleLR(optimizer, 0.05, total_steps=STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Saves(ModelCheckpoint):
    """Several of them in one Trainer."""

    @property
    def state_key(self):
        return f"{type(self).__name__}/{self.dirpath}"


class Remembers(DummyLogger):
    """Keeps what is logged, by step."""

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, dict(metrics)))


def savers(folder, alike):
    """Of the files that a run with these batches can be resumed from, every one."""
    if alike:
        return [Saves(folder / "step", save_top_k=-1, every_n_train_steps=1, filename="{step}")]
    every = {"save_top_k": -1, "every_n_epochs": 1, "filename": "{epoch}"}
    return [
        Saves(folder / "validation-end", **every, save_on_train_epoch_end=False),
        Saves(folder / "train-epoch-end", **every, save_on_train_epoch_end=True, save_last=True),
    ]


def of_engine(engine):
    """Options of the Trainer."""
    if engine == "one process":
        return {}
    strategy = "ddp" if engine == "ddp" else ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return {"devices": 2, "strategy": strategy, "use_distributed_sampler": False}  # it shuffles, by the seed of the run


def run(folder, kind, rewind, alike, ckpt_path=None, extra=(), engine="one process"):
    """Train from a seed (a wrong one when resuming), and say everything that came of it."""
    seed_everything(1 if ckpt_path is None else 99)
    in_steps = kind.startswith("steps-")  # nine rounds in one epoch
    rounds = {"rounds": 8, "every_n_steps": 2} if in_steps else {"rounds": 2, "every_n_epochs": 2}
    sap = SAPCallback(**rounds, rewind_weights=rewind, scope="global", eta_r=0.1)
    if kind.startswith(GROWS):  # in the same rounds
        sap = PruningCallback(GrowAndPrune(0.25, partitions=2), **rounds, rewind_weights=rewind, scope="global")
    monitor, logger, rates = PQIMonitor(stop_on=None, monitor="val_loss", mode="min"), Remembers(), {}
    watch = Watch(
        on_before_optimizer_step=lambda t, _: rates.update({t.global_step: t.optimizers[0].param_groups[0]["lr"]})
    )
    module = Resumable(kind.removeprefix(GROWS), sharded=engine == "fsdp2")
    # replicas see different data; shards the same, for nothing keeps their buffers in step
    rank = int(os.environ["RANK"]) if engine == "ddp" else 0
    trainer = fit(
        module,
        *(sap, monitor, watch, *savers(folder, alike), *extra),
        max_epochs=1 if in_steps else EPOCHS,
        val_check_interval=3 if in_steps else 1.0,
        train=DataLoader(Alike(2 + 10 * rank, STEPS if in_steps else 3), 8) if alike else loader(seed=2 + 10 * rank),
        val=loader(seed=3 + 10 * rank),
        ckpt_path=ckpt_path,
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
        **of_engine(engine),
    )
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in sap.history.rows()]
    return {
        "weights": plain(module.state_dict()),
        "masks": plain(sap.masks),
        "optimizer": plain(trainer.optimizers[0].state_dict()),
        "rates": rates,
        "rounds": rows,
        "monitor": monitor.rows(),
        "logged": logger.logged,
    }


def run_saving_epochs(build_module, build_pruner, folder, *, killed=None, ckpt_path=None, validate=False, max_epochs=6):
    """A run that saves every epoch; `killed` ends it after that epoch's file was written."""
    module, pruner, monitor = build_module(), build_pruner(), PQIMonitor(stop_on=None, log_layers=True)
    saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=not validate)
    trainer = quiet_trainer(
        pruner, monitor, saver, *([] if killed is None else [killed]), max_epochs=max_epochs, enable_checkpointing=True,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, loader(), loader() if validate else None, ckpt_path=ckpt_path)
    return module, pruner, monitor, trainer


def records_of(pruner):
    """The history without how long things took, whose it is, and the digests of files that say both."""
    other = dict.fromkeys(("seconds", "run", "size", "sha256"))
    return [{**vars(record), **other} for record in pruner.history]


def plain(found):
    """Copies of all tensors, of sharded ones all shards."""
    if isinstance(found, torch.Tensor):
        return whole(found.detach()).clone()
    if isinstance(found, dict):
        return {key: plain(value) for key, value in found.items()}
    return [plain(value) for value in found] if isinstance(found, list | tuple) else found


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def broken(folder, at, when, kind, rewind, engine="one process", end=crash):
    """A run that is ended in a step of the pruning or in the validation of an epoch, or at a batch of training."""
    with pytest.MonkeyPatch.context() as patch:

        def arm(trainer, module):  # the savers come last, and write the epoch's file all the same
            if trainer.current_epoch == when - 1:
                patch.setattr(STEPS_OF_A_PRUNING[at], lambda *args, **kwargs: end())

        enders = {
            "validation": Watch(on_validation_start=lambda t, _: end() if t.current_epoch == when else None),
            "batch": Watch(on_train_batch_start=lambda t, _: end() if t.global_step == when else None),
        }
        ender = enders.get(at) or Watch(on_train_epoch_end=arm)
        with pytest.raises(Crash):
            run(folder, kind, rewind, at == "batch", extra=[ender], engine=engine)
    return last_file(folder, at, when)


def last_file(folder, at, when):
    """What a broken run leaves to be resumed from."""
    return folder / (f"step/step={when}.ckpt" if at == "batch" else "train-epoch-end/last.ckpt")


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def differences(whole, resumed, leave_out=()):
    """What of a resumed run is not as in the run that never stopped."""
    after = len(resumed["logged"])
    expected = {
        **whole,
        "rates": {step: whole["rates"][step] for step in resumed["rates"]},
        "logged": whole["logged"][-after:] if after else [],
    }
    return [key for key in whole if key not in leave_out and not equal(expected[key], resumed[key])]


def without_validation(file):
    """What a file of an epoch's last batch lacks: from there Lightning never runs that epoch's validation."""
    kind, _, number = file.partition("/step=")
    return ("rounds", "monitor") if kind == "step" and int(number) % 3 == 0 else ()
