"""Replay and Ticks: where a schedule stands at each tick of a round."""

import copy
import warnings

import pytest
import torch
from scheduling import Shrinking
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from lightning_sap.rewind import Moment, Obstacle, Replay, Ticks
from lightning_sap.rewind.replay import restore_groups_
from lightning_sap.rewind.trial import Trial, take_groups


def sgd(lr=1.0, **options):
    return SGD([torch.nn.Parameter(torch.ones(2))], lr=lr, momentum=0.9, foreach=False, **options)


def at(tick, places=None):
    """A moment of a round whose places are ticks."""
    return Moment(tick, tick, tick, places)


def with_rates(rates, training=None, mode="restart", ended=False):
    replay = Replay(StepLR(sgd(), 1), mode=mode, ticks=Ticks(training=training))
    replay.trial = Trial(list(rates), ended, frozenset({"lr"}))
    return replay


def rate(replay):
    return float(replay.scheduler.optimizer.param_groups[0]["lr"])


def chosen(scheduler, wanted="restart", training=12, **ticks):
    replay = Replay(scheduler)
    replay.choose(wanted, Ticks(training=training, **ticks))
    scheduler.optimizer.step()  # otherwise schedules warn when they are stepped
    return replay


def shrinking(optimizer):
    return Shrinking(optimizer, factors=(1.0, 0.8, 0.5, 0.2), decay=1.0)


class TestGroups:
    def test_groups_come_back_without_their_parameters(self):
        optimizer = sgd(weight_decay=0.5)
        saved = take_groups(optimizer)
        assert "params" not in saved[0]
        assert saved[0]["lr"] == 1.0
        optimizer.param_groups[0].update(lr=0.3, weight_decay=0.0, momentum=0.1)
        parameter = optimizer.param_groups[0]["params"][0]
        restore_groups_(optimizer, saved, saved[0])
        group = optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"], group["momentum"]) == (1.0, 0.5, 0.9)
        assert group["params"][0] is parameter

    def test_groups_taken_share_nothing_with_the_optimizer(self):
        optimizer = sgd()
        optimizer.param_groups[0]["notes"] = [1]
        saved = take_groups(optimizer)
        optimizer.param_groups[0]["notes"].append(2)
        restore_groups_(optimizer, saved, saved[0])
        optimizer.param_groups[0]["notes"].append(3)
        assert saved[0]["notes"] == [1]

    def test_groups_restore_a_tensor_in_place(self):
        optimizer = sgd(torch.tensor(0.5))
        saved, live = take_groups(optimizer), optimizer.param_groups[0]["lr"]
        live.fill_(0.1)
        restore_groups_(optimizer, saved, saved[0])
        assert optimizer.param_groups[0]["lr"] is live
        assert live.item() == 0.5
        assert saved[0]["lr"] is not live

    def test_groups_that_were_added_stay_as_they_are(self):
        optimizer = sgd()
        saved = take_groups(optimizer)
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 7.0})
        restore_groups_(optimizer, saved, saved[0])
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
        assert replay.trial.rates == [1.0, 1.0, 0.5, 0.5, 0.25]
        assert replay.length == 5

    def test_trace_sums_over_the_groups(self):
        optimizer = sgd()
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 4.0})
        assert chosen(StepLR(optimizer, 1, gamma=0.5), training=3).trial.rates == [5.0, 2.5, 1.25]

    def test_trace_keeps_to_the_frequency(self):
        replay = chosen(StepLR(sgd(), 1, gamma=0.5), training=6, frequency=2, steps_of_epoch=[1, 2, 3])
        assert replay.trial.rates == [1.0, 1.0, 0.5, 0.5, 0.5, 0.25]

    def test_trace_ends_where_the_schedule_does(self):
        optimizer = sgd()
        replay = chosen(OneCycleLR(optimizer, max_lr=1.0, total_steps=4), training=12)
        assert replay.length == 4
        rates = replay.trial.rates
        assert rates[0] == pytest.approx(1 / 25)
        assert rates[1] == pytest.approx(0.812, abs=1e-3)  # the peak is at 0.2
        assert rates[-1] == pytest.approx(1 / 25e4)

    def test_trace_ends_where_the_schedule_refuses_to_go_on(self):
        optimizer = sgd()
        inner = [ConstantLR(optimizer, 1.0, total_iters=1), OneCycleLR(optimizer, max_lr=1.0, total_steps=3)]
        replay = chosen(SequentialLR(optimizer, inner, milestones=[2]), training=12)
        assert replay.length < 12
        replay.advance_(at(11, 12))  # no crash

    def test_trace_leaves_the_schedule_and_its_groups_as_they_were(self):
        scheduler = shrinking(sgd(weight_decay=0.5))
        replay = Replay(scheduler)
        scheduler.optimizer.step()
        scheduler.step()
        state, groups = copy.deepcopy(scheduler.state_dict()), take_groups(scheduler.optimizer)
        replay.choose("restart", Ticks(training=12))
        assert replay.trial.rates == pytest.approx([1.0, 0.8, 0.5] + [0.2] * 9)
        assert scheduler.state_dict() == state
        assert take_groups(scheduler.optimizer) == groups
        assert scheduler.left == [0.5, 0.2]

    def test_trace_is_silent_before_the_first_optimizer_step(self):
        optimizer = SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert chosen(StepLR(optimizer, 1, gamma=0.5), training=3).trial.rates == [1.0, 0.5, 0.25]

    @pytest.mark.parametrize(("n", "seen"), [(None, 16), (3, 48)])
    def test_of_a_training_of_unknown_length_sees_sixteen_rounds(self, n, seen):
        replay = chosen(StepLR(sgd(), 1), training=None, round=n)
        assert len(replay.trial.rates) == seen
        assert replay.length is None


class TestChoose:
    @pytest.mark.parametrize("wanted", ["restart", "squeeze", "keep"])
    def test_choose_takes_what_was_asked_for(self, wanted):
        replay = chosen(StepLR(sgd(), 1), wanted)
        assert (replay.mode, replay.reason) == (wanted, "asked for")

    @pytest.mark.parametrize(("wanted", "mode"), [("auto", "restart"), ("squeeze", "restart"), ("keep", "keep")])
    def test_choose_never_squeezes_a_schedule_driven_by_a_metric(self, wanted, mode):
        replay = Replay(StepLR(sgd(), 1), metric_driven=True)
        replay.choose(wanted, Ticks(4, 12))
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
        ("length", "places", "positions"),
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
    def test_squeezed(self, length, places, positions):
        replay = with_rates(range(length), training=length, mode="squeeze")
        assert [replay.position(at(s, places)) for s in range(places)] == positions
        assert replay.position(at(places + 3, places)) == positions[-1]

    @pytest.mark.parametrize(("ended", "positions"), [(False, [0, 1, 2, 3, 4]), (True, [0, 1, 2, 2, 2])])
    def test_restarted_it_goes_on_to_its_end(self, ended, positions):
        replay = with_rates([3, 2, 1], training=3, ended=ended)
        assert [replay.position(at(s, 4)) for s in range(5)] == positions

    @pytest.mark.parametrize("interval", ["step", "epoch"])
    def test_restarted_it_counts_in_its_own_ticks(self, interval):
        replay = Replay(StepLR(sgd(), 1), ticks=Ticks(interval=interval))
        assert replay.position(Moment(7, 2, 40, 60)) == {"step": 7, "epoch": 2}[interval]

    def test_a_round_without_an_end_is_not_squeezed(self):
        replay = with_rates(range(9), training=9, mode="squeeze", ended=True)
        assert [replay.position(at(s)) for s in (0, 1, 8, 9)] == [0, 1, 8, 8]


class TestRounds:
    def rates(self, replay, n):
        seen = []
        for tick in range(n):
            replay.advance_(at(tick, n))
            seen.append(rate(replay))
        return seen

    def test_restarted_schedule_starts_anew_in_each_round(self):
        replay = chosen(shrinking(sgd(weight_decay=0.5)))
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
        replay.advance_(at(3, 6))
        assert optimizer.param_groups[0]["momentum"] != 0.95
        replay.rewind_()
        assert (live.item(), optimizer.param_groups[0]["momentum"]) == first
        assert optimizer.param_groups[0]["lr"] is live

    def test_advancing_twice_or_back_does_nothing(self):
        replay = chosen(StepLR(sgd(), 1, gamma=0.5))
        replay.advance_(at(2, 4))
        replay.advance_(at(2, 4))
        replay.advance_(at(1, 4))
        assert rate(replay) == 0.25

    def test_an_option_that_the_schedule_leaves_alone_is_not_put_back(self):
        optimizer = sgd()
        optimizer.param_groups[0]["d"] = 1e-6  # as Prodigy keeps its estimate
        replay = chosen(CosineAnnealingLR(optimizer, 12))
        optimizer.param_groups[0].update(d=0.02, weight_decay=0.3)
        replay.advance_(at(3, 6))
        replay.rewind_()
        group = optimizer.param_groups[0]
        assert (group["lr"], group["d"], group["weight_decay"]) == (1.0, 0.02, 0.3)


class TestHighest:
    def test_a_restarted_round_sees_the_beginning_a_squeezed_one_all_of_it(self):
        replay = with_rates([0, 1, 2, 4, 3], training=5)
        replay.ticks = Ticks(2, 5, places=5)
        assert (replay.highest("restart"), replay.highest("squeeze")) == (1, 4)

    def test_a_squeezed_round_of_few_steps_may_step_over_the_peak(self):
        replay = with_rates([0, 1, 4, 1, 0], training=5, mode="squeeze")
        for places, highest in ((1, 0), (2, 0), (3, 4), (4, 1)):  # positions 0; 0 4; 0 2 4; 0 1 3 4
            replay.ticks = Ticks(1, 5, places=places)
            assert replay.highest("squeeze") == highest
            assert replay.shortfall() == (None if highest == 4 else (highest, 4))

    @pytest.mark.parametrize(("reached", "short"), [(0.89, (0.89, 1.0)), (0.9, None), (1.0, None)])
    def test_nine_tenths_are_near_enough(self, reached, short):
        replay = with_rates([0.1, reached, 1.0], training=3)
        replay.ticks = Ticks(2, 3)
        assert replay.shortfall() == short

    def test_kept_it_has_no_shortfall(self):
        replay = with_rates([0, 0, 1], training=3, mode="keep")
        replay.ticks = Ticks(1, 3)
        assert replay.shortfall() is None


class TestAutoTrains:
    """Rounds that would stand at the foot of a warm-up."""

    @pytest.mark.parametrize(
        ("values", "ticks", "mode", "reason"),
        [
            ([0, 4, 3, 2, 1], {"round": 1, "places": 8}, "squeeze", "only after the first round"),
            ([0, 4, 3, 2, 1], {"round": 1, "places": 1}, "keep", "a round reaches 0 at most, and the schedule 4"),
            ([0, 0, 4, 0, 0], {"round": 2, "places": 2}, "keep", "a round reaches 0 at most"),
            ([1, 0, 4, 0, 0], {"round": 2, "places": 2}, "squeeze", "only after the first round"),  # 1 of 4
            ([0, 3, 4, 4, 1], {"round": 2, "places": 2}, "restart", "so a round comes nearest"),  # 3 against 1
        ],
    )
    def test_it_chooses_what_comes_near_the_peak(self, values, ticks, mode, reason):
        replay = chosen(LambdaLR(sgd(), lambda t: values[min(t, 4)]), "auto", training=5, **ticks)
        assert replay.mode == mode
        assert reason in replay.reason

    def test_without_a_known_end_a_warm_up_longer_than_a_round_is_kept(self):
        replay = chosen(LambdaLR(sgd(), lambda t: min(1, t / 8)), "auto", training=None, round=4)
        assert (replay.mode, "only after the first round" in replay.reason) == ("keep", True)
        replay = chosen(LambdaLR(sgd(), lambda t: min(1, t / 8)), "auto", training=None, round=9)
        assert replay.mode == "restart"


class TestStretch:
    def test_a_longer_training_shows_more_of_the_schedule(self):
        replay = chosen(LambdaLR(sgd(), lambda t: 100 - t), "squeeze", training=10)
        for training in (20, 15, 30):
            replay.stretch(training)
            assert replay.length == training
            assert replay.position(at(4, 5)) == training - 1
        assert replay.trial.rates == [100 - t for t in range(30)]

    def test_a_schedule_with_an_end_of_its_own_stays_as_long(self):
        replay = chosen(OneCycleLR(sgd(), 1.0, 12), "squeeze", training=20)
        assert replay.length == 12
        replay.stretch(40)
        assert replay.length == 12
        replay.stretch(8)
        assert replay.length == 8


class TestObstacle:
    def obstructed(self):
        return Replay(StepLR(sgd(), 1), obstacle=Obstacle("it looks away", "Make it look"))

    @pytest.mark.parametrize(("wanted", "reason"), [("auto", "it looks away"), ("keep", "asked for")])
    def test_the_schedule_is_kept(self, wanted, reason):
        replay = self.obstructed()
        replay.choose(wanted, Ticks(4, 12))
        assert (replay.mode, replay.reason, replay.trial) == ("keep", reason, None)

    @pytest.mark.parametrize("wanted", ["restart", "squeeze"])
    def test_a_replay_is_refused_with_the_cure(self, wanted):
        message = rf"lr_schedule='{wanted}' cannot be had where it looks away \(StepLR\). Make it look, or use"
        with pytest.raises(ValueError, match=message):
            self.obstructed().choose(wanted, Ticks(4, 12))

    def test_a_state_that_cannot_be_copied_is_one(self):
        class Stubborn(Shrinking):
            def state_dict(self):
                return {"generator": (i for i in range(3))}

        replay = Replay(Stubborn(sgd()))
        replay.choose("auto", Ticks(4, 12))
        assert (replay.mode, replay.reason) == ("keep", "its state cannot be copied")


class TestNoTrial:
    """A user's own schedule whose copy cannot be made, or fails."""

    class Stubborn(Shrinking):
        def __deepcopy__(self, memo):
            raise RuntimeError("there is only one of me")

    class NeedsGradients(Shrinking):
        def get_lr(self):
            self.optimizer.param_groups[0]["params"][0].grad.norm()
            return super().get_lr()

    def sgd(self):
        optimizer = sgd()
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
        return optimizer

    @pytest.mark.parametrize("kind", [Stubborn, NeedsGradients])
    def test_auto_keeps_it(self, kind):
        replay = chosen(kind(self.sgd(), (1.0, 0.8, 0.5, 0.2), 1.0), "auto", round=4)
        assert (replay.mode, "no copy of it can be made" in replay.reason) == ("keep", True)

    @pytest.mark.parametrize("kind", [Stubborn, NeedsGradients])
    def test_restart_rewinds_what_schedules_usually_change(self, kind):
        replay = chosen(kind(self.sgd(), (1.0, 0.8, 0.5, 0.2), 1.0), "restart", round=4)
        replay.scheduler.optimizer.param_groups[0]["d"] = 0.5
        replay.advance_(at(2))
        assert rate(replay) == 0.5
        replay.rewind_()
        group = replay.scheduler.optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"], group["d"]) == (1.0, 1.0, 0.5)

    @pytest.mark.parametrize("kind", [Stubborn, NeedsGradients])
    def test_squeeze_is_refused(self, kind):
        with pytest.raises(ValueError, match=r"lr_schedule='squeeze' needs a trial of \w+ on a copy"):
            chosen(kind(self.sgd(), (1.0, 0.8, 0.5, 0.2), 1.0), "squeeze", round=4)
