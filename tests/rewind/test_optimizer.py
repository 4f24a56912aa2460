"""What real optimizers keep: fresh, and zero where weights are pruned."""

import copy
from collections import deque

import pytest
import torch
from helpers import seeded
from optimizers import REAL, slow_first, slow_later, take_step
from prodigyopt import Prodigy
from pytorch_optimizer import SOAP, Shampoo
from torch import nn
from torch.optim import SGD, Adagrad, Adam, Optimizer

from lightning_sap.rewind import (
    OptimizerMemory,
    base_optimizers,
    cannot_reset,
    cannot_zero,
    fires_hooks,
    hook_gradients,
    zero_pruned_,
)


def mlp():
    return seeded(lambda: nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)))


def train(network, optimizer, steps, after=lambda: None):
    generator = torch.Generator().manual_seed(0)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(steps):
        batch, target = torch.randn(8, 10, generator=generator), torch.randn(8, 3, generator=generator)
        take_step(optimizer, lambda b=batch, t=target: (network(b) - t).square().mean())
        after()


def halves(network):
    """Flags for every other weight of each matrix."""
    return {p: (torch.arange(p.numel()) % 2 == 0).reshape(p.shape) for p in network.parameters() if p.dim() == 2}


def tensors_in(value, seen):
    """All tensors in an optimizer, in whatever it holds, without its parameters; found without the package's help."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, deque)) else ()
    for part in (*parts, *(vars(value).values() if isinstance(value, Optimizer) else ())):
        yield from tensors_in(part, seen)


def kept_at(optimizer, flags):
    """How many values are not zero at flagged places, in tensors as long as a parameter or all of them together."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    every = [flags[p] if p in flags else torch.zeros(p.shape, dtype=torch.bool) for p in parameters_of(optimizer)]
    by_length = {where.numel(): where.reshape(-1) for where in every}
    by_length[sum(where.numel() for where in every)] = torch.cat([where.reshape(-1) for where in every])
    found = [t for t in tensors_in(optimizer, set()) if id(t) not in known and t.numel() in by_length]
    return sum(int(t.reshape(-1)[by_length[t.numel()]].count_nonzero()) for t in found)


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("name", REAL)
def test_reset_optimizer_goes_on_as_a_new_one(name):
    network = mlp()
    optimizer = REAL[name](list(network.parameters()))
    memory = OptimizerMemory(optimizer)
    train(network, optimizer, 8)
    memory.reset_()
    twin = copy.deepcopy(network)
    train(network, optimizer, 8)
    train(twin, REAL[name](list(twin.parameters())), 8)
    for (key, mine), other in zip(network.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other), key


@pytest.mark.parametrize("name", REAL)
def test_without_the_reset_the_optimizer_goes_on_otherwise(name):
    """The ground of the test above: all of these remember something."""
    network = mlp()
    optimizer = REAL[name](list(network.parameters()))
    train(network, optimizer, 8)
    twin = copy.deepcopy(network)
    train(network, optimizer, 8)
    train(twin, REAL[name](list(twin.parameters())), 8)
    assert not torch.equal(network[0].weight, twin[0].weight)


@pytest.mark.parametrize("name", REAL)
def test_nothing_is_kept_for_pruned_weights_and_nothing_comes(name):
    network = mlp()
    optimizer, flags = REAL[name](list(network.parameters())), halves(network)
    train(network, optimizer, 8)

    def mask_weights(*_):
        for parameter, where in flags.items():
            parameter.detach().masked_fill_(where, 0)

    def mask_gradients():
        for parameter, where in flags.items():
            parameter.grad.masked_fill_(where, 0)

    mask_weights()
    assert name == "Adafactor" or kept_at(optimizer, flags) > 100  # Adafactor keeps rows and columns
    zero_pruned_([optimizer], flags)
    assert kept_at(optimizer, flags) == 0
    hook_gradients([optimizer], mask_gradients)
    for each in filter(fires_hooks, base_optimizers(optimizer)):
        each.register_step_post_hook(mask_weights)
    train(network, optimizer, 8)
    assert kept_at(optimizer, flags) == 0
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    assert sum(int(p[where].count_nonzero()) for p, where in flags.items()) == 0


def test_kept_weights_keep_what_the_optimizer_has_of_them():
    network = mlp()
    optimizer, flags = Adam(network.parameters()), halves(network)
    train(network, optimizer, 3)
    before = {p: optimizer.state[p]["exp_avg"].clone() for p in network.parameters()}
    zero_pruned_([optimizer], flags)
    for p, average in before.items():
        kept = ~flags[p] if p in flags else torch.ones_like(p, dtype=torch.bool)
        assert torch.equal(optimizer.state[p]["exp_avg"][kept], average[kept])
    assert optimizer.state[network[0].weight]["step"] == 3


def test_zeroing_leaves_counts_and_whole_numbers_alone():
    """As 8-bit optimizers keep them: zero may be the code of another value."""
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = SGD([weight], lr=0.1)
    optimizer.state[weight] = {"codes": torch.full((2, 2), 7, dtype=torch.uint8), "rows": torch.ones(2)}
    zero_pruned_([optimizer], {weight: torch.ones(2, 2, dtype=torch.bool)})
    assert optimizer.state[weight]["codes"].tolist() == [[7, 7], [7, 7]]
    assert optimizer.state[weight]["rows"].tolist() == [1, 1]


class Slow(Optimizer):
    """Keeps copies of the weights in attributes, as several published wrappers do."""

    def __init__(self, base):
        self.inner, self.calls = [base], 0
        super().__init__(base.param_groups, {})
        self.param_groups = base.param_groups
        self.slow = [[p.detach().clone() for p in group["params"]] for group in base.param_groups]
        self.by_weight = {p: torch.ones_like(p) for group in base.param_groups for p in group["params"]}

    def step(self, closure=None):
        self.calls += 1
        self.late = 5.0
        self.inner[0].step(closure)
        for p in self.by_weight:
            self.by_weight[p] += 1


def test_slow_weights_in_attributes_become_the_present_weights():
    network = mlp()
    slow = Slow(SGD(network.parameters(), lr=0.1, momentum=0.9))
    memory = OptimizerMemory(slow)
    train(network, slow, 3)
    memory.reset_()
    weights = list(network.parameters())
    assert all(torch.equal(mine, p) for mine, p in zip(slow.slow[0], weights, strict=True))
    assert all((slow.by_weight[p] == 1).all() for p in weights)
    assert slow.calls == 0
    assert not hasattr(slow, "late")
    assert not slow.inner[0].state


def test_slow_weights_in_attributes_are_zero_where_pruned():
    network = mlp()
    slow, flags = Slow(SGD(network.parameters(), lr=0.1)), halves(network)
    assert kept_at(slow, flags) > 300
    zero_pruned_([slow], flags)
    assert kept_at(slow, flags) == 0


def test_slow_weights_follow_weights_that_were_rewound():
    network = mlp()
    optimizer = slow_first(list(network.parameters()))
    memory = OptimizerMemory(optimizer)
    train(network, optimizer, 4)
    with torch.no_grad():
        network[0].weight.fill_(7)
    memory.reset_()
    assert (optimizer.state[network[0].weight]["slow_params"] == 7).all()


def test_added_parameters_are_made_fresh_too():
    network = mlp()
    optimizer = slow_first(list(network[0].parameters()))
    memory = OptimizerMemory(optimizer)
    optimizer.add_param_group({"params": list(network[2].parameters()) + list(network[4].parameters())})
    train(network, optimizer, 4)
    memory.reset_()
    assert [group["counter"] for group in optimizer.param_groups] == [0, 0]
    assert torch.equal(optimizer.state[network[4].weight]["slow_params"], network[4].weight)
    train(network, optimizer, 4)


def test_what_the_user_and_schedules_set_stays():
    network = mlp()
    prodigy = Prodigy(network.parameters(), weight_decay=0.0)
    memory = OptimizerMemory(prodigy, leave=["d_coef", "mine"])
    train(network, prodigy, 8)
    changed = {"lr": 0.25, "weight_decay": 0.5, "betas": (0.8, 0.9), "mine": 3, "initial_lr": 2.0}
    prodigy.param_groups[0].update(changed)
    assert prodigy.param_groups[0]["d"] > 2e-6
    memory.reset_()
    group = prodigy.param_groups[0]
    assert {key: group[key] for key in changed} == changed
    assert (group["d"], group["d_max"], group["k"], group["d_numerator"]) == (1e-6, 1e-6, 0, 0.0)
    assert "d_hat" not in group


def test_modes_stay_as_they_are():
    from schedulefree import AdamWScheduleFree

    network = mlp()
    optimizer = AdamWScheduleFree(network.parameters())
    memory = OptimizerMemory(optimizer)
    train(network, optimizer, 2)
    memory.reset_()
    assert optimizer.param_groups[0]["train_mode"] is True
    assert optimizer.param_groups[0]["k"] == 0


def test_captured_tensors_in_groups_are_reset_in_place():
    weight = nn.Parameter(torch.ones(2))
    optimizer = SGD([weight], lr=0.1)
    held = optimizer.param_groups[0]["count"] = torch.tensor(1.0)
    memory = OptimizerMemory(optimizer)
    held.fill_(9)
    memory.reset_()
    assert optimizer.param_groups[0]["count"] is held
    assert held == 1


def test_base_optimizers_are_found_once_in_attributes_lists_and_circles():
    weight = nn.Parameter(torch.ones(2))
    inner, other = SGD([weight], lr=0.1), Adam([weight])
    outer = SGD([weight], lr=0.1)
    outer.several, outer.named, inner.outer = [inner, other], {"again": inner}, outer
    assert base_optimizers(outer) == [outer, inner, other]
    assert base_optimizers(other) == [other]
    wrapped = slow_later([weight])
    assert [type(each).__name__ for each in base_optimizers(wrapped)] == ["Lookahead", "Adam"]


def test_state_that_hangs_on_a_weight_by_a_graph_is_reset():
    weight = nn.Parameter(torch.ones(2))
    optimizer = SGD([weight], lr=0.1)
    optimizer.state[weight]["slow"] = weight.clone()
    memory = OptimizerMemory(optimizer)
    with torch.no_grad():
        weight.fill_(3)
    memory.reset_()
    assert optimizer.state[weight]["slow"].tolist() == [3, 3]


class Box:
    def __init__(self, content):
        self.content = content


@pytest.mark.parametrize("name", REAL)
def test_all_of_the_real_ones_can_be_reset_and_zeroed(name):
    network = mlp()
    optimizer = REAL[name](list(network.parameters()))
    train(network, optimizer, 4)
    assert [(cannot_reset(each), cannot_zero(each)) for each in base_optimizers(optimizer)] == [
        (None, None) for _ in base_optimizers(optimizer)
    ]


def test_tensors_hidden_in_objects_are_named():
    network = mlp()
    optimizer = slow_later(list(network.parameters()))
    base = base_optimizers(optimizer)[1]
    base.network, base.own, base.function = network, Box([next(network.parameters())]), lambda: None
    assert cannot_reset(optimizer) is None
    base.box = Box({"a": [torch.ones(2)]})
    assert cannot_reset(optimizer) == "Adam keeps tensors in its attribute 'box' (Box), which stay as they are"


@pytest.mark.parametrize("kind", [SOAP, Shampoo])
def test_optimizers_that_mix_places_are_named_and_left_alone(kind):
    network = mlp()
    optimizer = kind(network.parameters())
    train(network, optimizer, 4)
    before = copy.deepcopy(list(optimizer.state.values()))
    reason = cannot_zero(optimizer)
    assert reason.startswith(f"{kind.__name__} mixes the places of a weight by the matrices in 'state.")
    zero_pruned_([optimizer], halves(network))
    for state, old in zip(optimizer.state.values(), before, strict=True):
        assert all(torch.equal(state[key], old[key]) for key in state if isinstance(state[key], torch.Tensor))


def test_objects_in_the_state_are_named():
    weight = nn.Parameter(torch.ones(2))
    optimizer = SGD([weight], lr=0.1)
    optimizer.state[weight] = {"projector": Box(torch.ones(2))}
    assert cannot_zero(optimizer) == "SGD keeps Box objects in 'state.projector'"


def test_a_wrappers_argument_does_not_hide_a_count_of_the_same_name():
    network = mlp()
    optimizer = REAL["timm's Lookahead of Prodigy"](list(network.parameters()))  # the k of Prodigy counts steps
    memory = OptimizerMemory(optimizer)
    train(network, optimizer, 4)
    assert optimizer.param_groups[0]["k"] == 4
    memory.reset_()
    assert (optimizer.param_groups[0]["k"], optimizer.param_groups[0]["lookahead_k"]) == (0, 3)


def test_state_that_happens_to_equal_one_weight_is_no_copy_of_it():
    ones, twos = nn.Parameter(torch.ones(2)), nn.Parameter(torch.full((2,), 2.0))
    optimizer = Adagrad([ones, twos], lr=0.1, initial_accumulator_value=1.0)
    memory = OptimizerMemory(optimizer)
    with torch.no_grad():
        ones.fill_(5)
    memory.reset_()
    assert optimizer.state[ones]["sum"].tolist() == [1, 1]
