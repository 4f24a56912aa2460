"""How many rounds fit into a training, and the messages where they do not."""

import re
from itertools import product

import pytest

from lightning_sap.rounds.plan import RoundPlan, plan_rounds


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
    def test_neither_is_given(self, max_epochs, rounds, epochs):
        assert plan_rounds(max_epochs) == RoundPlan(rounds, epochs, 0, max_epochs)

    @pytest.mark.parametrize(
        ("max_epochs", "rounds", "epochs"),
        [(10, 0, 10), (10, 1, 5), (10, 2, 3), (10, 3, 2), (10, 4, 2), (10, 5, 1), (10, 9, 1), (1, 0, 1)],
    )
    def test_as_long_ones_as_fit(self, max_epochs, rounds, epochs):
        assert plan_rounds(max_epochs, rounds=rounds) == RoundPlan(rounds, epochs, 0, max_epochs)

    @pytest.mark.parametrize(
        ("max_epochs", "rounds", "epochs"), [(10, 9, 1), (10, 4, 2), (10, 2, 3), (10, 1, 4), (10, 1, 5), (2, 1, 1)]
    )
    def test_as_many_as_fit(self, max_epochs, rounds, epochs):
        assert plan_rounds(max_epochs, every_n_epochs=epochs) == RoundPlan(rounds, epochs, 0, max_epochs)

    @pytest.mark.parametrize(("rounds", "epochs"), [(2, 3), (4, 2), (9, 1), (1, 5), (1, 2), (0, 10), (0, 1)])
    def test_both_are_given(self, rounds, epochs):
        assert plan_rounds(10, rounds, epochs) == RoundPlan(rounds, epochs, 0, 10)

    @pytest.mark.parametrize(
        ("first_epoch", "given", "plan"),
        [
            (5, {}, RoundPlan(4, 1, 5, 14)),
            (5, {"rounds": 2}, RoundPlan(2, 3, 5, 14)),
            (5, {"every_n_epochs": 2}, RoundPlan(3, 2, 5, 14)),
            (5, {"rounds": 2, "every_n_epochs": 3}, RoundPlan(2, 3, 5, 14)),
        ],
    )
    def test_training_that_goes_on_counts_the_epochs_that_are_left(self, first_epoch, given, plan):
        assert plan_rounds(14, **given, first_epoch=first_epoch) == plan

    @pytest.mark.parametrize("max_epochs", [None, -1])
    @pytest.mark.parametrize(
        ("given", "plan"),
        [
            ({"every_n_epochs": 2}, RoundPlan(None, 2)),
            ({"rounds": 3, "every_n_epochs": 2}, RoundPlan(3, 2)),
            ({"rounds": 0}, RoundPlan(0, 1)),
        ],
    )
    def test_training_without_an_end(self, max_epochs, given, plan):
        assert plan_rounds(max_epochs, **given) == plan

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"max_epochs": -1},
                "The rounds have no length: the Trainer has no max_epochs and every_n_epochs is not given. Set either; "
                "rounds counted in steps (for a run limited by max_steps) do not exist yet.",
            ),
            (
                {"max_epochs": None, "rounds": 3},
                "The rounds have no length: the Trainer has no max_epochs and every_n_epochs is not given. Set either; "
                "rounds counted in steps (for a run limited by max_steps) do not exist yet.",
            ),
            (
                {"max_epochs": 10, "rounds": 3, "every_n_epochs": 3},
                "rounds=3, every_n_epochs=3 with 10 epochs of training: they need (rounds + 1) · every_n_epochs = 12 "
                "epochs. Give max_epochs=12, or fewer or shorter rounds.",
            ),
            (
                {"max_epochs": 14, "rounds": 3, "every_n_epochs": 3, "first_epoch": 4},
                "rounds=3, every_n_epochs=3 with 10 epochs of training: they need (rounds + 1) · every_n_epochs = 12 "
                "epochs. Give max_epochs=16, or fewer or shorter rounds.",
            ),
            (
                {"max_epochs": 10, "rounds": 10},
                "rounds=10, every_n_epochs=None with 10 epochs of training: 10 prunings need at least 11 epochs. Give "
                "max_epochs=11 or more, or rounds=9 or fewer.",
            ),
            (
                {"max_epochs": 7, "rounds": 3, "first_epoch": 4},
                "rounds=3, every_n_epochs=None with 3 epochs of training: 3 prunings need at least 4 epochs. Give "
                "max_epochs=8 or more, or rounds=2 or fewer.",
            ),
            (
                {"max_epochs": 11, "every_n_epochs": 6},
                "rounds=None, every_n_epochs=6 with 11 epochs of training: not even one pruning fits. Give "
                "max_epochs=12 or more, or every_n_epochs=5 or fewer; rounds=0 only holds masks.",
            ),
        ],
    )
    def test_what_cannot_fit_says_what_would(self, arguments, message):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            plan_rounds(**arguments)

    def test_every_plan_leaves_each_round_an_epoch(self):
        for max_epochs, first_epoch in product(range(1, 80), (0, 3)):
            plan = plan_rounds(max_epochs + first_epoch, first_epoch=first_epoch)
            lengths = [plan.length(t) for t in range(plan.rounds + 1)]
            assert min(lengths) == plan.epochs >= 1
            assert sum(lengths) == max_epochs
            assert plan.rounds <= 15


class TestRoundPlan:
    def test_a_longer_last_round(self):
        plan = RoundPlan(rounds=2, epochs=3, first_epoch=0, last_epoch=10)
        assert [plan.due(epoch) for epoch in range(10)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
        assert [plan.start(t) for t in range(3)] == [0, 3, 6]
        assert [plan.length(t) for t in range(3)] == [3, 3, 4]

    def test_one_that_starts_later(self):
        plan = RoundPlan(rounds=1, epochs=2, first_epoch=5, last_epoch=10)
        assert [plan.due(epoch) for epoch in range(5, 10)] == [0, 0, 1, 1, 1]
        assert [plan.start(t) for t in range(2)] == [5, 7]
        assert [plan.length(t) for t in range(2)] == [2, 3]

    def test_without_an_end(self):
        plan = RoundPlan(rounds=None, epochs=2)
        assert [plan.due(epoch) for epoch in (0, 1, 2, 3, 99, 100)] == [0, 0, 1, 1, 49, 50]
        assert plan.length(1000) == 2

    def test_the_last_round_of_a_training_without_an_end_has_no_length(self):
        plan = RoundPlan(rounds=2, epochs=3)
        assert [plan.due(epoch) for epoch in (5, 6, 100)] == [1, 2, 2]
        assert [plan.length(t) for t in range(3)] == [3, 3, None]

    def test_no_pruning_is_ever_due(self):
        plan = RoundPlan(rounds=0, epochs=1, first_epoch=0, last_epoch=7)
        assert [plan.due(epoch) for epoch in range(7)] == [0] * 7
        assert plan.length(0) == 7
