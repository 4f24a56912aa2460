"""What a user's mistake gets: an error that names the value, what is allowed and the fix, before training starts."""

import re
from types import SimpleNamespace

import pytest
import torch
from helpers import Crash, Net, Watch, copied, crash_in, fit, half, loader, quiet_trainer, same, survivors
from lightning.pytorch import strategies
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from torch import nn
from torch.nn.utils import prune

from lightning_sap import PQIMonitor, PruningCallback, SAPCallback
from lightning_sap.callbacks.pruning import checks


def refused(message, *callbacks, module=None, error=ValueError, whole=True, **options):
    """`fit` raises, with that message, before a batch is trained and before a weight or mask is changed."""
    module, steps = Net() if module is None else module, []
    before = copied(module.state_dict())
    look = Watch(on_train_batch_start=lambda t, m: steps.append(t.global_step))
    pattern = re.escape(message)
    with pytest.raises(error, match=f"^{pattern}$" if whole else pattern):
        fit(module, *callbacks, look, **options)
    assert steps == []
    assert same(module.state_dict(), before)


class TestRounds:
    def test_rounds_that_do_not_fit_into_max_epochs_are_refused(self):
        message = (
            "rounds=3, every_n_epochs=2 with 4 epochs of training: they need (rounds + 1) · every_n_epochs = 8 epochs. "
            "Give max_epochs=8, or fewer or shorter rounds."
        )
        refused(message, half(rounds=3, every_n_epochs=2))

    def test_a_run_without_any_limit_needs_every_n_steps(self):
        message = (
            "The rounds have no length, since it is not known beforehand how long training takes. Give every_n_steps, "
            "the length of a round in optimizer steps, or a Trainer with max_steps; or, where the data have an end, "
            "every_n_epochs or a Trainer with max_epochs."
        )
        refused(message, SAPCallback(), max_epochs=-1, max_steps=-1)

    @pytest.mark.parametrize(("k", "epochs", "options"), [(2, 1, {}), (3, 2, {"max_epochs": 9, "rounds": 3})])
    def test_rewinding_to_beyond_the_first_round_is_refused(self, k, epochs, options):
        pruner = half(rewind_weights=k, every_n_epochs=epochs, rounds=options.pop("rounds", None))
        message = (
            f"rewind_weights={k} lies beyond the first round, which has {epochs} epochs; give at most {epochs}, or a "
            "longer round with every_n_epochs."
        )
        refused(message, pruner, **options)

    def test_target_without_prunings_is_refused(self):
        message = (
            "target_remaining=0.5 cannot be reached: the number of prunings is 0. Give rounds, or max_epochs for at "
            "least two rounds."
        )
        refused(message, half(rounds=0, every_n_epochs=None, target_remaining=0.5))

    def test_target_of_a_run_without_an_end_is_refused(self):
        message = (
            "target_remaining=0.5 cannot be reached: the number of prunings is not known beforehand. Give rounds, or "
            "max_epochs for at least two rounds."
        )
        refused(message, half(target_remaining=0.5), max_epochs=-1, max_steps=9)

    @pytest.mark.parametrize("asked", [{"rounds": 3, "every_n_epochs": None}, {"rounds": 3}, {"every_n_epochs": 3}])
    def test_more_rounds_than_max_steps_allow_are_refused(self, asked):
        message = "max_steps=9 ends training in epoch 2; give more steps, or fewer or shorter rounds. (rounds="
        refused(message, half(**asked), max_epochs=12, max_steps=9, whole=False)

    def test_as_many_rounds_as_max_steps_allow_are_pruned(self):
        pruner = half(target_remaining=0.25)
        fit(Net(), pruner, max_epochs=40, max_steps=10)
        assert [record.round for record in pruner.history] == [0, 1, 2, 3]
        assert pruner.remaining == 0.25

    def test_rounds_left_open_fit_into_max_steps(self):
        pruner = half(every_n_epochs=None, target_remaining=0.25)
        fit(Net(), pruner, max_epochs=40, max_steps=9)
        assert [record.round for record in pruner.history] == [0, 1, 2]
        assert pruner.remaining == 0.25

    def test_target_below_what_is_frozen_is_refused(self):
        module, pruner = Net(), half(target_remaining=0.25)
        with pytest.raises(Crash):
            fit(module, pruner, crash_in("on_train_epoch_end", 1))  # after one pruning
        module.net[0].requires_grad_(False)
        history = list(pruner.history)
        held = survivors(pruner)["net.0.weight"]
        message = (
            f"target_remaining=0.25 cannot be met: that is 18 of 72 weights, and {held} of frozen parameters stay."
        )
        refused(message, pruner, module=module, whole=False)
        assert list(pruner.history) == history

    def test_target_below_frozen_weights_and_floors_is_refused(self):
        module, first, pruner = Net(), half(), half(target_remaining=0.4, min_remaining=0.4)
        fit(module, first, max_epochs=2)
        module.net[3].requires_grad_(False)  # 12 are left, and 20 of 48 stay at least
        pruner.load_state_dict(first.state_dict())
        message = "target_remaining=0.4 cannot be met: that is 29 of 72 weights, and 12 of frozen parameters stay."
        refused(message, pruner, module=module, whole=False)

    def test_target_below_rounded_floors_is_met_but_for_these(self):
        pruner = half(target_remaining=0.1, min_remaining=0.1)
        fit(Net(), pruner)
        assert survivors(pruner) == {"net.0.weight": 5, "net.3.weight": 3}  # 8 of 72, where 7 are a tenth

    @pytest.mark.parametrize(("manual", "every"), [(True, None), (False, 3)])
    def test_max_steps_that_are_never_reached_limit_nothing(self, manual, every):
        class Rare(Net):
            def training_step(self, batch, batch_idx):
                loss = self.loss(batch)
                if manual:
                    self.manual_backward(loss)
                    if batch_idx == 2:
                        self.optimizers().step()
                        self.optimizers().zero_grad()
                return loss

        module, pruner = Rare(), half(rounds=3)
        module.automatic_optimization = not manual
        others = [] if manual else [GradientAccumulationScheduler({0: every})]
        fit(module, pruner, *others, max_epochs=4, max_steps=5)
        assert [record.round for record in pruner.history] == [0, 1, 2, 3]

    def test_target_above_what_is_left_is_refused(self):
        module = Net()
        with torch.no_grad():
            module.net[0].weight[1:].zero_()
        message = "target_remaining=0.5 cannot be met: that is 36 of 72 weights, and only 30 survive already."
        refused(message, half(target_remaining=0.5, keep_zeros=True), module=module, whole=False)

    def test_fast_dev_run_skips_the_checks_of_rounds(self):
        fit(Net(), half(rounds=9, every_n_epochs=9, rewind_weights=99, target_remaining=0.5), fast_dev_run=True)


class TestSelection:
    @pytest.mark.parametrize("option", ["include", "exclude"])
    def test_include_pattern_without_a_match_lists_the_closest_names(self, option):
        message = (
            "The pattern 'net.0.wieght' matches no parameter. Patterns are globs on whole parameter names (say "
            "'*.fc.*'); the closest names are ['net.0.weight', 'net.3.weight']."
        )
        refused(message, half(**{option: ["net.3.*", "net.0.wieght"]}))

    def test_model_without_a_prunable_weight_is_refused(self):
        module = Net(nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3)))
        module.net[0].requires_grad_(False)
        message = (
            "The model has no prunable weight with include=None, exclude=None. Prunable are trainable parameters of "
            "two or more dimensions whose own name contains 'weight', embeddings left out; `include` lifts the rule on "
            "names and embeddings. The first parameters of the model are ['net.0.weight', 'net.0.bias', "
            "'net.1.weight', 'net.1.bias']. Selected, but not prunable: 'net.0.weight' (it is frozen), 'net.1.weight' "
            "(it has fewer than two dimensions)."
        )
        refused(message, half(), module=module)

    def test_excluding_every_weight_is_refused(self):
        message = "The model has no prunable weight with include=None, exclude='*weight'."
        refused(message, half(exclude="*weight"), whole=False)

    @pytest.mark.parametrize("order", [1, -1])
    def test_parameter_of_two_callbacks_is_refused(self, order):
        a, b = half(name="a", include="net.0.*"), SAPCallback(name="b", rounds=2)
        first, second = [a, b][::order]
        message = (
            f"The callbacks {first.options.name!r} and {second.options.name!r} both prune 'net.0.weight'. "
            "Give each its own part of the model with include and exclude."
        )
        refused(message, first, second)

    def test_parameter_of_two_callbacks_that_is_unfrozen_later_is_refused(self):
        module = Net()
        module.net[0].requires_grad_(False)
        unfreeze = Watch(on_train_epoch_end=lambda t, m: m.net[0].requires_grad_(t.current_epoch >= 1))
        a, b = half(name="a", include=["net.0.weight", "extra"]), half(name="b")
        module.extra = torch.nn.Parameter(torch.randn(3, 3))
        with pytest.raises(ValueError, match=r"The callbacks 'a' and 'b' both prune 'net\.0\.weight'"):
            fit(module, a, b, unfreeze)

    def test_tied_parameter_of_two_callbacks_is_refused(self):
        module = Net(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)))
        module.net[1].weight = module.net[0].weight
        a, b = half(name="a", include="net.0.weight"), half(name="b", include="net.1.weight")
        refused("The callbacks 'a' and 'b' both prune 'net.0.weight'.", a, b, module=module, whole=False)

    def test_two_callbacks_of_one_name_are_refused(self):
        """Lightning refers to the docstring."""
        with pytest.raises(RuntimeError, match="Please consult the documentation of `PruningCallback`"):
            quiet_trainer(half(include="net.0.*"), half(include="net.3.*"))
        assert "two in one Trainer need two names" in PruningCallback.__doc__

    @pytest.mark.parametrize(
        ("build", "name"),
        [
            (lambda: [half(include="net.0.*"), half(include="net.3.*")], "sap"),
            (lambda: [half(), PQIMonitor(name="a"), PQIMonitor(name="a")], "a"),
        ],
    )
    def test_two_callbacks_of_one_name_that_the_module_brings(self, build, name):
        """Lightning does not look at these."""
        module = Net()
        module.configure_callbacks = build
        message = (
            f"Two callbacks of the Trainer have the name {name!r}, under which a checkpoint holds one state. "
            f"Give one of them another, such as name='{name}2'."
        )
        refused(message, module=module)

    def test_two_callbacks_of_two_names_that_the_module_brings(self):
        module, first, second = Net(), half(include="net.0.*"), half(include="net.3.*", name="sap2")
        module.configure_callbacks = lambda: [first, second]
        fit(module, max_epochs=2)
        assert (survivors(first), survivors(second)) == ({"net.0.weight": 24}, {"net.3.weight": 12})


class TestTorchPruning:
    def test_it_is_refused_with_the_calls_that_end_it(self):
        module = Net()
        prune.l1_unstructured(module.net[0], "weight", amount=0.5)
        prune.random_unstructured(module.net[3], "weight", amount=0.25)
        prune.l1_unstructured(module.net[3], "weight", amount=0.25)  # twice
        prune.l1_unstructured(module.net[3], "bias", amount=1)
        calls = [
            "prune.remove(module.get_submodule('net.0'), 'weight')",
            "prune.remove(module.get_submodule('net.3'), 'weight')",
            "prune.remove(module.get_submodule('net.3'), 'bias')",
        ]
        message = (
            "torch.nn.utils.prune is still at work in 3 tensors of the module: the parameter `..._orig` is not what "
            f"the layer uses. Make its pruning permanent before fit, by {'; '.join(calls)}; with keep_zeros=True its "
            "zeros count as pruned."
        )
        for pruner in (half(), half(keep_zeros=True), half(rounds=0, every_n_epochs=None)):
            refused(message, pruner, module=module)
        for call in calls:
            eval(call, {"prune": prune, "module": module})
        zeros = sum(int((layer.weight == 0).sum()) for layer in (module.net[0], module.net[3]))
        pruner = half(keep_zeros=True, rounds=0, every_n_epochs=None)
        fit(module, pruner, max_epochs=1)
        assert pruner.remaining == 1 - zeros / 72

    def test_in_a_fit_that_goes_on_it_is_refused_too(self):
        def begin(trainer, module):
            if trainer.current_epoch == 1:
                prune.l1_unstructured(module.net[0], "weight", amount=0.5)

        with pytest.raises(ValueError, match=re.escape("prune.remove(module.get_submodule('net.0'), 'weight')")):
            fit(Net(), half(), Watch(on_train_epoch_end=begin))

    def test_of_a_compiled_module(self):
        module = Net()
        prune.l1_unstructured(module.net[0], "weight", amount=0.5)
        module.net = torch.compile(module.net, backend="eager")
        with pytest.raises(ValueError, match="is still at work in 1 tensors") as caught:
            fit(module, half())
        call = re.search(r"prune\.remove\(.*?'weight'\)", str(caught.value))[0]
        eval(call, {"prune": prune, "module": module})
        fit(module, half(keep_zeros=True), max_epochs=2)

    def test_of_the_module_itself(self):
        module = nn.Linear(4, 2)
        prune.identity(module, "weight")
        with pytest.raises(ValueError, match=re.escape("by prune.remove(module, 'weight');")):
            checks.check_torch_pruning(module)

    def test_a_layer_of_ones_own_with_a_mask_is_none(self):
        layer = nn.Linear(4, 2)
        layer.weight_orig = nn.Parameter(torch.ones(2, 4))
        layer.register_buffer("weight_mask", torch.ones(2, 4))
        checks.check_torch_pruning(nn.Sequential(layer))

    @pytest.mark.parametrize("normalise", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
    def test_spectral_norm_is_none(self, normalise):
        """The older one too calls its parameter `weight_orig`."""
        checks.check_torch_pruning(nn.Sequential(normalise(nn.Linear(4, 2))))


class TestStrategies:
    @pytest.mark.parametrize("name", checks.SHARDED)
    def test_sharded_weights_are_refused(self, name):
        strategy = getattr(strategies, name, type(name, (), {}))
        message = f"Pruning does not work with {name}, which flattens or splits the weights in its own way."
        for kind in (strategy, type("Own", (strategy,), {})):
            trainer = SimpleNamespace(strategy=object.__new__(kind))
            with pytest.raises(ValueError, match=f"^{re.escape(message)} .*strategy='ddp'"):
                half().setup(trainer, Net(), "fit")
            half().setup(trainer, Net(), "validate")

    @pytest.mark.parametrize("strategy", [strategies.DDPStrategy, strategies.ModelParallelStrategy])
    def test_unsharded_strategies_are_allowed(self, strategy):
        checks.check_strategy(SimpleNamespace(strategy=object.__new__(strategy)))


class TestNonFiniteWeights:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
    def test_non_finite_weights_are_an_error_at_the_rounds_end(self, scope, value):
        module, pruner, steps = Net(), half(scope=scope), []

        def diverge(trainer, module):
            if trainer.current_epoch == 1:
                with torch.no_grad():
                    module.net[3].weight[module.net[3].weight != 0] = value

        look = Watch(on_train_epoch_end=diverge, on_train_batch_start=lambda t, m: steps.append(t.global_step))
        message = (
            "Weights that are not finite in ['net.3.weight']: nothing is pruned, the masks stay as they were. The "
            "training has diverged; lower the learning rate or clip the gradients."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            fit(module, pruner, look)
        assert steps == [0, 1, 2, 3, 4, 5]
        assert sum(survivors(pruner).values()) == 36
        assert pruner.current_round() == 1
        assert [record.round for record in pruner.history] == [0]
        assert not module.net[3].weight.isnan().all()

    @pytest.mark.parametrize("options", [None, {"stop_on": None}, {"restore": False}])
    def test_non_finite_weights_are_an_error_in_the_last_round_too(self, options):
        module, pruner = Net(), half()
        beside = [] if options is None else [PQIMonitor(**options)]

        def diverge(trainer, module):
            if trainer.current_epoch == 3 and trainer.is_last_batch:
                with torch.no_grad():
                    module.net[3].weight[module.net[3].weight != 0] = float("nan")

        with pytest.raises(ValueError, match=re.escape("Weights that are not finite in ['net.3.weight']")):
            fit(module, pruner, *beside, Watch(on_train_batch_end=diverge))
        assert pruner.remaining == 0.125

    @pytest.mark.parametrize("beside", [False, True])
    def test_non_finite_weights_after_a_stop_are_warned_of(self, beside):
        module, pruner = Net(), half(every_n_epochs=2)
        monitors = [PQIMonitor(stop_on=None, verbose=False)] if beside else []

        def diverge(trainer, module):
            if trainer.current_epoch == 2:
                with torch.no_grad():
                    module.net[3].weight.fill_(float("nan"))

        stop = EarlyStopping("val_loss", check_finite=True, patience=99)
        with pytest.warns(UserWarning, match="Training was stopped with weights that are not finite"):
            fit(module, pruner, *monitors, Watch(on_train_batch_end=diverge), stop, val=loader(seed=3))
        assert pruner.current_round() == 1

    def test_non_finite_weights_are_not_looked_for_in_fast_dev_run(self):
        diverge = Watch(on_train_batch_end=lambda t, m: m.net[3].weight.data.fill_(float("nan")))
        fit(Net(), half(), diverge, fast_dev_run=True)

    @pytest.mark.parametrize("order", [1, -1])
    def test_monitor_restores_a_round_before_non_finite_weights(self, tmp_path, order):
        for epoch in (0, 2):
            module, pruner, monitor = Net(), half(), PQIMonitor(verbose=False)

            def diverge(trainer, module, epoch=epoch):
                if trainer.current_epoch == epoch and trainer.is_last_batch:
                    with torch.no_grad():
                        module.net[3].weight[module.net[3].weight != 0] = float("nan")

            callbacks = [pruner, monitor][::order]
            options = {"default_root_dir": tmp_path}
            if epoch == 0:
                with (
                    pytest.warns(UserWarning, match="No round was sound"),
                    pytest.raises(ValueError, match=re.escape("Weights that are not finite in ['net.3.weight']")),
                ):
                    fit(module, *callbacks, Watch(on_train_batch_end=diverge), **options)
            else:
                fit(module, *callbacks, Watch(on_train_batch_end=diverge), **options)
                assert pruner.history.restored.round == 1
                assert not module.net[3].weight.isnan().any()
            assert monitor.verdict.reason == f"In round {epoch} the index of net.3.weight is nan."

    def test_non_finite_weights_that_are_pruned_do_not_count(self):
        """What is masked is zero again before anyone measures it."""
        module, pruner = Net(), half()

        def spoil(trainer, module):
            with torch.no_grad():
                module.net[3].weight[~pruner.masks["net.3.weight"]] = float("nan")

        fit(module, pruner, Watch(on_before_optimizer_step=spoil))
        assert pruner.remaining == 0.125
        assert not module.net[3].weight.isnan().any()


class TestCheckpointUnderAnotherName:
    @pytest.fixture
    def file(self, tmp_path):
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        fit(Net(), half(name="first"), saver, max_epochs=2, enable_checkpointing=True)
        return tmp_path / "epoch=0.ckpt"

    def test_checkpoint_of_another_name_is_refused_with_both_names(self, file):
        message = (
            "The checkpoint holds pruning state named ['first'], but this callback is named 'second'. "
            "Give name='first' to go on with it."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            fit(Net(), half(name="second"), ckpt_path=file)

    def test_checkpoint_of_one_callback_is_found_beside_a_new_one(self, file):
        """A second callback may be added to a run, as long as the first finds its state."""
        a, b = half(name="first", include="net.0.*"), half(name="second", include="net.3.*")
        with pytest.raises(ValueError, match=r"surplus \['net\.3\.weight'\]"):
            fit(Net(), a, b, ckpt_path=file)
        a, b = half(name="first"), half(name="second", include="net.0.bias*")
        with pytest.raises(ValueError, match="no prunable weight"):
            fit(Net(), a, b, ckpt_path=file)

    def test_checkpoint_of_a_missing_callback_is_warned_of(self, tmp_path):
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        a, b = (half(name=name, include=f"net.{i}.weight") for name, i in (("a", 0), ("b", 3)))
        fit(Net(), a, b, saver, max_epochs=2, enable_checkpointing=True)
        message = "a: the checkpoint also holds pruning state named ['b'], which no callback takes up: what was pruned"
        with pytest.warns(UserWarning, match=re.escape(message)):
            fit(Net(), half(name="a", include="net.0.weight"), ckpt_path=tmp_path / "epoch=0.ckpt")

    def test_checkpoint_of_another_name_is_evaluated(self, file):
        trainer = quiet_trainer(half(name="second"))
        trainer.validate(Net(), loader(), ckpt_path=str(file), verbose=False, weights_only=True)
        assert "val_loss" in trainer.callback_metrics
