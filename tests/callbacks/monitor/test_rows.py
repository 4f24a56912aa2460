"""PQIMonitor.rows() and plot()."""

import copy
import pickle

import pytest
import torch
from helpers import Net, Watch, fit, half, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from monitoring import Expecting, close
from optimizers import REAL
from torch import nn

from lightning_sap import PQIMonitor


class TestRows:
    def test_rows_are_of_the_last_epoch_of_each_round(self):
        pruner, monitor, losses = half(every_n_epochs=2), PQIMonitor(stop_on=None, monitor="val_loss", mode="min"), []
        look = Watch(on_train_epoch_end=lambda t, m: losses.append(float(t.callback_metrics["val_loss"])))
        expecting = Expecting(pruner)
        fit(Net(), monitor, pruner, look, expecting, val=loader(), max_epochs=6)
        rows = monitor.rows()
        assert [(r["epoch"], r["round"], r["remaining"]) for r in rows] == [(1, 0, 1.0), (3, 1, 0.5), (5, 2, 0.25)]
        assert [r["metric"] for r in rows] == losses[1::2]
        assert [r["pqi"] for r in rows] == close([values["pqi/global"] for values in expecting.expected[1::2]])
        assert [r["pqi"] for r in rows] == close([record.pqi for record in pruner.history])

    @pytest.mark.parametrize("validates", [False, True])
    @pytest.mark.parametrize("order", [1, -1])
    def test_rows_of_steps_that_lightning_does_not_count_are_of_the_last_epoch_too(self, order, validates):
        """Two-call SAM steps an optimizer inside another, and leaves ``trainer.global_step`` where it is."""

        class Sharp(Net):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                self.manual_backward(self.loss(batch))
                optimizer.first_step(zero_grad=True)
                self.manual_backward(self.loss(batch))
                optimizer.second_step(zero_grad=True)

        pruner, monitor = half(every_n_epochs=2), PQIMonitor(stop_on=None)
        module = Sharp(optimizer=REAL["SAM"])
        trainer = fit(module, *[pruner, monitor][::order], val=loader() if validates else None, max_epochs=6)
        assert trainer.global_step == 0
        assert [row["pqi"] for row in monitor.rows()] == close([record.pqi for record in pruner.history])

    @pytest.mark.parametrize("validates", [False, True])
    @pytest.mark.parametrize("order", [1, -1])
    def test_rows_are_of_what_is_trained_once_that_is_known(self, order, validates):
        """A layer in the optimizer that has no gradient is watched until the first round ends."""

        class Partly(Net):
            def loss(self, batch):
                with torch.no_grad():
                    hidden = self.net[:3](batch[0])
                return (self.net[3](hidden) - batch[1]).square().mean()

        pruner, monitor = half(every_n_epochs=2), PQIMonitor(stop_on=None)
        fit(Partly(), *[pruner, monitor][::order], val=loader() if validates else None, max_epochs=6)
        rows = monitor.rows()
        assert [row["layers_remaining"] for row in rows] == [{"net.3.weight": share} for share in (1.0, 0.5, 0.25)]
        assert [row["pqi"] for row in rows] == close([record.pqi for record in pruner.history])

    @pytest.mark.filterwarnings("ignore:sap. these were replaced")
    @pytest.mark.parametrize("features", [8, 10])
    @pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
    @pytest.mark.parametrize("order", [1, -1])
    def test_rows_are_of_the_layers_that_are_there(self, order, hook, features):
        def change(trainer, module):
            if trainer.current_epoch == 3 and trainer.fit_loop.batch_idx == 2:
                module.net[0], module.net[1] = nn.Linear(6, features), nn.BatchNorm1d(features)
                module.net[3] = nn.Linear(features, 3)
                trainer.optimizers[0].param_groups[0]["params"][:] = list(module.parameters())

        pruner, monitor = half(every_n_epochs=2), PQIMonitor(stop_on=None)
        fit(Net(), Watch(**{hook: change}), *[pruner, monitor][::order], val=loader(), max_epochs=6)
        rows = monitor.rows()
        assert [row["remaining"] for row in rows] == [1.0, 1.0, 1.0]
        assert [row["pqi"] for row in rows] == close([record.pqi for record in pruner.history])

    def test_rows_without_a_pruner_are_of_each_epoch(self):
        monitor = PQIMonitor(stop_on=None)
        fit(Net(), monitor)
        assert [(r["epoch"], r["round"], r["remaining"]) for r in monitor.rows()] == [(e, None, 1.0) for e in range(4)]

    def test_rows_of_a_second_fit_start_over(self):
        monitor = PQIMonitor(stop_on=None)
        fit(Net(), monitor)
        fit(Net(), monitor, max_epochs=2)
        assert [row["epoch"] for row in monitor.rows()] == [0, 1]

    def test_rows_survive_a_resume(self, tmp_path):
        whole = PQIMonitor(stop_on=None, monitor="train_loss")
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        fit(Net(), half(), whole, saver, enable_checkpointing=True)
        resumed = PQIMonitor(stop_on=None, monitor="train_loss")
        fit(Net(), half(), resumed, ckpt_path=tmp_path / "epoch=1.ckpt")
        assert resumed.rows() == whole.rows()

    def test_copied_and_pickled_monitors_start_their_own_rows(self):
        monitor = PQIMonitor(stop_on=None, log_layers=["net.3.*"], monitor="train_loss")
        during = []
        look = Watch(on_train_epoch_end=lambda t, m: during.append(pickle.loads(pickle.dumps(monitor))))
        fit(Net(), half(), monitor, look)
        for twin in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor)), during[-1]):
            fit(Net(), twin, half(), max_epochs=2)
            assert [row["epoch"] for row in twin.rows()] == [0, 1]
        assert [row["epoch"] for row in monitor.rows()] == [0, 1, 2, 3]


class TestPlot:
    def test_plot_shows_index_remaining_and_metric_over_the_rounds(self):
        monitor = PQIMonitor(stop_on=None, monitor="val_loss")
        fit(Net(), half(every_n_epochs=2), monitor, val=loader(), max_epochs=6)
        index, remaining, metric = monitor.plot().axes
        rows = monitor.rows()
        assert index.lines[0].get_ydata().tolist() == [row["pqi"] for row in rows]
        assert remaining.lines[0].get_ydata().tolist() == [1.0, 0.5, 0.25]
        assert metric.lines[0].get_ydata().tolist() == [row["metric"] for row in rows]
        assert metric.get_ylabel() == "val_loss"
        assert metric.get_xlabel() == "round (number of prunings)"

    def test_plot_without_a_pruner_goes_over_the_epochs(self):
        monitor = PQIMonitor(stop_on=None)
        fit(Net(), monitor)
        axes = monitor.plot().axes
        assert axes[-1].get_xlabel() == "epoch"
        assert axes[0].lines[0].get_xdata().tolist() == [0, 1, 2, 3]

    def test_plot_before_any_epoch_is_refused(self):
        with pytest.raises(ValueError, match="nothing to plot yet"):
            PQIMonitor(stop_on=None).plot()


def test_validating_a_file_leaves_the_rows_as_they_are(tmp_path):
    monitor, saver = PQIMonitor(stop_on=None), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    module = Net()
    trainer = fit(module, half(), monitor, saver, val=loader(), enable_checkpointing=True)
    before = monitor.rows()
    trainer.validate(module, loader(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert monitor.rows() == before
    assert [row["round"] for row in before] == [0, 1, 2, 3]
