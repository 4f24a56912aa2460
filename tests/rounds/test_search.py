"""The search: what follows each round, worked out by hand."""

import math

import pytest

from lightning_sap.rounds.protocol import GoOn, TakeBack
from lightning_sap.rounds.search import Ended, Rule, Search, Tolerance

RULE = Rule(start=1.0, growth=2.0, shrink=0.25, way=0.5, chances=2, near=2.0, least=0.02, dense=0.5)
OWN = Tolerance("val_acc", drop=0.01)
GIVEN = Tolerance("val_acc", drop=0.01, reference=0.97)
NAN = math.nan


class Run:
    """A search of a network of 1,000 weights, told of one round after another."""

    def __init__(self, tolerance=OWN, rule=RULE, **fields):
        self.tolerance, self.rule = tolerance, rule
        self.search, self.round, self.answers = Search(weights=1000, dense=1000, **fields), -1, []

    def end(self, weights, metric, passed=None):
        self.round += 1
        answer = self.search.follow(self.tolerance, Ended(self.round, weights, metric, passed), self.rule)
        self.answers.append(answer)
        return type(answer), answer.scale, answer.most

    def note(self):
        return dict(self.answers[-1].notes[self.round])


class TestTolerance:
    @pytest.mark.parametrize(
        ("monitor", "mode", "better"),
        [("val_acc", None, "max"), ("val_loss", None, "min"), ("val_loss", "max", "max"), ("xyz", None, "max")],
    )
    def test_metric_is_better_as_its_mode_or_its_name_says(self, monitor, mode, better):
        assert Tolerance(monitor, mode=mode).better == better

    def test_loss_is_what_a_metric_is_worse(self):
        assert OWN.loss(0.97, 0.95) == pytest.approx(0.02)
        assert Tolerance("val_loss").loss(0.5, 0.7) == pytest.approx(0.2)

    def test_a_metric_at_the_bound_is_kept_in_float32_too(self):
        assert OWN.keeps(0.975, 0.9649999737739563)
        assert not OWN.keeps(0.975, 0.9649)
        assert not OWN.keeps(0.975, NAN)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"monitor": ""}, "monitor must be the name of a logged metric, such as 'val_acc', got ''"),
            ({"monitor": None}, "monitor must be the name of a logged metric, such as 'val_acc', got None"),
            ({"drop": -0.1}, "drop must be a finite number of at least 0, in the unit of 'val_acc', got -0.1"),
            ({"drop": NAN}, "drop must be a finite number of at least 0, in the unit of 'val_acc', got nan"),
            ({"drop": "1%"}, "drop must be a finite number of at least 0, in the unit of 'val_acc', got '1%'"),
            ({"mode": "up"}, "mode must be None .by the metric's name., 'max' or 'min', got 'up'"),
            ({"reference": math.inf}, "reference must be None or a finite number, got inf"),
        ],
    )
    def test_wrong_values_are_named(self, options, message):
        with pytest.raises(ValueError, match=message):
            Tolerance(**{"monitor": "val_acc", **options})


class TestSoundRounds:
    def test_the_scale_doubles_after_each_pruned_sound_round(self):
        run = Run()
        assert run.end(1000, 0.95) == (GoOn, 1.0, None)
        assert run.end(700, 0.95) == (GoOn, 2.0, None)
        assert run.end(400, 0.945) == (GoOn, 4.0, None)
        assert all(answer.keep for answer in run.answers)

    def test_the_best_sound_round_is_the_yardstick(self):
        run = Run()
        run.end(1000, 0.95)
        run.end(700, 0.97)
        assert run.note() == {"sound": True, "metric": 0.97, "yardstick": 0.97, "bound": pytest.approx(0.96)}
        assert run.end(500, 0.9599)[0] is GoOn  # a near miss
        assert run.note()["sound"] is False

    def test_with_a_reference_that_is_the_yardstick(self):
        run = Run(GIVEN)
        run.end(1000, 0.99)
        run.end(700, 0.961)
        assert run.note() == {"sound": True, "metric": 0.961, "yardstick": 0.97, "bound": pytest.approx(0.96)}

    def test_a_metric_that_is_better_when_smaller(self):
        run = Run(Tolerance("val_loss", drop=0.1))
        run.end(1000, 0.5)
        assert run.end(700, 0.6) == (GoOn, 2.0, None)
        assert run.note()["bound"] == pytest.approx(0.6)
        assert run.end(400, 0.9)[0] is TakeBack


class TestUnsoundRounds:
    def test_a_round_far_off_is_taken_back_and_the_next_step_is_smaller(self):
        run = Run()
        run.end(1000, 0.95)
        run.end(800, 0.95)  # the next scale is 2
        # it took 400; a quarter of them is 100, and half-way to the failure would be 800 - sqrt(800 * 400) = 234
        assert run.end(400, 0.5) == (TakeBack, 0.5, 100)
        assert run.search.best == 1

    def test_a_later_step_goes_half_way_to_the_failure_at_most(self):
        run = Run()
        run.end(1000, 0.95)
        run.end(800, 0.95)
        run.end(400, 0.5)
        assert run.end(700, 0.95) == (GoOn, 1.0, 170)  # 700 - sqrt(700 * 400) = 170.8

    def test_a_near_miss_gets_two_more_rounds_under_the_same_masks(self):
        run = Run()
        run.end(1000, 0.95)
        assert run.end(600, 0.935) == (GoOn, 0.0, None)
        assert run.end(600, 0.931) == (GoOn, 0.0, None)
        assert run.end(600, 0.935) == (TakeBack, 0.25, 100)
        assert [answer.keep for answer in run.answers[1:3]] == [False, False]

    def test_a_near_miss_that_recovers_is_kept_without_a_larger_step(self):
        run = Run()
        run.end(1000, 0.95)
        run.end(600, 0.935)
        assert run.end(600, 0.945) == (GoOn, 1.0, None)
        assert (run.search.best, run.search.weights) == (2, 600)

    def test_a_round_beyond_two_drops_has_no_second_chance(self):
        run = Run()
        run.end(1000, 0.95)
        assert run.end(600, 0.929)[0] is TakeBack

    def test_nan_is_one_unsound_round(self):
        run = Run()
        run.end(1000, 0.95)
        assert run.end(600, NAN)[0] is TakeBack
        assert run.end(900, 0.95)[0] is GoOn

    def test_a_round_that_lost_no_weights_tells_nothing_of_sparsity(self):
        run = Run()
        run.end(1000, 0.95)
        assert run.end(1000, 0.5) == (TakeBack, 1.0, None)
        assert run.search.failed is None


class TestRoundsThatAreNotJudged:
    def test_without_a_metric_another_round_follows_under_the_same_masks(self):
        run = Run()
        run.end(1000, 0.95)
        assert run.end(700, None) == (GoOn, 0.0, None)
        assert run.answers[-1].keep is False
        assert run.note() == {"sound": None, "metric": None, "yardstick": 0.95, "bound": pytest.approx(0.94)}
        assert run.end(700, 0.95) == (GoOn, 2.0, None)
        assert run.search.unjudged == 1

    def test_a_dense_round_that_is_nan_is_followed_by_another(self):
        run = Run()
        assert run.end(1000, NAN) == (GoOn, 0.0, None)
        assert run.search.best is None
        assert run.end(1000, 0.95) == (GoOn, 1.0, None)


class TestReference:
    def test_dense_rounds_go_on_until_the_reference_is_near(self):
        run = Run(GIVEN)
        assert run.end(1000, 0.94, 0.25) == (GoOn, 0.0, None)
        assert run.end(1000, 0.93, 0.30) == (GoOn, 0.0, None)
        assert [answer.keep for answer in run.answers] == [True, False]  # the better one
        assert run.end(1000, 0.96, 0.35) == (GoOn, 1.0, None)
        assert not run.search.own

    def test_at_half_of_the_training_the_best_dense_round_is_the_yardstick(self):
        run = Run(GIVEN)
        run.end(1000, 0.94, 0.25)
        assert run.end(1000, 0.935, 0.5) == (GoOn, 1.0, None)
        assert (run.search.own, run.search.yardstick) == (True, 0.94)
        assert run.end(700, 0.931, 0.55) == (GoOn, 2.0, None)

    def test_at_half_of_the_training_a_worse_round_goes_back_to_the_best(self):
        run = Run(GIVEN)
        run.end(1000, 0.94, 0.25)
        assert run.end(1000, 0.90, 0.5) == (TakeBack, 1.0, None)
        assert run.search.best == 0

    def test_without_a_known_end_the_reference_stands(self):
        run = Run(GIVEN)
        assert [run.end(1000, 0.9)[1] for _ in range(20)] == [0.0] * 20


class TestEnd:
    def test_it_is_over_when_a_step_is_not_worth_a_round(self):
        run = Run()
        run.end(1000, 0.95)
        # it took 60 of 1,000, and a quarter of them is 15: less than two percent
        assert run.end(940, 0.5) == (TakeBack, 0.0, None)
        assert run.answers[-1].last
        assert run.search.over

    def test_it_is_over_after_a_sound_round_next_to_the_failure(self):
        run = Run()
        run.end(1000, 0.95)
        run.end(700, 0.5)
        assert run.end(720, 0.95) == (GoOn, 0.0, None)  # half-way to 700 are 10
        assert run.answers[-1].last

    def test_the_last_stretch_is_kept_if_it_is_sound(self):
        run = Run(over=True, started=True, best=3, yardstick=0.95)
        assert run.end(1000, 0.945)[0] is GoOn
        assert (run.answers[-1].keep, run.search.best) == (True, 0)

    def test_the_last_stretch_is_taken_back_if_it_is_not(self):
        run = Run(over=True, started=True, best=3, yardstick=0.95)
        assert run.end(1000, 0.935) == (TakeBack, 0.0, None)  # no second chance: nothing follows
        assert run.search.best == 3

    def test_the_target_ends_it(self):
        run = Run(target=300)
        assert run.end(1000, 0.95) == (GoOn, 1.0, 700)
        assert run.end(400, 0.95) == (GoOn, 2.0, 100)
        assert run.end(300, 0.95) == (GoOn, 0.0, None)
        assert run.answers[-1].last

    def test_a_target_that_is_not_sound_does_not_end_it(self):
        run = Run(target=300)
        run.end(1000, 0.95)
        assert run.end(300, 0.5) == (TakeBack, 0.25, 175)
        assert not run.search.over


class TestWeightsThatComeBack:
    def test_a_denser_sound_round_is_not_kept_and_goes_on(self):
        run = Run()
        run.end(1000, 0.95)
        run.end(500, 0.95)
        assert run.end(600, 0.96) == (GoOn, 2.0, None)
        assert (run.answers[-1].keep, run.search.best, run.search.yardstick) == (False, 1, 0.95)


class TestRules:
    def test_without_going_back_an_unsound_round_is_pruned_on(self):
        run = Run(rule=Rule(goes_back=False))
        run.end(1000, 0.95)
        assert run.end(500, 0.5) == (GoOn, 1.0, None)
        assert run.answers[-1].keep is False

    def test_the_scale_has_an_end(self):
        run = Run()
        for _ in range(40):
            answer = run.end(1000, 0.95)
        assert answer == (GoOn, 2.0**20, None)
