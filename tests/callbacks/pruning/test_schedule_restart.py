"""lr_schedule='restart': each round replays the schedule from its start, at every optimizer step."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback
from scheduling import (
    BATCHES,
    SCHEDULES,
    E,
    Recording,
    Shrinking,
    Stream,
    adamw,
    fit,
    per_epoch,
    pruning,
    rates,
    sgd,
    thirds,
)
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    OneCycleLR,
    StepLR,
)
from torch.utils.data import DataLoader

pytestmark = [
    pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'. 'epoch'"),
    # a cycle of 15 epochs, restarted in rounds of three
    pytest.mark.filterwarnings("ignore:OneCycleLR under lr_schedule='restart'. the learning rate of a round is 0.188"),
]


def assert_restarts(schedule, optimizer=sgd, accumulate=1, **config):
    """Rounds 2 and 3 do what round 1 does, and that is what Lightning alone does in as many epochs."""
    trace = fit(Recording(schedule, optimizer, **config), pruning(), accumulate_grad_batches=accumulate)
    alone = fit(Recording(schedule, optimizer, **config), max_epochs=E, accumulate_grad_batches=accumulate)
    steps = -(-BATCHES // accumulate)
    assert len(trace) == 3 * E * steps
    first, second, third = thirds(trace)
    assert first == alone
    assert second == first
    assert third == first
    return first


class TestRestart:
    @pytest.mark.parametrize("interval", ["epoch", "step"])
    @pytest.mark.parametrize("name", SCHEDULES)
    def test_restart_makes_rounds_alike(self, name, interval):
        first = assert_restarts(SCHEDULES[name], interval=interval)
        assert len(set(rates(first))) > 1

    @pytest.mark.parametrize("accumulate", [1, 2])
    @pytest.mark.parametrize("frequency", [2, 3])  # 3 epochs and 15 steps a round: 2 does not divide them
    @pytest.mark.parametrize("interval", ["epoch", "step"])
    @pytest.mark.parametrize("name", ["LambdaLR", "a user's own"])
    def test_restart_makes_rounds_alike_at_any_frequency(self, name, interval, frequency, accumulate):
        assert_restarts(SCHEDULES[name], interval=interval, frequency=frequency, accumulate=accumulate)

    @pytest.mark.parametrize("interval", ["epoch", "step"])
    @pytest.mark.parametrize("name", ["LambdaLR", "OneCycleLR", "SequentialLR"])
    def test_restart_makes_rounds_alike_under_accumulation(self, name, interval):
        assert_restarts(SCHEDULES[name], interval=interval, accumulate=2)

    @pytest.mark.parametrize("optimizer", [sgd, adamw])
    def test_restart_brings_back_the_momentum_cycle(self, optimizer):
        first = assert_restarts(SCHEDULES["OneCycleLR"], optimizer, interval="step")
        momenta = [momentum for _, momentum, _ in first]
        assert momenta[0] == pytest.approx(0.95)
        assert momenta[-1] == pytest.approx(0.95)
        assert min(momenta) < 0.86

    def test_restart_brings_back_other_options_that_a_schedule_changes(self):
        first = assert_restarts(Shrinking, adamw, interval="epoch")
        assert [decay for _, _, decay in first[::BATCHES]] == pytest.approx([0.02, 0.03, 0.04])

    def test_restart_gives_rates_computed_by_hand(self):
        trace = fit(Recording(lambda o: StepLR(o, 1, gamma=0.5)), pruning(), max_epochs=10)
        assert per_epoch(trace) == pytest.approx([0.1, 0.05, 0.025, 0.1, 0.05, 0.025, 0.1, 0.05, 0.025, 0.0125])

    def test_restart_counts_limited_batches(self):
        trace = fit(Recording(lambda o: StepLR(o, 1, gamma=0.5)), pruning(), limit_train_batches=2)
        assert per_epoch(trace, batches=2) == pytest.approx([0.1, 0.05, 0.025] * 3)

    def test_restart_with_validation_in_mid_epoch(self):
        module = Recording(lambda o: StepLR(o, 1, gamma=0.5))
        module.validation_step = lambda batch, batch_idx: None
        trace = fit(module, pruning(), validation=DataLoader(torch.randn(2, 4)), val_check_interval=2)
        assert per_epoch(trace) == pytest.approx([0.1, 0.05, 0.025] * 3)

    @pytest.mark.parametrize("limit", [None, 3])
    @pytest.mark.parametrize(
        "config", [{"interval": "epoch"}, {"interval": "step"}, {"interval": "step", "frequency": 3}]
    )
    def test_restart_with_data_of_unknown_length(self, config, limit):
        def module():
            return Recording(SCHEDULES["LambdaLR"], **config)

        data = DataLoader(Stream())
        trace = fit(module(), pruning(), data=data, limit_train_batches=limit)
        alone = fit(module(), data=data, limit_train_batches=limit, max_epochs=E)
        assert thirds(trace) == (alone, alone, alone)
        assert len(set(rates(alone))) > 1

    @pytest.mark.parametrize("config", [{"interval": "epoch", "frequency": 2}, {"interval": "step", "frequency": 2}])
    def test_restart_in_a_training_without_an_end(self, config):
        def module():
            return Recording(SCHEDULES["LambdaLR"], **config)

        n = E * BATCHES
        trace = fit(module(), pruning(rounds=None), max_epochs=-1, max_steps=4 * n)
        assert trace == fit(module(), max_epochs=E) * 4

    @pytest.mark.parametrize("interval", ["epoch", "step"])
    def test_a_cycle_written_for_the_round_stays_at_its_end_in_a_longer_one(self, interval):
        ticks = E if interval == "epoch" else E * BATCHES
        module = Recording(lambda o: OneCycleLR(o, max_lr=0.3, total_steps=ticks), interval=interval)
        trace = fit(module, pruning(), max_epochs=3 * E + 2)
        n = E * BATCHES
        first, second, third = trace[:n], trace[n : 2 * n], trace[2 * n :]
        assert second == first
        assert third == first + [first[-1]] * (2 * BATCHES)

    def test_a_tensor_learning_rate_is_restored_in_place(self):
        held = torch.tensor(0.1)

        def optimizer(parameters):
            return SGD(parameters, lr=held, momentum=0.9, foreach=False)

        watched = []

        class Watch(Callback):
            def on_train_batch_end(self, trainer, *_):
                watched.append(trainer.optimizers[0].param_groups[0]["lr"])

        trace = fit(Recording(SCHEDULES["LambdaLR"], optimizer), pruning(), Watch())
        assert per_epoch(trace) == pytest.approx([0.1, 0.05, 0.1 / 3] * 3)
        assert len(watched) == 3 * E * BATCHES
        assert all(rate is held for rate in watched)

    def test_restart_without_a_schedule_keeps_the_rate(self):
        assert fit(Recording(None), pruning()) == [(0.1, 0.9, 0)] * (3 * E * BATCHES)

    def test_restart_of_two_schedules_of_one_optimizer(self):
        class Two(Recording):
            def configure_optimizers(self):
                optimizer = super().configure_optimizers()
                by_step = {"scheduler": StepLR(optimizer, 2, gamma=0.9), "interval": "step"}
                return [optimizer], [StepLR(optimizer, 1, gamma=0.5), by_step]

        trace, alone = fit(Two(None), pruning()), fit(Two(None), max_epochs=E)
        assert thirds(trace) == (alone, alone, alone)
        assert len(set(rates(alone))) == 9  # one for every second step and one more for each new epoch in between


class Several(Recording):
    """So many schedules, one optimizer for each layer."""

    def __init__(self, count):
        super().__init__(None)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(count))
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        loss = sum(layer(batch).square().mean() for layer in self.layers)
        self.manual_backward(loss)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.step()

    def configure_optimizers(self):
        optimizers = [sgd(layer.parameters()) for layer in self.layers]
        return optimizers, [StepLR(optimizer, 100) for optimizer in optimizers]


class TestResumedWithAnotherNumberOfSchedules:
    @pytest.mark.parametrize("after", [1, 2])
    def test_it_is_said_with_both_numbers(self, tmp_path, after):
        class Save(Callback):
            def on_train_epoch_end(self, trainer, module):
                if trainer.current_epoch == 1:
                    trainer.save_checkpoint(tmp_path / "file.ckpt")

        class Fewer(Several):
            def configure_optimizers(self):
                optimizers, schedules = super().configure_optimizers()
                return optimizers, schedules[:after]

        fit(Several(2), pruning("keep"), Save())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(Fewer(2), pruning("keep"), ckpt_path=tmp_path / "file.ckpt")
        said = [str(each.message) for each in caught if "learning-rate schedules" in str(each.message)]
        assert [text[:79] for text in said] == (
            ["The checkpoint was saved with 2 learning-rate schedules, and this fit has 1. Eve"[:79]]
            if after == 1
            else []
        )
