"""Listeners: what they hear at the end of a round, and what their answers do."""

import math
import pickle

import pytest
import torch
from helpers import Net, Scheduled, Watch, copied, fit, half, loader, quiet_trainer, same
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from resuming import records_of

from lightning_sap import GoOn, PQIMonitor, RoundListener, Stop, TakeBack
from lightning_sap.report import markdown


class Answers(RoundListener, Callback):
    """Gives one answer after another, then says to go on; keeps what it heard."""

    may_take_back = True

    def __init__(self, *answers):
        self.answers, self.heard, self.ended = list(answers), [], None

    def on_round_end(self, trainer, pl_module, event):
        self.heard.append(event)
        return self.answers.pop(0) if self.answers else GoOn()

    def on_run_end(self, trainer, pl_module, history):
        self.ended = [record.round for record in history]


class Unsound(RoundListener, Callback):
    """Takes round 2 back, once, and prunes nothing in its place."""

    may_take_back = True

    def on_round_end(self, trainer, pl_module, event):
        return TakeBack(scale=0.0) if event.record.round == 2 else GoOn()


class Ends:
    """Weights and buffers at the end of each round and at the first batch of the next, with the learning rates."""

    def __init__(self, pruner):
        self.pruner, self.ends, self.starts, self.masks, self.rates = pruner, {}, {}, {}, {}

    def watch(self):
        return Watch(on_train_epoch_end=self.end, on_train_batch_start=self.start, on_before_zero_grad=self.rate)

    def end(self, trainer, module):
        self.ends[self.pruner.current_round()] = copied(module.state_dict())
        self.masks[self.pruner.current_round()] = self.pruner.masks

    def start(self, trainer, module):
        self.starts.setdefault(self.pruner.current_round(), copied(module.state_dict()))

    def rate(self, trainer, module):
        self.rates.setdefault(self.pruner.current_round(), []).append(trainer.optimizers[0].param_groups[0]["lr"])


class TestEvent:
    def test_it_holds_the_round_and_those_before(self):
        listener, pruner = Answers(), half()
        fit(Net(), pruner, listener, val=loader())
        assert [event.record.round for event in listener.heard] == [0, 1, 2, 3]
        assert [len(event.history) for event in listener.heard] == [0, 1, 2, 3]
        assert [event.record.weights for event in listener.heard] == [72, 36, 18, 9]
        assert all("val_loss" in event.record.metrics for event in listener.heard)
        assert listener.ended == [0, 1, 2, 3]

    def test_the_last_round_is_told_also_where_something_else_ends_training(self):
        listener, pruner = Answers(), half(every_n_epochs=2)
        stop = Watch(on_train_epoch_end=lambda t, _: setattr(t, "should_stop", t.current_epoch == 2))
        with pytest.warns(UserWarning, match="not all prunings came"):
            fit(Net(), pruner, listener, stop, max_epochs=8)
        assert [(e.record.round, e.record.last_epoch) for e in listener.heard] == [(0, 1), (1, 2)]

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (GoOn(-1.0), "GoOn.scale, which a listener answers in on_round_end, must be a finite number"),
            (GoOn(math.nan), "GoOn.scale, .* got nan"),
            (GoOn(most=-3), "GoOn.most, .* must be a whole number of at least 0, got -3"),
            (Stop("one"), "Stop.restore, .* got 'one'"),
            (GoOn(notes={0: {"remaining": 3.0}}), r"GoOn.notes\[0\].remaining, .* up to 1, got 3.0"),
            (GoOn(notes={0: {"mood": "good"}}), r"GoOn.notes\[0\].mood, .* does not know"),
        ],
    )
    def test_an_answer_that_no_checkpoint_could_hold_is_refused(self, answer, message):
        with pytest.raises(ValueError, match=message):
            fit(Net(), half(), Answers(answer))

    @pytest.mark.parametrize("answer", [None, "go on", True])
    def test_what_is_no_answer_is_refused(self, answer):
        with pytest.raises(TypeError, match=r"on_round_end must return GoOn\(\), Stop\(\) or TakeBack\(\), got"):
            fit(Net(), half(), Answers(answer))

    def test_the_first_round_cannot_be_taken_back(self):
        with pytest.raises(ValueError, match="takes a round back, and no earlier round was kept"):
            fit(Net(), half(), Answers(TakeBack()))


class TestGoOn:
    def test_its_scale_multiplies_the_counts(self):
        pruner = half()
        fit(Net(), pruner, Answers(GoOn(scale=0.5), GoOn(scale=0.0), GoOn()))
        assert [record.weights for record in pruner.history] == [72, 54, 54, 27]

    def test_its_notes_go_into_the_records(self):
        pruner = half()
        fit(Net(), pruner, Answers(GoOn(), GoOn(notes={0: {"reason": "late"}, 1: {"reason": "now"}})))
        assert [record.reason for record in pruner.history] == ["late", "now", None, None]


class TestStop:
    def test_it_ends_training_with_the_round(self):
        pruner = half()
        trainer = fit(Net(), pruner, Answers(GoOn(), Stop()))
        assert trainer.current_epoch == 2
        assert [record.round for record in pruner.history] == [0, 1]
        assert pruner.history.restored is None

    def test_it_puts_the_round_back_that_it_names(self, tmp_path):
        pruner = half(save_rounds=True, dirpath=tmp_path)
        module, ends = Net(), Ends(pruner)
        fit(module, ends.watch(), pruner, Answers(GoOn(), GoOn(), Stop(restore=1)))
        assert same(copied(module.state_dict()), ends.ends[1])
        assert same(pruner.masks, ends.masks[1])
        assert pruner.history.restored.round == 1

    def test_a_round_that_was_not_saved_is_warned_of_and_nothing_is_lost(self):
        pruner = half()
        with pytest.warns(UserWarning, match=r"sap: the module stays as it is after round 1\. Round 0 was not saved"):
            fit(Net(), pruner, Answers(GoOn(), Stop(restore=0)))
        assert pruner.remaining == 0.5

    def test_training_that_goes_on_to_min_epochs_goes_on_pruning(self):
        pruner = half()
        trainer = fit(Net(), pruner, Answers(Stop()), min_epochs=3)
        assert trainer.current_epoch == 3
        assert [record.weights for record in pruner.history] == [72, 36, 18]

    def test_inside_an_epoch_it_ends_with_the_batch_that_starts(self):
        pruner = half(every_n_epochs=None, every_n_steps=2)
        trainer = fit(Net(), pruner, Answers(GoOn(), Stop()), max_epochs=1, train=loader(96))
        assert [record.round for record in pruner.history] == [0, 1]
        assert trainer.global_step == 5

    def test_inside_an_epoch_no_pruner_prunes_in_the_batch_that_is_left(self):
        steps = {"every_n_epochs": None, "every_n_steps": 2}
        first, second = half(include="net.0.*", **steps), half(include="net.3.*", name="other", **steps)
        trainer = quiet_trainer(first, second, Answers(GoOn(), Stop()), max_epochs=1)
        trainer.fit(Net(), loader(96))
        assert (first.remaining, second.remaining) == (0.5, 0.5)

    @pytest.mark.parametrize("least", [{"min_steps": 12}, {"min_epochs": 4}])
    def test_inside_an_epoch_training_that_goes_on_to_its_least_prunes_as_planned(self, least):
        pruner = half(every_n_epochs=None, rounds=5, every_n_steps=2)
        trainer = fit(Net(), pruner, Answers(GoOn(), *[Stop()] * 9), **least)
        assert trainer.global_step == 12
        assert [(record.first_step, record.last_step) for record in pruner.history] == [
            (2 * t, 2 * t + 1) for t in range(6)
        ]

    def test_a_run_cut_off_after_it_ends_at_once_when_resumed(self, tmp_path):
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        fit(Net(), half(), Answers(GoOn(), Stop()), saver, enable_checkpointing=True)
        resumed = half()
        trainer = fit(Net(), resumed, Answers(), ckpt_path=tmp_path / "epoch=1.ckpt")
        assert trainer.current_epoch == 2
        assert resumed.remaining == 0.5

    def test_without_a_listener_that_stops_a_resumed_run_goes_on(self, tmp_path):
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        fit(Net(), half(), Answers(GoOn(), Stop()), saver, enable_checkpointing=True)
        resumed = half()
        fit(Net(), resumed, PQIMonitor(stop_on=None, monitor=None), ckpt_path=tmp_path / "epoch=1.ckpt")
        assert resumed.remaining == 0.125


class TestTakeBack:
    @pytest.mark.parametrize("options", [{}, {"every_n_epochs": None, "every_n_steps": 3}], ids=["epochs", "steps"])
    def test_weights_buffers_and_masks_are_those_of_the_kept_round_bit_for_bit(self, options):
        pruner = half(**options)
        module, ends = Scheduled(), Ends(pruner)
        fit(module, ends.watch(), pruner, ends.watch(), Unsound(), max_epochs=6)
        assert same(ends.starts[3], ends.ends[1])  # the weights with which round 3 starts are those of round 1's end
        assert same(ends.masks[3], ends.masks[1])
        assert [record.taken_back for record in pruner.history] == [False, False, True, False, False, False]
        assert [record.weights for record in pruner.history] == [72, 36, 18, 36, 18, 9]

    def test_the_schedule_starts_anew_and_the_run_ends_as_planned(self):
        pruner = half(every_n_epochs=2)
        module, ends = Scheduled(), Ends(pruner)
        trainer = fit(module, ends.watch(), pruner, Unsound(), max_epochs=10)
        assert trainer.current_epoch == 10
        assert ends.rates[3] == ends.rates[2] == ends.rates[1] == ends.rates[0]
        assert [record.round for record in pruner.history] == [0, 1, 2, 3, 4]

    def test_its_scale_prunes_anew_from_the_masks_of_the_kept_round(self):
        pruner = half()
        fit(Net(), pruner, Answers(GoOn(), GoOn(), TakeBack(scale=0.5), GoOn()), max_epochs=5)
        assert [record.weights for record in pruner.history] == [72, 36, 18, 27, 14]
        assert [record.pruned for record in pruner.history] == [36, 18, 9, 13, None]

    def test_a_round_that_is_not_kept_is_gone_over(self):
        pruner = half()
        fit(Net(), pruner, Answers(GoOn(), GoOn(scale=0.0, keep=False), TakeBack(scale=0.0)), max_epochs=5)
        assert [record.weights for record in pruner.history] == [72, 36, 36, 72, 36]

    def test_the_target_is_met_all_the_same(self):
        pruner = half(target_remaining=0.125, rounds=4)
        fit(Net(), pruner, Unsound(), max_epochs=5)
        assert pruner.history[-1].weights == 9

    def test_the_last_round_taken_back_leaves_the_kept_round_in_the_module(self):
        pruner = half()
        module, ends = Net(), Ends(pruner)
        fit(module, ends.watch(), pruner, Answers(GoOn(), GoOn(), GoOn(), TakeBack()))
        assert same(copied(module.state_dict()), ends.ends[2])
        assert pruner.remaining == 0.25
        assert pruner.history[-1].taken_back
        assert pruner.history.restored.round == 2
        assert "The module holds round 2 again: 25.00%" in markdown(pruner.history)

    def test_optimizers_start_anew(self):
        states = []
        look = Watch(on_train_batch_start=lambda t, _: states.append(len(t.optimizers[0].state)))
        fit(Net(), half(), Unsound(), look, max_epochs=5)
        assert [states[3 * epoch] for epoch in range(5)] == [0] * 5

    def test_averages_go_back_too(self):
        pruner, average = half(), EMAWeightAveraging(decay=0.5)
        module = Net()
        fit(module, pruner, Unsound(), average, max_epochs=4)
        mask = pruner.masks["net.0.weight"]
        assert not module.net[0].weight[~mask].any()
        assert module.net[0].weight[mask].any()

    def test_monitors_hear_that_the_round_was_taken_back_and_do_not_judge_it(self):
        listener, pruner, monitor = Unsound(), half(), PQIMonitor(stop_on=None)
        fit(Net(), monitor, pruner, listener, max_epochs=5)
        assert [record.phase is None for record in pruner.history] == [False, False, True, False, False]

    @pytest.mark.parametrize("epoch", range(5))
    def test_a_run_killed_anywhere_and_resumed_equals_the_unbroken_run(self, tmp_path, epoch):
        def trained(**options):
            saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
            module, pruner = Scheduled(), half(rewind_weights="init")
            fit(module, pruner, Unsound(), saver, max_epochs=6, enable_checkpointing=True, **options)
            return module, pruner

        whole, pruner = trained()
        again, resumed = trained(ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert same(again.state_dict(), whole.state_dict())
        assert same(resumed.masks, pruner.masks)
        assert records_of(resumed) == records_of(pruner)

    def test_resumed_without_such_a_listener_no_round_is_kept_and_none_can_be_taken_back(self, tmp_path):
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        fit(Net(), half(), Answers(), saver, max_epochs=6, enable_checkpointing=True)
        resumed, listener = half(), Answers(GoOn(), TakeBack())
        listener.may_take_back = False
        with pytest.raises(ValueError, match="takes a round back, and no earlier round was kept"):
            fit(Net(), resumed, listener, max_epochs=6, ckpt_path=tmp_path / "epoch=1.ckpt")
        assert resumed.state_dict()["kept"] is None

    def test_without_such_a_listener_no_round_is_kept(self):
        pruner = half()
        fit(Net(), pruner, PQIMonitor(stop_on=None))
        assert pruner.state_dict()["kept"] is None


def test_a_listener_survives_pickle():
    assert pickle.loads(pickle.dumps(Unsound())).may_take_back


def test_a_pruner_beside_keeps_its_masks_where_a_round_is_taken_back():
    first, second = half(include="net.0.*"), half(include="net.3.*", name="other")
    module = Net()
    trainer = quiet_trainer(first, second, Unsound(), max_epochs=5)
    trainer.fit(module, loader())
    assert [record.weights for record in first.history] == [48, 24, 12, 24, 12]
    assert [record.weights for record in second.history] == [24, 12, 6, 3, 2]
    for pruner, name in ((first, "net.0.weight"), (second, "net.3.weight")):
        weight = module.get_parameter(name)
        assert torch.equal(weight != 0, pruner.masks[name])
