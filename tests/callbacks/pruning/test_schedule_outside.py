"""Schedules that look outside are kept; user code that steps a schedule runs in training alone."""

import functools
import logging
import sys
import weakref
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from scheduling import BATCHES, E, Recording, Shrinking, fit, pruning, rates, sgd, thirds
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    MultiplicativeLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from lightning_sap.callbacks.pruning.outside import obstacle_to

a_module = LightningModule()
a_number = 3.0


class Halving(Recording):
    """Its schedule halves the rate with each epoch of the Trainer's."""

    def __init__(self, **config):
        super().__init__(lambda o: LambdaLR(o, lambda _: 0.5**self.trainer.current_epoch), **config)


class TestTheTrainersOwnEpoch:
    def test_the_schedule_is_kept_and_that_is_said(self, caplog):
        with caplog.at_level(logging.INFO):
            trace = fit(Halving(), pruning("auto"))
        assert trace == fit(Halving())
        assert rates(trace[BATCHES : 2 * BATCHES]) == [0.1] * BATCHES  # Lightning steps it in epoch 0, before epoch 1
        assert rates(trace)[-1] == pytest.approx(0.1 * 0.5 ** (3 * E - 2))
        line = "LambdaLR: keep (it looks at the module or the Trainer, whose values no trial knows)"
        assert line in caplog.text

    @pytest.mark.parametrize("wanted", ["restart", "squeeze"])
    def test_a_replay_is_refused_with_the_cure(self, wanted):
        module = Halving()
        message = (
            f"'{wanted}' cannot be had where it looks at the module or the Trainer.* as a function of its own steps"
        )
        with pytest.raises(ValueError, match=message):
            fit(module, pruning(wanted))
        assert module.trace == []

    def test_asked_for_it_is_kept_without_a_word(self):
        assert fit(Halving(), pruning("keep")) == fit(Halving())


class Factor:
    """A callable object."""

    def __init__(self, holds):
        self.holds = holds

    def __call__(self, tick):
        return 1.0


class Watcher(Callback):
    factor = 1.0

    def of(self, tick):
        return self.factor


def reads_a_global(tick):
    return a_module.factor


def calls_one_that_does(tick):
    return reads_a_global(tick)


def by_default(tick, module=a_module):
    return module.factor


def by_keyword(tick, *, module=a_module):
    return module.factor


class OwnLR(Shrinking):
    def __init__(self, optimizer, trainer):
        self.trainer = trainer
        super().__init__(optimizer)


class GlobalLR(Shrinking):
    def get_lr(self):
        return [base * a_module.factor for base in self.base_lrs] if self.last_epoch > 0 else self.base_lrs


def over(value):
    """A function whose closure holds the value."""

    def factor(tick):
        return value.factor

    return factor


def nested(value):
    def factor(tick):
        def inner():
            return value.factor

        return inner()

    return factor


def scheduled(function):
    scheduler = LambdaLR(SGD([nn.Parameter(nn.Linear(1, 1).weight)], lr=0.1), lambda tick: 1.0)
    scheduler.lr_lambdas = [function]  # without a call of it
    return scheduler


trainer = Trainer(accelerator="cpu", barebones=True)
watcher = Watcher()

OUTSIDE = {
    "closure over a module": over(a_module),
    "closure over a trainer": over(trainer),
    "closure over a data module": over(LightningDataModule()),
    "closure over a callback": over(watcher),
    "closure in a closure": nested(a_module),
    "closure over something that holds it": over(SimpleNamespace(deep=[{"key": (trainer,)}])),
    "closure over a weak proxy": over(weakref.proxy(a_module)),
    "closure over a weak reference": over(weakref.ref(a_module)),
    "global": reads_a_global,
    "global of a function that it calls": calls_one_that_does,
    "default": by_default,
    "keyword": by_keyword,
    "partial": functools.partial(by_keyword, module=trainer),
    "bound method": watcher.of,
    "callable object": Factor(a_module),
}
INSIDE = {
    "closure over a number": over(0.5),
    "closure over a list": over([1.0, 0.5]),
    "closure over a layer": over(nn.Linear(2, 2)),
    "global number": lambda tick: a_number,
    "global package": lambda tick: 0.5 ** min(tick, sys.maxsize),
    "callable object": Factor(3),
}
OTHERS = {
    "multiplicative": (lambda o: MultiplicativeLR(o, over(watcher)), True),
    "cyclic": (lambda o: CyclicLR(o, 0.1, 1.0, scale_fn=over(watcher)), True),
    "inside a sequence": (lambda o: SequentialLR(o, [StepLR(o, 1), LambdaLR(o, over(watcher))], [2]), True),
    "a user's own that holds it": (lambda o: OwnLR(o, trainer), True),
    "a user's own that reads a global": (GlobalLR, True),
    "a user's own": (Shrinking, False),
    "cosine": (lambda o: CosineAnnealingLR(o, 3), False),
    "one cycle": (lambda o: OneCycleLR(o, 0.1, 3), False),
}


class TestWhatAScheduleReaches:
    @pytest.mark.parametrize("name", OUTSIDE)
    def test_a_function_outside(self, name):
        assert obstacle_to(scheduled(OUTSIDE[name])) is not None

    @pytest.mark.parametrize("name", INSIDE)
    def test_a_function_inside(self, name):
        assert obstacle_to(scheduled(INSIDE[name])) is None

    @pytest.mark.parametrize("name", OTHERS)
    def test_other_schedules(self, name):
        schedule, outside = OTHERS[name]
        assert (obstacle_to(schedule(sgd([nn.Parameter(nn.Linear(1, 1).weight)]))) is not None) == outside

    def test_what_training_does_not_move_may_be_read(self):
        """Hyperparameters and the length of training."""

        class Module(LightningModule):
            def __init__(self, warmup):
                super().__init__()
                self.save_hyperparameters()
                self.warmup = warmup

        module = Module(5)

        def looks(function):
            return obstacle_to(scheduled(function)) is not None

        assert not looks(lambda t: min(1.0, t / module.hparams.warmup))
        assert not looks(lambda t: t / module.trainer.estimated_stepping_batches)
        assert not looks(lambda t: t / module.trainer.max_epochs)
        assert looks(lambda t: t / module.trainer.global_step)
        assert looks(lambda t: t / module.own)
        assert looks(lambda t: t / module.hparams.warmup + module.trainer.current_epoch)


class CountsCalls(Recording):
    """Its hook counts its calls, and divides the rate by that count."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []

    def lr_scheduler_step(self, scheduler, metric):
        self.calls.append(len(self.trace))
        scheduler.step()


def stairs(optimizer):
    return StepLR(optimizer, 1, gamma=0.5)


class TestAModulesOwnStep:
    @pytest.mark.parametrize("lr_schedule", ["auto", "restart", "keep"])
    @pytest.mark.parametrize(
        "config", [{"interval": "epoch"}, {"interval": "step"}, {"interval": "step", "frequency": 2}]
    )
    def test_is_called_when_training_calls_it_and_at_no_other_time(self, config, lr_schedule):
        alone = CountsCalls(stairs, **config)
        fit(alone)
        module = CountsCalls(stairs, **config)
        fit(module, pruning(lr_schedule))
        assert module.calls == alone.calls
        assert len(module.calls) == {"{'interval': 'epoch'}": 9, "{'interval': 'step'}": 45}.get(str(config), 18)

    def test_auto_keeps_the_schedule_and_says_so(self, caplog):
        with caplog.at_level(logging.INFO):
            trace = fit(CountsCalls(stairs), pruning("auto"))
        assert trace == fit(CountsCalls(stairs))
        assert (
            "StepLR: keep (the module's own lr_scheduler_step steps it, which nobody but training calls)" in caplog.text
        )

    def test_restart_rewinds_the_schedule(self, caplog):
        with caplog.at_level(logging.INFO):
            first, second, third = thirds(fit(CountsCalls(stairs), pruning("restart")))
        assert rates(first)[::BATCHES] == pytest.approx([0.1, 0.05, 0.025])
        assert second == first
        assert third == first
        assert "StepLR: restart (asked for; the module's lr_scheduler_step steps it)" in caplog.text

    def test_squeeze_is_refused_with_the_cure(self):
        module = CountsCalls(stairs)
        message = "'squeeze' cannot be had where the module's own lr_scheduler_step steps it.* lr_schedule='restart'"
        with pytest.raises(ValueError, match=message):
            fit(module, pruning("squeeze"))
        assert (module.calls, module.trace) == ([], [])

    def test_given_to_the_instance_it_is_seen_too(self, caplog):
        module = Recording(stairs)
        module.lr_scheduler_step = lambda scheduler, metric: scheduler.step()
        with caplog.at_level(logging.INFO):
            fit(module, pruning("auto"))
        assert "StepLR: keep (the module's own lr_scheduler_step steps it" in caplog.text


class Counting(Shrinking):
    """A user's own that writes down where it was stepped."""

    def __init__(self, optimizer):
        self.seen = []
        super().__init__(optimizer)

    def step(self, epoch=None):
        self.seen.append(epoch)
        super().step(epoch)


class TestAUsersOwnSchedule:
    def test_is_tried_on_a_copy(self):
        kept = []

        def schedule(optimizer):
            kept.append(Counting(optimizer))
            return kept[-1]

        first, second, third = thirds(fit(Recording(schedule), pruning("restart", reset_optimizer=False)))
        assert (second, third) == (first, first)
        # at its birth; in the last round at the end of each epoch: `seen` is part of its state, which is rewound
        assert len(kept[0].seen) == 1 + E

    def test_is_untouched_before_the_first_step(self):
        schedulers, seen = [], []

        class Watch(Callback):
            def on_train_batch_start(self, trainer, module, batch, batch_idx):
                seen.append(list(schedulers[0].seen))

        def schedule(optimizer):
            schedulers.append(Counting(optimizer))
            return schedulers[0]

        fit(Recording(schedule), pruning("auto"), Watch())
        assert seen[0] == [None]


class TestFrequency:
    """Lightning's own count of a replayed schedule is stilled while training goes on."""

    @pytest.mark.parametrize("frequency", [1, 2])
    @pytest.mark.parametrize("fails", [False, True])
    def test_is_put_back(self, frequency, fails):
        seen = []

        class Watch(Callback):
            def on_train_batch_start(self, trainer, module, batch, batch_idx):
                seen.append(trainer.lr_scheduler_configs[0])
                assert seen[0].frequency == sys.maxsize
                if fails and trainer.global_step == 7:
                    raise RuntimeError("stop here")

        module = Recording(stairs, frequency=frequency)
        if fails:
            with pytest.raises(RuntimeError, match="stop here"):
                fit(module, pruning("squeeze"), Watch())
        else:
            fit(module, pruning("squeeze"), Watch())
        assert seen[0].frequency == frequency


class TestOptionsThatAnOptimizerKeepsForItself:
    @pytest.mark.parametrize("lr_schedule", ["restart", "squeeze"])
    def test_a_rewound_schedule_leaves_them(self, lr_schedule):
        """As Prodigy keeps the estimate of its step size."""
        seen = []

        class Estimating(SGD):
            def step(self, closure=None):
                group = self.param_groups[0]
                group["d"] *= 2
                seen.append((group["d"], group["lr"]))
                return super().step(closure)

        def optimizer(parameters):
            made = Estimating(parameters, lr=0.1, momentum=0.9)
            made.param_groups[0]["d"] = 1e-6
            return made

        module = Recording(lambda o: CosineAnnealingLR(o, E), optimizer)
        fit(module, pruning(lr_schedule, reset_optimizer=False))
        assert [d for d, _ in seen] == [1e-6 * 2**i for i in range(1, 3 * E * BATCHES + 1)]
        assert [rate for _, rate in seen[:: E * BATCHES]] == [0.1] * 3
