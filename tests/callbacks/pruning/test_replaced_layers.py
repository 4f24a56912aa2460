"""Layers that are replaced, removed or added while training goes on."""

import re

import pytest
import torch
from helpers import (
    BATCHES,
    Crash,
    Net,
    Watch,
    all_masked_are_zero,
    copied,
    crash,
    fit,
    half,
    loader,
    parameters,
    same,
    seeded,
    survivors,
)
from lightning.pytorch import Callback
from resuming import Alike, records_of
from torch import nn
from torch.utils.data import DataLoader

from lightning_sap import FixedFraction, GoOn, PruningCallback, RoundListener, TakeBack

JOINED = (
    "sap: these were replaced while training goes on: {} weights in {}. The new weights join dense, "
    "and are not rewound."
)
LOST = r"^sap: net\.0\.weight replaced parameters of the module while training goes on, and no optimizer holds them"


def hold(trainer, module):
    """Let the optimizer hold what the module has now, and nothing else."""
    (optimizer,) = trainer.optimizers
    optimizer.param_groups[0]["params"][:] = list(module.parameters())
    for parameter in [p for p in optimizer.state if all(p is not q for q in module.parameters())]:
        del optimizer.state[parameter]


def linear(features=8, seed=7):
    return seeded(lambda: nn.Linear(6, features), seed)


def replace_first(trainer, module, features=8):
    """Another first layer; one of other features takes what follows with it."""
    module.net[0] = linear(features)
    if features != 8:
        module.net[1] = nn.BatchNorm1d(features)
        module.net[3] = seeded(lambda: nn.Linear(features, 3), 8)


def at(hook, epoch, *functions):
    def act(trainer, module):
        if trainer.current_epoch == epoch and (hook != "on_train_batch_end" or trainer.fit_loop.batch_idx == 0):
            for function in functions:
                function(trainer, module)

    return Watch(**{hook: act})


HOOKS = ("on_train_batch_end", "on_train_epoch_end", "on_train_epoch_start")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("replacing_first", [True, False])
def test_a_layer_of_the_same_shape_joins_dense_and_is_said_once(recwarn, hook, replacing_first):
    module, pruner, seen = Net(), half(every_n_epochs=2), []
    change = at(hook, 3, replace_first, hold)  # the last epoch of round 1
    look = Watch(on_validation_start=lambda t, m: seen.append((survivors(pruner), all_masked_are_zero(t, m))))
    callbacks = [change, pruner] if replacing_first else [pruner, change]
    fit(module, *callbacks, look, val=loader(seed=3), max_epochs=8, num_sanity_val_steps=0)
    assert all(clean for _, clean in seen)
    assert seen[2][0] == {"net.0.weight": 24, "net.3.weight": 12}
    assert seen[4][0] == {"net.0.weight": 48, "net.3.weight": 6}  # replaced in round 1, pruned from round 2 on
    assert seen[6][0] == {"net.0.weight": 24, "net.3.weight": 3}
    said = [str(warning.message) for warning in recwarn if "replaced" in str(warning.message)]
    assert said == [JOINED.format(48, "net.0.weight")]


def test_a_layer_of_another_shape_joins_dense():
    module, pruner = Net(), half()
    change = at("on_train_epoch_end", 1, lambda t, m: replace_first(t, m, 10), hold)
    with pytest.warns(UserWarning, match=re.escape(JOINED.format(90, "net.0.weight, net.3.weight"))):
        fit(module, change, pruner)
    # of 60 and 30: replaced at the end of round 1, trained in round 2
    assert survivors(pruner) == {"net.0.weight": 30, "net.3.weight": 15}
    assert [record.pruned for record in pruner.history] == [36, 0, 45, None]
    assert all_masked_are_zero(module.trainer, module)


@pytest.mark.filterwarnings("ignore:sap. these are no longer in the module")
@pytest.mark.parametrize("features", [8, 10])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_layer_in_no_optimizer_is_an_error_that_names_it(hook, features):
    module, pruner = Net(), half()

    def change(trainer, module):
        module.net[0] = linear(features)
        if features != 8:
            module.net[1], module.net[3] = nn.BatchNorm1d(features), nn.Linear(features, 3).requires_grad_(False)

    with (
        pytest.warns(UserWarning, match=r"these were replaced while training goes on"),
        pytest.raises(ValueError, match=LOST),
    ):
        fit(module, at(hook, 1, change), pruner)
    assert module.trainer.current_epoch <= 2
    assert survivors(pruner)["net.0.weight"] == 6 * features


def test_a_layer_in_no_optimizer_is_warned_of_where_training_is_over():
    module, pruner = Net(), half()
    with pytest.warns(UserWarning, match=LOST), pytest.warns(UserWarning, match=r"these were replaced"):
        fit(module, at("on_train_batch_end", 3, replace_first), pruner)
    assert survivors(pruner) == {"net.0.weight": 48, "net.3.weight": 3}


def test_the_advice_of_the_error_works():
    module, pruner = Net(), half()

    def change(trainer, module):
        layer = module.net[0] = linear()
        trainer.optimizers[0].add_param_group({"params": layer.parameters()})

    with pytest.warns(UserWarning, match=re.escape(JOINED.format(48, "net.0.weight"))):
        fit(module, at("on_train_epoch_end", 0, change), pruner)
    assert survivors(pruner) == {"net.0.weight": 12, "net.3.weight": 3}


def test_a_frozen_layer_takes_no_part_any_more():
    module, pruner = Net(), half()

    def change(trainer, module):
        module.net[0] = linear().requires_grad_(False)

    message = (
        "sap: these are no longer in the module, or not to be trained there: net.0.weight. Their masks are given up."
    )
    with pytest.warns(UserWarning, match=re.escape(message)):
        fit(module, at("on_train_epoch_end", 1, change), pruner)
    assert survivors(pruner) == {"net.3.weight": 3}
    assert torch.equal(module.net[0].weight, linear().weight)


def test_a_layer_that_is_removed_leaves_the_masks():
    module, pruner = Net(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))), half(target_remaining=0.25)

    def change(trainer, module):
        module.net[1] = nn.Identity()

    with pytest.warns(UserWarning, match=r"no longer in the module, or not to be trained there: net\.1\.weight\."):
        fit(module, at("on_train_epoch_end", 1, change, hold), pruner)
    assert pruner.masks.keys() == {"net.0.weight", "net.2.weight"}
    assert sum(survivors(pruner).values()) == 14  # a quarter of 54, rounded


def test_a_layer_that_is_added_joins_once_it_was_trained():
    module, pruner = Net(), half()

    def change(trainer, module):
        module.net.append(seeded(lambda: nn.Linear(3, 3)))

    fit(module, at("on_train_epoch_end", 1, change, hold), pruner)
    assert survivors(pruner) == {"net.0.weight": 6, "net.3.weight": 3, "net.4.weight": 5}


def test_a_layer_with_the_weights_of_the_old_one_goes_on_under_its_mask():
    def run(*callbacks):
        module, pruner = Net(), half()
        fit(module, *callbacks, pruner)
        return module, pruner

    def change(trainer, module):
        old, new = module.net[0], nn.Linear(6, 8)
        new.load_state_dict(old.state_dict())
        momenta = {name: trainer.optimizers[0].state[p] for name, p in old.named_parameters()}
        module.net[0] = new
        hold(trainer, module)
        trainer.optimizers[0].state.update({p: momenta[name] for name, p in new.named_parameters()})

    (whole, plain), (module, pruner) = run(), run(at("on_train_epoch_end", 1, change))
    assert same(pruner.masks, plain.masks)
    assert same(module.state_dict(), whole.state_dict())


@pytest.mark.parametrize("features", [8, 10])
def test_a_replaced_layer_is_not_rewound_and_the_others_are(features):
    module, pruner, starts = Net(), half(rewind_weights="init"), []
    first = copied(module.state_dict())
    new = []

    def change(trainer, module):
        replace_first(trainer, module, features)
        hold(trainer, module)
        new.append(module.net[0].weight.detach().clone())

    look = Watch(on_train_batch_start=lambda t, m: starts.append(copied(m.state_dict())))
    with pytest.warns(UserWarning, match=r"these were replaced"):
        fit(module, at("on_train_epoch_end", 1, change), pruner, look)
    start = starts[2 * BATCHES]
    assert torch.equal(start["net.0.weight"], new[0])
    if features == 8:
        mask = ~(start["net.3.weight"] == 0)
        assert torch.equal(start["net.3.weight"][mask], first["net.3.weight"][mask])
        assert int(mask.sum()) == 6


def test_a_round_taken_back_leaves_a_replaced_layer_and_its_mask_as_they_are():
    class Unsound(RoundListener, Callback):
        may_take_back = True

        def on_round_end(self, trainer, pl_module, event):
            return TakeBack() if event.record.round == 2 else GoOn()

    module, pruner, seen = Net(), half(), []
    change = at("on_train_epoch_end", 1, replace_first, hold)
    look = Watch(on_train_batch_start=lambda t, m: seen.append((survivors(pruner), m.net[0].weight.detach().clone())))
    with pytest.warns(UserWarning, match=r"these were replaced"):
        fit(module, change, pruner, Unsound(), look)
    assert seen[2 * BATCHES][0] == {"net.0.weight": 48, "net.3.weight": 6}
    # back to round 1, and pruned from there: the new layer is as dense as it joined
    assert seen[3 * BATCHES][0] == {"net.0.weight": 24, "net.3.weight": 6}
    assert all_masked_are_zero(module.trainer, module)


def test_a_layer_replaced_in_the_round_that_is_taken_back_stays_dense():
    class Unsound(RoundListener, Callback):
        may_take_back = True

        def on_round_end(self, trainer, pl_module, event):
            return TakeBack() if event.record.round == 2 else GoOn()

    module, pruner, seen = Net(), half(), []
    look = Watch(on_train_batch_start=lambda t, m: seen.append((survivors(pruner), int((m.net[0].weight != 0).sum()))))
    change = at("on_train_batch_end", 2, replace_first, hold)
    with pytest.warns(UserWarning, match=r"these were replaced"):
        fit(module, change, pruner, Unsound(), look)
    # net.3 is back at the 12 of round 1, and pruned from there
    assert seen[3 * BATCHES] == ({"net.0.weight": 48, "net.3.weight": 6}, 48)


@pytest.mark.parametrize("steps", [2, 5])
def test_resume_after_a_replacement_equals_the_unbroken_run(tmp_path, steps):
    def run(*callbacks, **options):
        module, pruner = Net(), half(rewind_weights="init")
        fit(module, *callbacks, pruner, train=DataLoader(Alike(2), 8), **options)
        return module, pruner

    def kill(trainer, module):
        if trainer.global_step == 3 + steps:
            trainer.save_checkpoint(tmp_path / "killed.ckpt")
            crash()

    change = at("on_train_batch_end", 1, replace_first, hold)
    with pytest.warns(UserWarning, match=r"these were replaced"):
        whole, pruner = run(change)
    with pytest.warns(UserWarning, match=r"these were replaced"), pytest.raises(Crash):
        run(change, Watch(on_train_batch_end=kill))
    resumed, other = run(ckpt_path=tmp_path / "killed.ckpt")
    assert same(other.masks, pruner.masks)
    assert same(parameters(resumed), parameters(whole))
    assert records_of(other) == records_of(pruner)


def test_a_file_saved_right_after_a_replacement_has_the_mask_of_its_weights(tmp_path):
    module, pruner = Net(), half()

    def change(trainer, module):
        replace_first(trainer, module)
        hold(trainer, module)
        trainer.save_checkpoint(tmp_path / "now.ckpt")

    with pytest.warns(UserWarning, match=r"these were replaced"):
        fit(module, at("on_train_batch_end", 2, change), pruner)
    saved = torch.load(tmp_path / "now.ckpt", weights_only=True)
    twin = PruningCallback(FixedFraction(0.5))
    twin.load_state_dict(saved["callbacks"]["lightning_sap/sap"])
    assert survivors(twin) == {"net.0.weight": 48, "net.3.weight": 6}
    assert torch.equal(saved["state_dict"]["net.0.weight"], linear().weight)
    assert int((saved["state_dict"]["net.3.weight"] != 0).sum()) == 6


def regrow(trainer, module):
    """The same parameters, with tensors of another shape in them."""
    (optimizer,) = trainer.optimizers
    module.net[0].weight.data, module.net[0].bias.data = torch.randn(10, 6), torch.zeros(10)
    module.net[1] = nn.BatchNorm1d(10)
    module.net[3].weight.data = torch.randn(3, 10)
    optimizer.state.clear()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("hook", "first"), [("on_train_epoch_end", True), ("on_train_epoch_end", False), ("on_train_epoch_start", False)]
)
def test_a_parameter_that_is_given_another_shape_joins_dense(hook, first):
    module, pruner = Net(), half()
    change = at(hook, 2, regrow)
    with pytest.warns(UserWarning, match=re.escape(JOINED.format(90, "net.0.weight, net.3.weight"))):
        fit(module, *([change, pruner] if first else [pruner, change]), max_epochs=5)
    assert survivors(pruner) == {"net.0.weight": 30, "net.3.weight": 15}
    assert all_masked_are_zero(module.trainer, module)


@pytest.mark.filterwarnings("ignore:sap. these were replaced")
def test_a_parameter_that_is_given_another_shape_between_two_steps_is_an_error_that_names_it():
    message = r"^'net\.0\.weight' has the shape \(10, 6\), and what was pruned of it \(8, 6\)\. .* a new nn\.Parameter"
    with pytest.raises(ValueError, match=message):
        fit(Net(), at("on_train_batch_end", 2, regrow), half())
