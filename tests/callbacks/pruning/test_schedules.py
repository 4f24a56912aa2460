"""Learning rates of whole fits, at every optimizer step: each round replays the schedule."""

import logging

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader, IterableDataset

from lightning_sap import FixedFraction, PruningCallback

BATCHES = 5  # 32 samples, 7 at a time
E = 3  # epochs of a round

pytestmark = pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'. 'epoch'")


def sgd(parameters):
    return SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters):
    return AdamW(parameters, lr=0.1, weight_decay=0.01)


class Recording(LightningModule):
    """Writes down the options of its optimizer at every step."""

    def __init__(self, schedule, optimizer=sgd, **config):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.schedule, self.optimizer, self.config = schedule, optimizer, config
        self.trace = []

    def training_step(self, batch, batch_idx):
        self.log("constant", 1.0)
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        optimizer.register_step_pre_hook(lambda optimizer, *_: self.trace.append(seen(optimizer)))
        if self.schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule(optimizer), "monitor": "constant", **self.config},
        }


def seen(optimizer):
    """What a schedule may change: learning rate, momentum (or the first beta) and weight decay."""
    group = optimizer.param_groups[0]
    momentum = group["betas"][0] if "betas" in group else group["momentum"]
    return float(group["lr"]), momentum, group["weight_decay"]


def pruning(lr_schedule="restart", rounds=2, every_n_epochs=E, **options):
    return PruningCallback(
        FixedFraction(0.25), rounds=rounds, every_n_epochs=every_n_epochs, lr_schedule=lr_schedule, **options
    )


def fit(module, *callbacks, max_epochs=3 * E, data=None, validation=None, **options):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(torch.randn(32, 4), batch_size=7) if data is None else data, validation)
    return module.trace


def rates(trace):
    return [lr for lr, *_ in trace]


def per_epoch(trace, batches=BATCHES):
    """The learning rate of each epoch, in which it does not change."""
    epochs = [rates(trace[i : i + batches]) for i in range(0, len(trace), batches)]
    assert all(len(set(epoch)) == 1 for epoch in epochs)
    return [epoch[0] for epoch in epochs]


def thirds(trace):
    n = len(trace) // 3
    assert len(trace) == 3 * n
    return trace[:n], trace[n : 2 * n], trace[2 * n :]


class Shrinking(LRScheduler):
    """A user's own: it keeps its values in a list and changes it in place, and the weight decay with it."""

    def __init__(self, optimizer):
        self.left = [1.0, 0.9, 0.7, 0.4, 0.1]
        super().__init__(optimizer)

    def get_lr(self):
        factor = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        for group in self.optimizer.param_groups:
            group["weight_decay"] += 0.01
        return [base * factor for base in self.base_lrs]


def warmed_up_cosine(optimizer):
    warmup = LinearLR(optimizer, start_factor=0.1, total_iters=2)
    return SequentialLR(optimizer, [warmup, CosineAnnealingLR(optimizer, T_max=6)], milestones=[2])


def chained(optimizer):
    return ChainedScheduler([ConstantLR(optimizer, factor=0.5, total_iters=2), ExponentialLR(optimizer, gamma=0.8)])


SCHEDULES = {
    "StepLR": lambda o: StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: MultiStepLR(o, milestones=[1, 2, 4], gamma=0.5),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, T_max=4),
    "CosineAnnealingWarmRestarts": lambda o: CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2),
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=0.3, total_steps=E * BATCHES),
    "LambdaLR": lambda o: LambdaLR(o, lambda tick: 1 / (1 + tick)),
    "SequentialLR": warmed_up_cosine,
    "ChainedScheduler": chained,
    "a user's own": Shrinking,
}


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
    def test_rounds_are_alike(self, name, interval):
        first = assert_restarts(SCHEDULES[name], interval=interval)
        assert len(set(rates(first))) > 1

    @pytest.mark.parametrize("accumulate", [1, 2])
    @pytest.mark.parametrize("frequency", [2, 3])  # 3 epochs and 15 steps a round: 2 does not divide them
    @pytest.mark.parametrize("interval", ["epoch", "step"])
    @pytest.mark.parametrize("name", ["LambdaLR", "a user's own"])
    def test_at_any_frequency(self, name, interval, frequency, accumulate):
        assert_restarts(SCHEDULES[name], interval=interval, frequency=frequency, accumulate=accumulate)

    @pytest.mark.parametrize("interval", ["epoch", "step"])
    @pytest.mark.parametrize("name", ["LambdaLR", "OneCycleLR", "SequentialLR"])
    def test_under_accumulation(self, name, interval):
        assert_restarts(SCHEDULES[name], interval=interval, accumulate=2)

    @pytest.mark.parametrize("optimizer", [sgd, adamw])
    def test_the_momentum_cycle_comes_back(self, optimizer):
        first = assert_restarts(SCHEDULES["OneCycleLR"], optimizer, interval="step")
        momenta = [momentum for _, momentum, _ in first]
        assert momenta[0] == pytest.approx(0.95)
        assert momenta[-1] == pytest.approx(0.95)
        assert min(momenta) < 0.86

    def test_other_options_that_a_schedule_changes_come_back(self):
        first = assert_restarts(Shrinking, adamw, interval="epoch")
        assert [decay for _, _, decay in first[::BATCHES]] == pytest.approx([0.02, 0.03, 0.04])

    def test_values_by_hand(self):
        trace = fit(Recording(lambda o: StepLR(o, 1, gamma=0.5)), pruning(), max_epochs=10)
        assert per_epoch(trace) == pytest.approx([0.1, 0.05, 0.025, 0.1, 0.05, 0.025, 0.1, 0.05, 0.025, 0.0125])

    def test_fewer_batches_than_the_data_has(self):
        trace = fit(Recording(lambda o: StepLR(o, 1, gamma=0.5)), pruning(), limit_train_batches=2)
        assert per_epoch(trace, batches=2) == pytest.approx([0.1, 0.05, 0.025] * 3)

    def test_validation_in_mid_epoch(self):
        module = Recording(lambda o: StepLR(o, 1, gamma=0.5))
        module.validation_step = lambda batch, batch_idx: None
        trace = fit(module, pruning(), validation=DataLoader(torch.randn(2, 4)), val_check_interval=2)
        assert per_epoch(trace) == pytest.approx([0.1, 0.05, 0.025] * 3)

    @pytest.mark.parametrize("limit", [None, 3])
    @pytest.mark.parametrize(
        "config", [{"interval": "epoch"}, {"interval": "step"}, {"interval": "step", "frequency": 3}]
    )
    def test_data_of_unknown_length(self, config, limit):
        def module():
            return Recording(SCHEDULES["LambdaLR"], **config)

        data = DataLoader(Stream())
        trace = fit(module(), pruning(), data=data, limit_train_batches=limit)
        alone = fit(module(), data=data, limit_train_batches=limit, max_epochs=E)
        assert thirds(trace) == (alone, alone, alone)
        assert len(set(rates(alone))) > 1

    @pytest.mark.parametrize("config", [{"interval": "epoch", "frequency": 2}, {"interval": "step", "frequency": 2}])
    def test_a_training_without_an_end(self, config):
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

    def test_a_module_without_a_schedule(self):
        assert fit(Recording(None), pruning()) == [(0.1, 0.9, 0)] * (3 * E * BATCHES)

    def test_two_schedules_of_one_optimizer(self):
        class Two(Recording):
            def configure_optimizers(self):
                optimizer = super().configure_optimizers()
                by_step = {"scheduler": StepLR(optimizer, 2, gamma=0.9), "interval": "step"}
                return [optimizer], [StepLR(optimizer, 1, gamma=0.5), by_step]

        trace, alone = fit(Two(None), pruning()), fit(Two(None), max_epochs=E)
        assert thirds(trace) == (alone, alone, alone)
        assert len(set(rates(alone))) == 9  # one for every second step and one more for each new epoch in between


class Stream(IterableDataset):
    """Batches without a length."""

    LENGTH = 4

    def __iter__(self):
        return iter(torch.ones(self.LENGTH, 4))


class TestSqueeze:
    def squeezed(self, values, n):
        """What a round of n ticks shows of a schedule that, left alone, takes these values."""
        if n == 1:
            return values[:1]
        return [values[round(s * (len(values) - 1) / (n - 1))] for s in range(n)]

    @pytest.mark.parametrize("frequency", [1, 2])
    @pytest.mark.parametrize(
        ("max_epochs", "every_n_epochs", "lengths"),
        [
            (9, 3, [3, 3, 3]),
            (12, 4, [4, 4, 4]),
            (11, 3, [3, 3, 5]),  # a longer last round
            (4, 1, [1, 1, 2]),  # rounds of one tick
            (3, 1, [1, 1, 1]),
        ],
    )
    def test_by_epochs(self, max_epochs, every_n_epochs, lengths, frequency):
        def module():
            return Recording(lambda o: CosineAnnealingLR(o, T_max=max_epochs), frequency=frequency)

        values = per_epoch(fit(module(), max_epochs=max_epochs))
        trace = fit(module(), pruning("squeeze", every_n_epochs=every_n_epochs), max_epochs=max_epochs)
        expected = [value for n in lengths for value in self.squeezed(values, n)]
        assert per_epoch(trace) == expected

    @pytest.mark.parametrize(("frequency", "accumulate"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)])
    @pytest.mark.parametrize("max_epochs", [9, 11])
    def test_by_steps(self, max_epochs, frequency, accumulate):
        steps = -(-BATCHES // accumulate)

        def module():
            cycle = {"max_lr": 0.3, "total_steps": max_epochs * steps}
            return Recording(lambda o: OneCycleLR(o, **cycle), interval="step", frequency=frequency)

        options = {"max_epochs": max_epochs, "accumulate_grad_batches": accumulate}
        values = fit(module(), **options)
        trace = fit(module(), pruning("squeeze"), **options)
        lengths = [E * steps, E * steps, (max_epochs - 2 * E) * steps]
        expected = [value for n in lengths for value in self.squeezed(values, n)]
        assert trace == expected
        assert [trace[0], trace[lengths[0]]] == [values[0]] * 2
        assert [trace[lengths[0] - 1], trace[-1]] == [values[-1]] * 2

    def test_values_by_hand(self):
        trace = fit(Recording(lambda o: LambdaLR(o, lambda epoch: 9 - epoch)), pruning("squeeze"), max_epochs=9)
        assert per_epoch(trace) == pytest.approx([0.9, 0.5, 0.1] * 3)

    def test_fewer_batches_than_the_data_has(self):
        module = Recording(lambda o: LambdaLR(o, lambda step: 18 - step), interval="step")
        trace = fit(module, pruning("squeeze"), limit_train_batches=2)
        positions = [round(s * 17 / 5) for s in range(6)]
        assert rates(trace) == pytest.approx([0.1 * (18 - p) for p in positions] * 3)

    def test_a_training_limited_by_steps(self):
        module = Recording(lambda o: LambdaLR(o, lambda step: 40 - step), interval="step")
        trace = fit(module, pruning("squeeze"), max_steps=40)
        whole, last = ([round(s * 39 / (n - 1)) for s in range(n)] for n in (15, 10))  # the last round is cut short
        assert rates(trace) == pytest.approx([0.1 * (40 - p) for p in whole * 2 + last])

    def test_a_cycle_that_is_shorter_than_training_is_squeezed_to_its_own_end(self):
        def module():
            return Recording(lambda o: OneCycleLR(o, max_lr=0.3, total_steps=20), interval="step")

        values = fit(module(), max_epochs=4)
        assert fit(module(), pruning("squeeze")) == self.squeezed(values, 15) * 3

    def test_steps_of_data_of_unknown_length_are_refused(self):
        module = Recording(lambda o: StepLR(o, 1), interval="step")
        with pytest.raises(ValueError, match="lr_schedule='squeeze' needs to know how many optimizer steps"):
            fit(module, pruning("squeeze"), data=DataLoader(Stream()))
        assert module.trace == []


class TestAuto:
    @pytest.mark.parametrize(
        ("name", "interval", "written_for", "mode"),
        [
            ("CosineAnnealingLR", "epoch", "training", "squeeze"),
            ("CosineAnnealingLR", "epoch", "round", "restart"),
            ("CosineAnnealingLR", "step", "training", "squeeze"),
            ("CosineAnnealingLR", "step", "round", "restart"),
            ("OneCycleLR", "epoch", "training", "squeeze"),
            ("OneCycleLR", "epoch", "round", "restart"),
            ("OneCycleLR", "step", "training", "squeeze"),
            ("OneCycleLR", "step", "round", "restart"),
        ],
    )
    def test_says_what_it_chooses_and_does_it(self, name, interval, written_for, mode, caplog):
        ticks = (1 if interval == "epoch" else BATCHES) * (3 * E if written_for == "training" else E)

        def module():
            kinds = {
                "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, T_max=ticks),
                "OneCycleLR": lambda o: OneCycleLR(o, max_lr=0.3, total_steps=ticks),
            }
            return Recording(kinds[name], interval=interval)

        with caplog.at_level(logging.INFO):
            trace = fit(module(), pruning("auto"))
        lines = [line.strip() for record in caplog.records for line in record.getMessage().splitlines()]
        said = [line for line in lines if line.startswith("learning rate:")]
        assert len(said) == 1
        assert said[0].startswith(f"learning rate: {name}: {mode} (left alone, a round would end ")
        assert trace == fit(module(), pruning(mode))
        if written_for == "training":
            assert trace != fit(module(), pruning("restart"))

    def test_each_schedule_is_named_with_its_reason(self, caplog):
        class Two(Recording):
            def configure_optimizers(self):
                optimizer = super().configure_optimizers()
                return [optimizer], [CosineAnnealingLR(optimizer, 9), LambdaLR(optimizer, lambda epoch: 1.0)]

        with caplog.at_level(logging.INFO):
            fit(Two(None), pruning("auto"))
        assert "learning rate: CosineAnnealingLR: squeeze (left alone, a round would end" in caplog.text
        assert "learning rate: LambdaLR: restart (it is constant)" in caplog.text


class TestKeep:
    @pytest.mark.parametrize(
        ("config", "accumulate"),
        [
            ({"interval": "epoch"}, 1),
            ({"interval": "step"}, 1),
            ({"interval": "step", "frequency": 2}, 2),
        ],
    )
    @pytest.mark.parametrize("name", ["LambdaLR", "SequentialLR", "a user's own"])
    def test_is_what_lightning_does_alone(self, name, config, accumulate):
        schedule = SCHEDULES[name]
        kept = fit(Recording(schedule, **config), pruning("keep"), accumulate_grad_batches=accumulate)
        assert kept == fit(Recording(schedule, **config), accumulate_grad_batches=accumulate)

    @pytest.mark.parametrize("lr_schedule", ["auto", "restart", "squeeze", "keep"])
    def test_without_rounds_nothing_is_touched(self, lr_schedule):
        schedule = SCHEDULES["LambdaLR"]
        held = fit(Recording(schedule), pruning(lr_schedule, rounds=0, every_n_epochs=None))
        assert held == fit(Recording(schedule))

    @pytest.mark.parametrize("lr_schedule", ["restart", "squeeze"])
    def test_one_driven_by_a_metric_goes_on(self, lr_schedule):
        module = Recording(plateau)
        trace = fit(module, pruning("keep", every_n_epochs=4), max_epochs=12)
        assert trace == fit(Recording(plateau), max_epochs=12)
        assert trace != fit(Recording(plateau), pruning(lr_schedule, every_n_epochs=4), max_epochs=12)


class TwoLayers(Recording):
    def __init__(self, schedule, **config):
        super().__init__(schedule, **config)
        self.other = nn.Linear(3, 3)

    def training_step(self, batch, batch_idx):
        return self.other(self.layer(batch)).square().mean()


class TestSeveralCallbacks:
    @pytest.mark.parametrize("interval", ["step", "epoch"])
    def test_the_schedule_follows_the_first_that_prunes(self, interval):
        def schedule(optimizer):
            return CosineAnnealingLR(optimizer, 3 * E * (BATCHES if interval == "step" else 1))

        alone = fit(TwoLayers(schedule, interval=interval), pruning("squeeze", include="layer.weight"))
        holding = pruning("squeeze", rounds=0, every_n_epochs=None, include="other.weight", name="holding")
        second = pruning("restart", rounds=1, every_n_epochs=4, include="other.weight", name="second")
        first = [pruning("squeeze", include="layer.weight") for _ in range(2)]
        assert fit(TwoLayers(schedule, interval=interval), first[0], second) == alone
        assert fit(TwoLayers(schedule, interval=interval), holding, first[1]) == alone


def plateau(optimizer):
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=1)


class TestPlateau:
    @pytest.mark.parametrize("lr_schedule", ["auto", "restart", "squeeze"])
    def test_restarts_with_its_best_value_and_its_count(self, lr_schedule, caplog):
        states = []

        class Watch(Callback):
            def on_train_epoch_start(self, trainer, module):
                scheduler = trainer.lr_scheduler_configs[0].scheduler
                states.append((scheduler.best, scheduler.num_bad_epochs))

        with caplog.at_level(logging.INFO):
            trace = fit(Recording(plateau), pruning(lr_schedule, every_n_epochs=4), Watch(), max_epochs=12)
        # best, one bad epoch, a second one: half the rate, which leaves one bad epoch behind at the end of the round
        assert per_epoch(trace) == pytest.approx([0.1, 0.1, 0.1, 0.05] * 3)
        assert states == [(float("inf"), 0), (1.0, 0), (1.0, 1), (1.0, 0)] * 3
        assert "ReduceLROnPlateau: restart (it is driven by a metric)" in caplog.text


class TwoOptimizers(LightningModule):
    """Manual optimization: two optimizers with a schedule each, one stepped by batches, one by epochs."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)
        self.trace = ([], [])

    def training_step(self, batch, batch_idx):
        for layer, optimizer in zip((self.one, self.two), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(layer(batch).square().mean())
            optimizer.step()
        self.lr_schedulers()[0].step()

    def on_train_epoch_end(self):
        self.lr_schedulers()[1].step()

    def configure_optimizers(self):
        one, two = sgd(self.one.parameters()), adamw(self.two.parameters())
        for optimizer, trace in zip((one, two), self.trace, strict=True):
            optimizer.register_step_pre_hook(lambda optimizer, *_, trace=trace: trace.append(seen(optimizer)))
        return [one, two], [OneCycleLR(one, max_lr=0.3, total_steps=E * BATCHES), Shrinking(two)]


class TestManualOptimization:
    @pytest.mark.parametrize("lr_schedule", ["auto", "restart"])
    def test_rounds_are_alike(self, lr_schedule, caplog):
        with caplog.at_level(logging.INFO):
            traces = fit(TwoOptimizers(), pruning(lr_schedule))
        alone = fit(TwoOptimizers(), max_epochs=E)
        for trace, expected in zip(traces, alone, strict=True):
            assert len(expected) == E * BATCHES
            assert thirds(trace) == (expected, expected, expected)
        assert "OneCycleLR: restart (the module steps it itself)" in caplog.text
        assert "Shrinking: restart (the module steps it itself)" in caplog.text

    def test_kept_the_schedules_are_the_modules_own(self):
        class Stairs(TwoOptimizers):
            def configure_optimizers(self):
                optimizers, (_, two) = super().configure_optimizers()
                return optimizers, [StepLR(optimizers[0], 4), two]

        assert fit(Stairs(), pruning("keep")) == fit(Stairs())

    def test_squeeze_is_refused_at_the_start(self):
        module = TwoOptimizers()
        with pytest.raises(ValueError, match="lr_schedule='squeeze' cannot be had with manual optimization"):
            fit(module, pruning("squeeze"))
        assert module.trace == ([], [])


class ByEpoch(Recording):
    """Sets its schedule by the epoch of training, as timm's schedules want it."""

    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step(epoch=self.current_epoch + 1)


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
class TestASchedulerThatIsSetByTheEpoch:
    def test_it_goes_over_all_rounds_and_that_is_said(self, caplog):
        alone = fit(ByEpoch(lambda o: CosineAnnealingLR(o, 3 * E)))
        with caplog.at_level(logging.INFO):
            assert fit(ByEpoch(lambda o: CosineAnnealingLR(o, 3 * E)), pruning("auto")) == alone
        line = "CosineAnnealingLR: keep (the module's lr_scheduler_step sets it by the epoch of training)"
        assert line in caplog.text

    @pytest.mark.parametrize("wanted", ["restart", "squeeze"])
    def test_rounds_cannot_replay_it(self, wanted):
        module = ByEpoch(lambda o: CosineAnnealingLR(o, 3 * E))
        message = f"lr_schedule='{wanted}' cannot be had where the module's lr_scheduler_step sets it by the epoch"
        with pytest.raises(ValueError, match=message):
            fit(module, pruning(wanted))
        assert module.trace == []

    def test_nor_is_one_that_begins_later_or_whose_rate_does(self):
        class Late(Recording):
            def lr_scheduler_step(self, scheduler, metric):
                if self.trainer.global_step > 0:
                    scheduler.step()

        class Own(Recording):
            def lr_scheduler_step(self, scheduler, metric):
                scheduler.step()

        late = fit(Late(lambda o: StepLR(o, 1)), pruning())
        assert [rates(part)[0] for part in thirds(late)] == [0.1] * 3
        constant = fit(Own(lambda o: LambdaLR(o, lambda epoch: 1.0 if epoch < 2 else 0.5)), pruning())
        assert [rates(part)[0] for part in thirds(constant)] == [0.1] * 3
        assert [rates(part)[-1] for part in thirds(constant)] == [0.05] * 3

    def test_by_the_epoch_itself(self, caplog):
        class Now(Recording):
            def lr_scheduler_step(self, scheduler, metric):
                scheduler.step(epoch=self.current_epoch)

        with caplog.at_level(logging.INFO):
            fit(Now(lambda o: CosineAnnealingLR(o, 3 * E)), pruning("auto"))
        assert "CosineAnnealingLR: keep (the module's lr_scheduler_step sets it" in caplog.text

    def test_a_module_that_steps_it_in_its_own_way_is_no_such_case(self):
        class Own(Recording):
            def lr_scheduler_step(self, scheduler, metric):
                scheduler.step()

        for schedule in (lambda o: StepLR(o, 2), lambda o: LambdaLR(o, lambda epoch: 1.0)):
            assert fit(Own(schedule), pruning()) == fit(Recording(schedule), pruning())


class TestOptimizerState:
    @pytest.mark.parametrize(
        "module",
        [
            pytest.param(lambda: Recording(None), id="sgd"),
            pytest.param(lambda: Recording(None, adamw), id="adamw"),
            pytest.param(TwoOptimizers, id="two"),
        ],
    )
    @pytest.mark.parametrize("reset", [True, False])
    def test_is_forgotten_at_each_pruning(self, module, reset):
        sizes = []

        class Watch(Callback):
            def on_train_epoch_start(self, trainer, module):
                sizes.append({len(optimizer.state) for optimizer in trainer.optimizers})

        fit(module(), pruning(reset_optimizer=reset), Watch())
        empty, full = {0}, {2}  # weight and bias
        after = empty if reset else full
        assert sizes == [empty, full, full, after, full, full, after, full, full]
