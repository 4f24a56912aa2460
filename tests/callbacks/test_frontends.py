"""The standalone `pytorch_lightning` package, whose classes are others than those of `lightning.pytorch`."""

import pytest
import torch
from helpers import all_masked_are_zero, loader, mlp, seeded
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sap import PQIMonitor, SAPCallback

pl = pytest.importorskip("pytorch_lightning")


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = seeded(mlp)

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)]


@pytest.mark.filterwarnings("ignore::FutureWarning:pytorch_lightning", "ignore:.*LeafSpec")
def test_a_fit_and_its_logs(tmp_path):
    pruner, monitor = (
        SAPCallback(rounds=2, rewind_weights="init"),
        PQIMonitor(stop_on=None, monitor="val_loss", mode="min"),
    )
    callbacks = [pruner, monitor, pl.callbacks.EarlyStopping("sap/remaining", patience=9)]
    trainer = pl.Trainer(
        max_epochs=6,
        callbacks=callbacks,
        accelerator="cpu",
        logger=pl.loggers.TensorBoardLogger(tmp_path),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        gradient_clip_val=0.5,
    )
    module = Net()
    trainer.fit(module, loader(), loader(seed=3))
    assert all_masked_are_zero(trainer, module)
    assert [record.round for record in pruner.history] == [0, 1, 2]
    assert pruner.remaining < 1
    events = EventAccumulator(trainer.logger.log_dir).Reload()
    assert {"sap/remaining", "pqi/global", "pqi/global_pruned"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["pqi/rounds", "pqi/layers"]
    resumed = SAPCallback(rounds=2, rewind_weights="init")
    again = pl.Trainer(
        max_epochs=7, callbacks=[resumed], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    again.fit(Net(), loader(), ckpt_path=trainer.checkpoint_callback.best_model_path)
    assert resumed.masks.keys() == pruner.masks.keys()
    assert all(torch.equal(resumed.masks[name], mask) for name, mask in pruner.masks.items())
