"""PruningState: packing and unpacking, and when a pruning is due."""

from dataclasses import replace

import torch
from helpers import same

from lightning_sap.callbacks.pruning.state import KeptRound, PruningState
from lightning_sap.engine.decision import Decision
from lightning_sap.engine.masks import MaskSet
from lightning_sap.engine.measure import Measure
from lightning_sap.rounds.history import History, RoundRecord
from lightning_sap.rounds.plan import RoundPlan
from lightning_sap.rounds.protocol import Stop, TakeBack


class TestPruningState:
    def state(self):
        pruned = {"w": torch.tensor([[True, False, True], [False, False, True]])}
        record = RoundRecord(
            0, 0, 1, 1.0, {"w": 1.0}, 0.25, {"w": 0.25}, 3, 0.5, {"w": 0.5}, 0.1, 0.01, {"val_acc": 0.5}
        )
        return PruningState(
            MaskSet(pruned),
            RoundPlan(3, 2, 1, 9),
            companions=MaskSet({"b": torch.tensor([True, False])}),
            finest=5,
            round=1,
            first_epoch=3,
            first_step=12,
            steps=6,
            count=3,
            pqi_after_pruning=0.5,
            first_weights={"w": torch.ones(2, 3)},
            kept=KeptRound(0, {"w": torch.zeros(2, 3)}, MaskSet({"w": torch.zeros(2, 3, dtype=torch.bool)})),
            answer=TakeBack(0.25),
            stop=Stop(1),
            history=History([record]),
            lr=0.25,
            metrics={"metrics": {"a": 1.0}, "validated": 1, "validation_keys": ["a"], "logged": ["a"]},
        )

    def test_state_packed_and_unpacked_is_the_same(self):
        state = self.state()
        twin = PruningState.unpack(state.pack())
        assert same(dict(twin.masks.pruned), dict(state.masks.pruned))
        assert same(dict(twin.companions.pruned), dict(state.companions.pruned))
        assert same(twin.first_weights, state.first_weights)
        assert list(twin.history) == list(state.history)
        assert twin.kept.round == state.kept.round
        assert same(twin.kept.weights, state.kept.weights)
        assert same(dict(twin.kept.masks.pruned), dict(state.kept.masks.pruned))
        for key in (
            "plan", "round", "first_epoch", "first_step", "steps", "epoch", "epoch_steps",
            "count", "pqi_after_pruning", "lr", "metrics",
            "answer", "stop", "finest",
        ):  # fmt: skip
            assert getattr(twin, key) == getattr(state, key)

    def test_packing_changes_nothing(self):
        state = self.state()
        before = dict(vars(state))
        state.pack()
        assert all(vars(state)[key] is value for key, value in before.items())

    def test_state_of_an_older_version_keeps_defaults(self):
        packed = self.state().pack()
        for key in ("version", "writer", "metrics", "pqi_after_pruning"):
            del packed[key]
        twin = PruningState.unpack({**packed, "not_known_yet": 1})
        assert (twin.metrics["metrics"], twin.pqi_after_pruning) == ({}, None)

    def test_a_pruning_is_due_once_a_round_was_trained(self):
        state = self.state()  # rounds of two epochs; this one started in epoch 3
        assert [state.is_due(epoch) for epoch in range(3, 10)] == [False, False, True, True, True, True, True]
        assert not replace(state, steps=0).is_due(5)
        assert state.prunings_left() == 2

    def test_a_round_in_steps_is_due_by_the_steps_taken_in_it(self):
        state = replace(self.state(), plan=RoundPlan(3, 6, unit="step"))
        assert [replace(state, steps=steps).is_due(3) for steps in (0, 5, 6, 7)] == [False, False, True, True]
        assert not replace(state, round=3).is_due(3)  # the last one

    def test_the_next_round_starts_where_this_one_ends(self):
        state = self.state()
        companions = MaskSet({"b": torch.tensor([True, False])})
        decision = Decision(Measure(0.0, {}, {}), {"w": 7}, {}, state.masks, companions, finest=2)
        following = state.next_round(decision, 0.125, state.history[0], 5)
        assert (following.round, following.first_epoch, following.first_step, following.steps) == (2, 5, 18, 0)
        assert (following.count, following.pqi_after_pruning, following.answer) == (7, 0.125, None)
        assert (following.companions, following.finest) == (companions, 2)

    def test_prunings_left_are_unknown_without_an_end(self):
        assert PruningState(plan=RoundPlan(None, 2)).prunings_left() is None
