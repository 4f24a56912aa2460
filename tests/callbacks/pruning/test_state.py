"""PruningState: packing and unpacking, and when a pruning is due."""

import torch
from helpers import same

from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.engine.masks import MaskSet
from lightning_sap.rounds.history import History, RoundRecord
from lightning_sap.rounds.plan import RoundPlan


class TestRunState:
    def state(self):
        pruned = {"w": torch.tensor([[True, False, True], [False, False, True]])}
        record = RoundRecord(0, 0, 1, 1.0, {"w": 1.0}, 0.25, {"w": 0.25}, 3, 0.5, 0.1, 0.01, {"val_acc": 0.5})
        return PruningState(
            MaskSet(pruned),
            RoundPlan(3, 2, 1, 9),
            1,
            12,
            3,
            0.5,
            {"w": torch.ones(2, 3)},
            History([record]),
            lr=0.25,
            metrics={"a": 1.0},
        )

    def test_packing_and_unpacking_gives_it_back(self):
        state = self.state()
        twin = PruningState.unpack(state.pack())
        assert same(dict(twin.masks.pruned), dict(state.masks.pruned))
        assert same(twin.first_weights, state.first_weights)
        assert list(twin.history) == list(state.history)
        for key in ("plan", "round", "round_step", "count", "pqi_after_pruning", "lr", "metrics"):
            assert getattr(twin, key) == getattr(state, key)

    def test_what_an_older_version_did_not_store_keeps_its_default(self):
        packed = self.state().pack()
        del packed["metrics"], packed["pqi_after_pruning"]
        twin = PruningState.unpack({**packed, "not_known_yet": 1})
        assert (twin.metrics, twin.pqi_after_pruning) == ({}, None)

    def test_a_pruning_is_due_once_a_round_was_trained(self):
        state = self.state()  # rounds of two epochs from epoch 1; one pruning so far, at step 12
        assert [state.is_due(epoch, 20) for epoch in range(3, 10)] == [False, False, True, True, True, True, True]
        assert not state.is_due(5, 12)
        assert state.prunings_left() == 2

    def test_no_end_of_rounds(self):
        assert PruningState(plan=RoundPlan(None, 2)).prunings_left() is None
