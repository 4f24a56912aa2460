"""What a run says at its end: what was asked, what was reached, why, and the cure; at its start, what is known then."""

import itertools
import logging
import warnings
from functools import partial

import pytest
import torch
from helpers import BATCHES, Crash, Net, Watch, crash, data, fit, half, loader, quiet_trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from optimizers import REAL
from stopping import Scripted, monitor_of, pruner_of
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, IterableDataset

from lightning_sap import GoOn, RoundListener, SAPCallback, Stop, TakeBack


class Losing(Net):
    """The validation loss follows a script, epoch by epoch; its last value stays."""

    def __init__(self, *losses):
        super().__init__()
        self.losses = losses

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", float(self.losses[min(self.trainer.current_epoch, len(self.losses) - 1)]))


class Stream(IterableDataset):
    def __init__(self, *, endless):
        self.endless = endless

    def __iter__(self):
        return itertools.cycle(iter(data())) if self.endless else iter(data())


class OutOfTime(Timer):
    """Its time is over with an epoch."""

    def __init__(self, epoch):
        super().__init__("00:01:00:00", interval="epoch", verbose=False)
        self.epoch, self.over = epoch, False

    def time_elapsed(self, stage="train"):
        return 9999.0 if self.over else 0.0

    def on_train_epoch_end(self, trainer, pl_module):
        self.over = trainer.current_epoch == self.epoch
        super().on_train_epoch_end(trainer)


def should_stop(epoch):
    return Watch(on_train_epoch_end=lambda t, m: setattr(t, "should_stop", t.should_stop or t.current_epoch == epoch))


def said(caplog, run, name="sap"):
    """What a run warns of, but for units without weights, and its lines in the log but for plan and prunings."""
    caplog.clear()
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        run()
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    told = [
        line
        for line in lines
        if line.startswith(f"{name}: ")
        and not any(of in line for of in (" in rounds of ", "→", " resumed in ", " ended training in round "))
    ]
    warned = [str(w.message) for w in caught if str(w.message).startswith(f"{name}: ")]
    return [text for text in warned if "output units" not in text], told


class TestTarget:
    def test_a_target_that_is_met_is_said_to_be_met(self, caplog):
        assert said(caplog, lambda: fit(Net(), half(target_remaining=0.25))) == (
            [], ["sap: 25.00% of 72 weights remain after 3 prunings; target_remaining=0.25 is met."],
        )  # fmt: skip

    def test_a_target_that_was_met_before_the_end_is_not_missed(self, caplog):
        """By the first pruning; the others have nothing left to take."""
        pruner = half(target_remaining=0.5)
        assert said(caplog, lambda: fit(Net(), pruner, should_stop(1))) == (
            [], ["sap: 50.00% of 72 weights remain after 1 of 3 prunings; target_remaining=0.5 is met."],
        )  # fmt: skip

    def test_a_target_that_rounded_floors_miss_by_a_weight_is_told_as_it_is(self, caplog):
        """19 of 72 weights; floors of 13 of 48 and 7 of 24 keep 20."""
        assert said(caplog, lambda: fit(Net(), half(target_remaining=0.26, min_remaining=0.26))) == (
            [], ["sap: 27.78% of 72 weights remain after 3 prunings."],
        )  # fmt: skip

    def test_sharpness_aware_minimization_by_two_calls_meets_its_target(self, caplog):
        class ByHand(Net):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                self.manual_backward(self.loss(batch))
                optimizer.first_step(zero_grad=True)
                self.manual_backward(self.loss(batch))
                optimizer.second_step(zero_grad=True)

        pruner = SAPCallback(target_remaining=0.2)
        assert said(caplog, lambda: fit(ByHand(optimizer=REAL["SAM"]), pruner)) == (
            [], ["sap: 19.44% of 72 weights remain after 3 prunings; target_remaining=0.2 is met."],
        )  # fmt: skip
        assert len(pruner.history) == 4

    def test_early_stopping_that_misses_a_target_is_warned_of_once_at_the_end(self, caplog):
        pruner = half(every_n_epochs=2, target_remaining=0.05)
        early = EarlyStopping("val_loss", patience=2)
        assert said(caplog, lambda: fit(Losing(3, 2, 1), pruner, early, val=loader(), max_epochs=10)) == (
            [
                "sap: target_remaining=0.05 is missed: 22.22% of 72 weights remain after 2 of 4 prunings, since "
                "EarlyStopping('val_loss', patience=2) ended training in epoch 4. Give it more patience, which counts "
                "validation checks, or give Trainer(min_epochs=9)."
            ],
            [],
        )

    def test_min_epochs_that_the_warning_advises_meets_the_target(self, caplog):
        pruner, early = half(every_n_epochs=2, target_remaining=0.05), EarlyStopping("val_loss", patience=1)
        run = partial(fit, Losing(1), pruner, early, val=loader(), max_epochs=10, min_epochs=9)
        assert said(caplog, run) == (
            [], ["sap: 5.56% of 72 weights remain after 4 prunings; target_remaining=0.05 is met."],
        )  # fmt: skip

    def test_max_time_that_misses_a_target_is_warned_of(self, caplog):
        assert said(caplog, lambda: fit(Net(), half(target_remaining=0.05), OutOfTime(1), max_epochs=5)) == (
            [
                "sap: target_remaining=0.05 is missed: 47.22% of 72 weights remain after 1 of 4 prunings, since the "
                "time of Timer (max_time) was over in epoch 1. Give more time, or fewer or shorter rounds."
            ],
            [],
        )

    def test_a_layer_replaced_in_the_last_round_misses_the_target_with_a_warning(self, caplog):
        def change(trainer, module):
            if trainer.current_epoch == 3:
                layer = module.net[0] = nn.Linear(6, 8)
                trainer.optimizers[0].add_param_group({"params": layer.parameters()})

        run = partial(fit, Net(), half(target_remaining=0.25), Watch(on_train_epoch_start=change))
        replaced, *missed = said(caplog, run)[0]
        assert "these were replaced" in replaced
        (text,) = missed  # a replaced layer is no frozen one
        assert text.startswith("sap: target_remaining=0.25 is missed: 7")
        assert "since the last pruning took nothing of net.0.weight: a weight is pruned after a round in which" in text
        assert text.endswith("Replace or freeze layers earlier, exclude what is not to be pruned, or give a larger "
                             "target_remaining.")  # fmt: skip

    def test_a_layer_replaced_earlier_leaves_the_target_met_and_is_not_called_frozen(self, caplog):
        def change(trainer, module):
            if trainer.current_epoch == 1:
                layer = module.net[0] = nn.Linear(6, 8)
                trainer.optimizers[0].add_param_group({"params": layer.parameters()})

        run = partial(fit, Net(), half(target_remaining=0.25), Watch(on_train_epoch_start=change))
        warned, told = said(caplog, run)
        assert [text[:27] for text in warned] == ["sap: these were replaced wh"]
        assert told == ["sap: 25.00% of 72 weights remain after 3 prunings; target_remaining=0.25 is met."]

    def test_weights_frozen_for_several_rounds_are_warned_of_once_on_the_way(self, caplog):
        freeze = Watch(on_train_epoch_end=lambda t, m: m.net[0].requires_grad_(False))
        warned = said(caplog, lambda: fit(Net(), half(target_remaining=0.1), freeze, max_epochs=6))[0]
        assert ["pruned no further" in text for text in warned] == [True, False]

    def test_a_last_round_that_is_taken_back_misses_the_target_with_a_warning(self, caplog):
        class Unsound(RoundListener, Callback):
            may_take_back = True

            def on_round_end(self, trainer, pl_module, event):
                return TakeBack() if event.record.round == 3 else GoOn()

        pruner = half(target_remaining=0.125)
        assert said(caplog, lambda: fit(Net(), pruner, Unsound())) == (
            [
                "sap: target_remaining=0.125 is missed: 25.00% of 72 weights remain after 3 prunings, since round 3 "
                "was taken back. Give more rounds, so that each takes less, or a larger target_remaining."
            ],
            [],
        )

    @pytest.mark.parametrize(("target", "missed"), [(None, "nothing was pruned"), (0.25, "target_remaining=0.25 is ")])
    def test_steps_without_any_gradient_are_told_as_the_cause(self, caplog, target, missed):
        class Idle(Net):
            def loss(self, batch):
                with torch.no_grad():
                    hidden = self.net[:3](batch[0]) @ self.net[3].weight.T
                return (hidden + self.net[3].bias).square().mean()

        warned = said(caplog, lambda: fit(Idle(), half(target_remaining=target)))[0]
        assert warned[-1].startswith(f"sap: {missed}")
        assert warned[-1].endswith(
            ": 100.00% of 72 weights remain after 3 prunings, since none of them had a gradient. Let the loss depend "
            "on them, or prune other weights with include."
        )
        assert len(warned) == (1 if target is None else 2)


class TestPlannedPrunings:
    def test_should_stop_of_another_callback_is_warned_of_with_the_epochs_it_takes(self, caplog):
        assert said(caplog, lambda: fit(Net(), half(rounds=5), should_stop(2), max_epochs=8)) == (
            [
                "sap: not all prunings came: 25.00% of 72 weights remain after 2 of 5 prunings, since "
                "trainer.should_stop was set in epoch 2. To train on all the same, give Trainer(min_epochs=6)."
            ],
            [],
        )

    def test_the_epochs_that_the_warning_says_are_enough(self, caplog):
        pruner = half(rounds=5)
        assert said(caplog, lambda: fit(Net(), pruner, should_stop(2), max_epochs=8, min_epochs=6))[0] == []
        assert pruner.current_round() == 5

    def test_a_stop_before_the_first_pruning_says_that_nothing_was_pruned(self, caplog):
        early = EarlyStopping("val_loss", patience=3)
        run = partial(fit, Losing(1), half(rounds=2, every_n_epochs=3), early, val=loader(), max_epochs=12)
        assert said(caplog, run, "sap")[0] == [
            "sap: not all prunings came: 50.00% of 72 weights remain after 1 of 2 prunings, since "
            "EarlyStopping('val_loss', patience=3) ended training in epoch 3. Give it more patience, which counts "
            "validation checks, or give Trainer(min_epochs=7)."
        ]
        run = partial(fit, Net(), half(rounds=2, every_n_epochs=3), should_stop(0), max_epochs=12)
        assert said(caplog, run)[0] == [
            "sap: nothing was pruned: 100.00% of 72 weights remain after 0 of 2 prunings, since trainer.should_stop "
            "was set in epoch 0. To train on all the same, give Trainer(min_epochs=7)."
        ]

    def test_rounds_in_steps_that_training_cuts_off_are_warned_of_in_steps(self, caplog):
        stop = Watch(on_train_batch_end=lambda t, m: setattr(t, "should_stop", t.global_step == 5))
        assert said(caplog, lambda: fit(Net(), half(every_n_epochs=None, every_n_steps=2), stop))[0] == [
            "sap: not all prunings came: 25.00% of 72 weights remain after 2 of 5 prunings, since trainer.should_stop "
            "was set in epoch 1. To train on all the same, give Trainer(min_steps=11)."
        ]

    def test_early_stopping_at_a_threshold_was_asked_for(self, caplog):
        early = EarlyStopping("sap/remaining", stopping_threshold=0.3)
        assert said(caplog, lambda: fit(Net(), half(), early, max_epochs=50)) == (
            [],
            [
                "sap: 25.00% of 72 weights remain after 2 of 49 prunings, since EarlyStopping('sap/remaining', "
                "patience=3) ended training in epoch 2."
            ],
        )

    def test_epochs_without_a_step_are_warned_of_with_the_epochs_it_takes(self, caplog):
        module = Net()
        module.on_train_batch_start = lambda batch, index: -1 if module.trainer.current_epoch < 2 else None
        assert said(caplog, lambda: fit(module, half()))[0] == [
            "sap: not all prunings came: 50.00% of 72 weights remain after 1 of 3 prunings, since max_epochs=4 ended "
            "training in epoch 3. Give max_epochs=6 or more, or fewer or shorter rounds."
        ]

    def test_a_run_that_pruned_as_planned_says_how_to_go_further(self, caplog):
        assert said(caplog, lambda: fit(Net(), half())) == (
            [],
            [
                "sap: 12.50% of 72 weights remain after 3 prunings. For a sparser network give more rounds (rounds, "
                "max_epochs) or a target_remaining."
            ],
        )


class TestVerdict:
    def test_a_verdict_is_told_with_the_round_that_it_puts_back(self, tmp_path, caplog):
        run = partial(fit, Scripted(), pruner_of(), monitor_of(), val=loader(), max_epochs=8, default_root_dir=tmp_path)
        assert said(caplog, run) == (
            [],
            ["sap: 54.17% of 72 weights remain, those of round 3, which was put back, since PQIMonitor ended training "
             "after round 5."],
        )  # fmt: skip

    def test_a_verdict_that_misses_a_target_is_warned_of(self, tmp_path, caplog):
        pruner = pruner_of(target_remaining=0.1)
        run = partial(fit, Scripted(), pruner, monitor_of(), val=loader(), max_epochs=8, default_root_dir=tmp_path)
        warned, told = said(caplog, run)
        assert warned == [
            "sap: target_remaining=0.1 is missed: 34.72% of 72 weights remain, those of round 3, which was put "
            "back, since PQIMonitor ended training after round 5. Give more rounds, so that each takes less, or a "
            "larger target_remaining."
        ]
        assert told == []

    def test_a_verdict_on_the_last_round_that_misses_a_target_is_warned_of(self, tmp_path, caplog):
        """All prunings came, and the target was met, until a denser round was put back."""
        pruner = pruner_of(target_remaining=0.2)
        run = partial(fit, Scripted(), pruner, monitor_of(), val=loader(), max_epochs=6, default_root_dir=tmp_path)
        warned = said(caplog, run)[0]
        left = pruner.history.restored.remaining
        assert left > 0.2
        assert warned == [
            f"sap: target_remaining=0.2 is missed: {left:.2%} of 72 weights remain, those of round 3, which was put "
            "back, since PQIMonitor ended training after round 5. Give more rounds, so that each takes less, or a "
            "larger target_remaining."
        ]

    def test_a_listener_of_ones_own_that_stops_was_asked_for(self, caplog):
        class Enough(RoundListener, Callback):
            def on_round_end(self, trainer, pl_module, event):
                return Stop() if event.record.round == 1 else GoOn()

        assert said(caplog, lambda: fit(Net(), half(), Enough())) == (
            [], ["sap: 50.00% of 72 weights remain after 1 of 3 prunings, since Enough ended training after round 1."],
        )  # fmt: skip


class TestStart:
    @pytest.mark.parametrize(
        ("options", "trainer", "message"),
        [
            (
                {},
                {"max_epochs": 1},
                "sap: no pruning is planned: 1 epoch of training (max_epochs=1) cannot hold two rounds. Give "
                "max_epochs=2 or more, every_n_steps for rounds within the epoch, or rounds=0 to only hold masks.",
            ),
            (
                {},
                {"max_epochs": -1, "max_steps": 1},
                "sap: no pruning is planned: 1 step of training (max_steps=1) cannot hold two rounds. Give max_steps=2 "
                "or more, or rounds=0 to only hold masks.",
            ),
        ],
    )
    def test_a_run_too_short_to_prune_is_warned_of_at_the_start_and_not_again(self, caplog, options, trainer, message):
        seen = []
        look = Watch(on_train_batch_start=lambda t, m: seen.append(len(caught)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", message="sap:")
            fit(Net(), SAPCallback(**options), look, **trainer)
        assert [str(w.message) for w in caught if "sap:" in str(w.message)] == [message]
        assert seen[0] >= 1

    def test_the_epochs_or_steps_that_the_warning_says_are_enough(self, caplog):
        pruner, other = SAPCallback(), SAPCallback(every_n_steps=1)
        assert said(caplog, lambda: fit(Net(), pruner, max_epochs=2))[0] == []
        assert said(caplog, lambda: fit(Net(), other, max_epochs=1))[0] == []
        assert (pruner.current_round(), other.current_round()) == (1, 2)

    @pytest.mark.parametrize(
        ("patience", "trainer", "checks"),
        [
            (1, {}, 2),
            (2, {}, None),
            (3, {"val_check_interval": 0.5, "limit_train_batches": 2}, 4),
            (4, {"val_check_interval": 0.5, "limit_train_batches": 2}, None),
            (1, {"val_check_interval": 3}, 2),
            (1, {"val_check_interval": 2, "check_val_every_n_epoch": None}, 3),
            (1, {"check_val_every_n_epoch": 2}, None),
            (1, {"min_epochs": 5}, None),
        ],
    )
    def test_a_patience_shorter_than_a_round_is_warned_of_at_the_start(self, caplog, patience, trainer, checks):
        """Two prunings in rounds of two epochs; the loss falls, so that nothing is stopped."""
        early, pruner = EarlyStopping("val_loss", patience=patience), half(every_n_epochs=2)
        run = partial(fit, Losing(6, 5, 4, 3, 2, 1), pruner, early, val=loader(), max_epochs=6, **trainer)
        expected = [
            f"sap: EarlyStopping('val_loss', patience={patience}) counts validation checks; a round has {checks}, so "
            f"that training can end within a round. Give a patience of {2 * (checks or 0)}, two rounds, or more, or "
            "Trainer(min_epochs=5)."
        ]
        assert said(caplog, run)[0][:1] == (expected if checks else [])

    def test_a_patience_shorter_than_a_round_in_steps_is_warned_of(self, caplog):
        pruner = half(every_n_epochs=None, every_n_steps=6)
        early = EarlyStopping("val_loss", patience=1)
        assert said(caplog, lambda: fit(Losing(9, 8, 7, 6, 5), pruner, early, val=loader(), max_epochs=5))[0] == [
            "sap: EarlyStopping('val_loss', patience=1) counts validation checks; a round has 2, so that training can "
            "end within a round. Give a patience of 4, two rounds, or more, or Trainer(min_steps=7)."
        ]


class TestStreams:
    def train(self, pruner, *callbacks, endless=True, **options):
        trainer = quiet_trainer(pruner, *callbacks, limit_val_batches=0, **{"max_epochs": -1, **options})
        trainer.fit(Net(), DataLoader(Stream(endless=endless), 8))
        return trainer

    CURE = "Where the data have no end an epoch has none: give every_n_steps, the length of a round in steps."

    def stop_at(self, step):
        return Watch(on_train_batch_end=lambda t, m: setattr(t, "should_stop", t.global_step == step))

    @pytest.mark.parametrize(
        ("options", "trainer", "rounds"),
        [
            ({"every_n_epochs": None, "every_n_steps": 3}, {}, 3),
            ({"every_n_epochs": None}, {"max_steps": 10}, 4),
            ({}, {"endless": False, "max_epochs": 4}, 3),
            ({}, {"endless": False}, 3),
        ],
        ids=["every_n_steps", "max_steps", "max_epochs of data with an end", "every_n_epochs of data with an end"],
    )
    def test_what_the_error_advises_prunes(self, caplog, options, trainer, rounds):
        pruner, stop = half(**options), self.stop_at(4 * BATCHES - 1 if "endless" in trainer else 10)
        assert said(caplog, lambda: self.train(pruner, stop, **trainer))[0] == []
        assert pruner.current_round() == rounds

    def test_epochs_of_an_endless_stream_are_warned_of_at_the_end(self, caplog):
        """The error no longer says so, but a user may."""
        assert said(caplog, lambda: self.train(half(), self.stop_at(5)))[0] == [
            "sap: nothing was pruned: 100.00% of 72 weights remain after 0 prunings, since trainer.should_stop was set "
            f"in epoch 0. {self.CURE}"
        ]
        assert said(caplog, lambda: self.train(half(), max_epochs=3, max_steps=5))[0] == [
            "sap: nothing was pruned: 100.00% of 72 weights remain after 0 of 2 prunings, since max_steps=5 ended "
            f"training in epoch 0. {self.CURE}"
        ]

    def test_fewer_steps_than_the_rounds_take_are_warned_of_in_steps(self, caplog):
        pruner = half(every_n_epochs=None, every_n_steps=4, rounds=5)
        assert said(caplog, lambda: self.train(pruner, endless=False, max_epochs=3))[0] == [
            "sap: not all prunings came: 25.00% of 72 weights remain after 2 of 5 prunings, since max_epochs=3 ended "
            "training in epoch 2. All prunings take 21 steps: give more, or fewer or shorter rounds."
        ]


class TestUncountedSteps:
    class Own(Net):
        """Steps by an optimizer that the Trainer does not know."""

        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = SGD(self.parameters(), lr=0.01)
            self.manual_backward(self.loss(batch))
            optimizer.step()

        def configure_optimizers(self):
            return SGD(self.parameters(), lr=0.1)

    COUNTED = (
        "A step counts where step() of an optimizer from configure_optimizers is called, by Lightning or on "
        "self.optimizers(); one that steps in a method of its own must call step() of an optimizer inside it."
    )

    def test_a_round_in_which_no_step_was_seen_is_warned_of_once(self, caplog):
        assert said(caplog, lambda: fit(self.Own(), half(every_n_epochs=2), max_epochs=8))[0] == [
            "sap: no optimizer step was seen in the 6 batches of round 0, and a round without one is not pruned. "
            f"{self.COUNTED}"
        ]

    def test_rounds_in_steps_of_which_none_was_seen_are_warned_of_at_the_end(self, caplog):
        pruner = half(every_n_epochs=None, every_n_steps=2)
        assert said(caplog, lambda: fit(self.Own(), pruner, max_epochs=1, limit_train_batches=1.0))[0] == [
            "sap: no optimizer step was seen in the 3 batches of round 0, and a round without one is not pruned. "
            f"{self.COUNTED}"
        ]

    def test_a_stop_before_the_end_of_a_round_without_steps_tells_of_the_steps(self, caplog):
        pruner = half(every_n_epochs=4)
        assert said(caplog, lambda: fit(self.Own(), pruner, should_stop(1), max_epochs=8))[0] == [
            "sap: nothing was pruned: 100.00% of 72 weights remain after 0 of 1 pruning, since no optimizer step was "
            f"seen in 6 batches. {self.COUNTED}"
        ]

    def test_a_target_that_is_missed_as_steps_come_to_an_end_is_warned_of_with_that_cause(self, caplog):
        class Tiring(Net):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                if self.trainer.current_epoch < 2:
                    self.manual_backward(self.loss(batch))
                    self.optimizers().step()

        assert said(caplog, lambda: fit(Tiring(), half(target_remaining=0.1)))[0] == [
            "sap: target_remaining=0.1 is missed: 20.83% of 72 weights remain after 2 of 3 prunings, since no "
            f"optimizer step was seen in 6 batches. {self.COUNTED}"
        ]


class TestNothingIsSaid:
    @pytest.mark.parametrize(
        ("pruner", "options"),
        [
            ({"rounds": 0, "every_n_epochs": None}, {}),
            ({"rounds": 0, "every_n_epochs": None}, {"max_epochs": 1}),
            ({}, {"fast_dev_run": True}),
            ({"rounds": 50, "every_n_epochs": 9, "target_remaining": 0.1}, {"fast_dev_run": 2}),
        ],
    )
    def test_a_run_that_is_to_prune_nothing_is_not_warned_of(self, caplog, pruner, options):
        early = EarlyStopping("val_loss", patience=1)
        assert said(caplog, lambda: fit(Losing(1), half(**pruner), early, val=loader(), **options)) == (
            [], ["sap: 100.00% of 72 weights remain after 0 prunings."],
        )  # fmt: skip

    @pytest.mark.parametrize("error", [Crash, KeyboardInterrupt])
    def test_a_run_that_an_exception_ends_says_nothing(self, caplog, error):
        def fail(trainer, module):
            if trainer.current_epoch == 2:
                raise error

        def run():
            with pytest.raises((error, SystemExit)):
                fit(Net(), half(target_remaining=0.05), Watch(on_train_epoch_start=fail), max_epochs=6)

        assert said(caplog, run) == ([], [])

    def test_a_second_fit_says_only_its_own_end(self, caplog):
        module, pruner = Net(), half()
        with pytest.warns(UserWarning, match="not all prunings came"):
            fit(module, pruner, should_stop(1))
        assert said(caplog, lambda: fit(module, pruner)) == (
            [],
            [
                "sap: 6.94% of 72 weights remain after 3 prunings. For a sparser network give more rounds (rounds, "
                "max_epochs) or a target_remaining."
            ],
        )


class TestResume:
    def resumed(self, tmp_path, pruner, *callbacks, **options):
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        with pytest.raises(Crash):
            fit(Net(), half(target_remaining=0.05), saver, Watch(on_train_epoch_start=lambda t, m: (
                crash() if t.current_epoch == 2 else None)), max_epochs=6, enable_checkpointing=True)  # fmt: skip
        return fit(Net(), pruner, *callbacks, ckpt_path=tmp_path / "epoch=1.ckpt", **options)

    @pytest.mark.filterwarnings("ignore:.*checkpoint")
    def test_prunings_that_the_resume_said_to_be_lost_are_not_said_again(self, tmp_path, caplog):
        run = partial(self.resumed, tmp_path, half(target_remaining=0.05), max_epochs=4)
        warned, told = said(caplog, run)
        assert warned == [
            "sap: training now ends before 2 of the 5 prunings planned, and misses target_remaining=0.05. For all of "
            "them it takes max_epochs=6 or more, and steps to match."
        ]
        assert told == ["sap: 12.50% of 72 weights remain after 3 of 5 prunings."]

    def test_prunings_that_are_lost_beyond_those_are_warned_of(self, tmp_path, caplog):
        run = partial(self.resumed, tmp_path, half(target_remaining=0.05), should_stop(2), max_epochs=4)
        assert said(caplog, run)[0][1:] == [
            "sap: target_remaining=0.05 is missed: 25.00% of 72 weights remain after 2 of 5 prunings, since "
            "trainer.should_stop was set in epoch 2. To train on all the same, give Trainer(min_epochs=6)."
        ]

    def test_a_resumed_run_that_comes_to_its_end_says_so(self, tmp_path, caplog):
        run = partial(self.resumed, tmp_path, half(target_remaining=0.05), max_epochs=6)
        assert said(caplog, run) == (
            [], ["sap: 5.56% of 72 weights remain after 5 prunings; target_remaining=0.05 is met."],
        )  # fmt: skip

    def test_a_resumed_run_without_rounds_says_that_it_keeps_them(self, tmp_path, caplog):
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        with pytest.warns(UserWarning, match="no pruning is planned: 1 epoch"):
            fit(Net(), SAPCallback(), saver, max_epochs=1, enable_checkpointing=True)
        run = partial(fit, Net(), SAPCallback(), max_epochs=5, ckpt_path=tmp_path / "epoch=0.ckpt")
        assert said(caplog, run)[0] == [
            "sap: no pruning is planned: the run of the checkpoint has none, and a resumed run keeps its rounds. Start "
            "a new fit from its weights to prune them."
        ]


def test_two_pruners_each_tell_their_own_end(caplog):
    first = half(name="first", include="net.0.*")
    second = half(name="second", include="net.3.*", target_remaining=0.25)
    run = partial(fit, Net(), first, second, should_stop(1))
    assert said(caplog, run, "first")[0] == [
        "first: not all prunings came: 50.00% of 48 weights remain after 1 of 3 prunings, since trainer.should_stop "
        "was set in epoch 1. To train on all the same, give Trainer(min_epochs=4)."
    ]
    assert said(caplog, run, "second")[0] == []
