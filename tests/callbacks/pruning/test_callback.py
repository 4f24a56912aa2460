"""PruningCallback: what holds in every step, epoch and round of a fit."""

import logging
import math
import re
from functools import partial

import pytest
import torch
from helpers import (
    BAREBONES,
    BATCHES,
    OPTIMIZERS,
    PRUNABLE,
    Net,
    Watch,
    all_masked_are_zero,
    copied,
    fit,
    loader,
    mlp,
    parameters,
    quiet_trainer,
    same,
    seeded,
    survivors,
)
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.optim import SGD

from lightning_sap import FixedFraction, PQIMonitor, PruningCallback, SAPCallback

N = sum(PRUNABLE.values())


def half(**options):
    """A pruning by half after every epoch."""
    return PruningCallback(FixedFraction(0.5), **{"every_n_epochs": 1, **options})


def zeros_of(module):
    return sum(int((parameters(module)[name] == 0).sum()) for name in PRUNABLE)


class Checked(Net):
    """Looks at the weights after every optimizer step."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.steps = []

    def look(self):
        self.steps.append((all_masked_are_zero(self.trainer, self), zeros_of(self)))

    def optimizer_step(self, *arguments, **options):
        super().optimizer_step(*arguments, **options)
        self.look()


class Manual(Checked):
    """Two optimizers, of which the second steps first; it clips by itself."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.manual_backward(loss)
        for optimizer in reversed(self.optimizers()):
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()
            self.look()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return self.optimizer(self.net[0].parameters()), self.optimizer(self.net[1:].parameters())


class SparseRows(LightningModule):
    """An embedding of whose gradient only the rows of the batch exist."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.rows, self.gradients = seeded(lambda: nn.Embedding(8, 5, sparse=True)), []

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        rows = torch.tensor([batch_idx % 8, 3, 3])
        self.manual_backward((self.rows(rows) - 1).square().sum())
        self.gradients.append(self.rows.weight.grad.clone())
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TestEnforcement:
    @pytest.mark.parametrize("reset_optimizer", [True, False])
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"accumulate_grad_batches": 2},
            {"gradient_clip_val": 0.1},
            {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        ],
        ids=["plain", "accumulation", "clipped norm", "clipped values"],
    )
    def test_masked_weights_are_zero_after_every_step(self, optimizer, options, reset_optimizer):
        module = Checked(optimizer=OPTIMIZERS[optimizer])
        trainer = fit(module, half(reset_optimizer=reset_optimizer), **options)
        per_epoch = 2 if "accumulate_grad_batches" in options else BATCHES
        assert trainer.global_step == 4 * per_epoch
        # after three prunings by half of 48 and 24 weights, 6 and 3 remain
        zeros = [gone for gone in (0, N // 2, N * 3 // 4, N * 7 // 8) for _ in range(per_epoch)]
        assert module.steps == [(True, gone) for gone in zeros]
        assert zeros_of(module) == N * 7 // 8

    @pytest.mark.parametrize("reset_optimizer", [True, False])
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_manual_optimization_with_two_optimizers(self, optimizer, reset_optimizer):
        module = Manual(optimizer=OPTIMIZERS[optimizer])
        fit(module, half(reset_optimizer=reset_optimizer))
        zeros = [gone for gone in (0, N // 2, N * 3 // 4, N * 7 // 8) for _ in range(2 * BATCHES)]
        assert module.steps == [(True, gone) for gone in zeros]

    def test_an_embedding_with_sparse_gradients_under_manual_optimization(self):
        module = SparseRows()
        pruner = half(include="rows.weight", scope="global")
        fit(module, pruner)
        mask = pruner.masks["rows.weight"]
        assert int(mask.sum()) == 5  # of 40, halved three times
        assert module.gradients[-1].is_sparse
        assert not module.gradients[-1].to_dense()[~mask].any()
        assert module.gradients[-1].to_dense()[mask].any()
        assert not module.rows.weight[~mask].any()

    def test_momentum_would_revive_them(self):
        """Without the callback's hook the same run moves pruned weights: the tests above can fail."""
        module, pruner = Checked(), half(reset_optimizer=False)
        lost = Watch(on_train_start=lambda trainer, module: pruner._remove_hooks())
        fit(module, pruner, lost)
        assert [clean for clean, _ in module.steps] == [True] * BATCHES + [False] * (3 * BATCHES)

    def test_every_callback_sees_them_masked_wherever_it_stands(self):
        seen = []
        watch = {
            hook: lambda trainer, module: seen.append(all_masked_are_zero(trainer, module))
            for hook in ("on_before_zero_grad", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end")
        }
        fit(Net(), Watch(**watch), half(reset_optimizer=False), Watch(**watch), val=loader())
        assert seen == [True] * len(seen)
        assert len(seen) > 4 * 2 * (3 * BATCHES)

    def test_the_optimizer_forgets_at_each_pruning_only_if_asked(self):
        for reset in (True, False):
            sizes = []
            watch = Watch(on_train_batch_start=lambda t, m, sizes=sizes: sizes.append(len(t.optimizers[0].state)))
            fit(Net(), half(reset_optimizer=reset, every_n_epochs=2), watch)
            tensors = 6  # weight and bias of two linear layers and of one BatchNorm
            second = [0, tensors, tensors] if reset else [tensors] * BATCHES
            assert sizes == [0] + [tensors] * (2 * BATCHES - 1) + second + [tensors] * BATCHES

    def test_a_state_that_was_there_before_the_first_step_is_there_again(self):
        """Adagrad's is made with the optimizer, and older ones of PyTorch fail without it."""
        seen = []

        def look(trainer, module):
            state = trainer.optimizers[0].state[module.net[0].weight]
            seen.append((float(state["step"]), float(state["sum"].sum())))

        optimizer = partial(OPTIMIZERS["Adagrad"], initial_accumulator_value=0.5)
        fit(Net(optimizer=optimizer), half(), Watch(on_train_batch_start=look))
        assert seen[::BATCHES] == [(0, 24)] * 4  # half of 48 weights
        assert all(step > 0 and total > 24 for step, total in seen[1::BATCHES])

    def test_hooks_are_gone_after_fit(self):
        for failing in (False, True):
            module, pruner = Net(), half()
            trainer = quiet_trainer(pruner, Watch(on_train_epoch_end=_fail_in_epoch_2) if failing else Watch())
            if failing:
                with pytest.raises(ZeroDivisionError):
                    trainer.fit(module, loader())
            else:
                trainer.fit(module, loader())
            optimizer = module.optimizers(use_pl_optimizer=False)
            assert not optimizer._optimizer_step_post_hooks
            with torch.no_grad():
                module.net[0].weight.fill_(1.0)
            optimizer.step()
            assert module.net[0].weight.count_nonzero() == 48  # nothing masks them any more


def _fail_in_epoch_2(trainer, module):
    if trainer.current_epoch == 2:
        raise ZeroDivisionError


class OneLayer(Net):
    """Its gradient is (3, 4, 12) in every step: the loss is the scalar product of the weights with that."""

    slope = torch.tensor([[3.0, 4.0, 12.0]])

    def __init__(self, optimizer=lambda p: SGD(p, lr=1.0)):
        super().__init__(nn.Linear(3, 1, bias=False), optimizer)
        with torch.no_grad():
            self.net.weight.copy_(torch.tensor([[60.0, 50.0, 1.0]]))  # the last is the smallest: it goes
        self.seen = []

    def loss(self, batch):
        return (self.net.weight * self.slope).sum() + 0 * batch[0].sum()

    def optimizer_step(self, *arguments, **options):
        before = self.net.weight.detach().clone()
        super().optimizer_step(*arguments, **options)
        self.seen.append((before - self.net.weight.detach()).flatten().tolist())


class OneLayerByHand(OneLayer):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        before = self.net.weight.detach().clone()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, 2.5, "norm")
        optimizer.step()
        self.seen.append((before - self.net.weight.detach()).flatten().tolist())


class ClipsByItself(OneLayer):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, 2.5, "norm")


class ClipsBeforeTheStep(OneLayer):
    def on_before_optimizer_step(self, optimizer):
        nn.utils.clip_grad_norm_(self.parameters(), 2.5)


class ClipsAfterTheBackward(OneLayer):
    def on_after_backward(self):
        nn.utils.clip_grad_norm_(self.parameters(), 2.5)


class TestClipping:
    """The gradient (3, 4, 12) has norm 13; without the pruned weight, (3, 4, 0) has norm 5."""

    @pytest.mark.parametrize(
        ("build", "options"),
        [
            (OneLayer, {"gradient_clip_val": 2.5}),
            *[(build, {}) for build in (OneLayerByHand, ClipsByItself, ClipsBeforeTheStep, ClipsAfterTheBackward)],
        ],
        ids=["by the Trainer", "by hand", "by the module's hook", "before the step", "after the backward"],
    )
    def test_pruned_weights_take_no_part_in_the_norm(self, build, options):
        module = build()
        fit(module, half(rounds=1), max_epochs=2, train=loader(8), **options)
        whole = [2.5 * g / 13 for g in (3, 4, 12)]
        assert module.seen == [pytest.approx(whole, rel=1e-5), pytest.approx([1.5, 2.0, 0.0], rel=1e-5)]

    def test_values(self):
        module = OneLayer()
        options = {"gradient_clip_val": 3.5, "gradient_clip_algorithm": "value"}
        fit(module, half(rounds=1), max_epochs=2, train=loader(8), **options)
        assert module.seen == [pytest.approx([3.0, 3.5, 3.5]), pytest.approx([3.0, 3.5, 0.0])]

    def test_accumulated_gradients(self):
        module = OneLayer()
        options = {"gradient_clip_val": 2.5, "accumulate_grad_batches": 2}
        fit(module, half(rounds=1), max_epochs=2, train=loader(16), **options)
        moved = [step for step in module.seen if any(step)]
        whole = [2.5 * g / 13 for g in (3, 4, 12)]
        assert moved == [pytest.approx(whole, rel=1e-5), pytest.approx([1.5, 2.0, 0.0], rel=1e-5)]


class TestStateDict:
    def test_keys_are_the_dense_models_before_during_and_after(self):
        dense, seen = Net(), []
        watch = Watch(
            on_fit_start=lambda trainer, module: seen.append(copied(module.state_dict())),
            on_train_batch_end=lambda trainer, module: seen.append(copied(module.state_dict())),
        )
        module = Net()
        seen.append(copied(module.state_dict()))
        fit(module, half(rewind_weights="init"), watch)
        seen.append(copied(module.state_dict()))
        assert len(seen) == 3 + 4 * BATCHES
        for state in seen:
            assert list(state) == list(dense.state_dict())
            dense.load_state_dict(state, strict=True)
            assert same(dense.state_dict(), state)

    def test_nothing_is_planted_in_the_module(self):
        def anatomy(module):
            return {
                name: (sorted(vars(m)), sorted(m._parameters), sorted(m._buffers), len(m._forward_hooks),
                       len(m._forward_pre_hooks), type(m))
                for name, m in module.net.named_modules()
            }  # fmt: skip

        module, during = Net(), []
        before = anatomy(module)
        ids = [id(parameter) for parameter in module.parameters()]
        fit(module, half(rewind_weights="init"), Watch(on_train_batch_end=lambda t, m: during.append(anatomy(m))))
        assert [*during, anatomy(module)] == [before] * (4 * BATCHES + 1)
        assert [id(parameter) for parameter in module.parameters()] == ids
        assert not any(parameter._backward_hooks for parameter in module.parameters())
        assert all(parameter.is_leaf for parameter in module.parameters())


class TestRounds:
    """Two rounds of pruning, two epochs each, and a third without."""

    @pytest.mark.parametrize("validate", [False, True])
    @pytest.mark.parametrize("rewind", [None, "init"])
    def test_the_file_of_a_rounds_last_epoch_holds_its_trained_weights(self, tmp_path, validate, rewind):
        pruner, ends, module = half(every_n_epochs=2, rewind_weights=rewind), [], Net()
        last = Watch(on_train_batch_end=lambda t, m: ends.append((t.current_epoch, copied(m.state_dict()))))
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        fit(module, pruner, last, saver, max_epochs=6, val=loader() if validate else None, enable_checkpointing=True)
        trained = dict(ends)  # the last batch of each epoch
        remaining = {0: 72, 1: 72, 2: 36, 3: 36, 4: 18, 5: 18}
        for epoch, count in remaining.items():
            file = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
            assert same(file["state_dict"], trained[epoch])
            alive = PruningCallback(FixedFraction(0.5))
            alive.load_state_dict(file["callbacks"]["lightning_sap/sap"])
            assert sum(survivors(alive).values()) == count
            for name, mask in alive.masks.items():
                assert torch.equal(file["state_dict"][name] != 0, mask)

    @pytest.mark.parametrize("rewind", [None, "init", 1])
    def test_nothing_is_pruned_after_the_last_epoch(self, rewind):
        counts, module, pruner = [], Net(), half(every_n_epochs=2, rewind_weights=rewind)
        last = Watch(
            on_train_batch_start=lambda t, m: counts.append(sum(survivors(pruner).values())),
            on_train_epoch_end=lambda t, m: ends.append(copied(m.state_dict())),
        )
        ends = []
        fit(module, pruner, last, max_epochs=6)
        assert counts == [72] * (2 * BATCHES) + [36] * (2 * BATCHES) + [18] * (2 * BATCHES)
        assert sum(survivors(pruner).values()) == 18
        assert same(module.state_dict(), ends[-1])

    def test_what_is_left_over_lengthens_the_last_round(self):
        counts, pruner = [], half(rounds=2, every_n_epochs=2)
        fit(
            Net(), pruner, Watch(on_train_epoch_end=lambda t, m: counts.append(sum(survivors(pruner).values()))),
            max_epochs=8,
        )  # fmt: skip
        assert counts == [72, 72, 36, 36, 18, 18, 18, 18]

    def test_rounds_0_only_holds_masks(self):
        module, pruner = Net(), half()
        fit(module, pruner)
        masks = pruner.masks
        holder = half(rounds=0, every_n_epochs=None, keep_zeros=True, reset_optimizer=False)
        checked = Checked(module.net)
        fit(checked, holder)
        assert same(holder.masks, masks)
        assert checked.steps == [(True, N * 7 // 8)] * (4 * BATCHES)
        assert [record.pruned for record in holder.history] == [None]

    def test_a_run_without_an_end_prunes_until_it_stops(self):
        pruner = half(every_n_epochs=1)
        fit(Net(), pruner, max_epochs=-1, max_steps=4 * BATCHES)
        assert sum(survivors(pruner).values()) == 9


def first_batches(module, *callbacks, max_epochs=6, every=2, **options):
    """Copies of the module's state before the first forward of each round, and of the first of all training."""
    seen = {}

    def look(trainer, module):
        if trainer.current_epoch % every == 0:
            seen.setdefault(trainer.current_epoch // every, copied(module.state_dict()))

    fit(module, *callbacks, Watch(on_train_batch_start=look), max_epochs=max_epochs, **options)
    return list(seen.values())


class TestRewinding:
    @pytest.mark.parametrize("rewind", ["init", 0])
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_every_round_starts_from_the_first_weights(self, optimizer, rewind):
        module = Net(optimizer=OPTIMIZERS[optimizer])
        first = copied(module.state_dict())
        pruner, masks = half(every_n_epochs=2, rewind_weights=rewind), []
        keep = Watch(on_train_epoch_start=lambda t, m: masks.append(pruner.masks))
        starts = first_batches(module, pruner, keep, val=loader())
        assert same(starts[0], first)
        for start, mask in zip(starts[1:], masks[2::2], strict=True):
            for name, tensor in first.items():  # BatchNorm's statistics and the biases too
                assert torch.equal(start[name], tensor * mask[name] if name in mask else tensor), name
        assert not same(module.state_dict(), starts[2])  # a rewind is followed by training

    def test_to_the_weights_after_one_epoch(self):
        module, pruner, ends, masks = Net(), half(every_n_epochs=2, rewind_weights=1), [], []
        keep = Watch(
            on_train_epoch_start=lambda t, m: masks.append(pruner.masks),
            on_train_epoch_end=lambda t, m: ends.append(copied(m.state_dict())),
        )
        starts = first_batches(module, pruner, keep)
        for start, mask in zip(starts[1:], masks[2::2], strict=True):
            for name, tensor in ends[0].items():
                assert torch.equal(start[name], tensor * mask[name] if name in mask else tensor), name

    def test_to_the_weights_at_the_first_rounds_end(self):
        module, pruner, ends = Net(), half(every_n_epochs=2, rewind_weights=2), []
        keep = Watch(on_train_epoch_end=lambda t, m: ends.append(copied(m.state_dict())))
        starts = first_batches(module, pruner, keep)
        for start in starts[1:]:
            for name, tensor in ends[1].items():
                alive = start[name] != 0 if name in PRUNABLE else torch.ones_like(tensor, dtype=torch.bool)
                assert torch.equal(start[name][alive], tensor[alive]), name
        assert [int((start["net.0.weight"] != 0).sum()) for start in starts] == [48, 24, 12]

    def test_none_goes_on_with_the_weights_as_they_are(self):
        module, pruner, ends = Net(), half(every_n_epochs=2), []
        keep = Watch(on_train_epoch_end=lambda t, m: ends.append(copied(m.state_dict())))
        starts = first_batches(module, pruner, keep)
        for start, end in zip(starts[1:], ends[1::2], strict=False):
            for name, tensor in end.items():
                alive = start[name] != 0 if name in PRUNABLE else torch.ones_like(tensor, dtype=torch.bool)
                assert torch.equal(start[name][alive], tensor[alive]), name

    def test_the_snapshot_shares_no_storage_with_the_module(self):
        module, pruner, apart = Net(), half(rewind_weights="init"), []
        first = copied(module.state_dict())

        def look(trainer, module):
            snapshot = pruner._session.state.first_weights
            if pruner.current_round() == 3:  # nothing goes back to them any more
                assert snapshot is None
                return
            live = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
            apart.append(live.isdisjoint(t.untyped_storage().data_ptr() for t in snapshot.values()))
            assert same(snapshot, first)

        fit(module, pruner, Watch(on_train_batch_end=look))
        assert apart == [True] * (3 * BATCHES)

    def test_one_callbacks_rewind_does_not_revive_what_another_pruned(self):
        for order in (1, -1):
            a = half(name="a", include="net.0.*", rewind_weights="init")
            b = half(name="b", include="net.3.*")
            clean = []
            look = Watch(on_train_batch_start=lambda t, m, clean=clean: clean.append(all_masked_are_zero(t, m)))
            fit(Net(), *[a, b][::order], look)
            assert clean == [True] * (4 * BATCHES)


POLICIES = [
    FixedFraction(0.0),
    FixedFraction(0.2),
    FixedFraction(0.999),
    SAPCallback().options.policy,
    SAPCallback(eta_r=5.0).options.policy,
    SAPCallback(gamma=0.0).options.policy,
]


class TestTargetRemaining:
    @pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
    @pytest.mark.parametrize("policy", POLICIES, ids=str)
    def test_exactly_that_fraction_survives_three_prunings(self, policy, scope):
        pruner, left = PruningCallback(policy, scope=scope, rounds=3, target_remaining=0.25), []
        fit(Net(), pruner, Watch(on_train_epoch_end=lambda t, m: left.append(sum(survivors(pruner).values()))))
        assert sum(survivors(pruner).values()) == round(0.25 * N) == 18
        # no step does less than its geometric share of what is left to do, and none goes beyond the target
        for prunings_left, before, after in zip((3, 2, 1), left[:-1], left[1:], strict=True):
            assert 18 <= after <= max(18, math.floor(before * (18 / before) ** (1 / prunings_left) + 1e-6))

    @pytest.mark.filterwarnings("ignore:sap. after pruning .* no weights")
    @pytest.mark.parametrize("target", [0.01, 0.1, 1 / 3, 0.5, 0.9, 1.0])
    def test_a_number_that_is_not_whole_is_rounded(self, target):
        pruner = PruningCallback(FixedFraction(0.5), rounds=3, target_remaining=target)
        fit(Net(), pruner)
        assert sum(survivors(pruner).values()) == round(target * N)

    def test_a_policy_that_would_do_nothing_takes_the_geometric_share_in_each_layer(self):
        pruner, left = PruningCallback(FixedFraction(0.0), rounds=3, target_remaining=0.125), []
        fit(Net(), pruner, Watch(on_train_epoch_end=lambda t, m: left.append(survivors(pruner))))
        a, b = PRUNABLE
        assert left == [{a: 48, b: 24}, {a: 24, b: 12}, {a: 12, b: 6}, {a: 6, b: 3}]

    def test_what_is_cut_is_spread_in_proportion(self):
        pruner = PruningCallback(FixedFraction(0.9), rounds=1, target_remaining=0.5)
        fit(Net(), pruner)
        assert survivors(pruner) == {"net.0.weight": 24, "net.3.weight": 12}  # 43 and 21 were wanted, 36 may go


class TestMinRemaining:
    @pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
    def test_every_parameter_keeps_its_share(self, scope):
        pruner = PruningCallback(FixedFraction(0.99), rounds=3, scope=scope, min_remaining=0.3)
        fit(Net(), pruner)
        assert survivors(pruner) == {"net.0.weight": math.ceil(0.3 * 48), "net.3.weight": math.ceil(0.3 * 24)}

    @pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
    def test_together_with_a_target(self, scope):
        pruner = PruningCallback(FixedFraction(0.99), rounds=3, scope=scope, min_remaining=0.25, target_remaining=0.25)
        fit(Net(), pruner)
        assert survivors(pruner) == {"net.0.weight": 12, "net.3.weight": 6}

    def test_in_global_scope_the_next_smallest_elsewhere_go_instead(self):
        module = Net(nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 3, bias=False)), lambda p: SGD(p, lr=0.0))
        small, large = torch.arange(1.0, 13.0).reshape(2, 6), torch.arange(101.0, 107.0).reshape(3, 2)
        with torch.no_grad():
            module.net[0].weight.copy_(small)
            module.net[1].weight.copy_(large)
        pruner = PruningCallback(FixedFraction(0.5), rounds=1, scope="global", min_remaining=0.5)
        fit(module, pruner, max_epochs=2)
        # nine of eighteen go; the first layer may lose six of its twelve, so three go from the second
        assert torch.equal(pruner.masks["net.0.weight"], small > 6)
        assert torch.equal(pruner.masks["net.1.weight"], large > 103)


class TestSecondFit:
    def test_the_same_module_keeps_its_masks_and_the_rounds_start_anew(self):
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

    def test_a_trainer_that_goes_on(self):
        module, pruner = Net(), half(rounds=1, every_n_epochs=None)
        trainer = fit(module, pruner)
        assert survivors(pruner) == {"net.0.weight": 24, "net.3.weight": 12}
        trainer.fit_loop.max_epochs = 6
        trainer.fit(module, loader())
        assert survivors(pruner) == {"net.0.weight": 12, "net.3.weight": 6}
        assert [(r.first_epoch, r.last_epoch) for r in pruner.history] == [(4, 4), (5, 5)]

    def test_another_module_starts_afresh_and_says_so(self):
        pruner = half()
        fit(Net(), pruner)
        other = Net(seeded(mlp, 5))
        left = []
        with pytest.warns(UserWarning, match="sap: this module is not the one that was pruned before; starting afres"):
            fit(other, pruner, Watch(on_train_epoch_end=lambda t, m: left.append(pruner.remaining)))
        assert left == [1.0, 0.5, 0.25, 0.125]
        assert zeros_of(other) == N * 7 // 8

    def test_another_module_of_other_shapes(self):
        pruner = half()
        fit(Net(), pruner)
        other = Net(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)))
        with pytest.warns(UserWarning, match="starting afresh"):
            fit(other, pruner, max_epochs=2)
        assert survivors(pruner) == {"net.0.weight": 30, "net.2.weight": 15}

    def test_another_module_with_a_frozen_layer_leaves_the_first_one_alone(self):
        first, pruner = Net(), half()
        fit(first, pruner)
        before = copied(first.state_dict())
        other = Net(seeded(mlp, 5))
        other.net[0].requires_grad_(False)
        with pytest.warns(UserWarning, match="starting afresh"):
            fit(other, pruner)
        assert survivors(pruner) == {"net.3.weight": 3}
        assert same(first.state_dict(), before)

    def test_the_same_module_with_a_layer_frozen_in_between_keeps_its_masks(self):
        module, pruner = Net(), PruningCallback(FixedFraction(0.5), rounds=1)
        fit(module, pruner)
        before = pruner.masks["net.0.weight"]
        module.net[0].requires_grad_(False)
        fit(module, pruner)
        assert before.sum() == 24
        assert not pruner.masks["net.0.weight"][~before].any()
        assert not module.net[0].weight[~before].any()

    def test_another_module_with_a_layer_frozen_starts_afresh_without_it(self):
        pruner, other = PruningCallback(FixedFraction(0.5), rounds=1), Net()
        fit(Net(), pruner)
        other.net[0].requires_grad_(False)
        with pytest.warns(UserWarning, match="starting afresh"):
            fit(other, pruner)
        assert survivors(pruner) == {"net.3.weight": 12}

    def test_the_same_module_with_a_layer_unfrozen_in_between_keeps_its_masks(self):
        module, pruner = Net(), half()
        module.net[0].requires_grad_(False)
        fit(module, pruner)
        assert survivors(pruner) == {"net.3.weight": 3}
        module.net[0].requires_grad_(True)
        fit(module, pruner, max_epochs=2)
        assert survivors(pruner) == {"net.0.weight": 24, "net.3.weight": 2}

    def test_keep_zeros(self):
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

    def test_zeros_count_as_weights_unless_told(self):
        module, pruner, left = Net(), half(), []
        with torch.no_grad():
            module.net[0].weight[:4] = 0.0
        fit(module, pruner, Watch(on_train_start=lambda t, m: left.append(pruner.remaining)), max_epochs=2)
        assert left == [1.0]


class TestWhatPrunesNothing:
    def test_fast_dev_run(self):
        module, pruner = Net(), half()
        trainer = fit(module, pruner, val=loader(), fast_dev_run=True)
        assert trainer.global_step == 1
        assert pruner.remaining == 1.0
        assert zeros_of(module) == 0
        assert pruner.current_round() == 0

    def test_fast_dev_run_of_several_batches_keeps_what_was_pruned_before(self):
        module, pruner = Net(), half()
        fit(module, pruner)
        masks = pruner.masks
        fit(module, pruner, val=loader(), fast_dev_run=BATCHES)
        assert same(pruner.masks, masks)
        assert zeros_of(module) == N * 7 // 8

    def test_fast_dev_run_checks_no_rounds(self):
        pruner = half(rounds=50, every_n_epochs=9, target_remaining=0.1, rewind_weights=40)
        trainer = fit(Net(), pruner, fast_dev_run=2)
        assert trainer.global_step == 2
        assert pruner.remaining == 1.0

    @pytest.mark.parametrize("run", ["validate", "test", "predict"])
    def test_evaluation(self, run, tmp_path):
        module, pruner = Net(), half()
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer = fit(module, pruner, saver, enable_checkpointing=True)
        before, masks = copied(module.state_dict()), pruner.masks
        module.forward = lambda batch: module.net(batch[0])
        getattr(trainer, run)(module, loader())
        assert same(module.state_dict(), before)
        assert same(pruner.masks, masks)
        # an early file: its denser weights are evaluated, and the live masks stay as they are
        getattr(trainer, run)(module, loader(), ckpt_path=str(tmp_path / "epoch=1.ckpt"), weights_only=True)
        assert zeros_of(module) == N // 2
        assert same(pruner.masks, masks)
        assert pruner.current_round() == 3

    @pytest.mark.parametrize("run", ["validate", "test", "predict"])
    def test_a_callback_that_never_trained(self, run):
        module, pruner = Net(), half()
        before = copied(module.state_dict())
        module.forward = lambda batch: module.net(batch[0])
        getattr(quiet_trainer(pruner), run)(module, loader())
        assert pruner.masks == {}
        assert same(module.state_dict(), before)

    def test_sanity_check(self):
        module, pruner, seen = Net(), half(), []
        first = copied(module.state_dict())
        look = Watch(on_sanity_check_end=lambda t, m: seen.append(same(m.state_dict(), first)))
        trainer = fit(module, pruner, look, val=loader(), num_sanity_val_steps=2)
        assert seen == [True]
        assert trainer.callback_metrics["sap/round"] == 3

    def test_sanity_check_of_a_second_fit(self):
        module, pruner, seen = Net(), half(rounds=1, every_n_epochs=None), []
        fit(module, pruner, val=loader())
        before, masks = copied(module.state_dict()), pruner.masks
        look = Watch(on_sanity_check_end=lambda t, m: seen.extend([copied(m.state_dict()), pruner.masks]))
        fit(module, pruner, look, val=loader(), num_sanity_val_steps=2)
        assert [same(*pair) for pair in zip(seen, [before, masks], strict=True)] == [True, True]
        assert pruner.remaining == 0.25

    def test_epochs_without_a_step(self):
        """A round that took no optimizer step is not a round."""
        module, pruner = Net(), half()
        module.on_train_batch_start = lambda batch, index: -1 if module.trainer.current_epoch < 2 else None
        trainer = fit(module, pruner)
        assert trainer.global_step == 2 * BATCHES
        assert pruner.current_round() == 1

    def test_an_epoch_without_a_step_in_a_trainer_that_goes_on(self):
        module, pruner = Net(), half(rounds=1, every_n_epochs=None)
        trainer = fit(module, pruner)
        module.on_train_batch_start = lambda batch, index: -1 if trainer.current_epoch == 4 else None
        trainer.fit_loop.max_epochs = 6
        trainer.fit(module, loader())
        assert trainer.global_step == 5 * BATCHES
        assert pruner.current_round() == 0
        assert pruner.remaining == 0.5


class TestLogging:
    def test_values_of_every_epoch(self):
        pruner, seen = half(every_n_epochs=2, name="half"), []
        keys = ("half/round", "half/remaining", "half/pruned")
        look = Watch(on_train_epoch_end=lambda t, m: seen.append([float(t.callback_metrics[key]) for key in keys]))
        fit(Net(), pruner, look, max_epochs=6)
        assert seen == [[0, 1.0, 0]] * 2 + [[1, 0.5, 36]] * 2 + [[2, 0.25, 18]] * 2

    def test_at_validation_end_they_are_of_the_same_epoch(self):
        pruner, seen = half(), []
        look = Watch(
            on_validation_end=lambda t, m: seen.append(None if t.sanity_checking else _remaining(t)),
        )
        fit(Net(), look, pruner, val=loader())
        assert seen == [None, 1.0, 0.5, 0.25, 0.125]

    @pytest.mark.parametrize("validate", [False, True])
    @pytest.mark.parametrize("first", [False, True])
    @pytest.mark.parametrize("key", ["sap/remaining", "sap/round", "sap/pruned"])
    def test_early_stopping_finds_them_in_every_epoch(self, validate, first, key):
        module, pruner, seen = Net(), half(), []
        stop = EarlyStopping(key, patience=100, check_finite=False)
        watch = Watch(on_train_epoch_end=lambda t, m: seen.append(t.current_epoch))
        callbacks = [stop, pruner] if first else [pruner, stop]
        fit(module, *callbacks, watch, val=loader() if validate else None)
        assert seen == [0, 1, 2, 3]

    @pytest.mark.parametrize("val_every", [1, 2, 3])
    def test_early_stopping_beside_rare_validation(self, val_every):
        pruner, values = half(), []

        class Stop(EarlyStopping):
            def _evaluate_stopping_criteria(self, current):
                values.append(float(current))
                return super()._evaluate_stopping_criteria(current)

        fit(Net(), Stop("sap/remaining", patience=100), pruner, val=loader(), check_val_every_n_epoch=val_every)
        left = [1.0, 0.5, 0.25, 0.125]
        assert values == left[val_every - 1 :: val_every]

    def test_early_stopping_ends_the_run_when_enough_is_pruned(self):
        pruner = half(every_n_epochs=1)
        stop = EarlyStopping("sap/remaining", stopping_threshold=0.3)
        trainer = fit(Net(), pruner, stop, max_epochs=50)
        assert trainer.current_epoch == 3
        assert pruner.remaining == 0.25

    def test_barebones_is_said_to_silence_it_and_prunes_all_the_same(self):
        pruner = half()
        message = (
            "sap: Trainer(barebones=True) silences logging: sap/round, sap/remaining, sap/pruned reach no logger and "
            "no callback, and the history has no logged metrics; masks, rounds and the rest of the history are kept "
            "all the same."
        )
        with pytest.warns(UserWarning, match="barebones") as caught:
            trainer = fit(Net(), pruner, **BAREBONES)
        assert [str(w.message) for w in caught if "sap:" in str(w.message)] == [message]
        assert trainer.callback_metrics == {}
        assert pruner.remaining == 0.125
        assert [(r.remaining, r.metrics) for r in pruner.history] == [(2.0**-t, {}) for t in range(4)]

    def test_the_plan_at_the_start_and_the_result_at_the_end(self, caplog):
        with caplog.at_level(logging.INFO):
            fit(Net(), half(rewind_weights="init", scope="global"))
        said = [r.message for r in caplog.records if r.message.startswith("sap:")]
        assert said == [
            "sap: 3 prunings in rounds of 1 epoch from epoch 0, scope global, weights rewound to 'init', "
            "FixedFraction(fraction=0.5)\n"
            "  prunable: 72 weights (100.0% remain) in net.0.weight, net.3.weight",
            "sap: 12.50% of 72 weights remain after 3 prunings. For a sparser network give more rounds (rounds, "
            "max_epochs) or a target_remaining.",
        ]

    def test_a_parameter_that_loses_all_its_weights_is_warned_of(self):
        module = Net(nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3)), lambda p: SGD(p, lr=0.0))
        with torch.no_grad():
            module.net[0].weight.fill_(0.01)
        pruner = PruningCallback(FixedFraction(0.7), rounds=1, scope="global")
        with pytest.warns(UserWarning, match=r"no weights are left in 'net\.0\.weight'\. Give min_remaining"):
            fit(module, pruner, max_epochs=2)


def _remaining(trainer):
    return float(trainer.callback_metrics["sap/remaining"])


class TestTwoCallbacks:
    def test_each_prunes_its_part(self):
        a = half(name="a", include="net.0.*")
        b = SAPCallback(name="b", include="net.3.*", target_remaining=0.25, rounds=1, scope="neuron")
        module, seen = Net(), []
        keys = ("a/remaining", "b/remaining", "a/round", "b/round")
        look = Watch(on_train_epoch_end=lambda t, m: seen.append([float(t.callback_metrics[k]) for k in keys]))
        fit(module, a, b, look)
        assert survivors(a) == {"net.0.weight": 6}
        assert survivors(b) == {"net.3.weight": 6}
        assert seen == [[1, 1, 0, 0], [0.5, 1, 1, 0], [0.25, 0.25, 2, 1], [0.125, 0.25, 3, 1]]

    def test_of_one_class_with_two_names(self):
        a, b = half(name="a", include="net.0.*"), half(name="b", exclude="net.0.*", every_n_epochs=2)
        fit(Net(), a, b)
        assert (survivors(a), survivors(b)) == ({"net.0.weight": 6}, {"net.3.weight": 12})


class WithCausalMask(Net):
    """A user's buffer whose name looks like a pruning mask."""

    def __init__(self):
        super().__init__()
        self.register_buffer("causal_mask", torch.tril(torch.ones(6, 6)))

    def loss(self, batch):
        return (self.net(batch[0] @ self.causal_mask) - batch[1]).square().mean()


def test_a_buffer_named_like_a_mask(tmp_path):
    module, pruner = WithCausalMask(), half(rewind_weights="init")
    trainer = fit(module, pruner)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    fresh = WithCausalMask()
    fresh.load_state_dict(torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"], strict=True)
    assert same(fresh.state_dict(), module.state_dict())
    assert torch.equal(fresh.causal_mask, torch.tril(torch.ones(6, 6)))
    assert zeros_of(fresh) == N * 7 // 8


def test_a_compiled_module_goes_by_the_same_names():
    module = Net(torch.compile(seeded(mlp), backend="eager"))
    seen = []
    module.loss = lambda batch: (module.net._orig_mod(batch[0]) - batch[1]).square().mean()
    pruner = half(rewind_weights="init", include="net.0.*")
    fit(module, pruner, Watch(on_train_batch_start=lambda t, m: seen.append(all_masked_are_zero(t, m))))
    assert survivors(pruner) == {"net.0.weight": 6}
    assert seen == [True] * (4 * BATCHES)


def test_a_weight_unfrozen_later_joins_at_the_next_round():
    module, pruner, seen = Net(), half(every_n_epochs=1), []
    module.net[0].requires_grad_(False)

    def unfreeze(trainer, module):
        seen.append(survivors(pruner))
        if trainer.current_epoch == 1:
            module.net[0].requires_grad_(True)

    fit(module, pruner, Watch(on_train_epoch_end=unfreeze))
    a, b = PRUNABLE
    assert seen == [{b: 24}, {b: 12}, {a: 24, b: 6}, {a: 12, b: 3}]
    assert list(pruner.masks) == [a, b]


def test_a_weight_frozen_later_stays_under_its_mask():
    module, pruner, seen = Net(), half(), []

    def freeze(trainer, module):
        seen.append(survivors(pruner))
        module.net[0].requires_grad_(trainer.current_epoch < 1)

    fit(module, pruner, Watch(on_train_epoch_end=freeze))
    a, b = PRUNABLE
    assert seen == [{a: 48, b: 24}, {a: 24, b: 12}, {a: 24, b: 6}, {a: 24, b: 3}]
    assert [record.layers_remaining for record in pruner.history][2] == {a: 0.5, b: 0.25}
    assert set(pruner.history[1].layers_pqi) == set(pruner.history[1].layers_pqi_pruned) == {a, b}


@pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
def test_weights_frozen_between_two_fits_are_pruned_no_further(scope):
    module, pruner = Net(), half(scope=scope)
    fit(module, pruner, max_epochs=2)
    first, weight = pruner.masks, module.net[0].weight.detach().clone()
    module.net[0].requires_grad_(False)
    fit(module, pruner)
    a, b = PRUNABLE
    assert torch.equal(module.net[0].weight, weight)
    assert torch.equal(pruner.masks[a], first[a])
    assert survivors(pruner)[b] < int(first[b].sum())


def test_a_target_beside_frozen_weights_is_met_by_the_others():
    module, pruner = Net(), half(target_remaining=0.25, rounds=3)
    freeze = Watch(on_train_epoch_end=lambda t, m: m.net[0].requires_grad_(t.current_epoch < 1))
    with pytest.warns(
        UserWarning, match=r"pruned no further: net\.0\.weight\. These hold more than target_remaining=0\.25"
    ):
        fit(module, pruner, freeze)
    a, b = PRUNABLE
    assert survivors(pruner)[a] > 12
    assert survivors(pruner)[b] == 6


def test_a_target_is_met_exactly_where_weights_frozen_on_the_way_leave_room_for_it():
    module, pruner = Net(), half(target_remaining=0.4)
    freeze = Watch(on_train_epoch_end=lambda t, m: m.net[3].requires_grad_(t.current_epoch < 1))
    fit(module, pruner, freeze)
    assert survivors(pruner)["net.3.weight"] == pruner.history[1].layers_remaining["net.3.weight"] * 24
    assert sum(survivors(pruner).values()) == 29  # of 72


def test_a_target_is_met_exactly_where_weights_frozen_before_leave_room_for_it():
    module, first, pruner = Net(), half(), half(target_remaining=0.4)
    fit(module, first, max_epochs=2)
    module.net[3].requires_grad_(False)
    pruner.load_state_dict(first.state_dict())
    fit(module, pruner)
    assert survivors(pruner)["net.3.weight"] == survivors(first)["net.3.weight"] == 12
    assert sum(survivors(pruner).values()) == 29  # of 72


def test_floors_of_the_others_limit_what_frozen_weights_may_hold_of_a_target():
    module, pruner = Net(), half(target_remaining=0.4, min_remaining=0.3)
    freeze = Watch(on_train_epoch_end=lambda t, m: m.net[3].requires_grad_(t.current_epoch < 0))
    with pytest.warns(UserWarning, match=r"pruned no further: net\.3\.weight\. These hold more than target_rem"):
        fit(module, pruner, freeze)
    assert survivors(pruner) == {"net.0.weight": 19, "net.3.weight": 24}  # two fifths of the first


def test_steps_that_lightning_does_not_count_are_told():
    class Uncounted(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    pruner, seen = half(), []
    message = "The round ends at trainer.global_step=0, where it began, though its optimizer stepped"
    with pytest.raises(ValueError, match=message):
        fit(Uncounted(), pruner, Watch(on_train_epoch_end=lambda trainer, _: seen.append(trainer.current_epoch)))
    assert seen == [0]
    assert pruner.remaining == 1.0


def test_a_second_fit_without_any_step_is_no_error():
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
    fit(module, pruner)
    assert pruner.remaining == before < 1


def test_nothing_is_pruned_where_all_is_frozen():
    module, pruner = Net(), half()
    freeze = Watch(on_train_epoch_end=lambda t, m: [m.net[i].requires_grad_(t.current_epoch < 1) for i in (0, 3)])
    fit(module, pruner, freeze)
    assert [record.pruned for record in pruner.history] == [36, 0, 0, None]
    assert pruner.remaining == 0.5


class OtherOptimizer:
    """What Lightning takes for an optimizer though it is none of PyTorch's."""

    def __init__(self, optimizer):
        self.inner = optimizer

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)
    defaults = property(lambda self: self.inner.defaults)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)

    def step(self, closure=None):
        return self.inner.step(closure)

    def zero_grad(self, *_, **__):
        self.inner.zero_grad()


def test_an_optimizer_without_hooks():
    module, pruner, clean = Net(optimizer=lambda p: OtherOptimizer(OPTIMIZERS["Adam"](p))), half(), []
    look = Watch(on_train_batch_end=lambda t, m: clean.append(all_masked_are_zero(t, m)))
    fit(module, pruner, look)
    assert clean == [True] * (4 * BATCHES)
    assert pruner.remaining == 0.125


def test_a_module_without_an_optimizer():
    module, pruner = Net(optimizer=lambda p: None), half()
    with pytest.warns(UserWarning, match="will run with no optimizer"):
        fit(module, pruner)
    assert pruner.remaining == 0.125
    assert zeros_of(module) == N * 7 // 8


def test_a_lazy_layer_has_no_first_weights():
    network = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3))
    message = "There are no weights to rewind to yet: ['net.0.weight', 'net.0.bias'] are not initialized before the"
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(Net(network), half(rewind_weights="init"))
    pruner = half(rewind_weights=1)
    fit(Net(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3))), pruner)
    assert pruner.remaining == 0.125


def test_a_weight_that_is_a_strided_view():
    module, pruner = Net(), half()
    module.net[0].weight = nn.Parameter(torch.randn(8, 12)[:, ::2])
    fit(module, pruner, PQIMonitor(stop_on=None))
    assert not module.net[0].weight.is_contiguous()
    assert zeros_of(module) == N * 7 // 8


def test_a_state_is_taken_up_at_once_after_an_exception():
    first, pruner = half(), half()
    fit(Net(), first)
    with pytest.raises(ZeroDivisionError):
        fit(Net(), pruner, Watch(on_train_epoch_end=_fail_in_epoch_2))
    pruner.load_state_dict(first.state_dict())
    assert pruner.remaining == first.remaining == 0.125


def test_a_target_counts_the_weights_that_joined():
    module = Net()
    module.net[0].requires_grad_(False)
    pruner = PruningCallback(FixedFraction(0.1), rounds=3, target_remaining=0.25)
    join = Watch(on_train_epoch_end=lambda t, m: m.net[0].requires_grad_(t.current_epoch >= 2))
    fit(module, pruner, join)
    assert sum(survivors(pruner).values()) == round(0.25 * N)
