"""A callback in a second fit: of the same module, of another, after a run that failed."""

import pytest
import torch
from helpers import (
    Crash,
    N,
    Net,
    Watch,
    all_masked_are_zero,
    copied,
    crash_in,
    fit,
    half,
    loader,
    mlp,
    quiet_trainer,
    same,
    seeded,
    survivors,
    zeros_of,
)
from torch import nn

from lightning_sap import FixedFraction, PQIMonitor, PruningCallback


class TestSecondFit:
    def test_second_fit_keeps_masks_and_starts_rounds_anew(self):
        module, pruner, seen = Net(), half(), []
        fit(module, pruner)
        first = pruner.masks
        look = Watch(on_train_epoch_end=lambda t, m: seen.append((pruner.current_round(), pruner.masks)))
        fit(module, pruner, look, max_epochs=2)
        assert [round for round, _ in seen] == [0, 1]
        assert same(seen[0][1], first)
        assert all(not (mask & ~first[name]).any() for name, mask in pruner.masks.items())
        assert survivors(pruner) == {"net.0.weight": 3, "net.3.weight": 2}  # of 6 and 3
        assert [record.round for record in pruner.history] == [0, 1]

    def test_second_fit_of_the_same_trainer_prunes_on(self):
        module, pruner = Net(), half(rounds=1, every_n_epochs=None)
        trainer = fit(module, pruner)
        assert survivors(pruner) == {"net.0.weight": 24, "net.3.weight": 12}
        trainer.fit_loop.max_epochs = 6
        trainer.fit(module, loader())
        assert survivors(pruner) == {"net.0.weight": 12, "net.3.weight": 6}
        assert [(r.first_epoch, r.last_epoch) for r in pruner.history] == [(4, 4), (5, 5)]

    def test_second_fit_of_another_module_starts_afresh_with_a_warning(self):
        pruner = half()
        fit(Net(), pruner)
        other = Net(seeded(mlp, 5))
        left = []
        with pytest.warns(UserWarning, match="sap: this module is not the one that was pruned before; starting afres"):
            fit(other, pruner, Watch(on_train_epoch_end=lambda t, m: left.append(pruner.remaining)))
        assert left == [1.0, 0.5, 0.25, 0.125]
        assert zeros_of(other) == N * 7 // 8

    def test_second_fit_of_a_module_of_other_shapes_starts_afresh(self):
        pruner = half()
        fit(Net(), pruner)
        other = Net(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)))
        with pytest.warns(UserWarning, match="starting afresh"):
            fit(other, pruner, max_epochs=2)
        assert survivors(pruner) == {"net.0.weight": 30, "net.2.weight": 15}

    def test_second_fit_of_another_module_leaves_the_first_one_alone(self):
        first, pruner = Net(), half()
        fit(first, pruner)
        before = copied(first.state_dict())
        other = Net(seeded(mlp, 5))
        other.net[0].requires_grad_(False)
        with pytest.warns(UserWarning, match="starting afresh"):
            fit(other, pruner)
        assert survivors(pruner) == {"net.3.weight": 3}
        assert same(first.state_dict(), before)

    def test_second_fit_with_a_layer_frozen_in_between_keeps_masks(self):
        module, pruner = Net(), PruningCallback(FixedFraction(0.5), rounds=1)
        fit(module, pruner)
        before = pruner.masks["net.0.weight"]
        module.net[0].requires_grad_(False)
        fit(module, pruner)
        assert before.sum() == 24
        assert not pruner.masks["net.0.weight"][~before].any()
        assert not module.net[0].weight[~before].any()

    def test_second_fit_of_another_module_leaves_its_frozen_layer_out(self):
        pruner, other = PruningCallback(FixedFraction(0.5), rounds=1), Net()
        fit(Net(), pruner)
        other.net[0].requires_grad_(False)
        with pytest.warns(UserWarning, match="starting afresh"):
            fit(other, pruner)
        assert survivors(pruner) == {"net.3.weight": 12}

    def test_second_fit_with_a_layer_unfrozen_in_between_keeps_masks(self):
        module, pruner = Net(), half()
        module.net[0].requires_grad_(False)
        fit(module, pruner)
        assert survivors(pruner) == {"net.3.weight": 3}
        module.net[0].requires_grad_(True)
        fit(module, pruner, max_epochs=2)
        assert survivors(pruner) == {"net.0.weight": 24, "net.3.weight": 2}

    def test_keep_zeros_takes_zeros_as_pruned(self):
        module = Net()
        holes = torch.rand(8, 6, generator=torch.Generator().manual_seed(3)) < 0.3
        with torch.no_grad():
            module.net[0].weight[holes] = 0.0
        pruner, left = half(keep_zeros=True), []
        look = Watch(on_train_start=lambda t, m: left.append(pruner.masks), on_train_epoch_end=lambda t, m: None)
        fit(module, pruner, look, max_epochs=2)
        assert torch.equal(left[0]["net.0.weight"], ~holes)
        assert left[0]["net.3.weight"].all()
        alive = 48 - int(holes.sum())
        assert survivors(pruner)["net.0.weight"] == alive - alive // 2
        assert not module.net[0].weight[holes].any()

    def test_zeros_count_as_weights_without_keep_zeros(self):
        module, pruner, left = Net(), half(), []
        with torch.no_grad():
            module.net[0].weight[:4] = 0.0
        said = (
            r"^sap: 24 of 72 prunable weights are exactly zero as training starts.* stay with keep_zeros=True or masks"
        )
        with pytest.warns(UserWarning, match=said) as told:
            fit(module, pruner, Watch(on_train_start=lambda t, m: left.append(pruner.remaining)), max_epochs=2)
        assert left == [1.0]
        assert sum("exactly zero" in str(each.message) for each in told) == 1

    @pytest.mark.parametrize("zero", [lambda net: net[0].weight[0], lambda net: net[3].weight])
    def test_few_zeros_and_what_has_not_begun_are_not_told(self, zero):
        module = Net()
        with torch.no_grad():
            zero(module.net).zero_()  # 6 of 72 weights, or a layer that is all zero
        fit(module, half(), max_epochs=2)


def test_second_fit_without_any_step_is_no_error():
    class Resting(Net):
        automatic_optimization, rests = False, False

        def training_step(self, batch, batch_idx):
            if not self.rests:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    module, pruner = Resting(), half()
    fit(module, pruner)
    module.rests, before = True, pruner.remaining
    with pytest.warns(UserWarning, match="no optimizer step was seen in the 3 batches of round 0"):
        fit(module, pruner)
    assert pruner.remaining == before < 1


def test_state_is_loaded_at_once_after_a_crash():
    first, pruner = half(), half()
    fit(Net(), first)
    with pytest.raises(Crash):
        fit(Net(), pruner, crash_in("on_train_epoch_end", 2))
    pruner.load_state_dict(first.state_dict())
    assert pruner.remaining == first.remaining == 0.125


class TestOneCallbackAfterAnother:
    def test_second_trainer_with_another_module_starts_afresh(self):
        pruner = half()
        fit(first := Net(), pruner)
        before = copied(first.state_dict())
        trainer = quiet_trainer(pruner, max_epochs=2)
        with pytest.warns(UserWarning, match="starting afresh"):
            trainer.fit(Net(seeded(mlp, 3)), loader())
        assert pruner.remaining == 0.5
        assert same(first.state_dict(), before)

    def test_second_fit_after_a_crash_keeps_masks(self, tmp_path):
        pruner, module = half(), Net()
        with pytest.raises(Crash):
            fit(module, pruner, crash_in("on_train_batch_end", 2))
        assert pruner.remaining == 0.25
        fit(module, pruner, max_epochs=2)
        assert pruner.remaining == pytest.approx(9 / 72)
        assert all_masked_are_zero(quiet_trainer(pruner), module)

    def test_policy_that_crashes_leaves_weights_masks_and_optimizer_as_they_were(self):
        module, pruner = Net(), half(rewind_weights="init")
        before, policy = [], pruner.options.policy

        class Fails(type(policy)):
            def __call__(self, sums, round):
                if round == 2:
                    before.append((copied(module.state_dict()), pruner.masks, len(module.trainer.optimizers[0].state)))
                    raise Crash
                return super().__call__(sums, round)

        failing = PruningCallback(Fails(0.5), every_n_epochs=1, rewind_weights="init")
        pruner = failing
        with pytest.raises(Crash):
            fit(module, failing)
        ((state, masks, moments),) = before
        assert same(module.state_dict(), state)
        assert same(failing.masks, masks)
        assert moments == 6 == len(module.optimizers(use_pl_optimizer=False).state)
        assert len(failing.history) == 1


class TestFitInsideAFit:
    @pytest.mark.parametrize("inner", ["fit", "validate", "test"])
    @pytest.mark.parametrize("hook", ["on_fit_start", "on_train_batch_end", "on_train_end"])
    def test_the_same_callback_is_refused_and_the_outer_fit_goes_on_as_if_alone(self, inner, hook):
        module, pruner, said = Net(), half(), []

        def nest(trainer, _):
            if trainer.global_step in (0, 4, 12) and not said:
                with pytest.raises(RuntimeError, match="in the middle of a fit, and another Trainer begins a run"):
                    getattr(quiet_trainer(pruner, max_epochs=3), inner)(Net(), loader())
                said.append(trainer.global_step)

        fit(module, pruner, Watch(**{hook: nest}))
        alone, other = Net(), half()
        fit(alone, other)
        assert said
        assert same(module.state_dict(), alone.state_dict())
        assert same(pruner.masks, other.masks)
        assert len(pruner.history) == len(other.history) == 4

    @pytest.mark.parametrize("inner", ["fit", "validate"])
    def test_the_same_monitor_is_refused_and_keeps_what_it_has_seen(self, inner):
        monitor, said = PQIMonitor(stop_on=None), []

        def nest(trainer, _):
            if trainer.global_step == 4 and not said:
                with pytest.raises(RuntimeError, match=r"^pqi: the callback is in the middle of a fit"):
                    getattr(quiet_trainer(monitor, max_epochs=3), inner)(Net(), loader())
                said.append(trainer.global_step)

        fit(Net(), half(), monitor, Watch(on_train_batch_end=nest))
        alone = PQIMonitor(stop_on=None)
        fit(Net(), half(), alone)
        assert said
        assert monitor.rows() == alone.rows()
        fit(Net(), half(), monitor)  # and the next fit is free

    def test_a_callback_of_its_own_is_taken(self):
        pruner, inner = half(), half()

        def nest(trainer, _):
            if trainer.global_step == 4:
                fit(Net(), inner)

        fit(Net(), pruner, Watch(on_train_batch_end=nest))
        assert pruner.remaining == inner.remaining == 0.125

    def test_a_fit_that_an_exception_ended_is_over(self):
        module, pruner = Net(), half()
        with pytest.raises(Crash):
            fit(module, pruner, crash_in("on_train_epoch_start", 2))
        fit(module, pruner)
        assert len(pruner.history) == 4
