"""What each rank does in `test_agreement.py`."""

import os
import warnings

import pytest
import torch
from helpers import Net, half, seeded
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sap import PQIMonitor, SAPCallback
from lightning_sap.callbacks.pruning import decisions


def small():
    return Net(seeded(lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 2))))


class Perturb(Callback):
    """One weight of one rank moves by a hair, right before the pruning."""

    def __init__(self, rank):
        self.rank = rank

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.global_rank == self.rank:
            pl_module.net[2].weight.data[3, 1] += 1e-6


class Miss(Callback):
    """One rank has not seen the gradient of a weight in the round."""

    def __init__(self, rank, pruner):
        self.rank, self.pruner = rank, pruner

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.global_rank == self.rank:
            self.pruner.session.state.trained.remove("net.2.weight")


def data():
    torch.manual_seed(2)
    return DataLoader(TensorDataset(torch.randn(16, 6), torch.randn(16, 2)), batch_size=8)


def trainer(folder, **options):
    usual = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "use_distributed_sampler": False,  # the same data on every rank: what one process alone sees
        "logger": CSVLogger(folder),
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in options.get("callbacks", ())),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return Trainer(**{**usual, **options})


def outcome(callback, module):
    return {
        "masks": callback.masks,
        "weights": {name: tensor.detach().clone() for name, tensor in module.state_dict().items()},
        "history": [(r.pqi, r.pqi_pruned, r.pruned, r.layers_pqi) for r in callback.history],
        "remaining": callback.remaining,
    }


def fit(folder, scope, extra=(), **options):
    module = small()
    callback = SAPCallback(
        eta_r=0.3, scope=scope, every_n_epochs=1, rewind_weights="init" if scope == "global" else None
    )
    trainer(folder, callbacks=[callback, PQIMonitor(stop_on=None), *extra], **options).fit(module, data(), data())
    return outcome(callback, module)


def agreeing(rank, folder):
    """Fits in all scopes, what these warn of, and one in which rank 1 strays."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = {scope: fit(folder, scope, devices=2, strategy="ddp") for scope in ("neuron", "layer", "global")}
    found["warnings"] = [str(warning.message) for warning in caught]
    callback, module = SAPCallback(every_n_epochs=1), small()
    run = trainer(folder, callbacks=[Perturb(1), callback], devices=2, strategy="ddp")
    try:
        run.fit(module, data())
    except ValueError as error:
        found["error"] = str(error)
    found["masks after the error"] = callback.masks
    found["momenta after the error"] = len(run.optimizers[0].state)
    module, callback = small(), half()
    trainer(folder, callbacks=[Miss(1, callback), callback], devices=2, strategy="ddp").fit(module, data())
    found["rank 1 misses a gradient"] = {name: int(mask.sum()) for name, mask in callback.masks.items()}
    found["rank 1 decides otherwise"] = deciding(folder, otherwise=rank == 1, devices=2, strategy="ddp")
    return found


def deciding(folder, otherwise=False, **options):
    """A fit with one pruning, and the masks that this process decided on: if otherwise, the largest weights go."""
    decided, decide = [], decisions.decide

    def recorded(pieces, **how):
        if otherwise:
            pieces = {name: p._replace(weight=p.weight.abs().max() - p.weight.abs()) for name, p in pieces.items()}
        decided.append(decide(pieces, **how))
        return decided[-1]

    module, callback = small(), half(rounds=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decisions, "decide", recorded)
        trainer(folder, callbacks=[callback], **options).fit(module, data())
    (own,) = decided
    return {**outcome(callback, module), "decided": dict(own.masks.kept)}


def spawning(rank, folder):
    """A fit whose processes Lightning starts itself, and what then is in this one."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_PORT"):
        del os.environ[name]  # by which Lightning would take this process for one of those already started
    module, callback, keep = small(), SAPCallback(eta_r=0.3, every_n_epochs=1), ModelCheckpoint(folder)
    run = trainer(folder, callbacks=[callback, PQIMonitor(stop_on=None), keep], devices=2, strategy="ddp_spawn")
    run.fit(module, data(), data())
    left_behind = (callback.masks, list(callback.history))
    saved = torch.load(keep.best_model_path, weights_only=True)["callbacks"][callback.state_key]
    callback.load_state_dict(saved)
    metrics = {key: float(value) for key, value in run.callback_metrics.items()}
    return {**outcome(callback, module), "left behind": left_behind, "metrics": metrics, "started": run.num_devices}


def on_gpus(rank, folder):
    """NCCL between as many ranks as there are; each says also where it computed."""
    world = int(os.environ["WORLD_SIZE"])
    found = fit(folder, "global", devices=world, strategy="ddp", accelerator="gpu")
    return {**found, "backend": torch.distributed.get_backend()}
