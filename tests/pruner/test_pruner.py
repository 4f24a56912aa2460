"""Pruner: masks, gradients, steps, optimizers and states in loops without a Trainer."""

import copy
import pickle

import pytest
import torch
from helpers import OPTIMIZERS, copied, data, is_masked, mlp, same, seeded
from torch import nn
from torch.optim import SGD, Adagrad, Adam
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

import lightning_sap
from lightning_sap import FixedFraction, Policy, Pruner, PruningCallback, SparsityInformed, prune_masks

NAMES = {"0.weight": 48, "3.weight": 24}
CHAIN = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


class HalfThenTenths(Policy):
    def __call__(self, sums, round):
        return (sums.count * (0.5 if round == 1 else 0.1)).long()


def train(net, optimizer, batches=None, clip=None, step=None):
    """One epoch."""
    for inputs, targets in batches or DataLoader(data(), 8):
        optimizer.zero_grad()
        (net(inputs) - targets).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        if step:
            step()


def attached(policy=None, optimizer="SGD with momentum", net=None, **options):
    net = seeded(mlp) if net is None else net
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    return net, optimizer, Pruner(policy or FixedFraction(0.5), **options).attach(net, optimizer)


def weights_of(net):
    """As they are: a state_dict would mask them first."""
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


def state_of(net, optimizer):
    return {f"{i}.{key}": v.clone() for i, p in enumerate(net.parameters()) for key, v in optimizer.state[p].items()}


class TestMasks:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_masks_hold_after_every_step_of_every_optimizer(self, optimizer):
        net, optimizer, pruner = attached(optimizer=optimizer)
        clean = []
        for _ in range(4):
            train(net, optimizer, step=lambda: clean.append(is_masked(weights_of(net), pruner.masks)))
            pruner.prune()
        assert clean == [True] * 12
        assert [record.pruned for record in pruner.history] == [36, 18, 9, 4]
        assert pruner.remaining == 5 / 72
        assert {name: int((net.state_dict()[name] != 0).sum()) for name in NAMES} == {"0.weight": 3, "3.weight": 2}

    def test_each_pruning_takes_what_prune_masks_takes(self):
        net, optimizer, pruner = attached(SparsityInformed(), scope="global")
        masks = None
        for round in range(1, 4):
            train(net, optimizer)
            weights = {name: net.state_dict()[name].clone() for name in NAMES}
            masks = prune_masks(weights, masks, policy=SparsityInformed(), scope="global", round=round)
            record = pruner.prune()
            assert same(pruner.masks, masks)
            assert record.pruned > 0

    def test_a_policy_is_told_the_number_of_the_pruning(self):
        weights, masks, kept = {"w": torch.arange(1.0, 1001.0)}, None, []
        for round in range(1, 4):
            masks = prune_masks(weights, masks, policy=HalfThenTenths(), round=round)
            kept.append(float(masks["w"].float().mean()))
        assert kept == pytest.approx([0.5, 0.45, 0.405])
        net = nn.Linear(100, 10)
        pruner, found = Pruner(HalfThenTenths()).attach(net), []
        for _ in range(3):
            pruner.prune()
            found.append(pruner.remaining)
        assert found == pytest.approx([0.5, 0.45, 0.405])

    def test_gradients_are_clipped_by_the_norm_of_the_kept_weights(self):
        net = nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            net.weight.copy_(torch.tensor([[60.0, 50.0, 1.0]]))
        sgd = SGD(net.parameters(), lr=1.0)
        Pruner(FixedFraction(0.34)).attach(net, sgd).prune()  # the last one goes
        net(torch.tensor([[3.0, 4.0, 12.0]])).sum().backward()
        assert float(nn.utils.clip_grad_norm_(net.parameters(), 2.5)) == pytest.approx(5.0)
        sgd.step()
        assert net.weight.tolist() == [pytest.approx([58.5, 48.0, 0.0], rel=1e-5)]

    def test_gradients_that_accumulate_over_a_pruning_are_masked(self):
        net = nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            net.weight.copy_(torch.tensor([[60.0, 50.0, 1.0]]))
        pruner = Pruner(FixedFraction(0.34)).attach(net, SGD(net.parameters(), lr=1.0))
        net(torch.tensor([[3.0, 4.0, 12.0]])).sum().backward()
        pruner.prune()
        assert net.weight.grad.tolist() == [[3.0, 4.0, 0.0]]

    def test_weights_written_by_hand_are_masked_when_they_are_saved_and_on_call(self):
        net, _, pruner = attached()
        pruner.prune()
        with torch.no_grad():
            net[0].weight.add_(1.0)
        assert is_masked(net.state_dict(), pruner.masks)
        with torch.no_grad():
            net[0].weight.add_(1.0)
        pruner.hold_masks()
        assert is_masked(weights_of(net), pruner.masks)

    def test_whole_units_and_patterns_go_too(self):
        pytest.importorskip("torch_pruning")
        net = seeded(lambda: copy.deepcopy(CHAIN))
        optimizer, seen = Adam(net.parameters(), lr=0.01), []
        pruner = Pruner(FixedFraction(0.25), structure="unit").attach(net, optimizer)
        pruner.prune()
        gone = ~pruner.masks["0.weight"].any(1)
        assert int(gone.sum()) == 2
        train(net, optimizer, step=lambda: seen.append(bool(net[0].bias[gone].any() or net[0].weight[gone].any())))
        assert seen == [False] * 3
        net, optimizer, pruner = attached(structure="2:4", net=nn.Sequential(nn.Linear(8, 8)))
        pruner.prune()
        assert (pruner.masks["0.weight"].reshape(8, 2, 4).sum(-1) == 2).all()

    def test_an_average_inside_the_module_is_as_sparse(self):
        net = nn.ModuleDict({"net": seeded(mlp)})
        net["average"] = AveragedModel(net["net"])
        optimizer = SGD(net["net"].parameters(), lr=0.1)
        pruner = Pruner(FixedFraction(0.5)).attach(net, optimizer)
        for _ in range(2):
            train(net["net"], optimizer, step=lambda: net["average"].update_parameters(net["net"]))
            pruner.prune()
        train(net["net"], optimizer, step=lambda: net["average"].update_parameters(net["net"]))
        assert list(pruner.masks) == ["net.0.weight", "net.3.weight"]
        weight = net["average"].module[0].weight
        assert not weight[~pruner.masks["net.0.weight"]].any()
        assert weight[pruner.masks["net.0.weight"]].all()


class TestOptimizers:
    @pytest.mark.parametrize("kind", [lambda p: SGD(p, lr=0.1, momentum=0.9), Adam, Adagrad])
    def test_a_pruning_makes_optimizers_fresh(self, kind):
        net = seeded(mlp)
        optimizer = kind(net.parameters())
        before = state_of(net, optimizer)
        pruner = Pruner(FixedFraction(0.5)).attach(net, optimizer)
        train(net, optimizer)
        assert not same(state_of(net, optimizer), before)
        pruner.prune()
        assert same(state_of(net, optimizer), before)
        train(net, optimizer)

    def test_without_a_reset_only_what_is_kept_for_pruned_weights_goes(self):
        net, optimizer, pruner = attached(optimizer="Adam", reset_optimizer=False)
        train(net, optimizer)
        before = state_of(net, optimizer)
        pruner.prune()
        after, kept = state_of(net, optimizer), pruner.masks["0.weight"]
        assert torch.equal(after["0.exp_avg"], before["0.exp_avg"] * kept)
        assert torch.equal(after["0.step"], before["0.step"])

    def test_an_optimizer_that_has_stepped_is_refused(self):
        net = seeded(mlp)
        optimizer = Adam(net.parameters())
        train(net, optimizer)
        with pytest.raises(ValueError, match=r"^Adam has taken steps, .* Attach the pruner before that, or give reset"):
            Pruner(FixedFraction(0.5)).attach(net, optimizer)
        Pruner(FixedFraction(0.5), reset_optimizer=False).attach(net, optimizer)

    def test_what_no_optimizer_holds_and_what_is_frozen_later_stays(self):
        net = seeded(mlp)
        pruner = Pruner(FixedFraction(0.5)).attach(net, SGD(net[3].parameters(), lr=0.1))
        assert list(pruner.masks) == ["3.weight"]
        net, _, pruner = attached()
        net[0].requires_grad_(False)
        pruner.prune()
        assert {name: int(mask.sum()) for name, mask in pruner.masks.items()} == {"0.weight": 48, "3.weight": 12}

    def test_steps_and_rates_are_in_the_history(self):
        net, optimizer, pruner = attached()
        train(net, optimizer)
        pruner.prune({"val_acc": torch.tensor(0.5)})
        optimizer.param_groups[0]["lr"] = 0.05
        train(net, optimizer)
        pruner.prune()
        pruner.prune()
        first, second, third = pruner.history
        assert (first.first_step, first.last_step, second.first_step, second.last_step) == (0, 2, 3, 5)
        assert (third.first_step, third.last_step) == (6, None)
        assert (first.lr, second.lr, first.metrics, first.unit) == (0.1, 0.05, {"val_acc": 0.5}, "step")
        assert [record.round for record in pruner.history] == [0, 1, 2]
        assert pruner.history.best("val_acc").round == 0


class TestRewindingAndTargets:
    def test_rewound_weights_go_back_to_those_at_attach(self):
        net, optimizer, pruner = attached(rewind_weights="init")
        first = copied(net.state_dict())
        for _ in range(2):
            train(net, optimizer)
            pruner.prune()
            for name, tensor in net.state_dict().items():
                mask = pruner.masks.get(name, torch.tensor(True))
                assert torch.equal(tensor, tensor.new_zeros(()).where(~mask, first[name]))

    def test_a_target_is_met_in_that_many_rounds(self):
        net, optimizer, pruner = attached(FixedFraction(0.1), target_remaining=0.25, rounds=3, scope="global")
        for _ in range(3):
            train(net, optimizer)
            pruner.prune()
        assert pruner.remaining == 0.25
        with pytest.raises(ValueError, match=r"^sap: rounds=3 prunings are done"):
            pruner.prune()

    def test_zeros_are_kept_where_that_is_asked_for(self):
        net = seeded(mlp)
        with torch.no_grad():
            net[0].weight[:, ::2] = 0.0
        optimizer = Adam(net.parameters())
        pruner = Pruner(FixedFraction(0.5), rounds=0, keep_zeros=True).attach(net, optimizer)
        train(net, optimizer)
        assert not net[0].weight[:, ::2].any()
        assert pruner.remaining == (72 - 24) / 72


class TestStates:
    @pytest.mark.parametrize("first", ["attach", "load"])
    @pytest.mark.parametrize("options", [{}, {"rewind_weights": "init"}])
    def test_a_resumed_loop_equals_the_unbroken_one(self, tmp_path, first, options):
        def run(net, optimizer, pruner, rounds):
            for _ in rounds:
                train(net, optimizer)
                pruner.prune()

        whole = attached(optimizer="Adam", **options)
        run(*whole, range(3))
        train(*whole[:2])
        net, optimizer, pruner = attached(optimizer="Adam", **options)
        run(net, optimizer, pruner, range(2))
        train(net, optimizer)
        torch.save([net.state_dict(), optimizer.state_dict(), pruner.state_dict()], tmp_path / "run.pt")
        states = torch.load(tmp_path / "run.pt", weights_only=True)
        net, pruner = mlp(), Pruner(FixedFraction(0.5), **options)
        optimizer = OPTIMIZERS["Adam"](net.parameters())
        if first == "load":
            pruner.load_state_dict(states[2])
        net.load_state_dict(states[0])
        pruner.attach(net, optimizer)
        if first == "attach":
            pruner.load_state_dict(states[2])
        optimizer.load_state_dict(states[1])
        pruner.prune()
        train(net, optimizer)
        assert same(net.state_dict(), whole[0].state_dict())
        assert same(state_of(net, optimizer), state_of(*whole[:2]))
        assert same(pruner.masks, whole[2].masks)
        assert [r.pruned for r in pruner.history] == [r.pruned for r in whole[2].history]

    def test_a_callback_reads_the_state_of_a_pruner(self):
        _, _, pruner = attached()
        pruner.prune()
        callback = PruningCallback(FixedFraction(0.5))
        callback.load_state_dict(pruner.state_dict())
        assert same(callback.masks, pruner.masks)
        assert callback.history[0].pruned == 36

    def test_another_state_is_refused_and_nothing_changes(self):
        _, _, pruner = attached()
        pruner.prune()
        masks = pruner.masks
        with pytest.raises(ValueError, match="The pruning state of the checkpoint"):
            pruner.load_state_dict({"masks": {}})
        assert same(pruner.masks, masks)

    def test_another_head_keeps_the_masks_of_the_other_layers(self):
        net, _, pruner = attached()
        pruner.prune()
        masks = pruner.masks
        net[3] = nn.Linear(8, 5)
        with pytest.raises(
            RuntimeError, match=r"^sap: these parameters were replaced since attach: 3\.weight, 3\.bias"
        ):
            pruner.prune()
        with pytest.warns(
            UserWarning, match=r"for the masks of 3\.weight, which are given up; the masks of all others"
        ):
            pruner.attach(net, Adam(net.parameters()))
        assert torch.equal(pruner.masks["0.weight"], masks["0.weight"])
        assert pruner.masks["3.weight"].shape == (5, 8)
        assert pruner.masks["3.weight"].all()

    def test_copies_and_pickles_are_attached_to_nothing(self):
        _, _, pruner = attached()
        pruner.prune()
        for twin in (copy.deepcopy(pruner), pickle.loads(pickle.dumps(pruner))):
            assert same(twin.masks, pruner.masks)
            with pytest.raises(RuntimeError, match=r"^sap: the pruner is attached to no module"):
                twin.prune()

    def test_detached_it_leaves_the_module_alone(self):
        net, optimizer, pruner = attached()
        pruner.prune()
        pruner.detach()
        train(net, optimizer)
        assert all(weights_of(net)[name].all() for name in NAMES)


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"every_n_epochs": 2}, TypeError, "Pruner has no option 'every_n_epochs', which needs a Trainer"),
            ({"scop": "global"}, TypeError, "Pruner has no option 'scop'; the closest is 'scope'"),
            ({"rewind_weights": 2}, ValueError, "rewind_weights=2 counts epochs"),
            ({"target_remaining": 0.1}, ValueError, "target_remaining=0.1 needs rounds"),
            (
                {"importance": "taylor"},
                ValueError,
                "importance='taylor' is gathered in the last part of a round, whose",
            ),
            ({"scope": "all"}, ValueError, "Unknown scope 'all'"),
        ],
    )
    def test_a_mistake_is_named_at_once(self, options, error, message):
        with pytest.raises(error, match=f"^{message}"):
            Pruner(FixedFraction(0.5), **options)

    def test_a_module_without_weights_is_refused(self):
        with pytest.raises(ValueError, match=r"^The model has no prunable weight"):
            Pruner(FixedFraction(0.5)).attach(nn.BatchNorm1d(3))

    def test_an_optimizer_without_hooks_is_said(self):
        class Silent(SGD):
            def __init__(self, parameters):  # without super().__init__(), as some wrappers
                self.param_groups, self.state, self.defaults = [{"params": list(parameters), "lr": 0.1}], {}, {}

        net = seeded(mlp)
        with pytest.warns(UserWarning, match=r"^sap: Silent calls no hook at its steps.* Call hold_masks\(\) after"):
            Pruner(FixedFraction(0.5)).attach(net, Silent(net.parameters()))


def compiled(net):
    return torch.compile(net, backend="eager")


class TestPlan:
    def test_every_parameter_is_in_it_and_what_no_optimizer_holds_is_not_trained(self):
        net = seeded(mlp)
        pruner = Pruner(FixedFraction(0.5), exclude="3.weight").attach(net, SGD([net[0].weight, net[3].weight], lr=0.1))
        pruner.prune()
        told = {row.name: (row.kept, row.trained, row.how) for row in pruner.plan().rows if row.name[0] != "1"}
        assert told == {
            "0.weight": (24, True, "a group"),
            "0.bias": (8, False, "it is in no optimizer"),
            "3.weight": (24, True, "exclude='3.weight'"),
            "3.bias": (3, False, "it is in no optimizer"),
        }
        assert pruner.plan().head.startswith("48 weights are prunable (50.0% remain), 66.7% of the 72 that are trained")

    def test_without_a_module_it_is_refused(self):
        with pytest.raises(RuntimeError, match=r"^sap: the pruner is attached to no module"):
            Pruner(FixedFraction(0.5)).plan()


class TestNames:
    @pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, lambda net: compiled(nn.DataParallel(net))])
    def test_a_module_that_is_compiled_or_wrapped_goes_by_the_same_names(self, wrap):
        assert list(Pruner(FixedFraction(0.5)).attach(wrap(seeded(mlp))).masks) == list(NAMES)

    def test_it_is_imported_when_it_is_asked_for(self):
        assert "Pruner" in lightning_sap.__all__
        assert lightning_sap.Pruner is Pruner
