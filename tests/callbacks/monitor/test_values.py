"""PQIMonitor: what it logs is the PQ Index of the weights, every epoch, beside a pruner and without one."""

import json
import re

import pytest
import torch
from helpers import BAREBONES, BATCHES, PRUNABLE, Net, Watch, fit, half, loader, quiet_trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from monitoring import Expecting, by_hand, close, logged
from torch import nn
from torch.nn.utils import prune

from lightning_sap import PQIMonitor, SAPCallback, pq_index
from lightning_sap.engine.masks import MaskSet


class TestValues:
    @pytest.mark.parametrize("validate", [False, True])
    @pytest.mark.parametrize("order", [1, -1])
    def test_index_beside_a_pruner_is_that_of_the_kept_weights(self, order, validate):
        pruner, monitor = half(), PQIMonitor(stop_on=None, log_layers=True, gini=True)
        look = Expecting(pruner)
        fit(Net(), *[pruner, monitor][::order], look, val=loader() if validate else None)
        assert len(look.seen) == 4
        for seen, expected in zip(look.seen, look.expected, strict=True):
            assert set(seen) == {*expected, "pqi/global_pruned", "pqi/phase"}
            assert {key: seen[key] for key in expected} == close(expected)
        assert [seen["remaining/net.0.weight"] for seen in look.seen] == [1.0, 0.5, 0.25, 0.125]

    def test_index_at_validation_end_is_of_the_same_epoch(self):
        pruner = half()
        look = Expecting(pruner, hook="on_validation_end")
        fit(Net(), pruner, PQIMonitor(stop_on=None), look, val=loader())
        assert len(look.seen) == 4
        for seen, expected in zip(look.seen, look.expected, strict=True):
            assert seen["pqi/global"] == close(expected["pqi/global"])
            assert seen["pqi/layer_mean"] == close(expected["pqi/layer_mean"])

    @pytest.mark.parametrize("order", [1, -1])
    def test_index_beside_averaging_is_that_of_the_model(self, order):
        watched = {"on_validation_start": [], "on_validation_end": []}

        def measure(trainer, module):
            watched["on_validation_start"].append(by_hand(module)["gini/global"])

        def read(trainer, module):
            watched["on_validation_end"].append(float(trainer.callback_metrics["gini/global"]))

        monitor, average = PQIMonitor(stop_on=None, gini=True), EMAWeightAveraging(decay=0.5)
        look = Watch(on_validation_start=measure, on_validation_end=read)
        fit(Net(), look, *[monitor, average][::order], val=loader(), num_sanity_val_steps=0)
        assert watched["on_validation_end"] == [close(gini) for gini in watched["on_validation_start"]]
        assert len(watched["on_validation_end"]) == 4

    def test_index_without_a_pruner_is_that_of_all_prunable_weights(self):
        look = Expecting()
        fit(Net(), PQIMonitor(stop_on=None, log_layers=True, gini=True), look)
        assert len(look.seen) == 4
        for seen, expected in zip(look.seen, look.expected, strict=True):
            assert seen == close(expected)
        assert len({seen["pqi/global"] for seen in look.seen}) == 4  # it follows the training

    @pytest.mark.parametrize("compiled", [False, True])
    def test_index_of_what_torch_pruned_is_that_of_the_kept_weights(self, compiled):
        """As beside ModelPruning: the parameter is dense, and the layer uses its product with a mask."""
        module, seen = Net(), []
        prune.l1_unstructured(module.net[0], "weight", amount=0.5)
        layers = list(module.net)
        if compiled:
            module.net = torch.compile(module.net, backend="eager")

        def look(trainer, module):
            kept = [layers[0].weight_orig[layers[0].weight_mask.bool()], layers[3].weight.flatten()]
            index = float(pq_index(torch.cat(kept).detach()))
            seen.append((float(trainer.callback_metrics["pqi/global"]), index))
            assert trainer.callback_metrics["remaining/net.0.weight_orig"] == 0.5

        fit(module, PQIMonitor(stop_on=None, log_layers=True), Watch(on_train_epoch_end=look), max_epochs=2)
        assert len(seen) == 2
        assert all(found == pytest.approx(index) for found, index in seen)

    def test_orders_of_the_index_are_the_pruners_unless_given(self):
        for monitor, p, q in ((PQIMonitor(stop_on=None), 1.0, 2.0), (PQIMonitor(stop_on=None, p=0.3, q=0.7), 0.3, 0.7)):
            pruner = SAPCallback(p=1.0, q=2.0, rounds=3)
            look = Expecting(pruner, p=p, q=q)
            fit(Net(), pruner, monitor, look)
            for seen, expected in zip(look.seen, look.expected, strict=True):
                assert seen["pqi/global"] == close(expected["pqi/global"])
                assert ("pqi/global_pruned" in seen) == ((p, q) == (1.0, 2.0))  # the pruner took it in its own orders

    def test_index_right_after_a_pruning_is_that_of_the_rounds_start(self):
        """Measured here at the first batch of each round, before it is trained."""
        pruner, starts, seen, module = half(every_n_epochs=2), {}, [], Net()
        look = Watch(
            on_train_batch_start=lambda t, m: starts.setdefault(
                t.current_epoch // 2, by_hand(m, pruner.masks)["pqi/global"]
            ),
            on_train_epoch_end=lambda t, m: seen.append(logged(t)["pqi/global_pruned"]),
        )
        fit(module, pruner, PQIMonitor(stop_on=None), look, max_epochs=6)
        assert seen == close([starts[0], starts[0], starts[1], starts[1], starts[2], starts[2]])
        assert len(set(seen)) == 3

    def test_index_beside_two_pruners_is_that_of_both_parts(self):
        a, b = half(name="a", include="net.0.*"), half(name="b", include="net.3.*", every_n_epochs=2)
        seen, expected = [], []

        def compare(trainer, module):
            seen.append(logged(trainer)["pqi/global"])
            expected.append(by_hand(module, {**a.masks, **b.masks})["pqi/global"])
            assert "pqi/global_pruned" not in logged(trainer)  # each took that of its own part

        fit(Net(), a, PQIMonitor(stop_on=None), b, Watch(on_train_epoch_end=compare))
        assert seen == close(expected)

    def test_index_of_a_dense_model_with_integer_weights_is_exact(self):
        """Of the weights 4, 4, 0, 0: ‖w‖₀.₅ = (2 + 2)² = 16, ‖w‖₁ = 8, d⁻¹ = 1/4, so I = 1 - 16 / 8 / 4 = 0.5."""
        module = Net(nn.Linear(4, 1, bias=False), lambda p: torch.optim.SGD(p, lr=0.0))
        module.net.weight = nn.Parameter(torch.tensor([[4.0, -4.0, 0.0, 0.0]]))
        module.loss = lambda batch: module.net.weight.sum()
        trainer = fit(module, PQIMonitor(stop_on=None, gini=True), max_epochs=1)
        assert logged(trainer) == {"pqi/global": 0.5, "pqi/layer_mean": 0.5, "gini/global": 0.5}


class TestLogLayers:
    @pytest.mark.parametrize(
        ("log_layers", "names"),
        [
            (False, []),
            (True, ["net.0.weight", "net.3.weight"]),
            (["net.3.*"], ["net.3.weight"]),
            (["net.?.weight"], ["net.0.weight", "net.3.weight"]),
            (["net.3.*", "net.0.weight"], ["net.0.weight", "net.3.weight"]),
            ([], []),
        ],
    )
    def test_log_layers_selects_the_parameters_logged(self, log_layers, names):
        trainer = fit(Net(), PQIMonitor(stop_on=None, log_layers=log_layers), max_epochs=1)
        keys = {"pqi/global", "pqi/layer_mean", *(f"{kind}/{name}" for kind in ("pqi", "remaining") for name in names)}
        assert set(logged(trainer)) == keys

    def test_gini_is_logged_only_where_asked_for(self):
        assert "gini/global" not in fit(Net(), PQIMonitor(stop_on=None), max_epochs=1).callback_metrics
        assert "gini/global" in fit(Net(), PQIMonitor(stop_on=None, gini=True), max_epochs=1).callback_metrics


class TestMonitoring:
    @pytest.mark.parametrize("mode", ["max", "min"])
    @pytest.mark.parametrize("validate", [False, True])
    def test_best_checkpoint_by_index_holds_the_weights_of_that_index(self, tmp_path, mode, validate):
        pruner, seen = half(), []
        saver = ModelCheckpoint(tmp_path, "{epoch}", monitor="pqi/global", mode=mode)
        look = Watch(on_train_epoch_end=lambda t, m: seen.append(logged(t)["pqi/global"]))
        val = loader() if validate else None
        fit(Net(), pruner, PQIMonitor(stop_on=None), saver, look, val=val, max_epochs=6, enable_checkpointing=True)
        best = max(seen) if mode == "max" else min(seen)
        file = torch.load(saver.best_model_path, weights_only=True)
        assert file["epoch"] == seen.index(best)
        masks = MaskSet.unpack(file["callbacks"]["lightning_sap/sap"]["masks"]).kept
        saved = torch.cat([file["state_dict"][name][masks[name]] for name in PRUNABLE])
        assert float(saver.best_model_score) == close(float(pq_index(saved)))
        assert float(saver.best_model_score) == close(best)

    @pytest.mark.parametrize("val_every", [None, 1, 2])
    @pytest.mark.parametrize("key", ["pqi/global", "pqi/layer_mean", "pqi/global_pruned"])
    def test_early_stopping_finds_the_index_in_every_epoch(self, key, val_every):
        epochs = []
        options = {} if val_every is None else {"val": loader(), "check_val_every_n_epoch": val_every}
        stop = EarlyStopping(key, patience=100)
        look = Watch(on_train_epoch_end=lambda t, m: epochs.append(t.current_epoch))
        fit(Net(), stop, PQIMonitor(stop_on=None), half(), look, **options)
        assert epochs == [0, 1, 2, 3]

    def test_index_is_logged_at_each_of_several_validations(self):
        look = Expecting(pruner := half(), hook="on_validation_end")
        fit(Net(), pruner, PQIMonitor(stop_on=None), look, val=loader(), val_check_interval=1)
        assert len(look.seen) == 4 * BATCHES
        seen = [values["pqi/global"] for values in look.seen]
        assert seen == close([values["pqi/global"] for values in look.expected])

    def test_a_metric_that_is_never_logged_is_an_error_after_the_first_epoch(self):
        epochs = []
        look = Watch(on_train_epoch_end=lambda t, m: epochs.append(t.current_epoch))
        message = re.escape(
            "PQIMonitor(monitor='val_acc'): no such metric is logged; those logged are ['pqi/global', "
            "'pqi/layer_mean', 'train_loss', 'val_loss']."
        )
        with pytest.raises(ValueError, match=f"^{message}$"):
            fit(Net(), PQIMonitor(stop_on=None, monitor="val_acc"), look, val=loader())
        assert epochs == [0]

    @pytest.mark.parametrize("beside", [(), (half,)])
    def test_a_metric_of_training_is_known_without_validation(self, beside):
        monitor, losses = PQIMonitor(monitor="train_loss", stop_on=None), []
        look = Watch(on_train_epoch_end=lambda t, m: losses.append(float(t.callback_metrics["train_loss"])))
        callbacks = [make() for make in beside]
        fit(Net(), *callbacks, monitor, look, val=loader(seed=3), max_epochs=3, check_val_every_n_epoch=2)
        assert [row["metric"] for row in monitor.rows()] == losses
        for pruner in callbacks:
            assert [record.metrics["train_loss"] for record in pruner.history] == losses

    def test_a_metric_of_rare_validation_is_waited_for(self):
        monitor = PQIMonitor(stop_on=None, monitor="val_loss")
        trainer = fit(Net(), monitor, half(), val=loader(), check_val_every_n_epoch=3, max_epochs=3)
        assert [row["metric"] for row in monitor.rows()] == [None, None, float(trainer.callback_metrics["val_loss"])]


class TestArguments:
    @pytest.mark.parametrize(("p", "q"), [(1.0, 1.0), (2.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (0.5, float("inf"))])
    def test_monitor_refuses_orders_out_of_range(self, p, q):
        with pytest.raises(ValueError, match=re.escape(f"0 < p < q <= 1000, got p={p} and q={q}; try p=0.5, q=1.0.")):
            PQIMonitor(p=p, q=q)

    @pytest.mark.parametrize("one", [{"p": 0.5}, {"q": 1.0}])
    def test_monitor_refuses_one_order_alone(self, one):
        with pytest.raises(ValueError, match="Give both p and q, or neither"):
            PQIMonitor(**one)

    def test_monitor_refuses_an_unknown_mode(self):
        with pytest.raises(ValueError, match=re.escape("mode must be 'max' or 'min', got 'maximum'.")):
            PQIMonitor(mode="maximum")


class TestOutsideFit:
    def test_monitor_logs_nothing_in_evaluation(self):
        trainer = quiet_trainer(PQIMonitor(stop_on=None), half())
        trainer.validate(Net(), loader(), verbose=False)
        assert set(trainer.callback_metrics) == {"val_loss"}

    def test_barebones_warns_that_the_monitor_is_silent_and_keeps_rows(self):
        pruner, monitor = half(), PQIMonitor(stop_on=None, monitor="train_loss")
        message = (
            "PQIMonitor: Trainer(barebones=True) silences logging: pqi/global and the other values reach no logger and "
            "no callback; rows() and plot() have them all the same, without a monitored metric."
        )
        with pytest.warns(UserWarning, match="barebones") as caught:
            trainer = fit(Net(), pruner, monitor, **BAREBONES)
        assert [str(w.message) for w in caught if "PQIMonitor:" in str(w.message)] == [message]
        assert trainer.callback_metrics == {}
        rows = [(row["remaining"], row["pqi"], row["metric"]) for row in monitor.rows()]
        assert rows == [(2.0**-t, pruner.history[t].pqi, None) for t in range(4)]


def test_two_monitors_of_different_orders_log_under_their_names(tmp_path):
    pruner = half()
    a, b = PQIMonitor(stop_on=None), PQIMonitor(stop_on=None, p=1.0, q=2.0, name="pr")
    trainer = fit(Net(), pruner, a, b)
    expected = by_hand(trainer.lightning_module, pruner.masks, p=1.0, q=2.0)
    assert float(trainer.callback_metrics["pr/global"]) == close(expected["pqi/global"])
    assert json.loads(json.dumps(b.state_dict()))["rows"][-1]["pqi"] == close(expected["pqi/global"])


def test_log_layers_takes_one_glob_and_refuses_one_without_a_match():
    trainer = fit(Net(), half(), PQIMonitor(stop_on=None, log_layers="net.0*"), max_epochs=2)
    assert "pqi/net.0.weight" in trainer.callback_metrics
    assert "pqi/net.3.weight" not in trainer.callback_metrics
    with pytest.raises(ValueError, match=r"'nett\.\*' matches no parameter.*net\.0\.weight"):
        fit(Net(), half(), PQIMonitor(stop_on=None, log_layers=["nett.*"]), max_epochs=2)


@pytest.mark.parametrize("name", ["", "a/b"])
def test_monitor_refuses_names_that_would_spoil_the_keys(name):
    with pytest.raises(ValueError, match="name must be a non-empty text without '/'"):
        PQIMonitor(name=name)
