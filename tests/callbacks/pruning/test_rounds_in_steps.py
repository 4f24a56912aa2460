"""Rounds that are counted in optimizer steps: several in an epoch, over streams, and for every way to step."""

import itertools

import pytest
import torch
from helpers import BATCHES, OPTIMIZERS, Net, Watch, data, fit, loader, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from resuming import Remembers, differences, run, without_validation
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, IterableDataset

from lightning_sap import FixedFraction, PQIMonitor, PruningCallback, SAPCallback


def half(**options):
    return PruningCallback(FixedFraction(0.5), **options)


def steps_of(pruner):
    """First and last step of each round."""
    return [(record.first_step, record.last_step) for record in pruner.history]


def remaining(pruner):
    return [record.weights for record in pruner.history]


class Stream(IterableDataset):
    """Never ends."""

    def __iter__(self):
        return itertools.cycle(iter(data()))


class TestPlan:
    def test_nine_rounds_fit_into_one_epoch_and_meet_the_target(self):
        pruner = half(rounds=8, every_n_steps=2, target_remaining=0.125)
        fit(Net(), pruner, max_epochs=1, train=loader(144))  # 18 batches
        assert steps_of(pruner) == [(2 * t, 2 * t + 1) for t in range(9)]
        assert [(record.first_epoch, record.last_epoch, record.unit) for record in pruner.history] == [
            (0, 0, "step")
        ] * 9
        assert remaining(pruner)[-1] == 9  # an eighth of 72

    def test_rounds_go_on_over_epochs(self):
        pruner = half(every_n_steps=4)
        fit(Net(), pruner, max_epochs=4)  # 12 steps
        assert steps_of(pruner) == [(0, 3), (4, 7), (8, 11)]
        assert [(record.first_epoch, record.last_epoch) for record in pruner.history] == [(0, 1), (1, 2), (2, 3)]
        assert remaining(pruner) == [72, 36, 18]

    def test_max_steps_alone_is_planned_in_steps(self):
        pruner = half()
        fit(Net(), pruner, max_epochs=-1, max_steps=40)
        assert steps_of(pruner) == [(4 * t, 4 * t + 3) for t in range(10)]  # 9 prunings, as for 40 epochs

    def test_rounds_alone_are_as_long_as_fits_into_max_steps(self):
        pruner = half(rounds=2)
        fit(Net(), pruner, max_epochs=-1, max_steps=11)
        assert steps_of(pruner) == [(0, 2), (3, 5), (6, 10)]

    def test_an_endless_stream_is_pruned_after_every_round(self):
        pruner = half(every_n_steps=3)
        trainer = quiet_trainer(pruner, max_epochs=-1, max_time="00:00:00:30", limit_val_batches=0)
        stop = Watch(on_train_batch_end=lambda trainer, _: setattr(trainer, "should_stop", trainer.global_step == 10))
        trainer.callbacks.append(stop)
        trainer.fit(Net(), DataLoader(Stream(), 8))
        assert steps_of(pruner) == [(0, 2), (3, 5), (6, 8), (9, 9)]
        assert remaining(pruner) == [72, 36, 18, 9]

    def test_an_endless_stream_without_a_length_is_refused_before_training(self):
        with pytest.raises(ValueError, match=r"Give every_n_steps, the length of a round in optimizer steps"):
            quiet_trainer(half(), max_epochs=-1).fit(Net(), DataLoader(Stream(), 8))

    def test_rounds_and_length_that_do_not_fit_say_what_would(self):
        message = (
            r"rounds=5, every_n_steps=3 with 12 steps of training: .* Give max_steps=18, or fewer or shorter rounds"
        )
        with pytest.raises(ValueError, match=message):
            fit(Net(), half(rounds=5, every_n_steps=3))

    def test_rewinding_beyond_the_first_round_in_steps_is_refused(self):
        with pytest.raises(ValueError, match="rewind_weights=2 lies beyond the first round, which has 1 epochs"):
            fit(Net(), half(rewind_weights=2, every_n_steps=5), max_epochs=8)

    def test_weights_go_back_to_those_after_an_epoch_inside_a_round_in_steps(self):
        taken, seen, pruner = {}, [], half(rewind_weights=1, every_n_steps=4, min_remaining=0.1)
        watch = Watch(
            on_train_epoch_start=lambda t, m: taken.setdefault(t.current_epoch, m.net[0].weight.detach().clone()),
            on_before_zero_grad=lambda t, m: (
                seen.append(m.net[0].weight.detach().clone()) if t.global_step == 4 else None
            ),
        )
        fit(Net(), pruner, watch)
        kept = pruner.history[1].layers_remaining["net.0.weight"]
        assert kept == 0.5
        assert torch.equal(seen[0][seen[0] != 0], taken[1][seen[0] != 0])

    @pytest.mark.parametrize(("batches", "rounds"), [(6, 11), (1, 1)])
    def test_a_second_fit_counts_the_steps_that_are_left_by_its_own_epochs(self, batches, rounds):
        module, pruner = Net(), half(every_n_steps=2)
        trainer = quiet_trainer(pruner, max_epochs=4)
        trainer.fit(module, loader())  # 12 steps
        trainer.fit_loop.max_epochs = 8
        trainer.fit(module, loader(8 * batches))
        assert pruner.session.state.plan.rounds == rounds
        assert pruner.session.state.plan.end == trainer.global_step == 12 + 4 * batches

    @pytest.mark.parametrize(("batch_size", "batches"), [(4, 6), (16, 2)])
    def test_resumed_with_another_batch_size_the_plan_ends_where_training_does(self, tmp_path, batch_size, batches):
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        fit(Net(), half(rounds=2, every_n_steps=3), saver, enable_checkpointing=True)
        pruner = half(rounds=2, every_n_steps=3)
        train = loader(batch_size=batch_size)
        trainer = fit(Net(), pruner, train=train, ckpt_path=tmp_path / "epoch=0.ckpt")
        assert pruner.session.state.plan.end == trainer.global_step == 3 + 3 * batches


class TestCounting:
    def test_accumulated_batches_are_one_step(self):
        pruner = half(every_n_steps=2)
        fit(Net(), pruner, accumulate_grad_batches=2)  # two steps in an epoch of three batches
        assert steps_of(pruner) == [(0, 1), (2, 3), (4, 5), (6, 7)]

    def test_every_step_of_several_optimizers_counts(self):
        class Two(Net):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(batch))
                    optimizer.step()

            def configure_optimizers(self):
                return [OPTIMIZERS["Adam"](part.parameters()) for part in (self.net[0], self.net[3])]

        pruner = half(every_n_steps=3)
        trainer = fit(Two(), pruner)
        assert trainer.global_step == 24
        # two steps in a batch: a round ends with the batch in which its last step lies
        assert steps_of(pruner) == [(4 * t, 4 * t + 3) for t in range(6)]

    def test_steps_that_a_scaler_skips_do_not_count(self):
        class Skipping(Net):
            """Like a scaler that found an overflow, it leaves out every second step."""

            def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
                if batch_idx % 2:
                    optimizer_closure()
                else:
                    super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

        pruner = half(every_n_steps=2)
        with pytest.warns(UserWarning, match=r"2 of 3 prunings, since max_epochs=1 .* All prunings take 7 steps"):
            trainer = fit(Skipping(), pruner, max_epochs=1, train=loader(64))  # 8 batches, 4 steps
        assert trainer.global_step == 8
        assert steps_of(pruner) == [(0, 1), (2, 3)]

    def test_optimizers_without_hooks_are_counted_by_the_trainer(self):
        class Plain:
            """What Lightning takes for an optimizer, without hooks."""

            def __init__(self, inner):
                self.inner, self.param_groups, self.state, self.defaults = inner, inner.param_groups, inner.state, {}

            def step(self, closure=None):
                return self.inner.step(closure)

            def zero_grad(self, **options):
                self.inner.zero_grad(**options)

            def state_dict(self):
                return self.inner.state_dict()

            def load_state_dict(self, state):
                self.inner.load_state_dict(state)

        module = Net(optimizer=lambda parameters: Plain(OPTIMIZERS["SGD with momentum"](parameters)))
        pruner = half(every_n_steps=BATCHES)
        fit(module, pruner)
        assert steps_of(pruner) == [(0, 2), (3, 5), (6, 8), (9, 11)]


class TestWhatIsSeen:
    def test_learning_rates_of_all_rounds_are_alike(self):
        class OneCycle(Net):
            def configure_optimizers(self):
                optimizer = self.optimizer(self.parameters())
                schedule = OneCycleLR(optimizer, 0.1, total_steps=self.trainer.estimated_stepping_batches)
                return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        rates = []
        note = Watch(on_before_zero_grad=lambda t, _: rates.append(t.optimizers[0].param_groups[0]["lr"]))
        fit(OneCycle(), half(rounds=3, every_n_steps=6), note, max_epochs=1, train=loader(192))
        rounds = [rates[6 * t : 6 * t + 6] for t in range(4)]
        assert rounds[1:] == [rounds[0]] * 3
        assert max(rounds[0]) == pytest.approx(0.1, rel=0.1)

    def test_loggers_have_one_value_for_each_round_inside_an_epoch(self, tmp_path):
        logger, pruner = CSVLogger(tmp_path), half(rounds=2, every_n_steps=2)
        fit(Net(), pruner, PQIMonitor(stop_on=None), max_epochs=1, train=loader(48), logger=logger)
        logger.save()
        lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
        columns = lines[0].split(",")
        rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
        logged = {key: [int(row["step"]) for row in rows if row[key]] for key in ("sap/remaining", "pqi/global")}
        assert logged["sap/remaining"][:2] == logged["pqi/global"][:2] == [2, 4]
        assert [float(row["sap/remaining"]) for row in rows if row["sap/remaining"]][:2] == [0.5, 0.25]

    def test_a_monitor_judges_each_round_and_its_report_counts_steps(self):
        pruner, monitor = half(rounds=3, every_n_steps=2), PQIMonitor(stop_on=None)
        fit(Net(), pruner, monitor, max_epochs=1, train=loader(64), val=loader(), val_check_interval=2)
        assert [record.phase for record in pruner.history] == ["regularization"] * 4
        assert [row["round"] for row in monitor.rows()] == [0, 1, 2, 3]
        assert [row["remaining"] for row in monitor.rows()] == [1.0, 0.5, 0.25, 0.125]
        header, _, first, *_ = monitor.report().splitlines()
        assert header.startswith("| round | steps |")
        assert first.startswith("| 0 | 0–1 |")

    def test_a_round_without_validation_has_no_metric_of_an_earlier_round_in_the_epoch(self):
        pruner, monitor = half(rounds=5, every_n_steps=2), PQIMonitor(stop_on=None, monitor="val_loss")
        fit(Net(), pruner, monitor, max_epochs=1, train=loader(96), val=loader(), val_check_interval=4)
        assert ["val_loss" in record.metrics for record in pruner.history] == [False, True] * 3
        assert [row["metric"] is not None for row in monitor.rows()] == [False, True] * 3

    def test_each_round_inside_an_epoch_is_saved_and_can_be_put_back(self, tmp_path):
        pruner = half(rounds=3, every_n_steps=2, save_rounds=True, dirpath=tmp_path)
        module, weights = Net(), {}
        note = Watch(
            on_train_batch_start=lambda t, m: weights.setdefault(t.global_step, m.net[0].weight.detach().clone())
        )
        trainer = quiet_trainer(note, pruner, max_epochs=1)
        trainer.fit(module, loader(64))
        record = pruner.restore_round(1)
        assert (record.first_step, record.last_step) == (2, 3)
        assert torch.equal(module.net[0].weight, weights[4])
        assert pruner.remaining == 0.5

    def test_the_plan_is_announced_in_steps(self, caplog):
        with caplog.at_level("INFO"):
            fit(Net(), half(every_n_steps=4), max_epochs=4)
        assert "2 prunings in rounds of 4 steps from step 0" in caplog.text


@pytest.mark.parametrize("kind", ["steps-SGD-cosine", "steps-AdamW-linear"])
@pytest.mark.parametrize("rewind", [None, "init"])
def test_resume_from_any_step_of_an_epoch_with_nine_rounds_equals_unbroken_run(tmp_path, kind, rewind):
    whole = run(tmp_path / "whole", kind, rewind, True)
    assert len(whole["rounds"]) == 9
    for step in (1, 2, 3, 4, 5, 8, 9, 13, 16, 17):
        file = tmp_path / f"whole/step/step={step}.ckpt"
        resumed = run(tmp_path / f"from-{step}", kind, rewind, True, file)
        assert min(resumed["rates"]) == step
        assert differences(whole, resumed, without_validation(f"step/step={step}")) == [], step


def test_a_round_file_from_inside_an_epoch_can_be_resumed_from(tmp_path):
    def trained(folder, **options):
        pruner = SAPCallback(rounds=8, every_n_steps=2, save_rounds=True, dirpath=folder)
        module, logger = Net(), Remembers()
        fit(module, pruner, max_epochs=1, train=loader(8 * 18), logger=logger, **options)
        return module, pruner

    _, pruner = trained(tmp_path / "whole")
    assert [record.path is not None for record in pruner.history] == [True] * 9
    _, resumed = trained(tmp_path / "resumed", ckpt_path=pruner.history[3].path)
    assert [record.round for record in resumed.history] == list(range(9))


def test_a_policy_in_a_fit_in_steps_sees_the_rounds_before():
    class Looks(FixedFraction):
        seen = []

        def __call__(self, sums, round, standing):
            self.seen.append((round, [record.last_step for record in standing.history], sorted(standing.metrics)))
            return super().__call__(sums, round)

    fit(Net(), PruningCallback(Looks(0.5), rounds=2, every_n_steps=3), max_epochs=3)
    assert [(round, steps) for round, steps, _ in Looks.seen] == [(1, []), (2, [2])]
    assert "train_loss" in Looks.seen[1][2]
