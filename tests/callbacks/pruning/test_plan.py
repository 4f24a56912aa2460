"""The plan says of every parameter what becomes of it, and both shares; a target may be of all trained weights."""

import logging
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from helpers import Net, Watch, fit, half, loader, mlp, quiet_trainer, seeded
from lightning.pytorch.loggers import CSVLogger
from mixtures import language_model
from torch import nn
from torch.utils.data import DataLoader

from lightning_sap import FixedFraction, GrowAndPrune, PQIMonitor, PruningCallback, SAPCallback


class Recommender(nn.Module):
    """Two tables of many rows, a small network, and a weight for each task."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(40, 6), nn.Embedding(30, 6)
        self.net, self.task_weights = mlp(), nn.Parameter(torch.ones(3, 1))

    def forward(self, x):
        user, item = (x[:, i].abs().mul(9).long() % 30 for i in (0, 1))
        return self.net(self.users(user) + self.items(item) + x) * self.task_weights.T


HEAD = "72 weights are prunable ({:.1%} remain), 13.8% of the 522 that are trained ({:.1%} remain)"


class TestRows:
    def test_every_parameter_is_named_with_what_becomes_of_it(self):
        plan = SAPCallback(exclude="net.0.*").plan(Recommender())
        assert [(row.name, row.shape, row.weights, row.kept, row.pruned, row.how) for row in plan.rows][:4] == [
            ("task_weights", (3, 1), 3, 3, False, "one axis alone is longer than 1: it scales, and acts on no input"),
            ("users.weight", (40, 6), 240, 240, False, "it is an embedding"),
            ("items.weight", (30, 6), 180, 180, False, "it is an embedding"),
            ("net.0.weight", (8, 6), 48, 48, False, "exclude='net.0.*'"),
        ]
        assert [row.name for row in plan.rows if row.pruned] == ["net.3.weight"]
        assert len(plan.rows) == len(list(Recommender().parameters()))
        assert (plan.prunable, plan.trained) == (24, 522)

    @pytest.mark.parametrize(
        ("options", "how"),
        [
            ({}, "a group"),
            ({"scope": "global"}, "in one group with all others"),
            ({"scope": "neuron"}, "a group for each output unit"),
            ({"structure": "1:2"}, "1 of every 2 weights along the inputs are kept"),
        ],
    )
    def test_what_forms_a_group_is_told(self, options, how):
        assert [row.how for row in SAPCallback(**options).plan(mlp()).rows if row.pruned] == [how, how]

    def test_what_a_pattern_does_not_fit_is_told(self):
        rows = {row.name: row for row in SAPCallback(structure="2:4").plan(mlp()).rows}
        assert rows["0.weight"].how == "structure='2:4' does not fit it"
        assert rows["3.weight"].pruned

    def test_normalised_rows_are_told(self):
        (row,) = [
            r for r in SAPCallback().plan(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))).rows if r.pruned
        ]
        assert row.how == "a group; what is divided by a norm keeps a weight"

    def test_what_is_frozen_is_not_trained(self):
        module = mlp()
        module[0].requires_grad_(False)
        plan = SAPCallback().plan(module)
        assert plan.trained == 24 + 3 + 16
        assert plan.rows[0].how == "it is frozen"

    def test_lazy_layers_have_no_shape_yet(self):
        row = SAPCallback().plan(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))).rows[0]
        assert (row.shape, row.weights, row.how) == ((), 0, "it has no shape before the first forward")


class TestBeforeFit:
    """It shows the weights that a fit would start with."""

    def test_masks_that_are_given_are_in_it(self):
        mask = torch.zeros(8, 6, dtype=torch.bool)
        mask[:2] = True
        plan = SAPCallback(masks={"0.weight": mask}).plan(mlp())
        assert [row.kept for row in plan.rows if row.pruned] == [12, 24]
        assert (plan.remaining, plan.remaining_of_trained) == (36 / 72, 63 / 99)
        assert plan.head.startswith("72 weights are prunable (50.0% remain), 72.7% of the 99 that are trained (63.6%")
        assert "| `0.weight` | 8 × 6 | 48 | 25.00% | pruned: a group |" in plan.markdown()

    def test_zeros_that_are_kept_are_in_it(self):
        module = mlp()
        module[0].weight.data[:, ::2] = 0.0
        assert SAPCallback(keep_zeros=True).plan(module).remaining == (72 - 24) / 72
        assert SAPCallback().plan(module).remaining == 1.0

    def test_masks_of_the_fit_before_are_in_it_while_they_hold(self):
        module, pruner = Net(), half(rounds=1)
        fit(module, pruner, max_epochs=2)
        assert pruner.plan(module) == pruner.plan()
        assert pruner.plan(module).remaining == 0.5
        module.net[3] = nn.Linear(8, 3)
        with pytest.warns(UserWarning, match=r"left out, and their weights start dense: net\.3\.weight"):
            assert pruner.plan(module).remaining == (24 + 24) / 72

    def test_what_a_fit_would_refuse_is_refused(self):
        pruner = SAPCallback(masks={"other.weight": torch.ones(8, 6) > 0})
        with pytest.raises(ValueError, match=r"^masks fits no prunable parameter of the module: other\.weight"):
            pruner.plan(mlp())

    def test_nothing_remains_for_certain_where_the_policy_prunes_before_training(self):
        policy = GrowAndPrune(0.5, partitions=2)
        plan = PruningCallback(policy).plan(mlp())
        assert str(plan).splitlines()[0] == (
            "72 weights are prunable, 72.7% of the 99 that are trained; how many of them training starts with is "
            "decided when fit begins"
        )
        assert math.isnan(plan.remaining)
        assert math.isnan(plan.remaining_of_trained)
        assert "| `0.weight` | 8 × 6 | 48 | – | pruned: a group |" in plan.markdown()
        assert PruningCallback(policy, rounds=0).plan(mlp()).remaining == 1.0


class TestOfFit:
    def test_of_a_fit_it_knows_optimizers_and_masks_and_stays_after_it(self):
        class Partly(Net):
            def configure_optimizers(self):
                return self.optimizer(self.net.net.parameters())

        module, pruner = Partly(seeded(Recommender)), half(rounds=1)
        fit(module, pruner, max_epochs=2)
        plan = pruner.plan()
        reasons = {row.name: (row.trained, row.how) for row in plan.rows if not row.pruned}
        assert reasons["net.users.weight"] == (False, "it is in no optimizer")
        assert (plan.prunable, plan.trained, plan.remaining) == (72, 99, 0.5)
        assert plan.remaining_of_trained == pytest.approx(63 / 99)
        assert pickle.loads(pickle.dumps(pruner)).plan() == plan
        del module
        assert pruner.plan() == plan

    def test_before_any_fit_it_asks_for_the_module(self):
        with pytest.raises(ValueError, match=re.escape("There was no fit yet: give the module, as in plan(model).")):
            SAPCallback().plan()

    def test_both_shares_are_said_at_the_start_and_where_little_is_prunable_at_the_end(self, caplog):
        with caplog.at_level(logging.INFO):
            fit(Net(seeded(Recommender)), half(rounds=1), max_epochs=2)
        assert (
            "  prunable: 72 weights (100.0% remain), 13.8% of the 522 that are trained (100.0% remain), in"
            in caplog.text
        )
        assert "  left out: net.users.weight (it is an embedding); net.items.weight (it is an embedding)" in caplog.text
        assert "sap: " + HEAD.format(0.5, 486 / 522) + "." in caplog.text

    def test_where_most_is_prunable_the_end_says_nothing_more(self, caplog):
        with caplog.at_level(logging.INFO):
            fit(Net(), half(rounds=1), max_epochs=2)
        assert "weights are prunable" not in caplog.text


class TestFile:
    def test_a_fit_with_a_logger_writes_it_as_markdown(self, tmp_path):
        pruner = half(rounds=1, name="ours")
        trainer = fit(Net(seeded(Recommender)), pruner, max_epochs=2, logger=CSVLogger(tmp_path))
        text = (Path(trainer.log_dir) / "ours-plan.md").read_text().splitlines()
        assert text[0] == "# The plan of ours"
        assert text[2] == HEAD.format(0.5, 486 / 522) + "."
        assert "| `net.net.0.weight` | 8 × 6 | 48 | 50.00% | pruned: a group |" in text
        assert "| `net.users.weight` | 40 × 6 | 240 | – | left out: it is an embedding |" in text
        assert len(text) == 6 + len(list(Recommender().parameters()))

    def test_the_report_of_a_monitor_ends_with_it(self):
        pruner, monitor = half(rounds=1), PQIMonitor(stop_on=None)
        fit(Net(seeded(Recommender)), pruner, monitor, max_epochs=2, val=loader())
        assert monitor.report().endswith("\n\n" + pruner.plan().markdown())

    def test_without_a_logger_nothing_is_written(self, tmp_path):
        fit(Net(), half(rounds=1), max_epochs=2, default_root_dir=tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_what_cannot_be_written_is_warned_of_and_training_goes_on(self, tmp_path):
        pruner, logger = half(rounds=1), CSVLogger(tmp_path)
        block = Watch(on_fit_start=lambda *_: Path(logger.log_dir, "sap-plan.md").mkdir(parents=True))
        with pytest.warns(UserWarning, match=r"^sap: the plan is not written: .*Training goes on without it\.$"):
            fit(Net(), block, pruner, max_epochs=2, logger=logger)
        assert pruner.remaining == 0.5


class TestTarget:
    def test_a_target_of_the_model_counts_all_trained_weights(self):
        """Of 522 trained weights 95 % stay: 496, so that of 72 prunable ones 26 go."""
        pruner = SAPCallback(rounds=2, target_remaining=0.95, target_of="model")
        fit(Net(seeded(Recommender)), pruner, max_epochs=3)
        assert sum(int(mask.sum()) for mask in pruner.masks.values()) == 46
        assert pruner.plan().remaining_of_trained == pytest.approx(496 / 522)

    def test_one_that_the_prunable_weights_cannot_meet_is_refused_with_numbers(self):
        pruner = SAPCallback(rounds=2, target_remaining=0.5, target_of="model")
        message = (
            "target_remaining=0.5 cannot be met: that is -189 of 72 weights beside 450 that are trained and left out, "
            "and 1 stay at least. Give another target_remaining or None."
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            fit(Net(seeded(Recommender)), pruner, max_epochs=3)

    def test_what_it_is_a_fraction_of_is_checked(self):
        with pytest.raises(ValueError, match="target_of must be 'prunable' or 'model', got 'all'"):
            SAPCallback(target_of="all")


class Language(Net):
    """Next tokens of a small mixture of experts."""

    def loss(self, batch):
        return self.net(input_ids=batch, labels=batch).loss


def test_a_mixture_of_experts_is_pruned_expert_by_expert_in_a_whole_fit():
    module = Language(language_model("qwen3_moe"), lambda p: torch.optim.SGD(p, lr=0.1))
    tokens = DataLoader(torch.randint(0, 32, (8, 6)), batch_size=4)
    pruner = PruningCallback(FixedFraction(0.5), rounds=1, exclude=["routers", "output"])
    quiet_trainer(pruner, max_epochs=2).fit(module, tokens)
    masks = {name: mask for name, mask in pruner.masks.items() if ".experts." in name}
    assert [mask.flatten(1).sum(1).tolist() for mask in masks.values()] == [[128] * 4, [64] * 4]
    parameters = dict(module.named_parameters())
    assert all(int((parameters[name] != 0).sum()) <= int(mask.sum()) for name, mask in masks.items())
    plan = pruner.plan()
    reasons = {row.name: row.how for row in plan.rows if not row.pruned and len(row.shape) > 1}
    assert reasons == {
        "net.model.embed_tokens.weight": "it is an embedding",
        "net.model.layers.0.mlp.gate.weight": "exclude='routers'",
        "net.lm_head.weight": "exclude='output'",
    }
    assert (plan.prunable, plan.trained, plan.remaining) == (2304, 3456, 0.5)


class TestEffective:
    def test_what_layers_compute_an_example_with_is_in_the_report(self):
        class TwoBranches(nn.Module):
            """Computes with the sum of two weights, of which other places are pruned."""

            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

            def forward(self, x):
                return nn.functional.linear(x, self.a.weight + self.b.weight)

        class WithExample(Net):
            example_input_array = torch.ones(2, 6)

            def forward(self, x):
                return self.net(x)

        module, pruner, monitor = WithExample(TwoBranches()), half(rounds=1), PQIMonitor(stop_on=None)
        fit(module, pruner, monitor, max_epochs=2)
        merged = module.net.a.weight + module.net.b.weight
        share = int(merged.count_nonzero()) / merged.numel()
        assert pruner.plan().effective == share > pruner.remaining
        assert f"of what layers compute the example with, {share:.1%} is not 0" in monitor.report()

    def test_an_example_that_cannot_be_computed_is_told_and_ends_no_fit(self, caplog):
        class Refusing(Net):
            example_input_array = "no tensor"

        pruner = half()
        with caplog.at_level(logging.INFO):
            trainer = fit(Refusing(), pruner, enable_model_summary=False)
        assert trainer.current_epoch == 4
        assert "sap: what layers compute the example with was not measured: " in caplog.text
        assert pruner.plan().effective is None
