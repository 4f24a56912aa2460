"""Learning rates of whole fits: 'keep', plateaus, several callbacks, manual optimization, a module's own steps."""

import logging

import pytest
from lightning.pytorch import Callback, LightningModule
from scheduling import (
    BATCHES,
    SCHEDULES,
    E,
    Recording,
    Shrinking,
    adamw,
    fit,
    per_epoch,
    plateau,
    pruning,
    rates,
    seen,
    sgd,
    thirds,
)
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    OneCycleLR,
    StepLR,
)

pytestmark = pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'. 'epoch'")


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
    def test_keep_is_what_lightning_does_alone(self, name, config, accumulate):
        schedule = SCHEDULES[name]
        kept = fit(Recording(schedule, **config), pruning("keep"), accumulate_grad_batches=accumulate)
        assert kept == fit(Recording(schedule, **config), accumulate_grad_batches=accumulate)

    @pytest.mark.parametrize("lr_schedule", ["auto", "restart", "squeeze", "keep"])
    def test_schedule_without_rounds_is_not_touched(self, lr_schedule):
        schedule = SCHEDULES["LambdaLR"]
        held = fit(Recording(schedule), pruning(lr_schedule, rounds=0, every_n_epochs=None))
        assert held == fit(Recording(schedule))

    @pytest.mark.parametrize("lr_schedule", ["restart", "squeeze"])
    def test_keep_lets_a_plateau_schedule_go_on(self, lr_schedule):
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
    def test_schedule_follows_the_first_callback_that_prunes(self, interval):
        def schedule(optimizer):
            return CosineAnnealingLR(optimizer, 3 * E * (BATCHES if interval == "step" else 1))

        alone = fit(TwoLayers(schedule, interval=interval), pruning("squeeze", include="layer.weight"))
        holding = pruning("squeeze", rounds=0, every_n_epochs=None, include="other.weight", name="holding")
        second = pruning("restart", rounds=1, every_n_epochs=4, include="other.weight", name="second")
        first = [pruning("squeeze", include="layer.weight") for _ in range(2)]
        assert fit(TwoLayers(schedule, interval=interval), first[0], second) == alone
        assert fit(TwoLayers(schedule, interval=interval), holding, first[1]) == alone


class TestPlateau:
    @pytest.mark.parametrize("lr_schedule", ["auto", "restart", "squeeze"])
    def test_plateau_schedule_restarts_with_its_best_value_and_its_count(self, lr_schedule, caplog):
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
    def test_rounds_are_alike_under_manual_optimization(self, lr_schedule, caplog):
        with caplog.at_level(logging.INFO):
            traces = fit(TwoOptimizers(), pruning(lr_schedule))
        alone = fit(TwoOptimizers(), max_epochs=E)
        for trace, expected in zip(traces, alone, strict=True):
            assert len(expected) == E * BATCHES
            assert thirds(trace) == (expected, expected, expected)
        assert "OneCycleLR: restart (the module steps it itself)" in caplog.text
        assert "Shrinking: restart (the module steps it itself)" in caplog.text

    def test_keep_under_manual_optimization_leaves_the_modules_own(self):
        class Stairs(TwoOptimizers):
            def configure_optimizers(self):
                optimizers, (_, two) = super().configure_optimizers()
                return optimizers, [StepLR(optimizers[0], 4), two]

        assert fit(Stairs(), pruning("keep")) == fit(Stairs())

    def test_squeeze_under_manual_optimization_is_refused_at_the_start(self):
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
    def test_schedule_set_by_the_epoch_goes_over_all_rounds_and_says_so(self, caplog):
        alone = fit(ByEpoch(lambda o: CosineAnnealingLR(o, 3 * E)))
        with caplog.at_level(logging.INFO):
            assert fit(ByEpoch(lambda o: CosineAnnealingLR(o, 3 * E)), pruning("auto")) == alone
        line = "CosineAnnealingLR: keep (the module's lr_scheduler_step sets it by the epoch of training)"
        assert line in caplog.text

    @pytest.mark.parametrize("wanted", ["restart", "squeeze"])
    def test_schedule_set_by_the_epoch_cannot_be_replayed(self, wanted):
        module = ByEpoch(lambda o: CosineAnnealingLR(o, 3 * E))
        message = f"lr_schedule='{wanted}' cannot be had where the module's lr_scheduler_step sets it by the epoch"
        with pytest.raises(ValueError, match=message):
            fit(module, pruning(wanted))
        assert module.trace == []

    def test_schedule_that_begins_or_changes_later_is_replayed(self):
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

    def test_schedule_set_by_the_current_epoch_is_kept(self, caplog):
        class Now(Recording):
            def lr_scheduler_step(self, scheduler, metric):
                scheduler.step(epoch=self.current_epoch)

        with caplog.at_level(logging.INFO):
            fit(Now(lambda o: CosineAnnealingLR(o, 3 * E)), pruning("auto"))
        assert "CosineAnnealingLR: keep (the module's lr_scheduler_step sets it" in caplog.text

    def test_schedule_that_the_module_steps_itself_is_replayed(self):
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
    def test_optimizer_state_is_forgotten_at_each_pruning(self, module, reset):
        sizes = []

        class Watch(Callback):
            def on_train_epoch_start(self, trainer, module):
                sizes.append({len(optimizer.state) for optimizer in trainer.optimizers})

        fit(module(), pruning(reset_optimizer=reset), Watch())
        empty, full = {0}, {2}  # weight and bias
        after = empty if reset else full
        assert sizes == [empty, full, full, after, full, full, after, full, full]
