"""PQIMonitor: what it logs is the PQ Index of the weights, every epoch, beside a pruner and without one."""

import copy
import csv
import json
import pickle
import re

import pytest
import torch
from helpers import BAREBONES, BATCHES, PRUNABLE, Net, Watch, fit, loader, parameters, quiet_trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from lightning_sap import FixedFraction, PQIMonitor, PruningCallback, SAPCallback, gini_index, pq_index
from lightning_sap.engine.masks import MaskSet

STEPS_PER_LOG = {"log_every_n_steps": 1}


def half(**options):
    return PruningCallback(FixedFraction(0.5), **{"every_n_epochs": 1, **options})


def by_hand(module, masks=None, p=0.5, q=1.0):
    """Keys and values of an epoch, from nothing but the weights and `pq_index`."""
    live = {name: parameters(module)[name].detach() for name in PRUNABLE}
    alive = {name: w.flatten() if masks is None else w[masks[name]] for name, w in live.items()}
    layers = {name: float(pq_index(w, p, q)) for name, w in alive.items()}
    everything = torch.cat(list(alive.values()))
    return {
        "pqi/global": float(pq_index(everything, p, q)),
        "pqi/layer_mean": sum(layers.values()) / len(layers),
        "gini/global": float(gini_index(everything)),
        **{f"pqi/{name}": index for name, index in layers.items()},
        **{f"remaining/{name}": len(alive[name]) / w.numel() for name, w in live.items()},
    }


def logged(trainer, prefixes=("pqi/", "remaining/", "gini/")):
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefixes)}


def close(values):
    return pytest.approx(values, rel=1e-6, abs=1e-7)  # Lightning logs in float32


class Expecting(Watch):
    """Compares what is logged at the end of each epoch (and of each validation) with what it should be."""

    def __init__(self, pruner=None, hook="on_train_epoch_end", **options):
        self.seen, self.expected = [], []

        def compare(trainer, module):
            if trainer.sanity_checking:
                return
            self.seen.append(logged(trainer))
            self.expected.append(by_hand(module, None if pruner is None else pruner.masks, **options))

        super().__init__(**{hook: compare})


class TestValues:
    @pytest.mark.parametrize("validate", [False, True])
    @pytest.mark.parametrize("order", [1, -1])
    def test_beside_a_pruner_they_are_those_of_the_survivors(self, order, validate):
        pruner, monitor = half(), PQIMonitor(stop_on=None, log_layers=True, gini=True)
        look = Expecting(pruner)
        fit(Net(), *[pruner, monitor][::order], look, val=loader() if validate else None)
        assert len(look.seen) == 4
        for seen, expected in zip(look.seen, look.expected, strict=True):
            assert set(seen) == {*expected, "pqi/global_pruned", "pqi/phase"}
            assert {key: seen[key] for key in expected} == close(expected)
        assert [seen["remaining/net.0.weight"] for seen in look.seen] == [1.0, 0.5, 0.25, 0.125]

    def test_at_validation_end_they_are_of_the_same_epoch(self):
        pruner = half()
        look = Expecting(pruner, hook="on_validation_end")
        fit(Net(), pruner, PQIMonitor(stop_on=None), look, val=loader())
        assert len(look.seen) == 4
        for seen, expected in zip(look.seen, look.expected, strict=True):
            assert seen["pqi/global"] == close(expected["pqi/global"])
            assert seen["pqi/layer_mean"] == close(expected["pqi/layer_mean"])

    @pytest.mark.parametrize("order", [1, -1])
    def test_beside_an_averaging_callback_they_are_those_of_the_model(self, order):
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

    def test_without_a_pruner_all_prunable_weights_count(self):
        look = Expecting()
        fit(Net(), PQIMonitor(stop_on=None, log_layers=True, gini=True), look)
        assert len(look.seen) == 4
        for seen, expected in zip(look.seen, look.expected, strict=True):
            assert seen == close(expected)
        assert len({seen["pqi/global"] for seen in look.seen}) == 4  # it follows the training

    def test_orders_are_the_pruners_unless_given(self):
        for monitor, p, q in ((PQIMonitor(stop_on=None), 1.0, 2.0), (PQIMonitor(stop_on=None, p=0.3, q=0.7), 0.3, 0.7)):
            pruner = SAPCallback(p=1.0, q=2.0, rounds=3)
            look = Expecting(pruner, p=p, q=q)
            fit(Net(), pruner, monitor, look)
            for seen, expected in zip(look.seen, look.expected, strict=True):
                assert seen["pqi/global"] == close(expected["pqi/global"])
                assert ("pqi/global_pruned" in seen) == ((p, q) == (1.0, 2.0))  # the pruner took it in its own orders

    def test_right_after_a_pruning(self):
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

    def test_beside_two_pruners_both_parts_count(self):
        a, b = half(name="a", include="net.0.*"), half(name="b", include="net.3.*", every_n_epochs=2)
        seen, expected = [], []

        def compare(trainer, module):
            seen.append(logged(trainer)["pqi/global"])
            expected.append(by_hand(module, {**a.masks, **b.masks})["pqi/global"])
            assert "pqi/global_pruned" not in logged(trainer)  # each took that of its own part

        fit(Net(), a, PQIMonitor(stop_on=None), b, Watch(on_train_epoch_end=compare))
        assert seen == close(expected)

    def test_a_dense_model_with_integer_weights(self):
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
    def test_which_parameters_are_logged(self, log_layers, names):
        trainer = fit(Net(), PQIMonitor(stop_on=None, log_layers=log_layers), max_epochs=1)
        keys = {"pqi/global", "pqi/layer_mean", *(f"{kind}/{name}" for kind in ("pqi", "remaining") for name in names)}
        assert set(logged(trainer)) == keys

    def test_gini_only_where_asked_for(self):
        assert "gini/global" not in fit(Net(), PQIMonitor(stop_on=None), max_epochs=1).callback_metrics
        assert "gini/global" in fit(Net(), PQIMonitor(stop_on=None, gini=True), max_epochs=1).callback_metrics


class TestMonitoring:
    @pytest.mark.parametrize("mode", ["max", "min"])
    @pytest.mark.parametrize("validate", [False, True])
    def test_a_checkpoint_keeps_the_epoch_whose_weights_give_that_value(self, tmp_path, mode, validate):
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
    def test_early_stopping_finds_the_keys_in_every_epoch(self, key, val_every):
        epochs = []
        options = {} if val_every is None else {"val": loader(), "check_val_every_n_epoch": val_every}
        stop = EarlyStopping(key, patience=100)
        look = Watch(on_train_epoch_end=lambda t, m: epochs.append(t.current_epoch))
        fit(Net(), stop, PQIMonitor(stop_on=None), half(), look, **options)
        assert epochs == [0, 1, 2, 3]

    def test_several_validations_an_epoch(self):
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


class TestRows:
    def test_the_last_epoch_of_each_round(self):
        pruner, monitor, losses = half(every_n_epochs=2), PQIMonitor(stop_on=None, monitor="val_loss", mode="min"), []
        look = Watch(on_train_epoch_end=lambda t, m: losses.append(float(t.callback_metrics["val_loss"])))
        expecting = Expecting(pruner)
        fit(Net(), monitor, pruner, look, expecting, val=loader(), max_epochs=6)
        rows = monitor.rows()
        assert [(r["epoch"], r["round"], r["remaining"]) for r in rows] == [(1, 0, 1.0), (3, 1, 0.5), (5, 2, 0.25)]
        assert [r["metric"] for r in rows] == losses[1::2]
        assert [r["pqi"] for r in rows] == close([values["pqi/global"] for values in expecting.expected[1::2]])
        assert [r["pqi"] for r in rows] == close([record.pqi for record in pruner.history])

    def test_without_a_pruner_each_epoch(self):
        monitor = PQIMonitor(stop_on=None)
        fit(Net(), monitor)
        assert [(r["epoch"], r["round"], r["remaining"]) for r in monitor.rows()] == [(e, None, 1.0) for e in range(4)]

    def test_a_second_fit_starts_over(self):
        monitor = PQIMonitor(stop_on=None)
        fit(Net(), monitor)
        fit(Net(), monitor, max_epochs=2)
        assert [row["epoch"] for row in monitor.rows()] == [0, 1]

    def test_they_survive_a_resume(self, tmp_path):
        whole = PQIMonitor(stop_on=None, monitor="train_loss")
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        fit(Net(), half(), whole, saver, enable_checkpointing=True)
        resumed = PQIMonitor(stop_on=None, monitor="train_loss")
        fit(Net(), half(), resumed, ckpt_path=tmp_path / "epoch=1.ckpt")
        assert resumed.rows() == whole.rows()

    def test_copies_and_pickles(self):
        monitor = PQIMonitor(stop_on=None, log_layers=["net.3.*"], monitor="train_loss")
        during = []
        look = Watch(on_train_epoch_end=lambda t, m: during.append(pickle.loads(pickle.dumps(monitor))))
        fit(Net(), half(), monitor, look)
        for twin in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor)), during[-1]):
            fit(Net(), twin, half(), max_epochs=2)
            assert [row["epoch"] for row in twin.rows()] == [0, 1]
        assert [row["epoch"] for row in monitor.rows()] == [0, 1, 2, 3]


def events(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    found = accumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


class TestTensorBoard:
    @pytest.fixture(scope="class")
    @classmethod
    def found(cls, tmp_path_factory):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("tensorboard")
        logger = TensorBoardLogger(folder, name="", version="")
        monitor, look = PQIMonitor(stop_on=None, log_layers=True, monitor="val_loss"), Expecting(pruner := half())
        fit(Net(), monitor, pruner, look, val=loader(), logger=logger, **STEPS_PER_LOG)
        return events(folder), look

    def test_one_value_of_every_epoch(self, found):
        file, look = found
        for key in look.expected[0]:
            if key != "gini/global":
                scalars = file.Scalars(key)
                assert [s.step for s in scalars] == [BATCHES * e - 1 for e in (1, 2, 3, 4)]
                assert [s.value for s in scalars] == close([values[key] for values in look.expected])
        assert [s.value for s in file.Scalars("sap/remaining")] == [1.0, 0.5, 0.25, 0.125]
        assert [s.value for s in file.Scalars("sap/pruned")] == [0, 36, 18, 9]
        assert len(file.Scalars("pqi/global_pruned")) == 4

    def test_the_layout_names_curves_that_exist(self, found):
        from tensorboard.plugins.custom_scalar import layout_pb2

        file, _ = found
        layout = layout_pb2.Layout()
        (tensor,) = file.Tensors("custom_scalars__config__")
        layout.ParseFromString(tensor.tensor_proto.string_val[0])
        charts = {c.title: list(c.multiline.tag) for category in layout.category for c in category.chart}
        names = [re.escape(name) for name in PRUNABLE]
        assert {category.title for category in layout.category} == {"lightning-sap"}
        assert charts == {
            "PQ Index": ["pqi/global$", "pqi/layer_mean$", "pqi/global_pruned$"],
            "PQ Index of the layers": [f"pqi/{name}$" for name in names],
            "Remaining weights of the layers": [f"remaining/{name}$" for name in names],
        }
        tags = file.Tags()["scalars"]
        for pattern in (pattern for chart in charts.values() for pattern in chart):
            assert len([tag for tag in tags if re.match(pattern, tag)]) == 1

    def test_the_figure_is_among_the_images(self, found):
        pytest.importorskip("matplotlib")
        file, _ = found
        (image,) = file.Images("pqi/rounds")
        assert image.step == 4 * BATCHES
        assert image.encoded_image_string.startswith(b"\x89PNG")
        assert min(image.width, image.height) > 300

    def test_without_matplotlib_there_is_no_figure(self, tmp_path, monkeypatch):
        import lightning_sap.callbacks.monitor.callback as room

        monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
        fit(
            Net(),
            PQIMonitor(stop_on=None),
            half(),
            logger=TensorBoardLogger(tmp_path, name="", version=""),
            **STEPS_PER_LOG,
        )
        assert events(tmp_path).Tags()["images"] == []


class TestOtherLoggers:
    def test_csv(self, tmp_path):
        look = Expecting(pruner := half())
        logger = CSVLogger(tmp_path, name="", version="")
        fit(Net(), pruner, PQIMonitor(stop_on=None, log_layers=True), look, logger=logger, **STEPS_PER_LOG)
        with open(tmp_path / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["pqi/global"]]
        for row, expected in zip(rows, look.expected, strict=True):
            for key in ("pqi/global", "pqi/layer_mean", "pqi/net.0.weight", "remaining/net.3.weight"):
                assert float(row[key]) == close(expected[key])
        assert [float(row["sap/remaining"]) for row in rows] == [1.0, 0.5, 0.25, 0.125]

    def test_several_at_once(self, tmp_path):
        loggers = [TensorBoardLogger(tmp_path, name="a", version=""), CSVLogger(tmp_path, name="b", version="")]
        fit(Net(), half(), PQIMonitor(stop_on=None), logger=loggers, **STEPS_PER_LOG)
        assert len(events(tmp_path / "a").Scalars("pqi/global")) == 4
        assert "pqi/global" in (tmp_path / "b" / "metrics.csv").read_text()


class TestPlot:
    def test_over_the_rounds(self):
        monitor = PQIMonitor(stop_on=None, monitor="val_loss")
        fit(Net(), half(every_n_epochs=2), monitor, val=loader(), max_epochs=6)
        index, remaining, metric = monitor.plot().axes
        rows = monitor.rows()
        assert index.lines[0].get_ydata().tolist() == [row["pqi"] for row in rows]
        assert remaining.lines[0].get_ydata().tolist() == [1.0, 0.5, 0.25]
        assert metric.lines[0].get_ydata().tolist() == [row["metric"] for row in rows]
        assert metric.get_ylabel() == "val_loss"
        assert metric.get_xlabel() == "round (number of prunings)"

    def test_without_a_pruner_over_the_epochs(self):
        monitor = PQIMonitor(stop_on=None)
        fit(Net(), monitor)
        axes = monitor.plot().axes
        assert axes[-1].get_xlabel() == "epoch"
        assert axes[0].lines[0].get_xdata().tolist() == [0, 1, 2, 3]

    def test_before_any_epoch_it_says_so(self):
        with pytest.raises(ValueError, match="nothing to plot yet"):
            PQIMonitor(stop_on=None).plot()


class TestArguments:
    @pytest.mark.parametrize(("p", "q"), [(1.0, 1.0), (2.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (0.5, float("inf"))])
    def test_orders_out_of_range(self, p, q):
        with pytest.raises(ValueError, match=re.escape(f"0 < p < q <= 1000, got p={p} and q={q}; try p=0.5, q=1.0.")):
            PQIMonitor(p=p, q=q)

    @pytest.mark.parametrize("one", [{"p": 0.5}, {"q": 1.0}])
    def test_one_order_alone(self, one):
        with pytest.raises(ValueError, match="Give both p and q, or neither"):
            PQIMonitor(**one)

    def test_an_unknown_mode(self):
        with pytest.raises(ValueError, match=re.escape("mode must be 'max' or 'min', got 'maximum'.")):
            PQIMonitor(mode="maximum")


class TestOutsideFit:
    def test_evaluation_logs_nothing(self):
        trainer = quiet_trainer(PQIMonitor(stop_on=None), half())
        trainer.validate(Net(), loader(), verbose=False)
        assert set(trainer.callback_metrics) == {"val_loss"}

    def test_barebones_is_said_to_silence_it_and_the_rows_are_kept(self):
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


def test_two_monitors_of_different_orders_and_names(tmp_path):
    pruner = half()
    a, b = PQIMonitor(stop_on=None), PQIMonitor(stop_on=None, p=1.0, q=2.0, name="pr")
    trainer = fit(Net(), pruner, a, b)
    expected = by_hand(trainer.lightning_module, pruner.masks, p=1.0, q=2.0)
    assert float(trainer.callback_metrics["pr/global"]) == close(expected["pqi/global"])
    assert json.loads(json.dumps(b.state_dict()))["rows"][-1]["pqi"] == close(expected["pqi/global"])


def test_a_file_that_is_only_validated_leaves_what_is_known(tmp_path):
    monitor, saver = PQIMonitor(stop_on=None), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    module = Net()
    trainer = fit(module, half(), monitor, saver, val=loader(), enable_checkpointing=True)
    before = monitor.rows()
    trainer.validate(module, loader(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert monitor.rows() == before
    assert [row["round"] for row in before] == [0, 1, 2, 3]


def test_one_glob_needs_no_list_and_one_that_matches_nothing_is_refused():
    trainer = fit(Net(), half(), PQIMonitor(stop_on=None, log_layers="net.0*"), max_epochs=2)
    assert "pqi/net.0.weight" in trainer.callback_metrics
    assert "pqi/net.3.weight" not in trainer.callback_metrics
    with pytest.raises(ValueError, match=r"'nett\.\*' matches no parameter.*net\.0\.weight"):
        fit(Net(), half(), PQIMonitor(stop_on=None, log_layers=["nett.*"]), max_epochs=2)


@pytest.mark.parametrize("name", ["", "a/b"])
def test_names_that_would_spoil_the_keys_are_refused(name):
    with pytest.raises(ValueError, match="name must be a non-empty text without '/'"):
        PQIMonitor(name=name)
