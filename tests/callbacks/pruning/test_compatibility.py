"""Beside Lightning's own callbacks, in either order."""

import copy
import csv

import pytest
import torch
from helpers import Net, Watch, fit, is_masked, loader, quiet_trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from lightning_sap import PQIMonitor, SAPCallback


def sap(**options):
    return SAPCallback(rounds=2, every_n_epochs=2, scope="global", eta_r=0.1, **options)


def ordered(first, *callbacks):
    return callbacks if first else callbacks[::-1]


def masks_in(file):
    """The masks of a checkpoint file, and its content."""
    checkpoint = torch.load(file, weights_only=True)
    pruner = SAPCallback()
    pruner.load_state_dict(checkpoint["callbacks"]["lightning_sap/sap"])
    return pruner.masks, checkpoint


@pytest.mark.parametrize("pruner_first", [True, False])
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("average", [lambda: EMAWeightAveraging(decay=0.9), WeightAveraging], ids=["EMA", "mean"])
def test_averaged_copies_are_as_sparse_as_the_model(tmp_path, average, validate, pruner_first):
    pruner, module = sap(rewind_weights="init"), Net()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    callbacks = ordered(pruner_first, pruner, average())
    val = loader(seed=3) if validate else None
    fit(module, *callbacks, saver, max_epochs=6, val=val, enable_checkpointing=True)
    assert pruner.remaining < 0.9
    assert is_masked(module.state_dict(), pruner.masks)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 6
    for file in files:
        masks, checkpoint = masks_in(file)
        assert is_masked(checkpoint["state_dict"], masks), f"the average in {file.name}"
        assert is_masked(checkpoint["current_model_state"], masks), f"the model in {file.name}"
    assert any(not mask.all() for mask in masks.values())


@pytest.mark.parametrize("pruner_first", [True, False])
def test_averaged_weights_are_rewound_too(pruner_first):
    pruner, module, average, seen = sap(rewind_weights="init"), Net(), EMAWeightAveraging(decay=0.9), []
    first = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def look(trainer, _):
        if trainer.current_epoch in (2, 4):
            holder = Net()
            copy.deepcopy(average).on_train_end(trainer, holder)
            kept = {name: mask.to(first[name].dtype) for name, mask in pruner.masks.items()}
            seen.append({n: tensor - first[n] * kept.get(n, 1) for n, tensor in holder.state_dict().items()})

    callbacks = ordered(pruner_first, pruner, average)
    fit(module, *callbacks, Watch(on_train_batch_start=look), max_epochs=6, limit_train_batches=1)
    assert pruner.remaining < 0.9
    assert [name for found in seen for name, tensor in found.items() if tensor.any()] == []
    assert len(seen) == 2


def test_averaged_copies_are_dense_without_the_pruner():
    """The ground of the test above: weights that went to zero late leave a trace in an average."""
    module = Net()

    def forget(trainer, module):
        if trainer.current_epoch == 3:
            with torch.no_grad():
                module.net[0].weight.zero_()

    fit(module, EMAWeightAveraging(decay=0.9), Watch(on_train_batch_end=forget))
    assert module.net[0].weight.count_nonzero() == 48  # the average is in the module now


@pytest.mark.parametrize("pruner_first", [True, False])
def test_stochastic_weight_averaging_is_refused(pruner_first):
    module, callbacks = Net(), ordered(pruner_first, sap(), StochasticWeightAveraging(0.01))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with pytest.raises(ValueError, match="use EMAWeightAveraging or WeightAveraging, or rounds=0"):
        fit(module, *callbacks, max_epochs=6)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("pruner_first", [True, False])
@pytest.mark.parametrize("rounds", [0, 2])
def test_model_pruning_is_refused(rounds, pruner_first):
    module, callbacks = Net(), ordered(pruner_first, SAPCallback(rounds=rounds), ModelPruning("l1_unstructured"))
    names = list(module.state_dict())
    with pytest.raises(ValueError, match=r"PruningCallback\(FixedFraction\(amount\), include=\.\.\.\)"):
        fit(module, *callbacks, max_epochs=6)
    assert list(module.state_dict()) == names


def test_stochastic_weight_averaging_holds_the_masks_of_a_pruned_model():
    module, pruner = Net(), SAPCallback(rounds=0, keep_zeros=True)
    with torch.no_grad():
        module.net[0].weight[::2] = 0.0
    fit(module, StochasticWeightAveraging(0.01, swa_epoch_start=2), pruner, max_epochs=4)
    assert not module.net[0].weight[::2].any()
    assert bool(module.net[0].weight[1::2].all())


class WithSchedule(Net):
    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [CosineAnnealingLR(optimizer, 6)]


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_learning_rate_monitor_sees_each_round_start_anew(tmp_path, interval):
    callbacks = [sap(), LearningRateMonitor(interval)]
    logger = CSVLogger(tmp_path)
    fit(WithSchedule(), *callbacks, max_epochs=6, logger=logger, log_every_n_steps=1)
    (file,) = tmp_path.rglob("metrics.csv")
    logged = [float(row["lr-SGD"]) for row in csv.DictReader(file.read_text().splitlines()) if row["lr-SGD"]]
    assert len(logged) == (18 if interval == "step" else 6)
    third = len(logged) // 3
    assert logged[:third] == logged[third : 2 * third] == logged[2 * third :]
    assert logged[0] == 0.1


def test_gradient_accumulation_that_changes_keeps_the_rounds():
    pruner = sap()
    fit(WithSchedule(), GradientAccumulationScheduler({0: 1, 3: 3}), pruner, max_epochs=6)
    assert [record.round for record in pruner.history] == [0, 1, 2]


class WithBackbone(Net):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(6, 6)

    def loss(self, batch):
        return (self.net(self.backbone(batch[0])) - batch[1]).square().mean()

    def configure_optimizers(self):
        return SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


@pytest.mark.parametrize("pruner_first", [True, False])
def test_backbone_that_is_unfrozen_joins_the_pruning(pruner_first):
    pruner, module = sap(), WithBackbone()
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=3, verbose=False)
    fit(module, *ordered(pruner_first, pruner, finetuning), max_epochs=6)
    assert ["backbone.weight" in record.layers_pqi for record in pruner.history] == [False, True, True]
    assert is_masked(module.state_dict(), pruner.masks)
    assert not pruner.masks["backbone.weight"].all()


class Tuned(Net):
    """A learning rate, which its schedule leaves as it is, and a batch size to be found."""

    def __init__(self):
        super().__init__()
        self.lr, self.batch_size = 0.1, 2

    def train_dataloader(self):
        return loader(batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(seed=3)

    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return [optimizer], [StepLR(optimizer, 100)]


def find_batch_size():
    return BatchSizeFinder("power", steps_per_trial=1, max_trials=2)


def find_rate():
    return LearningRateFinder(num_training_steps=30)


@pytest.mark.parametrize("pruner_first", [True, False])
@pytest.mark.parametrize("finder", [find_rate, find_batch_size])
def test_what_a_finder_finds_holds_in_every_round(tmp_path, finder, pruner_first):
    """They save and restore a checkpoint before training begins; a second fit goes on under the masks of the first."""
    pruner, monitor, module, rates = sap(), PQIMonitor(stop_on=None), Tuned(), []
    look = Watch(on_train_batch_start=lambda t, m: rates.append(t.optimizers[0].param_groups[0]["lr"]))
    remaining = 1.0
    for _ in range(2):
        rates.clear()
        trainer = quiet_trainer(
            *ordered(pruner_first, pruner, finder()), monitor, look, max_epochs=6, default_root_dir=tmp_path
        )
        trainer.fit(module)
        assert set(rates) == {module.lr}
        assert [record.round for record in pruner.history] == [0, 1, 2]
        assert pruner.history[0].remaining == remaining
        assert [row["round"] for row in monitor.rows()] == [0, 1, 2]
        assert is_masked(module.state_dict(), pruner.masks)
        assert pruner.remaining < remaining
        remaining = pruner.remaining
    assert (module.lr, module.batch_size) != (0.1, 2)


def test_a_finder_leaves_the_schedules_of_a_second_fit_where_they_begin(tmp_path):
    pruner, module = sap(), Tuned()
    trainer = quiet_trainer(pruner, find_rate(), max_epochs=6, default_root_dir=tmp_path)
    for epochs in (6, 12):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module)
        assert pruner.state_dict()["plan"]["schedules_from"] == epochs - 6
