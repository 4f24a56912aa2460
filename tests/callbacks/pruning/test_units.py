"""structure="unit": whole units go and stay away, with bias and norm; resumed, searched and shrunk."""

import copy
import pickle
import re
import sys
from contextlib import nullcontext

import pytest
import torch
from helpers import OPTIMIZERS, Net, Rounds, Scheduled, copied, fit, half, loader, quiet_trainer, same, seeded
from lightning.pytorch import LightningModule
from networks import NETWORKS, assert_equal, build, count
from resuming import run_saving_epochs
from searching import Scored, search
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from lightning_sap import FixedFraction, PQIMonitor, PruningCallback, SAPCallback, Tolerance, shrink
from lightning_sap.callbacks.pruning.emptied import warn_of_empty_units
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.engine.groups import PrunableTensor
from lightning_sap.engine.masks import MaskSet
from lightning_sap.policies.base import Policy

tp = pytest.importorskip("torch_pruning")


def chain():
    """136 weights; a unit of the first layer has 6 + 6 of them, one of the second 8 + 3."""
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)
        )
    )


def pruned(policy=None, **options):
    return PruningCallback(policy or FixedFraction(0.5), **{"structure": "unit", "every_n_epochs": 1, **options})


def shapes_left(pruner):
    """Of each weight how many rows and columns have weights left."""
    return {name: (int(mask.any(1).sum()), int(mask.any(0).sum())) for name, mask in pruner.masks.items()}


def zero_units(module):
    """Entries of biases and norms that are zero."""
    return {n: (p == 0).nonzero().flatten().tolist() for n, p in module.named_parameters() if p.dim() == 1}


class Coupled(LightningModule):
    """Trains any network on random inputs of the shape given."""

    def __init__(self, name):
        super().__init__()
        self.net, self.example_input_array = build(name)
        self.net.train()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    def batches(self):
        shape = self.example_input_array.shape[1:]
        return DataLoader(torch.randn(8, *shape, generator=torch.Generator().manual_seed(3)), 4)


class TestWhatGoes:
    def test_half_of_the_units_go_after_each_round_with_bias_norm_and_readers(self):
        module, pruner = Net(chain()), pruned()
        fit(module, pruner, max_epochs=2)
        assert shapes_left(pruner) == {"net.0.weight": (4, 6), "net.3.weight": (3, 4), "net.5.weight": (3, 3)}
        zeros = zero_units(module)
        units = (~pruner.masks["net.0.weight"].any(1)).nonzero().flatten().tolist()
        assert zeros["net.0.bias"] == zeros["net.1.weight"] == zeros["net.1.bias"] == units
        assert len(zeros["net.3.bias"]) == 3
        assert zeros["net.5.bias"] == []
        assert pruner.remaining == (4 * 6 + 3 * 4 + 3 * 3) / (48 + 48 + 18)

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_pruned_entries_stay_zero_at_every_step(self, optimizer):
        class Looks(Net):
            seen = []

            def optimizer_step(self, *arguments, **options):
                super().optimizer_step(*arguments, **options)
                masks = {**pruner.masks, **pruner.session.state.companions.kept}
                self.seen.append(all(not p[~masks[n]].any() for n, p in self.named_parameters() if n in masks))

        module, pruner = Looks(chain(), OPTIMIZERS[optimizer]), pruned()
        fit(module, pruner)
        assert len(module.seen) == 12
        assert all(module.seen)

    def test_optimizer_state_of_pruned_biases_is_zero_where_it_is_not_reset(self):
        module, pruner = Net(chain()), pruned(reset_optimizer=False)
        trainer = fit(module, pruner)
        gone = pruner.session.state.companions.pruned["net.0.bias"]
        momentum = trainer.optimizers[0].state[module.net[0].bias]["momentum_buffer"]
        assert gone.any()
        assert not momentum[gone].any()
        assert momentum[~gone].all()

    def test_outputs_are_never_pruned(self):
        pruner = pruned(FixedFraction(0.9))
        fit(Net(chain()), pruner, max_epochs=6)
        assert shapes_left(pruner) == {"net.0.weight": (1, 6), "net.3.weight": (1, 1), "net.5.weight": (3, 1)}

    def test_excluded_layers_lose_neither_rows_nor_columns(self):
        pruner = pruned(exclude=["net.3.*"])
        fit(Net(chain()), pruner, max_epochs=2)
        assert shapes_left(pruner) == {"net.0.weight": (4, 6), "net.5.weight": (3, 6)}

    def test_rewound_units_stay_away(self):
        module, pruner = Net(chain()), pruned(rewind_weights="init")
        rounds = Rounds(pruner)
        fit(module, pruner, rounds)
        gone = pruner.session.state.companions.pruned
        assert all(not module.get_parameter(name)[mask].any() for name, mask in gone.items())
        assert int(gone["net.0.bias"].sum()) == 7

    def test_averages_in_the_module_lose_biases_too(self):
        class Averaging(Net):
            def __init__(self):
                super().__init__(chain())
                self.average = AveragedModel(self.net)

            def forward(self, x):
                return self.net(x)

            def on_train_batch_end(self, *_):
                self.average.update_parameters(self.net)

        module, pruner = Averaging(), pruned(example_inputs=torch.randn(2, 6))
        fit(module, pruner)
        gone = pruner.session.state.companions.pruned
        assert gone["net.0.bias"].any()
        assert all(not module.average.module.get_parameter(name[4:])[mask].any() for name, mask in gone.items())

    def test_a_monitor_works_beside_it(self):
        module, monitor = Net(chain()), PQIMonitor(stop_on=None)
        fit(module, pruned(), monitor, val=loader())
        assert len(monitor.rows()) == 4


class TestAmounts:
    @pytest.mark.parametrize("scope", ["layer", "global"])
    @pytest.mark.parametrize("target", [0.2, 0.37, 0.8])
    def test_a_target_is_met_as_closely_as_whole_units_allow_and_said(self, target, scope, caplog):
        caplog.set_level("INFO")
        pruner = pruned(FixedFraction(0.1), scope=scope, target_remaining=target)
        fit(Net(chain()), pruner)
        left = sum(int(mask.sum()) for mask in pruner.masks.values())
        off = left - round(target * 114)
        assert abs(off) <= 7  # half of the largest unit
        told = f"as closely as whole units allow, {abs(off)} weights {'above' if off > 0 else 'below'} it"
        assert f"target_remaining={target} is met{' ' + told if off else ''}." in caplog.text

    def test_a_target_below_what_units_can_reach_is_warned_of(self):
        with pytest.warns(
            UserWarning, match="target_remaining=0.01 is missed: .* since outputs of the network and one"
        ):
            fit(Net(chain()), pruned(target_remaining=0.01))

    def test_floors_hold(self):
        pruner = pruned(FixedFraction(0.9), min_remaining=0.3)
        fit(Net(chain()), pruner)
        assert all(mask.float().mean() >= 0.3 for mask in pruner.masks.values())
        assert pruner.remaining < 0.6


class TestSearch:
    def test_an_unsound_round_gives_units_and_biases_back(self):
        module, pruner, _ = search(module=self.scored([0.9, 0.9, 0.5, 0.5]), pruner=self.searching())
        kept = next(r for r in pruner.history if r.restored)
        assert kept.sound
        assert pruner.remaining == kept.remaining
        units = {n: (~m.any(1)).nonzero().flatten().tolist() for n, m in pruner.masks.items()}
        assert zero_units(module)["net.0.bias"] == units["net.0.weight"]
        assert zero_units(module)["net.3.bias"] == units["net.3.weight"]

    def test_a_search_ends_where_even_one_unit_is_more_than_a_step_may_take(self):
        scores = [0.9] + [0.5] * 11
        with pytest.warns(UserWarning, match="no network that was pruned further kept the tolerance"):
            _, pruner, _ = search(module=self.scored(scores), pruner=self.searching())
        assert len(pruner.history) == 4  # of the ten that were planned
        assert pruner.remaining == 1.0

    def test_a_search_goes_on_where_the_index_of_a_few_units_rounds_to_none(self):
        _, pruner, _ = search(module=self.scored([0.9] * 4), pruner=self.searching(FixedFraction(0.0)))
        pruned = [record.pruned for record in pruner.history][:-1]
        assert len(pruned) == 3
        assert all(0.02 * 114 < weights <= 14 for weights in pruned)  # one unit, or two small ones

    def test_a_resumed_search_equals_the_unbroken_one(self, tmp_path):
        def build():
            return self.scored([0.9, 0.9, 0.5, 0.9, 0.9, 0.5])

        module, whole, _, _ = run_saving_epochs(build, self.searching, tmp_path / "whole", validate=True)
        for epoch in (1, 2, 3, 4):
            path = tmp_path / "whole" / f"epoch={epoch}.ckpt"
            again, resumed, _, _ = run_saving_epochs(
                build, self.searching, tmp_path / str(epoch), ckpt_path=path, validate=True
            )
            assert same(again.state_dict(), module.state_dict())
            assert same(resumed.masks, whole.masks)
            assert same(resumed.session.state.companions.pruned, whole.session.state.companions.pruned)

    def scored(self, scores):
        module = Scored(scores, period=6)
        module.net = chain()
        return module

    def searching(self, policy=None):
        return pruned(policy, tolerance=Tolerance("val_acc"))


class TestResume:
    @pytest.mark.parametrize("rewind", [None, "init"])
    def test_a_resumed_run_equals_the_unbroken_one(self, rewind, tmp_path):
        def build():
            return Scheduled(chain())

        def pruner():
            return SAPCallback(structure="unit", rounds=2, rewind_weights=rewind, eta_r=0.5)

        module, whole, _, _ = run_saving_epochs(build, pruner, tmp_path / "whole")
        assert whole.remaining < 0.9
        for epoch in (1, 2, 4):
            path = tmp_path / "whole" / f"epoch={epoch}.ckpt"
            again, resumed, _, _ = run_saving_epochs(build, pruner, tmp_path / str(epoch), ckpt_path=path)
            assert same(again.state_dict(), module.state_dict())
            assert same(resumed.masks, whole.masks)
            assert same(resumed.session.state.companions.pruned, whole.session.state.companions.pruned)

    def test_the_biases_are_in_the_file(self, tmp_path):
        module, pruner = Net(chain()), pruned()
        fit(module, pruner).save_checkpoint(tmp_path / "end.ckpt")
        state = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["lightning_sap/sap"]
        assert set(state["companions"]) == {"net.0.bias", "net.1.weight", "net.1.bias", "net.3.bias"}
        fresh = pruned()
        fresh.load_state_dict(state)
        assert same(fresh.session.state.companions.pruned, pruner.session.state.companions.pruned)

    def test_a_second_fit_prunes_on_and_masks_that_are_only_held_hold_biases(self):
        module, pruner = Net(chain()), pruned(rounds=1)
        fit(module, pruner, max_epochs=2)
        fit(module, pruner, max_epochs=2)
        assert shapes_left(pruner)["net.0.weight"] == (2, 6)
        holds = PruningCallback(FixedFraction(0.5), structure="unit", rounds=0, keep_zeros=True)
        before = zero_units(module)
        fit(module, holds)
        assert same(holds.masks, pruner.masks)
        assert zero_units(module) == before

    def test_a_round_that_is_restored_has_its_biases(self, tmp_path):
        module, pruner = Net(chain()), pruned(save_rounds=True, dirpath=tmp_path)
        rounds = Rounds(pruner)
        fit(module, pruner, rounds)
        pruner.restore_round(1)
        assert same(copied(module.state_dict()), rounds.states[1])
        assert int(pruner.session.state.companions.pruned["net.0.bias"].sum()) == 4

    def test_copies_and_pickles_go_on(self):
        module, pruner = Net(chain()), pruned(rounds=1)
        fit(module, pruner, max_epochs=2)
        for twin in (copy.deepcopy(pruner), pickle.loads(pickle.dumps(pruner))):
            other = Net(chain())
            other.load_state_dict(module.state_dict())
            fit(other, twin, max_epochs=2)
            assert shapes_left(twin)["net.0.weight"] == (2, 6)


def train(name, **options):
    module = Coupled(name)
    pruner = SAPCallback(**{"structure": "unit", "rounds": 2, "eta_r": 1.0, **options})
    quiet_trainer(pruner, max_epochs=3).fit(module, module.batches())
    return module, pruner


class TestBottlenecks:
    def fit(self, **options):
        """The second layer has the smaller norms."""
        module = Net(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)))
        with torch.no_grad():
            module.net[2].weight *= 0.1
        pruner = pruned(rounds=2, **options)
        fit(module, pruner, max_epochs=3)
        return pruner

    def test_a_layer_of_which_one_unit_is_left_is_told_once(self):
        said = (
            r"^sap: after pruning .*% remain, 1 of 16 units of 'net.2.weight'. Give min_remaining \(now 0.0\) to keep "
            r"a fraction of every layer, scope='layer' \(the units of all layers compete now\), or exclude these.$"
        )
        with pytest.warns(UserWarning, match=said) as told:
            pruner = self.fit(scope="global")
        assert sum("1 of 16 units" in str(each.message) for each in told) == 1
        assert int(pruner.masks["net.2.weight"].any(1).sum()) == 1

    @pytest.mark.parametrize(("left", "told"), [(1, True), (2, True), (3, False)])
    def test_of_a_wide_layer_one_unit_of_64_is_few(self, left, told):
        tensors = {"weight": PrunableTensor(torch.ones(128, 2))}
        masks = MaskSet({"weight": (torch.arange(128) >= left).unsqueeze(1).expand(128, 2)})
        said = pytest.warns(UserWarning, match=f"{left} of 128 units of 'weight'") if told else nullcontext()
        with said:
            warn_of_empty_units(Options(FixedFraction(0.5), structure="unit"), tensors, masks)

    @pytest.mark.parametrize("options", [{"scope": "layer"}, {"scope": "global", "min_remaining": 0.15}])
    def test_what_it_advises_keeps_more(self, options):
        assert int(self.fit(**options).masks["net.2.weight"].any(1).sum()) > 1


@pytest.mark.filterwarnings("ignore:.* 1 of .* units of")  # pruned as far as can be
class TestShrunk:
    @pytest.mark.parametrize(
        "name",
        [n if n in ("mlp", "concatenation", "encoder") else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS],
    )
    def test_outputs_are_the_same_and_what_survives_is_what_is_left(self, name):
        module, pruner = train(name)
        net, inputs = module.net.eval(), module.example_input_array
        small = shrink(net, inputs)
        assert count(small) < 0.9 * count(net)
        assert_equal(small, net, inputs)
        assert_equal(small, net, torch.randn_like(inputs))
        left = {**pruner.masks, **pruner.session.state.companions.kept}
        others = sum(p.numel() for n, p in module.named_parameters() if n not in left)
        assert count(small) == others + sum(int(mask.sum()) for mask in left.values())

    @pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Softplus])
    def test_activations_that_do_not_keep_zeros_are_removed_too(self, activation):
        net = seeded(lambda: nn.Sequential(nn.Linear(6, 8), activation(), nn.Linear(8, 3)))
        module = Net(net)
        fit(module, pruned(), max_epochs=2)
        small = shrink(net.eval(), torch.randn(2, 6))
        assert small[0].out_features == 4
        assert_equal(small, net, torch.randn(5, 6))

    def test_the_shrunk_module_trains_on_and_exports(self):
        module, _ = train("mlp")
        small = shrink(module, module.example_input_array)
        quiet_trainer(max_epochs=1).fit(small, module.batches())
        x = module.example_input_array
        exported = torch.export.export(small.net.eval(), (x,)).module()
        assert torch.allclose(exported(x), small.net(x), atol=1e-6)


class TestRefused:
    def test_a_module_whose_couplings_are_not_known_is_refused_with_the_cure(self):
        module = Net(nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 3)]))
        with pytest.raises(ValueError, match=re.escape("must see how Net couples its layers, and has no example.")):
            fit(module, pruned())

    def test_without_torch_pruning_the_package_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch_pruning", None)
        with pytest.raises(ModuleNotFoundError, match=re.escape('pip install "torch-pruning<2"')):
            fit(Net(), pruned(example_inputs=torch.ones(2, 6)))

    def test_an_example_of_the_callback_or_of_the_module(self):
        class Residual(Net):
            def __init__(self):
                super().__init__(seeded(lambda: nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)])))

            def forward(self, x):
                first, second, head = self.net
                return head(first(x) + second(x).relu())

            def loss(self, batch):
                return (self(batch[0]) - batch[1]).square().mean()

        one, other = Residual(), Residual()
        other.example_input_array = torch.randn(2, 6)
        given, found = pruned(example_inputs=(torch.randn(2, 6),)), pruned()
        fit(one, given), fit(other, found)
        assert same(given.masks, found.masks)
        assert (~given.masks["net.0.weight"].any(1)).equal(~given.masks["net.1.weight"].any(1))

    def test_without_a_unit_that_can_go_it_is_refused(self):
        with pytest.raises(ValueError, match=r"structure='unit': no unit of net.0.weight can go: outputs of the net"):
            fit(Net(nn.Sequential(nn.Linear(6, 3))), pruned())

    def test_options_that_contradict_units_are_refused(self):
        class Regrows(Policy):
            regrows = True

            def __call__(self, sums, round):
                return sums.count // 2

        with pytest.raises(ValueError, match="structure='unit' contradicts scope='neuron'"):
            pruned(scope="neuron")
        with pytest.raises(ValueError, match=r"structure='unit' contradicts Regrows\(\), whose weights come back"):
            pruned(Regrows())
        with pytest.raises(ValueError, match="example_inputs are for structure='unit', and structure='weight' needs n"):
            half(example_inputs=torch.randn(2, 6))

    def test_the_example_is_not_among_the_texts_of_the_options(self):
        assert pruned(example_inputs=torch.randn(2, 6)).options.plain()["example_inputs"] == "Tensor"
