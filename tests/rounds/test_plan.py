"""How many rounds fit into a training, and the messages where they do not."""

import re
from itertools import product

import pytest

from lightning_sap.rounds.plan import RoundPlan, plan_rounds, plan_search


class TestPlanRounds:
    @pytest.mark.parametrize(
        ("max_epochs", "rounds", "epochs"),
        [
            (0, 0, 1),
            (1, 0, 1),  # one epoch: no pruning would be followed by training
            (2, 1, 1),
            (3, 2, 1),
            (4, 3, 1),
            (5, 4, 1),
            (9, 4, 1),
            (10, 4, 2),
            (23, 4, 4),
            (24, 5, 4),
            (60, 14, 4),
            (63, 14, 4),
            (64, 15, 4),
            (200, 15, 12),
        ],
    )
    def test_plan_with_neither_rounds_nor_length_takes_defaults(self, max_epochs, rounds, epochs):
        assert plan_rounds(max_epochs) == RoundPlan(rounds, epochs, 0, max_epochs)

    @pytest.mark.parametrize(
        ("max_epochs", "rounds", "epochs"),
        [(10, 0, 10), (10, 1, 5), (10, 2, 3), (10, 3, 2), (10, 4, 2), (10, 5, 1), (10, 9, 1), (1, 0, 1)],
    )
    def test_plan_with_rounds_alone_makes_them_as_long_as_fit(self, max_epochs, rounds, epochs):
        assert plan_rounds(max_epochs, rounds=rounds) == RoundPlan(rounds, epochs, 0, max_epochs)

    @pytest.mark.parametrize(
        ("max_epochs", "rounds", "epochs"), [(10, 9, 1), (10, 4, 2), (10, 2, 3), (10, 1, 4), (10, 1, 5), (2, 1, 1)]
    )
    def test_plan_with_a_length_alone_makes_as_many_as_fit(self, max_epochs, rounds, epochs):
        assert plan_rounds(max_epochs, every=epochs) == RoundPlan(rounds, epochs, 0, max_epochs)

    @pytest.mark.parametrize(("rounds", "epochs"), [(2, 3), (4, 2), (9, 1), (1, 5), (1, 2), (0, 10), (0, 1)])
    def test_plan_with_rounds_and_length_keeps_both(self, rounds, epochs):
        assert plan_rounds(10, rounds, epochs) == RoundPlan(rounds, epochs, 0, 10)

    @pytest.mark.parametrize(
        ("first_epoch", "given", "plan"),
        [
            (5, {}, RoundPlan(4, 1, 5, 14)),
            (5, {"rounds": 2}, RoundPlan(2, 3, 5, 14)),
            (5, {"every": 2}, RoundPlan(3, 2, 5, 14)),
            (5, {"rounds": 2, "every": 3}, RoundPlan(2, 3, 5, 14)),
        ],
    )
    def test_training_that_goes_on_counts_the_epochs_that_are_left(self, first_epoch, given, plan):
        assert plan_rounds(14, **given, first=first_epoch) == plan

    @pytest.mark.parametrize("max_epochs", [None, -1])
    @pytest.mark.parametrize(
        ("given", "plan"),
        [
            ({"every": 2}, RoundPlan(None, 2)),
            ({"rounds": 3, "every": 2}, RoundPlan(3, 2)),
            ({"rounds": 0}, RoundPlan(0, 1)),
        ],
    )
    def test_plan_of_training_without_an_end(self, max_epochs, given, plan):
        assert plan_rounds(max_epochs, **given) == plan

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"limit": -1},
                "The rounds have no length, since it is not known beforehand how long training takes. Give "
                "every_n_steps, the length of a round in optimizer steps, or a Trainer with max_steps; or, where the "
                "data have an end, every_n_epochs or a Trainer with max_epochs.",
            ),
            (
                {"limit": None, "rounds": 3},
                "The rounds have no length, since it is not known beforehand how long training takes. Give "
                "every_n_steps, the length of a round in optimizer steps, or a Trainer with max_steps; or, where the "
                "data have an end, every_n_epochs or a Trainer with max_epochs.",
            ),
            (
                {"limit": 10, "rounds": 3, "every": 3},
                "rounds=3, every_n_epochs=3 with 10 epochs of training: they need (rounds + 1) · every_n_epochs = 12 "
                "epochs. Give max_epochs=12, or fewer or shorter rounds.",
            ),
            (
                {"limit": 14, "rounds": 3, "every": 3, "first": 4},
                "rounds=3, every_n_epochs=3 with 10 epochs of training: they need (rounds + 1) · every_n_epochs = 12 "
                "epochs. Give max_epochs=16, or fewer or shorter rounds.",
            ),
            (
                {"limit": 10, "rounds": 10},
                "rounds=10, every_n_epochs=None with 10 epochs of training: 10 prunings need at least 11 epochs. Give "
                "max_epochs=11 or more, or rounds=9 or fewer.",
            ),
            (
                {"limit": 7, "rounds": 3, "first": 4},
                "rounds=3, every_n_epochs=None with 3 epochs of training: 3 prunings need at least 4 epochs. Give "
                "max_epochs=8 or more, or rounds=2 or fewer.",
            ),
            (
                {"limit": 11, "every": 6},
                "rounds=None, every_n_epochs=6 with 11 epochs of training: not even one pruning fits. Give "
                "max_epochs=12 or more, or every_n_epochs=5 or fewer; rounds=0 only holds masks.",
            ),
        ],
    )
    def test_plan_that_cannot_fit_is_refused_with_what_would(self, arguments, message):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            plan_rounds(**arguments)

    def test_every_plan_leaves_each_round_an_epoch(self):
        for max_epochs, first_epoch in product(range(1, 80), (0, 3)):
            plan = plan_rounds(max_epochs + first_epoch, first=first_epoch)
            lengths = [plan.length_of(t, first_epoch + t * plan.length) for t in range(plan.rounds + 1)]
            assert min(lengths) == plan.length >= 1
            assert sum(lengths) == max_epochs
            assert plan.rounds <= 15

    @pytest.mark.parametrize("unit", ["epoch", "step"])
    def test_steps_are_planned_like_epochs(self, unit):
        assert plan_rounds(60, unit=unit) == RoundPlan(14, 4, 0, 60, unit)
        assert plan_rounds(60, every=7, unit=unit) == RoundPlan(7, 7, 0, 60, unit)

    def test_messages_speak_of_steps_where_rounds_are_steps(self):
        with pytest.raises(ValueError, match="every_n_steps=40 with 60 steps of training: not even one pruning fits"):
            plan_rounds(60, every=40, unit="step")
        with pytest.raises(ValueError, match="Give max_steps=160, or fewer or shorter rounds"):
            plan_rounds(60, rounds=3, every=40, unit="step")


class TestRoundPlan:
    def test_a_round_is_over_once_it_has_lasted_its_length(self):
        plan = RoundPlan(rounds=2, length=3, first=0, end=10)
        assert [plan.is_over(0, elapsed) for elapsed in range(5)] == [False, False, False, True, True]
        assert [plan.is_over(t, 3) for t in range(4)] == [True, True, False, False]  # no pruning follows the last one

    def test_the_last_round_takes_what_is_left_wherever_it_starts(self):
        plan = RoundPlan(rounds=2, length=3, first=0, end=10)
        assert [plan.length_of(t, start) for t, start in ((0, 0), (1, 3), (2, 6), (2, 8))] == [3, 3, 4, 2]

    def test_without_an_end_every_round_has_its_length(self):
        plan = RoundPlan(rounds=None, length=2)
        assert plan.is_over(1000, 2)
        assert plan.length_of(1000, 2000) == 2

    def test_the_last_round_of_a_training_without_an_end_has_no_length(self):
        assert [RoundPlan(rounds=2, length=3).length_of(t, 3 * t) for t in range(3)] == [3, 3, None]

    def test_prunings_before_a_moment_count_from_the_start_of_the_round(self):
        plan = RoundPlan(rounds=2, length=3, first=0, end=10)
        assert [plan.prunings_before(0, 0, epoch) for epoch in range(10)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
        assert [plan.prunings_before(1, 4, epoch) for epoch in (4, 6, 7, 9)] == [1, 1, 2, 2]
        assert [RoundPlan(None, 2).prunings_before(0, 0, epoch) for epoch in (0, 2, 99)] == [0, 1, 49]

    def test_no_pruning_is_ever_due_where_there_are_none(self):
        plan = RoundPlan(rounds=0, length=1, first=0, end=7)
        assert not any(plan.is_over(0, elapsed) for elapsed in range(8))
        assert plan.length_of(0, 0) == 7


class TestSearching:
    @pytest.mark.parametrize(
        ("limit", "rounds", "every", "first", "found"),
        [
            (80, None, None, 0, (20, 4, 15)),  # a quarter; 60 epochs for about sixteen rounds
            (60, None, None, 0, (15, 3, 15)),
            (24, None, None, 0, (6, 1, 18)),
            (24, None, None, 20, (1, 1, 3)),
            (2, None, None, 0, (1, 1, 1)),
            (80, 5, None, 0, (20, 12, 5)),
            (80, None, 7, 0, (20, 7, 8)),  # the last one takes the four epochs left over
            (80, 5, 12, 0, (20, 12, 5)),
            (80, 7, 10, 0, (10, 10, 7)),  # no room for a quarter
            (6, None, 3, 0, (3, 3, 1)),
            (3, 2, None, 0, (1, 1, 2)),
        ],
    )
    def test_the_dense_round_takes_a_quarter_where_there_is_room(self, limit, rounds, every, first, found):
        plan = plan_search(limit, rounds, every, first)
        assert (plan.dense, plan.length, plan.rounds) == found
        assert first + plan.needed < limit
        assert (plan.first, plan.end) == (first, limit)

    def test_rounds_are_long_enough_for_a_validation_where_their_length_is_free(self):
        assert plan_search(24, least=3).length == 3
        assert plan_search(24, every=1, least=3).length == 1

    def test_rounds_are_not_too_short_to_judge_by_as_long_as_four_are_left(self):
        assert [plan_search(30, shortest=n).length for n in (1, 2, 5, 9)] == [1, 2, 5, 5]
        assert plan_search(30, every=1, shortest=5).length == 1
        assert plan_search(30, rounds=11, shortest=5).length == 2

    def test_what_does_not_fit_is_refused_as_ever(self):
        with pytest.raises(ValueError, match=r"they need \(rounds \+ 1\) · every_n_epochs = 90 epochs"):
            plan_search(80, 8, 10)

    def test_without_a_known_end_all_rounds_are_equal(self):
        assert plan_search(None, every=10, unit="step") == plan_rounds(None, every=10, unit="step")
        assert plan_search(1).rounds == 0

    def test_the_first_round_is_over_after_its_own_length(self):
        plan = plan_search(80)
        assert [plan.is_over(0, elapsed) for elapsed in (4, 19, 20)] == [False, False, True]
        assert [plan.is_over(1, elapsed) for elapsed in (3, 4)] == [False, True]
        assert (plan.length_of(0, 0), plan.length_of(1, 20), plan.length_of(15, 76)) == (20, 4, 4)
        assert [plan.prunings_before(0, 0, now) for now in (0, 19, 20, 23, 24, 79)] == [0, 0, 1, 1, 2, 15]
