"""The standalone `pytorch_lightning` package, whose classes are others than those of `lightning.pytorch`."""

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from helpers import all_masked_are_zero, is_masked, loader, mlp, seeded
from pytorch_lightning.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sap import PQIMonitor, SAPCallback
from lightning_sap.callbacks.pruning.compatibility import accumulation

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:pytorch_lightning", "ignore:.*LeafSpec")


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


def trainer_with(*callbacks, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, "max_epochs": 6, **options})


def test_pytorch_lightning_fit_prunes_logs_and_resumes(tmp_path):
    pruner, monitor = (
        SAPCallback(rounds=2, rewind_weights="init"),
        PQIMonitor(stop_on=None, monitor="val_loss", mode="min"),
    )
    callbacks = [pruner, monitor, pl.callbacks.EarlyStopping("sap/remaining", patience=9)]
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    trainer = trainer_with(*callbacks, logger=logger, log_every_n_steps=1, gradient_clip_val=0.5)
    module = Net()
    trainer.fit(module, loader(), loader(seed=3))
    assert all_masked_are_zero(trainer, module)
    assert [record.round for record in pruner.history] == [0, 1, 2]
    assert pruner.remaining < 1
    events = EventAccumulator(trainer.logger.log_dir).Reload()
    assert {"sap/remaining", "pqi/global", "pqi/global_pruned"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["pqi/rounds", "pqi/layers"]
    resumed = SAPCallback(rounds=2, rewind_weights="init")
    again = trainer_with(resumed, max_epochs=7, enable_checkpointing=False)
    again.fit(Net(), loader(), ckpt_path=trainer.checkpoint_callback.best_model_path)
    assert resumed.masks.keys() == pruner.masks.keys()
    assert all(torch.equal(resumed.masks[name], mask) for name, mask in pruner.masks.items())


@pytest.mark.parametrize("pruner_first", [True, False])
@pytest.mark.parametrize("average", [lambda: EMAWeightAveraging(decay=0.9), WeightAveraging], ids=["EMA", "mean"])
def test_pytorch_lightning_averaged_copies_are_as_sparse_as_the_model(tmp_path, average, pruner_first):
    pruner, module = SAPCallback(rounds=2, eta_r=0.1, scope="global"), Net()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    callbacks = [pruner, average()] if pruner_first else [average(), pruner]
    trainer_with(*callbacks, saver).fit(module, loader(), loader(seed=3))
    assert pruner.remaining < 0.9
    assert is_masked(module.state_dict(), pruner.masks)
    for epoch in range(6):
        checkpoint = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        saved = SAPCallback()
        saved.load_state_dict(checkpoint["callbacks"]["lightning_sap/sap"])
        assert (saved.remaining < 1) == (epoch >= 2)
        assert is_masked(checkpoint["state_dict"], saved.masks)
        assert is_masked(checkpoint["current_model_state"], saved.masks)


@pytest.mark.parametrize(
    ("neighbour", "message"),
    [
        (lambda: StochasticWeightAveraging(0.01), "use EMAWeightAveraging or WeightAveraging, or rounds=0"),
        (lambda: ModelPruning("l1_unstructured"), "use either callback"),
    ],
    ids=["StochasticWeightAveraging", "ModelPruning"],
)
@pytest.mark.parametrize("pruner_first", [True, False])
def test_pytorch_lightning_callbacks_that_do_not_fit_are_refused(neighbour, message, pruner_first):
    module = Net()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    callbacks = [SAPCallback(rounds=2), neighbour()][:: 1 if pruner_first else -1]
    with pytest.raises(ValueError, match=message):
        trainer_with(*callbacks, enable_checkpointing=False).fit(module, loader())
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize(("schedule", "every"), [({0: 2}, 2), ({0: 1, 3: 3}, None)])
def test_pytorch_lightning_changing_accumulation_is_seen(schedule, every):
    assert accumulation(SimpleNamespace(callbacks=[GradientAccumulationScheduler(schedule)])) == every
