"""What each rank does in `test_units.py`."""

import pytest
import torch
from distributed.replicas import data, small, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sap import PQIMonitor, SAPCallback
from lightning_sap.callbacks.pruning import decisions


def fit(folder, ckpt_path=None, **options):
    """Whole units of a chain of layers, three prunings; a file of every epoch."""
    module, pruner = small(), SAPCallback(structure="unit", eta_r=1.0, every_n_epochs=1, scope="global")
    saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    run = trainer(folder, callbacks=[pruner, PQIMonitor(stop_on=None), saver], max_epochs=4, **options)
    run.fit(module, data(), data(), ckpt_path=ckpt_path)
    return {
        "masks": pruner.masks,
        "companions": dict(pruner.session.state.companions.pruned),
        "weights": {name: tensor.detach().clone() for name, tensor in module.state_dict().items()},
        "remaining": [record.remaining for record in pruner.history],
    }


def pruning(rank, folder):
    """A fit, one resumed in the middle, and one in which rank 1 decides otherwise."""
    found = {"whole": fit(folder / "whole", devices=2, strategy="ddp")}
    path = folder / "whole" / "epoch=1.ckpt"
    found["resumed"] = fit(folder / "resumed", path, devices=2, strategy="ddp")
    decide = decisions.decide_units

    def otherwise(tensors, *arguments, **how):
        tensors = {name: t._replace(weight=torch.rand_like(t.weight)) for name, t in tensors.items()}
        return decide(tensors, *arguments, **how)

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(decisions, "decide_units", otherwise)
        found["rank 1 decides otherwise"] = fit(folder / "otherwise", devices=2, strategy="ddp")
    return found
