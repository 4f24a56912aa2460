"""Every round walks through the schedule and trains, however short it is."""

import logging

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from scheduling import BATCHES, E, Recording, adamw, fit, plateau, pruning, rates, seen, sgd, thirds
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader, TensorDataset

from lightning_sap import FixedFraction, PruningCallback, SAPCallback

pytestmark = pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'. 'epoch'")

N = E * BATCHES  # steps of a round
ALL = {  # written for n ticks
    "StepLR": lambda o, n: StepLR(o, max(1, n // 3), gamma=0.5),
    "MultiStepLR": lambda o, n: MultiStepLR(o, [n // 3, n // 2], gamma=0.5),
    "ExponentialLR": lambda o, n: ExponentialLR(o, 0.01 ** (1 / n)),
    "CosineAnnealingLR": CosineAnnealingLR,
    "CosineAnnealingWarmRestarts": lambda o, n: CosineAnnealingWarmRestarts(o, T_0=max(1, n // 3), T_mult=2),
    "OneCycleLR": lambda o, n: OneCycleLR(o, 0.3, total_steps=n),
    "CyclicLR": lambda o, n: CyclicLR(o, 0.01, 0.1, step_size_up=max(1, n // 3), mode="triangular2"),
    "LinearLR": lambda o, n: LinearLR(o, 1.0, 0.1, total_iters=n),
    "PolynomialLR": lambda o, n: PolynomialLR(o, total_iters=n, power=2),
    "SequentialLR": lambda o, n: SequentialLR(
        o, [LinearLR(o, 0.1, total_iters=n // 3), CosineAnnealingLR(o, n)], milestones=[n // 3]
    ),
    "ChainedScheduler": lambda o, n: ChainedScheduler([ConstantLR(o, 0.5, total_iters=n // 3), ExponentialLR(o, 0.9)]),
    "LambdaLR": lambda o, n: LambdaLR(o, lambda tick: 1 / (1 + tick)),
    "MultiplicativeLR": lambda o, n: MultiplicativeLR(o, lambda tick: 0.9),
    "ConstantLR": lambda o, n: ConstantLR(o, 0.5, total_iters=n // 3),
}


@pytest.mark.parametrize(("lr_schedule", "rounds_written_for"), [("restart", 1), ("squeeze", 3)])
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore:CyclicLR under lr_schedule='squeeze'. the learning rate of a round is")
def test_all_rounds_have_the_learning_rates_of_the_first(name, interval, lr_schedule, rounds_written_for):
    """Momentum and weight decay are in the trace too."""
    ticks = rounds_written_for * (N if interval == "step" else E)
    trace = fit(Recording(lambda o: ALL[name](o, ticks), interval=interval), pruning(lr_schedule))
    first, second, third = thirds(trace)
    assert len(first) == N
    assert second == first
    assert third == first
    assert len(set(rates(first))) > 1


def steps_pruning(lr_schedule, length, rounds=8):
    return PruningCallback(FixedFraction(0.1), rounds=rounds, every_n_steps=length, lr_schedule=lr_schedule)


@pytest.mark.parametrize(("lr_schedule", "rounds_written_for"), [("restart", 1), ("squeeze", 9)])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore:.* under lr_schedule='squeeze'. the learning rate of a round is")
def test_rounds_in_steps_have_the_learning_rates_of_the_first(name, lr_schedule, rounds_written_for):
    """Nine rounds of eleven steps within one epoch."""
    module = Recording(lambda o: ALL[name](o, 11 * rounds_written_for), interval="step")
    data = DataLoader(torch.randn(99, 4))
    trace = fit(module, steps_pruning(lr_schedule, 11), max_epochs=1, data=data)
    rounds = [trace[i : i + 11] for i in range(0, 99, 11)]
    assert rounds == [rounds[0]] * 9
    assert len(set(rates(rounds[0]))) > 1


class TestRoundsInSteps:
    """Of seven steps, in epochs of five."""

    def test_squeeze_walks_an_epoch_schedule_in_every_round(self):
        module = Recording(lambda o: LambdaLR(o, lambda epoch: 1 - epoch / 7))
        trace = fit(module, steps_pruning("squeeze", 7, rounds=4), max_epochs=7)
        # 7 epochs in all; position round(s * 6 / 6)
        assert rates(trace) == pytest.approx([0.1 * (1 - s / 7) for s in range(7)] * 5)

    def test_restart_counts_the_epochs_of_a_schedule_from_the_start_of_the_round(self):
        module = Recording(lambda o: LambdaLR(o, lambda epoch: 0.5**epoch))
        trace = fit(module, steps_pruning("restart", 7, rounds=4), max_epochs=7)
        assert rates(trace) == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05] * 5)

    def test_a_frequency_is_counted_from_the_start_of_the_round(self):
        module = Recording(lambda o: LambdaLR(o, lambda step: 0.5**step), interval="step", frequency=2)
        trace = fit(module, steps_pruning("restart", 7, rounds=4), max_epochs=7)
        # batches 2 and 4 of five, counted from the round's start
        assert rates(trace) == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.025] * 5)

    def test_auto_walks_through_a_warm_up_of_one_epoch(self):
        module = Recording(warm_up(7))
        trace = fit(module, steps_pruning("auto", 7, rounds=4), max_epochs=7)
        assert rates(trace) == pytest.approx([0.1 * (e if e < 1 else (7 - e) / 6) for e in range(7)] * 5)

    def test_a_round_too_short_is_warned_of_in_steps(self):
        module = Recording(warm_up(7))
        with pytest.warns(UserWarning, match="smaller `rounds`, larger `every_n_steps`"):
            fit(module, steps_pruning("restart", 3, rounds=9), max_epochs=7)


@pytest.mark.parametrize("lr_schedule", ["auto", "restart", "squeeze"])
def test_all_rounds_have_the_learning_rates_of_the_first_where_a_metric_drives_them(lr_schedule):
    first, second, third = thirds(fit(Recording(plateau), pruning(lr_schedule, every_n_epochs=4), max_epochs=12))
    assert second == first
    assert third == first
    assert rates(first)[-1] == 0.05


def warm_up(epochs):
    """One epoch from 0, and down to 0 at the end."""

    def schedule(optimizer):
        return LambdaLR(optimizer, lambda epoch: epoch if epoch < 1 else (epochs - epoch) / (epochs - 1))

    return schedule


class Net(LightningModule):
    """10-16-16-3 on 64 points."""

    def __init__(self, schedule, rate=0.01):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
        self.schedule, self.rate = schedule, rate
        self.trace = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        optimizer = AdamW(self.parameters(), lr=self.rate)
        optimizer.register_step_pre_hook(lambda optimizer, *_: self.trace.append(seen(optimizer)))
        return [optimizer], [self.schedule(optimizer)]


def points():
    torch.manual_seed(0)
    x = torch.randn(64, 10)
    return TensorDataset(x, x[:, :3].argmax(1))


def train(net, callback, max_epochs, **options):
    trainer = Trainer(
        accelerator="cpu", max_epochs=max_epochs, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(net, DataLoader(points(), batch_size=8))
    return rates(net.trace)


class TestRoundsOfOneEpoch:
    def test_a_warm_up_and_decay_per_epoch_trains(self, caplog):
        torch.manual_seed(0)
        net, callback = Net(warm_up(5)), SAPCallback()
        with caplog.at_level(logging.INFO):
            seen = train(net, callback, max_epochs=5)
        assert [(r.first_epoch, r.last_epoch) for r in callback.history] == [(i, i) for i in range(5)]
        ticks = [round(s * 4 / 7) for s in range(8)]  # 0 1 1 2 2 3 3 4
        assert seen == pytest.approx([0.01 * [0, 1, 0.75, 0.5, 0.25][t] for t in ticks] * 5)
        x, y = points().tensors
        assert (net.net(x).argmax(1) == y).float().mean() > 0.6  # 0.37 if the rate is 0 at all steps
        assert "LambdaLR: squeeze (left alone, it would reach its highest value only after the first" in caplog.text

    def test_one_cycle_per_epoch_reaches_its_peak(self):
        seen = train(Net(lambda o: OneCycleLR(o, 0.1, total_steps=10)), SAPCallback(), max_epochs=10)
        rounds = [seen[i : i + 16] for i in range(0, 80, 16)]  # five rounds of two epochs
        assert rounds == [rounds[0]] * 5
        assert rounds[0][0] == pytest.approx(0.004)
        assert max(rounds[0]) == pytest.approx(0.1, rel=0.05)
        assert rounds[0][-1] == pytest.approx(4e-7, rel=0.01)


class ByHand(Recording):
    """Manual optimization, in which the module steps its schedule at the end of each epoch."""

    def __init__(self, schedule):
        super().__init__(schedule)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.layer(batch).square().mean())
        optimizer.step()

    def on_train_epoch_end(self):
        self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizer = sgd(self.parameters())
        optimizer.register_step_pre_hook(lambda optimizer, *_: self.trace.append(seen(optimizer)))
        return [optimizer], [self.schedule(optimizer)]


class OwnStep(Recording):
    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step()


class TestRoundsOfOneEpochWhereTheModuleStepsTheSchedule:
    """What a round sees is known once the first one is over."""

    RATES = (0.0, 0.1, 0.075, 0.05, 0.025)

    def short(self, lr_schedule, **options):
        return pruning(lr_schedule, rounds=4, every_n_epochs=1, **options)

    def test_auto_keeps_what_the_first_round_saw_too_little_of(self, caplog):
        with caplog.at_level(logging.INFO):
            trace = fit(ByHand(warm_up(5)), self.short("auto"), max_epochs=5)
        assert rates(trace) == pytest.approx([rate for rate in self.RATES for _ in range(BATCHES)])
        assert "LambdaLR: keep from now on (a round reaches 0, and the schedule 0.1)" in caplog.text

    @pytest.mark.parametrize("epoch", [0, 2])
    def test_a_resumed_run_goes_on_keeping_it(self, tmp_path, epoch):
        class Saving(ByHand):
            def on_train_epoch_end(self):
                super().on_train_epoch_end()
                if self.trainer.current_epoch == epoch:
                    self.trainer.save_checkpoint(tmp_path / "file.ckpt")

        whole = fit(Saving(warm_up(5)), self.short("auto"), max_epochs=5)
        resumed = fit(ByHand(warm_up(5)), self.short("auto"), max_epochs=5, ckpt_path=tmp_path / "file.ckpt")
        assert resumed == whole[(epoch + 1) * BATCHES :]

    @pytest.mark.parametrize("kind", [ByHand, OwnStep])
    def test_a_restart_that_was_asked_for_is_warned_of_with_both_numbers(self, kind):
        message = (
            r"'restart': the learning rate of a round is 0 at most, and the schedule goes up to 0\.1\. Give longer "
            r"rounds .* or a shorter warm-up, or use lr_schedule='keep'\."
        )
        with pytest.warns(UserWarning, match=message) as caught:
            trace = fit(kind(warm_up(5)), self.short("restart"), max_epochs=5)
        assert sum("at most" in str(each.message) for each in caught) == 1
        assert rates(trace) == [0.0] * 5 * BATCHES

    @pytest.mark.parametrize("kind", [ByHand, OwnStep])
    def test_a_schedule_for_one_round_is_silent(self, kind):
        callback = pruning("restart", rounds=1, every_n_epochs=3)
        seen = rates(fit(kind(warm_up(3)), callback, max_epochs=6))
        assert seen[::BATCHES] == pytest.approx([0.0, 0.1, 0.05] * 2)


class TestShortfall:
    def test_a_restart_in_the_middle_of_the_warm_up_is_warned_of_with_both_numbers(self):
        module = Recording(lambda o: LambdaLR(o, lambda epoch: min(1, epoch / 6)))
        message = (
            "LambdaLR under lr_schedule='restart': the learning rate of a round is 0.0333 at most, and the schedule "
            r"goes up to 0.1. Give longer rounds .* or use lr_schedule='squeeze' or 'keep'"
        )
        with pytest.warns(UserWarning, match=message):
            fit(module, pruning("restart"))

    def test_a_squeeze_into_two_steps_is_warned_of(self):
        module = Recording(warm_up(5))
        with pytest.warns(
            UserWarning, match="'squeeze': the learning rate of a round is 0.025 at most, .* up to 0.1. Give"
        ):
            fit(module, pruning("squeeze", rounds=4, every_n_epochs=1), max_epochs=5, limit_train_batches=2)

    def test_groups_are_summed(self):
        class TwoGroups(Recording):
            def configure_optimizers(self):
                groups = [{"params": [self.layer.weight], "lr": 0.3}, {"params": [self.layer.bias]}]
                optimizer = adamw(groups)
                return [optimizer], [LambdaLR(optimizer, lambda epoch: min(1, epoch / 6))]

        message = r"0.133 at most, and the schedule goes up to 0.4 \(summed over 2 parameter groups\)"
        with pytest.warns(UserWarning, match=message):
            fit(TwoGroups(None), pruning("restart"))

    @pytest.mark.parametrize("lr_schedule", ["auto", "squeeze", "keep"])
    def test_what_reaches_the_peak_is_silent(self, lr_schedule):
        fit(Recording(warm_up(9)), pruning(lr_schedule))

    def test_auto_keeps_what_no_round_can_walk(self, caplog):
        def module():
            return Recording(lambda o: LambdaLR(o, lambda epoch: [0, 1, 0.5, 0.1, 0.05, 0][epoch]))

        alone = fit(module(), max_epochs=5, limit_train_batches=2)
        with caplog.at_level(logging.INFO):
            callback = pruning("auto", rounds=4, every_n_epochs=1)
            trace = fit(module(), callback, max_epochs=5, limit_train_batches=2)
        assert trace == alone
        assert "LambdaLR: keep (a round reaches 0.005 at most, and the schedule 0.1)" in caplog.text
