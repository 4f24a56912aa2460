"""Names that others rely on, as literals: a change here breaks someone's script, dashboard or checkpoint."""

import dataclasses
import inspect

import torch
from helpers import Net, fit, loader

import lightning_sap
from lightning_sap import (
    FixedFraction,
    GrowAndPrune,
    History,
    PQIMonitor,
    PQIndex,
    PruningCallback,
    RoundRecord,
    SAPCallback,
    SparsityInformed,
    gini_index,
    pq_index,
    prune_count,
    prune_masks,
    retained_lower_bound,
)

COMMON = {
    "scope": None,
    "structure": "weight",
    "example_inputs": None,
    "importance": "magnitude",
    "tolerance": None,
    "rounds": None,
    "every_n_epochs": None,
    "every_n_steps": None,
    "rewind_weights": None,
    "lr_schedule": "auto",
    "reset_optimizer": True,
    "target_remaining": None,
    "target_of": "prunable",
    "min_remaining": 0.0,
    "min_per_unit": 0,
    "include": None,
    "exclude": None,
    "keep_zeros": False,
    "masks": None,
    "save_rounds": None,
    "dirpath": None,
    "name": "sap",
    "prog_bar": True,
}
REQUIRED = inspect.Parameter.empty


def arguments(function):
    """Positional and keyword-only arguments with their defaults."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    return positional, {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


class TestPublicNames:
    def test_public_names_of_the_package(self):
        assert {
            "Amounts",
            "FisherRatio",
            "FixedFraction",
            "GoOn",
            "GrowAndPrune",
            "History",
            "Importance",
            "Magnitude",
            "PQIMonitor",
            "PQIndex",
            "Phase",
            "PhaseDetector",
            "Policy",
            "Pruner",
            "PruningCallback",
            "RoundEnd",
            "RoundListener",
            "RoundRecord",
            "SAPCallback",
            "SparsityInformed",
            "Standing",
            "Taylor",
            "Wanda",
            "effective_weights",
            "gini_index",
            "load_sparse",
            "pq_index",
            "prune_count",
            "prune_masks",
            "quantize_survivors",
            "retained_lower_bound",
            "save_sparse",
            "shrink",
            "sparse_linears",
        } <= set(lightning_sap.__all__)
        assert sorted(lightning_sap.__all__) == list(lightning_sap.__all__)
        assert all(hasattr(lightning_sap, name) for name in lightning_sap.__all__)

    def test_public_arguments_of_the_callbacks(self):
        sap = {"eta_r": 0.0, "gamma": 1.0, "beta": 0.9, **COMMON}
        assert arguments(SAPCallback) == ({"p": None, "q": None}, sap)
        assert arguments(PruningCallback) == ({"policy": REQUIRED}, COMMON)

    def test_public_arguments_of_the_monitor(self):
        positional, named = arguments(PQIMonitor)
        assert positional == {"p": None, "q": None}
        assert named == {
            "stop_on": "collapse", "monitor": None, "mode": None, "patience": 2, "restore": True, "verbose": True,
            "gini": False, "log_layers": False, "name": "pqi", "prog_bar": False,
        }  # fmt: skip

    def test_public_arguments_of_the_functions(self):
        vector = {"x": REQUIRED, "p": 0.5, "q": 1.0}
        groups = {"index": REQUIRED, "d": REQUIRED, "p": REQUIRED, "q": REQUIRED}
        assert arguments(pq_index) == (vector, {"mask": None, "dim": None})
        assert arguments(gini_index) == ({"x": REQUIRED}, {"mask": None, "dim": None})
        assert arguments(retained_lower_bound) == ({**groups, "eta_r": 0.0}, {})
        assert arguments(prune_count) == (groups, {"eta_r": 0.0, "gamma": 1.0, "beta": 0.9})
        named = {"policy": REQUIRED, "scope": "layer", "units": None, "round": 1, "importance": "magnitude"}
        assert arguments(prune_masks) == ({"weights": REQUIRED, "masks": None}, named)

    def test_public_arguments_of_what_deploys(self):
        sources = {"source": REQUIRED, "path": REQUIRED}
        assert arguments(lightning_sap.save_sparse) == (sources, {"values": "same", "compress": True})
        assert arguments(lightning_sap.load_sparse) == ({"path": REQUIRED}, {})
        assert arguments(lightning_sap.quantize_survivors) == ({"source": REQUIRED}, {})
        module = {"module": REQUIRED, "example_inputs": REQUIRED}
        assert arguments(lightning_sap.sparse_linears) == (module, {})
        assert arguments(lightning_sap.effective_weights) == (module, {})
        assert arguments(lightning_sap.shrink) == (module, {"exclude": (), "time_limit": 40.0})

    def test_public_arguments_of_policies_and_the_metric(self):
        assert arguments(SparsityInformed) == ({"p": 0.5, "q": 1.0, "eta_r": 0.0, "gamma": 1.0, "beta": 0.9}, {})
        grown = {"remaining": 0.1, "partitions": 4, "cycles": None, "close": None}
        assert arguments(GrowAndPrune) == (grown, {})
        assert arguments(FixedFraction) == ({"fraction": REQUIRED}, {})
        assert arguments(PQIndex) == ({"p": 0.5, "q": 1.0}, {})

    def test_public_names_of_the_history(self):
        assert [field.name for field in dataclasses.fields(RoundRecord)] == [
            "round", "first_epoch", "last_epoch", "remaining", "layers_remaining", "pqi", "layers_pqi", "pruned",
            "pqi_pruned", "layers_pqi_pruned", "lr", "seconds", "metrics", "weights", "phase", "reason", "path",
            "restored", "first_step", "last_step", "unit", "regrown", "taken_back", "sound",
            "metric", "yardstick", "bound", "opened", "run", "parent", "size", "sha256",
        ]  # fmt: skip
        assert arguments(History.best) == (
            {"self": REQUIRED, "monitor": REQUIRED, "mode": "max", "tolerance": 0.0}, {}
        )  # fmt: skip
        assert all(callable(getattr(History, name)) for name in ("rows", "to_csv"))

    def test_public_names_of_a_pruner(self):
        assert all(
            isinstance(getattr(SAPCallback, name), property) for name in ("masks", "remaining", "history", "earlier")
        )
        assert arguments(SAPCallback.plan) == ({"self": REQUIRED, "module": None}, {})
        assert arguments(SAPCallback.restore_round) == ({"self": REQUIRED, "round": REQUIRED, "module": None}, {})

    def test_public_names_of_a_pruner_without_a_trainer(self):
        pruner = lightning_sap.Pruner
        assert all(isinstance(getattr(pruner, name), property) for name in ("masks", "remaining", "history"))
        assert all(callable(getattr(pruner, name)) for name in ("detach", "hold_masks", "mask_gradients", "state_dict"))
        assert arguments(pruner) == ({"policy": REQUIRED}, {})
        assert arguments(pruner.attach) == ({"self": REQUIRED, "module": REQUIRED}, {})
        assert arguments(pruner.prune) == ({"self": REQUIRED, "metrics": None}, {})
        assert arguments(pruner.load_state_dict) == ({"self": REQUIRED, "state": REQUIRED}, {})

    def test_public_names_of_a_monitor(self):
        assert all(isinstance(getattr(PQIMonitor, name), property) for name in ("phase", "reason", "verdict"))
        assert all(callable(getattr(PQIMonitor, name)) for name in ("rows", "plot", "report"))


class TestLogKeys:
    def test_log_keys_of_a_pruner_and_a_monitor(self):
        trainer = fit(Net(), SAPCallback(), PQIMonitor(stop_on=None, gini=True, log_layers=["net.3.*"]), val=loader())
        assert {
            "train_loss", "val_loss", "sap/round", "sap/remaining", "sap/pruned", "sap/lr", "pqi/global",
            "pqi/layer_mean", "pqi/global_pruned", "pqi/phase", "gini/global", "pqi/net.3.weight",
            "remaining/net.3.weight",
        } <= set(trainer.callback_metrics)  # fmt: skip

    def test_log_keys_of_a_pruner_by_another_name(self):
        trainer = fit(Net(), PruningCallback(FixedFraction(0.5), name="ticket"))
        keys = {"ticket/round", "ticket/remaining", "ticket/pruned", "ticket/lr"}
        assert set(trainer.callback_metrics) == {"train_loss", *keys}


class TestCheckpointKeys:
    def test_checkpoint_keys_are_found_by_the_names_alone(self):
        assert SAPCallback().state_key == "lightning_sap/sap"
        assert PruningCallback(FixedFraction(0.5), name="ticket", rounds=3).state_key == "lightning_sap/ticket"
        assert PQIMonitor().state_key == PQIMonitor(p=1.0, q=2.0).state_key == "lightning_sap.monitor/pqi"

    def test_checkpoint_keys_of_a_file(self, tmp_path):
        trainer = fit(Net(), SAPCallback(rewind_weights="init"), PQIMonitor(stop_on=None))
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        states = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
        assert {"lightning_sap/sap", "lightning_sap.monitor/pqi"} <= set(states)
        state = states["lightning_sap/sap"]
        assert set(state) == {
            "masks", "plan", "round", "first_epoch", "first_step", "steps", "epoch", "epoch_steps",
            "count", "pqi_after_pruning", "first_weights", "kept", "search", "answer", "undone", "pruning", "stop",
            "history", "metrics", "folder", "parent", "run", "lr", "note", "schedules", "options", "waiting", "trained",
            "replaced", "first_bits", "copies", "companions", "finest", "others", "gathered", "version", "writer",
        }  # fmt: skip
        assert set(state["plan"]) == {
            "rounds", "length", "first", "end", "unit", "schedules_from", "dense",
        }  # fmt: skip
        assert set(state["masks"]["net.0.weight"]) == {"shape", "bits"}
        assert set(state["options"]) == {*COMMON, "policy"} - {"prog_bar"}
