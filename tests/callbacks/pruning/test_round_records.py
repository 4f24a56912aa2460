"""What the history records of each round."""

import pytest
import torch
from archiving import archiving_half
from helpers import Crash, Net, Watch, crash, fit, half, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from lightning_sap import PQIMonitor, SAPCallback, pq_index


def test_a_round_without_validation_knows_no_metric_of_validation():
    pruner = half(every_n_epochs=2)
    fit(Net(), pruner, max_epochs=8, val=loader(), check_val_every_n_epoch=3)  # after epochs 2 and 5: rounds 1 and 2
    assert ["val_loss" in record.metrics for record in pruner.history] == [False, True, True, False]
    assert all("train_loss" in record.metrics for record in pruner.history)
    assert pruner.history.best("val_loss", "min").round in (1, 2)
    assert [record.metrics["sap/remaining"] for record in pruner.history] == [1.0, 0.5, 0.25, 0.125]


class PerEpoch(Net):
    """Training logs a mean over each epoch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_mean", loss.detach() + self.current_epoch, on_step=False, on_epoch=True)
        return loss


@pytest.mark.parametrize("monitored", [None, "train_mean"])
def test_resume_in_mid_epoch_takes_no_mean_of_the_epoch_before_for_its_own(tmp_path, monitored):
    """The first part of the mean is lost, as Lightning has it: the record says nothing rather than another epoch's."""
    kill = Watch(on_train_epoch_end=lambda t, m: crash() if t.current_epoch == 2 else None)

    def run(*callbacks, **options):
        pruner, monitor = half(), PQIMonitor(stop_on=None, monitor=monitored)
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
        every = (*callbacks, pruner, monitor, saver)
        fit(PerEpoch(), *every, val=loader(), num_sanity_val_steps=0, enable_checkpointing=True, **options)
        return pruner, monitor

    whole, _ = run()
    means = [record.metrics["train_mean"] for record in whole.history]
    with pytest.raises(Crash):
        run(kill)
    resumed, monitor = run(ckpt_path=tmp_path / "epoch=2.ckpt")
    found = [record.metrics.get("train_mean") for record in resumed.history]
    assert found == [means[0], means[1], None, means[3]]
    assert [r.metrics["val_loss"] for r in resumed.history] == [r.metrics["val_loss"] for r in whole.history]
    if monitored:
        assert [row["metric"] for row in monitor.rows()] == found


@pytest.mark.slow  # whole fits, many of them
class TestRecords:
    @pytest.mark.parametrize("interval", ["step", "epoch"])
    @pytest.mark.parametrize("lr_schedule", ["restart", "squeeze", "keep"])
    def test_recorded_learning_rate_is_that_of_the_last_step(self, lr_schedule, interval):
        class Stepped(Net):
            def configure_optimizers(self):
                optimizer = SGD(self.parameters(), lr=0.1)
                return [optimizer], [{"scheduler": StepLR(optimizer, 1, 0.9), "interval": interval}]

        pruner, rates = archiving_half(lr_schedule=lr_schedule, save_rounds=False), {}
        look = Watch(
            on_before_optimizer_step=lambda t, _: rates.update(
                {pruner.current_round(): t.optimizers[0].param_groups[0]["lr"]}
            )
        )
        fit(Stepped(), pruner, look, max_epochs=6)
        assert [record.lr for record in pruner.history] == [rates[round] for round in range(3)]

    def test_recorded_learning_rate_of_a_tensor_is_a_float(self):
        class Changing(Net):
            def on_train_epoch_end(self):
                self.trainer.optimizers[0].param_groups[0]["lr"].mul_(0.5)

        pruner = archiving_half(save_rounds=False)
        fit(Changing(optimizer=lambda p: SGD(p, lr=torch.tensor(0.5))), pruner, max_epochs=6)
        assert [record.lr for record in pruner.history] == [0.25, 0.0625, 0.015625]
        assert type(pruner.history[0].lr) is type(pruner.state_dict()["lr"]) is float

    def test_recorded_layers_pqi_pruned_is_right_after_the_pruning(self):
        pruner, found = archiving_half(save_rounds=False), {}

        def look(trainer, module):
            if trainer.current_epoch in (2, 4):
                live, masks = dict(module.named_parameters()), pruner.masks
                found[pruner.current_round() - 1] = {n: float(pq_index(live[n].detach()[m])) for n, m in masks.items()}

        fit(
            Net(),
            pruner,
            Watch(on_train_batch_start=lambda t, m: look(t, m) if t.global_step % 3 == 0 else None),
            max_epochs=6,
        )
        for record in pruner.history[:2]:
            assert record.layers_pqi_pruned == pytest.approx(found[record.round], rel=1e-6)
        assert pruner.history[2].layers_pqi_pruned == {}

    def test_record_holds_phase_reason_and_number_of_weights(self):
        pruner, monitor = archiving_half(save_rounds=None), PQIMonitor(verbose=False)
        fit(Net(), pruner, monitor, max_epochs=6)
        assert [(r.phase, r.reason) for r in pruner.history] == [
            ("regularization", "The index has not turned from falling to rising.")
        ] * 3
        assert [r.weights for r in pruner.history] == [72, 36, 18]

    def test_record_without_a_monitor_holds_no_phase(self):
        pruner = SAPCallback(rounds=1)
        fit(Net(), pruner, max_epochs=2)
        assert [(r.phase, r.reason, r.path) for r in pruner.history] == [(None, None, None)] * 2
