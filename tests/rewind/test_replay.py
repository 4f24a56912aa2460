"""Replay and Ticks: where a schedule stands at each tick of a round."""

import copy
import warnings

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from lightning_sap.rewind import Replay, Ticks
from lightning_sap.rewind.replay import restore_groups_, take_groups


def sgd(lr=1.0, **options):
    return SGD([torch.nn.Parameter(torch.ones(2))], lr=lr, momentum=0.9, foreach=False, **options)


def step(scheduler):
    scheduler.step()


def rate(replay):
    return float(replay.scheduler.optimizer.param_groups[0]["lr"])


def chosen(scheduler, wanted="restart", training=12, **ticks):
    replay = Replay(scheduler)
    replay.choose(wanted, Ticks(training=training, **ticks), step)
    scheduler.optimizer.step()  # otherwise schedules warn when they are stepped
    return replay


class Shrinking(LRScheduler):
    """Keeps its values in a list and changes it in place; at each call it also raises the weight decay."""

    def __init__(self, optimizer):
        self.left = [1.0, 0.8, 0.5, 0.2]
        super().__init__(optimizer)

    def get_lr(self):
        factor = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        for group in self.optimizer.param_groups:
            group["weight_decay"] += 1.0
        return [base * factor for base in self.base_lrs]


class TestGroups:
    def test_groups_come_back_without_their_parameters(self):
        optimizer = sgd(weight_decay=0.5)
        saved = take_groups(optimizer)
        assert "params" not in saved[0]
        assert saved[0]["lr"] == 1.0
        optimizer.param_groups[0].update(lr=0.3, weight_decay=0.0, momentum=0.1)
        parameter = optimizer.param_groups[0]["params"][0]
        restore_groups_(optimizer, saved)
        group = optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"], group["momentum"]) == (1.0, 0.5, 0.9)
        assert group["params"][0] is parameter

    def test_groups_taken_share_nothing_with_the_optimizer(self):
        optimizer = sgd()
        optimizer.param_groups[0]["notes"] = [1]
        saved = take_groups(optimizer)
        optimizer.param_groups[0]["notes"].append(2)
        restore_groups_(optimizer, saved)
        optimizer.param_groups[0]["notes"].append(3)
        assert saved[0]["notes"] == [1]

    def test_groups_restore_a_tensor_in_place(self):
        optimizer = sgd(torch.tensor(0.5))
        saved, live = take_groups(optimizer), optimizer.param_groups[0]["lr"]
        live.fill_(0.1)
        restore_groups_(optimizer, saved)
        assert optimizer.param_groups[0]["lr"] is live
        assert live.item() == 0.5
        assert saved[0]["lr"] is not live

    def test_groups_that_were_added_stay_as_they_are(self):
        optimizer = sgd()
        saved = take_groups(optimizer)
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 7.0})
        restore_groups_(optimizer, saved)
        assert [group["lr"] for group in optimizer.param_groups] == [1.0, 7.0]


class TestTicks:
    @pytest.mark.parametrize(
        ("frequency", "calls"),
        [(1, [0, 1, 2, 3, 4, 5, 6]), (2, [0, 0, 1, 1, 2, 2, 3]), (3, [0, 0, 0, 1, 1, 1, 2])],
    )
    def test_ticks_of_epochs_are_counted_through(self, frequency, calls):
        ticks = Ticks(frequency=frequency)
        assert [ticks.calls(tick) for tick in range(7)] == calls

    @pytest.mark.parametrize(
        ("frequency", "batches", "calls"),
        [
            (1, [1, 2, 3], [0, 1, 2, 3, 4, 5, 6]),
            (2, [1, 2, 3], [0, 0, 1, 1, 1, 2, 2]),  # batch 2 of each epoch
            (3, [1, 2, 3], [0, 0, 0, 1, 1, 1, 2]),
            (4, [1, 2, 3], [0, 0, 0, 0, 0, 0, 0]),  # an epoch is too short for a call
            (2, [2, 4, 5], [0, 1, 2, 2, 3, 4, 4]),  # two batches a step: batches 2 and 4
            (3, [2, 4, 6], [0, 0, 0, 1, 1, 1, 2]),  # batch 3 makes no step
        ],
    )
    def test_ticks_of_steps_start_anew_with_each_epoch(self, frequency, batches, calls):
        ticks = Ticks(frequency=frequency, steps_of_epoch=batches)
        assert [ticks.calls(tick) for tick in range(7)] == calls


class TestTrace:
    def test_trace_is_what_the_schedule_does_left_alone(self):
        replay = chosen(StepLR(sgd(), 2, gamma=0.5), training=5)
        assert replay.trace(step) == [1.0, 1.0, 0.5, 0.5, 0.25]
        assert replay.length == 5

    def test_trace_sums_over_the_groups(self):
        optimizer = sgd()
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 4.0})
        assert chosen(StepLR(optimizer, 1, gamma=0.5), training=3).trace(step) == [5.0, 2.5, 1.25]

    def test_trace_keeps_to_the_frequency(self):
        replay = chosen(StepLR(sgd(), 1, gamma=0.5), training=6, frequency=2, steps_of_epoch=[1, 2, 3])
        assert replay.trace(step) == [1.0, 1.0, 0.5, 0.5, 0.5, 0.25]

    def test_trace_ends_where_the_schedule_does(self):
        optimizer = sgd()
        replay = chosen(OneCycleLR(optimizer, max_lr=1.0, total_steps=4), training=12)
        assert replay.length == 4
        rates = replay.trace(step)
        assert rates[0] == pytest.approx(1 / 25)
        assert rates[1] == pytest.approx(0.812, abs=1e-3)  # the peak is at 0.2
        assert rates[-1] == pytest.approx(1 / 25e4)

    def test_trace_ends_where_the_schedule_refuses_to_go_on(self):
        optimizer = sgd()
        inner = [ConstantLR(optimizer, 1.0, total_iters=1), OneCycleLR(optimizer, max_lr=1.0, total_steps=3)]
        replay = chosen(SequentialLR(optimizer, inner, milestones=[2]), training=12)
        assert replay.length < 12
        replay.advance_(11, 12, step)  # no crash

    def test_trace_leaves_the_schedule_and_its_groups_as_they_were(self):
        scheduler = Shrinking(sgd(weight_decay=0.5))
        replay = Replay(scheduler)
        replay.ticks = Ticks(training=12)
        scheduler.optimizer.step()
        scheduler.step()
        state, groups = copy.deepcopy(scheduler.state_dict()), take_groups(scheduler.optimizer)
        assert replay.trace(step) == pytest.approx([1.0, 0.8, 0.5] + [0.2] * 9)
        assert scheduler.state_dict() == state
        assert take_groups(scheduler.optimizer) == groups
        assert scheduler.left == [0.5, 0.2]

    def test_trace_is_silent_before_the_first_optimizer_step(self):
        optimizer = SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert chosen(StepLR(optimizer, 1, gamma=0.5), training=3).trace(step) == [1.0, 0.5, 0.25]

    def test_trace_of_a_training_of_unknown_length_is_its_first_value(self):
        replay = chosen(StepLR(sgd(), 1), training=None)
        assert replay.trace(step) == [1.0]
        assert replay.length is None


class TestChoose:
    @pytest.mark.parametrize("wanted", ["restart", "squeeze", "keep"])
    def test_choose_takes_what_was_asked_for(self, wanted):
        replay = chosen(StepLR(sgd(), 1), wanted)
        assert (replay.mode, replay.reason) == (wanted, "asked for")

    @pytest.mark.parametrize(("wanted", "mode"), [("auto", "restart"), ("squeeze", "restart"), ("keep", "keep")])
    def test_choose_never_squeezes_a_schedule_driven_by_a_metric(self, wanted, mode):
        replay = Replay(StepLR(sgd(), 1), metric_driven=True)
        replay.choose(wanted, Ticks(4, 12), step)
        assert replay.mode == mode

    def test_choose_squeeze_needs_a_known_length(self):
        with pytest.raises(ValueError, match="lr_schedule='squeeze' needs to know how many optimizer steps"):
            chosen(StepLR(sgd(), 1), "squeeze", training=None)

    @pytest.mark.parametrize(
        ("schedule", "mode", "reason"),
        [
            pytest.param(lambda o: CosineAnnealingLR(o, 12), "squeeze", "75% of its range above", id="cosine"),
            pytest.param(lambda o: CosineAnnealingLR(o, 4), "restart", "0% of its range above", id="cosine of a round"),
            pytest.param(lambda o: OneCycleLR(o, 1.0, 12), "squeeze", "94% of its range above", id="cycle"),
            pytest.param(lambda o: OneCycleLR(o, 1.0, 4), "restart", "0% of its range above", id="cycle of a round"),
            pytest.param(lambda o: LinearLR(o, 1.0, 0.0, 12), "squeeze", "64% of its range above", id="line"),
            pytest.param(lambda o: StepLR(o, 3, gamma=0.1), "restart", "10% of its range above", id="stairs"),
            pytest.param(lambda o: StepLR(o, 6, gamma=0.1), "squeeze", "100% of its range above", id="long stairs"),
            pytest.param(lambda o: LambdaLR(o, lambda t: 0.9 ** (t % 4)), "restart", "repeats every round", id="waves"),
            pytest.param(lambda o: LambdaLR(o, lambda t: 1.0), "restart", "it is constant", id="constant"),
        ],
    )
    def test_choose_auto_looks_at_the_end_of_a_round(self, schedule, mode, reason):
        replay = chosen(schedule(sgd()), "auto", training=12, round=4)
        assert replay.mode == mode
        assert reason in replay.reason

    @pytest.mark.parametrize(("end", "mode"), [(0.19, "restart"), (0.2, "restart"), (0.21, "squeeze")])
    def test_choose_auto_draws_the_line_at_a_fifth(self, end, mode):
        values = [1.0, 1.0, 1.0, 1.0, end, 0.0]
        replay = chosen(LambdaLR(sgd(), lambda tick: values[min(tick, 5)]), "auto", training=12, round=4)
        assert replay.mode == mode

    @pytest.mark.parametrize("ticks", [{"round": None}, {"training": None, "round": 4}])
    def test_choose_auto_restarts_where_the_length_is_unknown(self, ticks):
        replay = chosen(StepLR(sgd(), 1), "auto", **ticks)
        assert replay.mode == "restart"
        assert "not known beforehand" in replay.reason


class TestPosition:
    @pytest.mark.parametrize(
        ("length", "round_ticks", "positions"),
        [
            (9, 3, [0, 4, 8]),
            (10, 4, [0, 3, 6, 9]),
            (12, 4, [0, 4, 7, 11]),  # 3.67 and 7.33
            (10, 3, [0, 4, 9]),  # 4.5 goes to the even number
            (4, 4, [0, 1, 2, 3]),
            (2, 5, [0, 0, 0, 1, 1]),  # 0.25, 0.5, 0.75
            (1, 3, [0, 0, 0]),
            (9, 1, [0]),
        ],
    )
    def test_position_of_a_squeezed_schedule(self, length, round_ticks, positions):
        replay = Replay(StepLR(sgd(), 1), mode="squeeze", length=length)
        assert [replay.position(s, round_ticks) for s in range(round_ticks)] == positions
        assert replay.position(round_ticks + 3, round_ticks) == positions[-1]

    @pytest.mark.parametrize(("length", "positions"), [(None, [0, 1, 2, 3, 4]), (3, [0, 1, 2, 2, 2])])
    def test_position_of_a_restarted_schedule_goes_on_to_its_end(self, length, positions):
        replay = Replay(StepLR(sgd(), 1), length=length)
        assert [replay.position(s, 4) for s in range(5)] == positions

    def test_position_in_a_round_without_an_end_is_not_squeezed(self):
        replay = Replay(StepLR(sgd(), 1), mode="squeeze", length=9)
        assert [replay.position(s, None) for s in (0, 1, 8, 9)] == [0, 1, 8, 8]


class TestRounds:
    def rates(self, replay, n):
        seen = []
        for tick in range(n):
            replay.advance_(tick, n, step)
            seen.append(rate(replay))
        return seen

    def test_restarted_schedule_starts_anew_in_each_round(self):
        replay = chosen(Shrinking(sgd(weight_decay=0.5)))
        for _ in range(3):
            assert self.rates(replay, 5) == pytest.approx([1.0, 0.8, 0.5, 0.2, 0.2])
            assert replay.calls == 4
            assert replay.scheduler.optimizer.param_groups[0]["weight_decay"] == 5.5
            replay.rewind_()
            assert replay.calls == 0
            assert replay.scheduler.optimizer.param_groups[0]["weight_decay"] == 1.5

    def test_squeezed_schedule_runs_whole_in_each_round(self):
        replay = chosen(LambdaLR(sgd(), lambda tick: tick), "squeeze", training=10)
        for _ in range(3):
            assert self.rates(replay, 4) == [0, 3, 6, 9]
            replay.rewind_()
        assert self.rates(replay, 2) == [0, 9]  # a round of another length

    def test_kept_schedule_is_never_rewound(self):
        replay = chosen(StepLR(sgd(), 1, gamma=0.5), "keep")
        replay.scheduler.step()
        replay.rewind_()
        assert rate(replay) == 0.5

    def test_momentum_and_a_tensor_learning_rate_come_back_in_place(self):
        optimizer = sgd(torch.tensor(1.0))
        live = optimizer.param_groups[0]["lr"]
        replay = chosen(OneCycleLR(optimizer, max_lr=1.0, total_steps=6), training=6)
        first = (live.item(), optimizer.param_groups[0]["momentum"])
        assert first == (pytest.approx(0.04), 0.95)
        replay.advance_(3, 6, step)
        assert optimizer.param_groups[0]["momentum"] != 0.95
        replay.rewind_()
        assert (live.item(), optimizer.param_groups[0]["momentum"]) == first
        assert optimizer.param_groups[0]["lr"] is live

    def test_advancing_a_schedule_twice_to_the_same_tick_does_nothing(self):
        replay = chosen(StepLR(sgd(), 1, gamma=0.5))
        replay.advance_(2, 4, step)
        replay.advance_(2, 4, step)
        replay.advance_(1, 4, step)
        assert rate(replay) == 0.25
