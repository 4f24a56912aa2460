"""What PruningCallback logs, says and warns of."""

import logging

import pytest
import torch
from helpers import BAREBONES, Net, Watch, fit, half, loader
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.optim import SGD

from lightning_sap import FixedFraction, PQIMonitor, PruningCallback


class TestLogging:
    def test_round_remaining_and_pruned_are_logged_in_every_epoch(self):
        pruner, seen = half(every_n_epochs=2, name="half"), []
        keys = ("half/round", "half/remaining", "half/pruned")
        look = Watch(on_train_epoch_end=lambda t, m: seen.append([float(t.callback_metrics[key]) for key in keys]))
        fit(Net(), pruner, look, max_epochs=6)
        assert seen == [[0, 1.0, 0]] * 2 + [[1, 0.5, 36]] * 2 + [[2, 0.25, 18]] * 2

    def test_logged_values_at_validation_end_are_of_the_same_epoch(self):
        pruner, seen = half(), []
        look = Watch(
            on_validation_end=lambda t, m: seen.append(None if t.sanity_checking else _remaining(t)),
        )
        fit(Net(), look, pruner, val=loader())
        assert seen == [None, 1.0, 0.5, 0.25, 0.125]

    @pytest.mark.parametrize(
        ("pruner", "monitor", "shown"),
        [
            ({}, {}, {"sap/remaining": 0.125}),
            ({"prog_bar": False}, {"prog_bar": True}, {"pqi/global": None}),
            ({"prog_bar": False}, {}, {}),
        ],
    )
    def test_progress_bar_shows_what_remains_and_the_index_if_asked(self, pruner, monitor, shown):
        seen = {}
        look = Watch(on_train_end=lambda trainer, _: seen.update(trainer.progress_bar_metrics))
        trainer = fit(Net(), half(**pruner), PQIMonitor(stop_on=None, **monitor), look, val=loader())
        expected = {k: trainer.callback_metrics[k].item() if v is None else v for k, v in shown.items()}
        assert {key: value for key, value in seen.items() if "/" in key} == expected

    @pytest.mark.parametrize("validate", [False, True])
    @pytest.mark.parametrize("first", [False, True])
    @pytest.mark.parametrize("key", ["sap/remaining", "sap/round", "sap/pruned"])
    def test_early_stopping_finds_logged_values_in_every_epoch(self, validate, first, key):
        module, pruner, seen = Net(), half(), []
        stop = EarlyStopping(key, patience=100, check_finite=False)
        watch = Watch(on_train_epoch_end=lambda t, m: seen.append(t.current_epoch))
        callbacks = [stop, pruner] if first else [pruner, stop]
        fit(module, *callbacks, watch, val=loader() if validate else None)
        assert seen == [0, 1, 2, 3]

    @pytest.mark.parametrize("val_every", [1, 2, 3])
    def test_early_stopping_beside_rare_validation_sees_the_latest_values(self, val_every):
        pruner, values = half(), []

        class Stop(EarlyStopping):
            def _evaluate_stopping_criteria(self, current):
                values.append(float(current))
                return super()._evaluate_stopping_criteria(current)

        fit(Net(), Stop("sap/remaining", patience=100), pruner, val=loader(), check_val_every_n_epoch=val_every)
        left = [1.0, 0.5, 0.25, 0.125]
        assert values == left[val_every - 1 :: val_every]

    def test_early_stopping_ends_the_run_when_enough_is_pruned(self):
        pruner = half(every_n_epochs=1)
        stop = EarlyStopping("sap/remaining", stopping_threshold=0.3)
        trainer = fit(Net(), pruner, stop, max_epochs=50)
        assert trainer.current_epoch == 3
        assert pruner.remaining == 0.25

    def test_barebones_warns_of_silence_and_prunes_all_the_same(self):
        pruner = half()
        message = (
            "sap: Trainer(barebones=True) silences logging: sap/round, sap/remaining, sap/pruned reach no logger and "
            "no callback, and the history has no logged metrics; masks, rounds and the rest of the history are kept "
            "all the same."
        )
        with pytest.warns(UserWarning, match="barebones") as caught:
            trainer = fit(Net(), pruner, **BAREBONES)
        assert [str(w.message) for w in caught if "sap:" in str(w.message)] == [message]
        assert trainer.callback_metrics == {}
        assert pruner.remaining == 0.125
        assert [(r.remaining, r.metrics) for r in pruner.history] == [(2.0**-t, {}) for t in range(4)]

    def test_plan_is_said_at_the_start_and_result_at_the_end(self, caplog):
        with caplog.at_level(logging.INFO):
            fit(Net(), half(rewind_weights="init", scope="global"))
        said = [r.message for r in caplog.records if r.message.startswith("sap:") and "→" not in r.message]
        assert said == [
            "sap: 3 prunings in rounds of 1 epoch from epoch 0, scope global, weights rewound to 'init', "
            "FixedFraction(fraction=0.5)\n"
            "  prunable: 72 weights (100.0% remain), 72.7% of the 99 that are trained (100.0% remain), in "
            "net.0.weight, net.3.weight",
            "sap: 12.50% of 72 weights remain after 3 prunings. For a sparser network give more rounds (rounds, "
            "max_epochs) or a target_remaining.",
        ]

    def test_parameter_without_a_kept_weight_is_warned_of(self):
        module = Net(nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3)), lambda p: SGD(p, lr=0.0))
        with torch.no_grad():
            module.net[0].weight.fill_(0.01)
        pruner = PruningCallback(FixedFraction(0.7), rounds=1, scope="global")
        with pytest.warns(UserWarning, match=r"no weights are left in 'net\.0\.weight'\. Give min_remaining"):
            fit(module, pruner, max_epochs=2)


def _remaining(trainer):
    return float(trainer.callback_metrics["sap/remaining"])
