"""What is trained: what an optimizer holds and what had a gradient in the round; copies share the masks of others."""

import copy
import logging
import warnings
from functools import partial

import pytest
import torch
from averaging import Keeping
from helpers import Crash, Net, Watch, copied, crash, fit, half, is_masked, loader, parameters, same, seeded, survivors
from lightning.pytorch import LightningModule
from resuming import Alike
from timm.utils.model_ema import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sap import FixedFraction, PQIMonitor, PruningCallback

STUDENT = {"student.0.weight": 160, "student.2.weight": 48}  # 208
NET = {"net.0.weight": 48, "net.2.weight": 24}


def classifier(seed=1):
    return seeded(lambda: nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3)), seed)


def points():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(32, 10, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 8)


def only_student(module):
    return module.student.parameters()


def everything(module):
    return module.parameters()


class Distilled(LightningModule):
    """A student that learns from a teacher, whose parameters require gradients and get none."""

    def __init__(self, held=only_student):
        super().__init__()
        self.teacher, self.student, self.held = classifier(2), classifier(1), held

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            wanted = self.teacher(batch[0]).softmax(1)
        return nn.functional.cross_entropy(self.student(batch[0]), wanted)

    def configure_optimizers(self):
        return Adam(self.held(self), lr=0.01)


class TestDistillation:
    @pytest.mark.parametrize("held", [only_student, everything])
    @pytest.mark.parametrize("scope", ["layer", "global"])
    def test_a_teacher_keeps_all_its_weights_and_is_not_prunable(self, held, scope):
        module, pruner = Distilled(held), half(every_n_epochs=1, target_remaining=0.2, scope=scope)
        before = copied(module.teacher.state_dict())
        fit(module, pruner, train=points())
        assert same(module.teacher.state_dict(), before)
        assert sum(int((p == 0).sum()) for p in module.teacher.parameters()) == 0
        assert {name: mask.numel() for name, mask in pruner.masks.items()} == STUDENT
        assert sum(survivors(pruner).values()) == round(0.2 * 208)

    def test_a_teacher_changes_nothing_of_how_the_student_is_pruned(self):
        runs = [Distilled(), Distilled(everything)]
        pruners = [half(), half()]
        for module, pruner in zip(runs, pruners, strict=True):
            fit(module, pruner, train=points())
        assert same(pruners[0].masks, pruners[1].masks)
        assert same(runs[0].student.state_dict(), runs[1].student.state_dict())

    def test_what_no_optimizer_holds_is_said_with_its_size(self, caplog):
        with caplog.at_level(logging.INFO):
            fit(Distilled(), half(), train=points())
        line = "  not prunable: 208 weights in teacher.0.weight, teacher.2.weight, which no optimizer holds\n"
        assert caplog.text.count(line) == 1

    def test_what_an_optimizer_holds_and_has_no_gradient_is_said_once(self, caplog):
        with caplog.at_level(logging.INFO):
            fit(Distilled(everything), half(), train=points())
        line = (
            "sap: an optimizer holds these, and they had no gradient in the first round: 208 weights in "
            "teacher.0.weight, teacher.2.weight. They are left out until they have one."
        )
        assert caplog.text.count(line) == 1

    def test_a_monitor_alone_leaves_a_teacher_out(self):
        monitor = PQIMonitor(stop_on=None, log_layers=True)
        trainer = fit(Distilled(), monitor, train=points(), max_epochs=1)
        logged = {key.removeprefix("pqi/") for key in trainer.callback_metrics if key.startswith("pqi/")}
        assert logged & {"student.0.weight", "teacher.0.weight"} == {"student.0.weight"}

    def test_a_teacher_is_left_out_after_a_resume_too(self, tmp_path):
        whole, path = half(), tmp_path / "killed.ckpt"
        fit(Distilled(everything), whole, train=points())
        kill = Watch(on_train_epoch_end=lambda t, m: (t.save_checkpoint(path), crash()) if t.current_epoch == 1 else 0)
        with pytest.raises(Crash):
            fit(Distilled(everything), half(), kill, train=points())
        resumed = half()
        fit(Distilled(everything), resumed, train=points(), ckpt_path=path)
        assert same(resumed.masks, whole.masks)
        assert resumed.masks.keys() == STUDENT.keys()


def toggled(module, network, trains):
    network.requires_grad_(trains)


def untouched(module, network, trains):
    """As without any freezing: the gradient that the other network's step leaves is never used."""


class GAN(LightningModule):
    """A discriminator that is frozen for the generator's step, and still is when the batch ends."""

    def __init__(self, freeze=toggled):
        super().__init__()
        self.automatic_optimization, self.freeze = False, freeze
        self.generator = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6)), 1)
        self.discriminator = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)), 2)

    def training_step(self, batch, batch_idx):
        real, (g, d) = batch[0], self.optimizers()
        noise = torch.ones(len(real), 4) * torch.linspace(-1, 1, len(real))[:, None]
        self.freeze(self, self.discriminator, True)
        d.zero_grad()
        fake = self.generator(noise).detach()
        self.manual_backward(self.discriminator(fake).mean() - self.discriminator(real).mean())
        d.step()
        self.freeze(self, self.discriminator, False)
        g.zero_grad()
        self.manual_backward(-self.discriminator(self.generator(noise)).mean())
        g.step()

    def configure_optimizers(self):
        return [SGD(network.parameters(), lr=0.01) for network in (self.generator, self.discriminator)]


class TestGAN:
    GENERATOR = {"generator.0.weight": 32, "generator.2.weight": 48}
    DISCRIMINATOR = {"discriminator.0.weight": 48, "discriminator.2.weight": 8}

    @pytest.mark.parametrize("scope", ["layer", "global"])
    def test_a_frozen_discriminator_is_pruned_as_one_that_is_never_frozen(self, scope):
        pruners = []
        for freeze in (toggled, untouched):
            pruners.append(half(scope=scope, target_remaining=0.25))
            module = GAN(freeze)
            fit(module, pruners[-1])
            assert is_masked(module.state_dict(), pruners[-1].masks)
        assert not module.discriminator[0].weight.requires_grad or freeze is untouched
        assert same(*(pruner.masks for pruner in pruners))
        assert sum(survivors(pruners[0]).values()) == round(0.25 * 136)
        assert pruners[0].masks.keys() == self.GENERATOR.keys() | self.DISCRIMINATOR.keys()
        if scope == "layer":
            assert [survivors(pruners[0])[name] for name in self.DISCRIMINATOR] == [12, 2]

    def test_a_discriminator_frozen_when_a_second_fit_starts_is_pruned_on(self):
        module, first, second = GAN(), half(), half(rounds=1, every_n_epochs=None, target_remaining=0.5)
        fit(module, first, max_epochs=2)
        assert not module.discriminator[0].weight.requires_grad
        with pytest.warns(UserWarning, match=r"^sap: 68 of 136 prunable weights are exactly zero"):
            fit(module, second, max_epochs=2)
        assert {name: survivors(second)[name] for name in self.DISCRIMINATOR} == {
            "discriminator.0.weight": 24,
            "discriminator.2.weight": 4,
        }

    def test_a_discriminator_alone_is_pruned_though_it_is_frozen_when_fit_starts(self):
        module, pruner = GAN(), half(include="discriminator.*")
        module.discriminator.requires_grad_(False)
        fit(module, pruner)
        assert survivors(pruner) == {"discriminator.0.weight": 6, "discriminator.2.weight": 1}

    def test_a_network_frozen_between_its_backward_and_its_step_is_pruned(self):
        class Early(GAN):
            def manual_backward(self, loss, *arguments):
                super().manual_backward(loss, *arguments)
                self.discriminator.requires_grad_(False)

        module, pruner = Early(), half()
        fit(module, pruner)
        assert {name: survivors(pruner)[name] for name in self.DISCRIMINATOR} == {
            "discriminator.0.weight": 6,
            "discriminator.2.weight": 1,
        }


def momentum_encoder(network):
    return copy.deepcopy(network).requires_grad_(False)


COPIES = {
    "AveragedModel": AveragedModel,
    "AveragedModel, exponential": partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "timm's ModelEmaV2": partial(ModelEmaV2, decay=0.9),
    "timm's ModelEmaV3": partial(ModelEmaV3, decay=0.9),
    "momentum encoder": momentum_encoder,
    "momentum encoder that requires gradients": copy.deepcopy,
}


def disturb(part):
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.01)


def copy_of(module):
    """The parameters of the copy by the names that they have in the network."""
    copied_part = getattr(module.copy, "module", module.copy)
    return {f"net.{name}": parameter.detach() for name, parameter in copied_part.named_parameters()}


@pytest.mark.filterwarnings("ignore:Found 4 module.s. in eval mode")  # timm's
class TestCopies:
    @pytest.mark.parametrize("held", [lambda m: m.net.parameters(), everything], ids=["the network held", "all held"])
    @pytest.mark.parametrize("kind", COPIES)
    def test_a_copy_has_the_mask_of_its_source_after_every_step(self, kind, held):
        module, pruner, clean, moves = Keeping(COPIES[kind], held), half(), [], []

        def look(trainer, module):
            masks = {name: mask for name, mask in pruner.masks.items() if name in NET}
            clean.append(is_masked(copy_of(module), masks))
            moves.append(not torch.equal(copy_of(module)["net.0.weight"], module.net[0].weight))

        fit(module, pruner, Watch(on_train_batch_end=look))
        assert clean == [True] * 12
        assert moves[-1]  # the average is one still
        assert survivors(pruner) == {"net.0.weight": 6, "net.2.weight": 3}
        assert {n: int((t != 0).sum()) for n, t in copy_of(module).items() if n in NET} == survivors(pruner)

    @pytest.mark.parametrize("kind", COPIES)
    def test_a_copy_changes_nothing_of_how_its_source_is_pruned(self, kind):
        pruners = []
        for make in (COPIES[kind], lambda network: nn.Identity()):
            pruners.append(half(target_remaining=0.2, scope="global"))
            module = Keeping(make)
            if make is not COPIES[kind]:
                module.follow = lambda: None
            fit(module, pruners[-1])
        assert same(*(pruner.masks for pruner in pruners))

    def test_a_copy_holds_the_masks_that_a_sparse_model_brings(self):
        module = Keeping(AveragedModel)
        with torch.no_grad():
            module.net[0].weight[:4] = 0
        fit(module, PruningCallback(FixedFraction(0.5), rounds=0, keep_zeros=True), max_epochs=1)
        assert not module.copy.module[0].weight[:4].any()
        assert module.copy.module[0].weight[4:].all()

    def test_a_copy_rewound_with_the_weights_is_masked(self):
        module, pruner = Keeping(momentum_encoder), half(rewind_weights="init")
        fit(module, pruner)
        assert is_masked(copy_of(module), pruner.masks)

    def test_copies_are_known_after_a_resume(self, tmp_path):
        def run(pruner, *callbacks, **options):
            module = Keeping(momentum_encoder)
            fit(module, pruner, *callbacks, train=DataLoader(Alike(2), 8), **options)
            return module

        def kill(trainer, module):
            if trainer.global_step == 8:  # in mid-round, two rounds after the copy was found
                trainer.save_checkpoint(tmp_path / "killed.ckpt")
                crash()

        whole = run(half())
        with pytest.raises(Crash):
            run(half(), Watch(on_train_batch_end=kill))
        resumed = run(half(), ckpt_path=tmp_path / "killed.ckpt")
        assert same(resumed.state_dict(), whole.state_dict())

    def test_a_fixed_copy_stays_as_it_is(self):
        module = Keeping(momentum_encoder)
        module.decay = 1.0
        before = copied(module.copy.state_dict())
        fit(module, half())
        assert same(module.copy.state_dict(), before)

    def test_an_average_of_what_is_not_in_the_module_is_warned_of_and_not_pruned(self):
        module, pruner = Keeping(lambda network: AveragedModel(nn.Sequential(nn.Linear(6, 5)))), half()
        module.follow = lambda: None
        message = (
            r"^sap: these are averages, and what they average was not found in the module: copy\.module\.0\.weight\. "
        )
        with pytest.warns(UserWarning, match=message):
            fit(module, pruner)
        assert pruner.masks.keys() == NET.keys()
        assert module.copy.module[0].weight.all()

    def test_an_average_alone_is_refused_with_the_reason(self):
        reason = r"Selected, but not prunable: 'copy\.module\.0\.weight' \(it is an average of others\)"
        with pytest.raises(ValueError, match=reason):
            fit(Keeping(AveragedModel, everything), half(include="copy.*0.weight"))

    @pytest.mark.parametrize("kind", ["AveragedModel", "momentum encoder"])
    def test_a_copy_that_someone_writes_is_masked_after_the_next_step(self, kind):
        module, pruner, clean = Keeping(COPIES[kind]), half(), []

        def look(trainer, module):
            clean.append(is_masked(copy_of(module), {n: m for n, m in pruner.masks.items() if n in NET}))

        noise = Watch(on_train_batch_start=lambda t, m: disturb(m.copy))
        fit(module, noise, pruner, Watch(on_train_batch_end=look))
        assert clean == [True] * 12

    def test_a_copy_that_someone_writes_is_masked_after_a_resume_in_mid_round(self, tmp_path):
        def run(*callbacks, **options):
            module, pruner = Keeping(momentum_encoder), half()
            fit(module, *callbacks, pruner, train=DataLoader(Alike(2), 8), **options)

        def kill(trainer, module):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "killed.ckpt")
                crash()

        clean = []
        with pytest.raises(Crash):
            run(Watch(on_train_batch_end=kill))
        noise = Watch(
            on_train_batch_start=lambda t, m: disturb(m.copy),
            on_train_batch_end=lambda t, m: clean.append(int((m.copy[0].weight != 0).sum())),
        )
        run(noise, ckpt_path=tmp_path / "killed.ckpt")
        assert clean == [12] + [6] * 3  # the rest of round 2, and round 3

    def test_a_copy_that_did_not_start_as_one_is_warned_of_once(self):
        module = Keeping(lambda network: copy.deepcopy(network).requires_grad_(False))
        with torch.no_grad():
            module.copy[0].weight.add_(0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(module, half())
        said = [str(warning.message) for warning in caught if "change without a gradient" in str(warning.message)]
        assert len(said) == 1
        assert said[0].startswith("sap: these weights change without a gradient: copy.0.weight. They stay dense.")
        assert module.copy[0].weight.all()
        assert int((module.copy[2].weight != 0).sum()) == 3


class Silent:
    """Gradient descent that Lightning takes for an optimizer, and that calls no hook of PyTorch."""

    def __init__(self, parameters):
        self.param_groups, self.state, self.defaults = [{"params": list(parameters), "lr": 0.1}], {}, {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        """It keeps nothing."""

    def step(self, closure=None):
        closure()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad)

    def zero_grad(self, *_, **__):
        """The module does."""


class TestOptimizers:
    def test_of_an_optimizer_that_holds_a_part_only_that_is_pruned(self, caplog):
        module = Net(optimizer=lambda p: SGD(list(p)[-2:], lr=0.1))
        pruner = half()
        before = module.net[0].weight.detach().clone()
        with caplog.at_level(logging.INFO):
            fit(module, pruner)
        assert survivors(pruner) == {"net.3.weight": 3}
        assert torch.equal(module.net[0].weight, before)
        assert "not prunable: 48 weights in net.0.weight, which no optimizer holds" in caplog.text

    def test_parameters_of_two_optimizers_are_pruned_once(self):
        class Twice(Net):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(batch))
                    optimizer.step()

            def configure_optimizers(self):
                return SGD(self.parameters(), lr=0.1), Adam(self.parameters(), lr=0.01)

        pruner = half()
        fit(Twice(), pruner)
        assert survivors(pruner) == {"net.0.weight": 6, "net.3.weight": 3}

    def test_a_group_that_is_added_later_joins_once_it_had_a_gradient(self, caplog):
        module, pruner = Net(optimizer=lambda p: SGD(list(p)[-2:], lr=0.1)), half()

        def add(trainer, module):
            if trainer.current_epoch == 1:
                trainer.optimizers[0].add_param_group({"params": [module.net[0].weight]})

        with caplog.at_level(logging.INFO):
            fit(module, pruner, Watch(on_train_epoch_start=add))
        assert survivors(pruner) == {"net.0.weight": 12, "net.3.weight": 3}
        line = "sap: trained for the first time, and prunable from now on: 48 weights in net.0.weight."
        assert caplog.text.count(line) == 1

    def test_earlier_masks_hold_for_what_the_second_optimizer_does_not_hold(self):
        module, pruner = Net(), half()
        fit(module, pruner, max_epochs=2)
        first = pruner.masks["net.0.weight"]
        module.optimizer = lambda p: SGD(list(p)[-2:], lr=0.1)
        fit(module, pruner, max_epochs=2)
        assert torch.equal(pruner.masks["net.0.weight"], first)
        assert survivors(pruner) == {"net.0.weight": 24, "net.3.weight": 6}

    def test_nothing_prunable_in_any_optimizer_is_refused_with_the_reason(self):
        module = Net(optimizer=lambda p: SGD(list(p)[3:4], lr=0.1))  # a bias
        with pytest.raises(ValueError, match=r"Selected, but not prunable: 'net\.0\.weight' \(it is in no optimizer\)"):
            fit(module, half())

    @pytest.mark.filterwarnings("ignore:sap. .*prun")  # that nothing was pruned
    def test_where_nothing_prunable_has_a_gradient_nothing_is_pruned(self):
        module, pruner = Distilled(everything), half(include="teacher.*")
        before = copied(module.teacher.state_dict())
        fit(module, pruner, train=points())
        assert pruner.remaining == 1.0
        assert same(module.teacher.state_dict(), before)

    def test_an_optimizer_that_tells_of_no_step_prunes_what_is_not_frozen(self):
        class ByHand(Net):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                self.loss(batch).backward()  # no hook of Lightning either
                self.optimizers().step()
                self.zero_grad()

        module, pruner = ByHand(optimizer=Silent), half()
        fit(module, pruner)
        assert survivors(pruner) == {"net.0.weight": 6, "net.3.weight": 3}

    def test_of_an_optimizer_that_tells_of_its_steps_nothing_without_a_gradient_is_pruned(self, caplog):
        """Though an optimizer holds it and it is not frozen, and no other weight of the module had a gradient."""

        class OnlyBias(Net):
            def loss(self, batch):
                with torch.no_grad():
                    hidden = self.net[:3](batch[0]) @ self.net[3].weight.T
                return (hidden + self.net[3].bias).square().mean()

        module, pruner = OnlyBias(), half()
        with pytest.warns(UserWarning, match="since none of them had a gradient"):
            fit(module, pruner)
        assert survivors(pruner) == {"net.0.weight": 48, "net.3.weight": 24}

    def test_a_teacher_held_by_one_that_tells_of_no_step_is_left_alone_where_gradients_are_seen(self):
        class Held(Distilled):
            def configure_optimizers(self):
                return Silent(self.parameters())

        module, pruner = Held(), half()
        before = copied(module.teacher.state_dict())
        fit(module, pruner, train=points())
        assert same(module.teacher.state_dict(), before)
        assert survivors(pruner) == {"student.0.weight": 20, "student.2.weight": 6}

    def test_of_two_optimizers_one_that_tells_of_no_step_has_its_part_pruned_too(self):
        class Two(Net):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                told, silent = self.optimizers()
                hidden = self.net[:3](batch[0])
                hidden.square().mean().backward()
                told.step()
                self.zero_grad()
                (self.net[3](hidden.detach()) - batch[1]).square().mean().backward()
                silent.step()
                self.zero_grad()

            def configure_optimizers(self):
                return SGD(self.net[:3].parameters(), lr=0.1), Silent(self.net[3].parameters())

        module, pruner = Two(), half()
        fit(module, pruner)
        assert survivors(pruner) == {"net.0.weight": 6, "net.3.weight": 3}

    def test_beside_one_that_tells_of_no_step_what_another_holds_needs_a_gradient(self):
        class Two(Net):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                with torch.no_grad():
                    hidden = self.net[:3](batch[0])
                (self.net[3](hidden) - batch[1]).square().mean().backward()
                for optimizer in self.optimizers():
                    optimizer.step()
                self.zero_grad()

            def configure_optimizers(self):
                return SGD(self.net[:3].parameters(), lr=0.1), Silent(self.net[3].parameters())

        module, pruner = Two(), half()
        fit(module, pruner)
        assert survivors(pruner) == {"net.3.weight": 3}


class TestRounds:
    def test_what_is_frozen_on_the_way_is_pruned_after_the_round_in_which_it_was_trained(self):
        module, pruner, seen = Net(), half(every_n_epochs=2), []

        def freeze(trainer, module):
            seen.append(survivors(pruner))
            if trainer.current_epoch == 2:  # the first epoch of round 1, in which it is trained for one batch
                module.net[0].requires_grad_(False)

        fit(module, pruner, Watch(on_train_batch_end=freeze), max_epochs=6)
        assert seen[-1] == {"net.0.weight": 12, "net.3.weight": 6}
        assert [record.layers_remaining["net.0.weight"] for record in pruner.history] == [1, 0.5, 0.25]

    def test_zeros_left_in_the_gradient_of_a_frozen_weight_are_no_gradient(self):
        class Zeroing(Net):
            def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
                optimizer.zero_grad(set_to_none=False)

        module, pruner = Zeroing(), half()
        fit(module, pruner, Watch(on_train_epoch_end=lambda t, m: m.net[0].requires_grad_(False)))
        assert survivors(pruner) == {"net.0.weight": 24, "net.3.weight": 3}

    @pytest.mark.parametrize("batch", [0, 1])
    def test_a_gradient_before_a_checkpoint_in_mid_round_counts_after_the_resume(self, tmp_path, batch):
        class Freezing(Net):
            """Trains its first layer for the first batch of an epoch."""

            def on_train_batch_start(self, batch, batch_idx):
                self.net[0].requires_grad_(batch_idx == 0)

        def run(*callbacks, **options):
            module, pruner = Freezing(), half()
            fit(module, pruner, *callbacks, train=DataLoader(Alike(2), 8), max_epochs=3, **options)
            return module, pruner

        def kill(trainer, module):
            if trainer.global_step == 4 + batch:
                trainer.save_checkpoint(tmp_path / "killed.ckpt")
                crash()

        whole, pruner = run()
        with pytest.raises(Crash):
            run(Watch(on_train_batch_end=kill))
        resumed, other = run(ckpt_path=tmp_path / "killed.ckpt")
        assert survivors(pruner) == {"net.0.weight": 12, "net.3.weight": 6}
        assert same(other.masks, pruner.masks)
        assert same(parameters(resumed), parameters(whole))

    def test_a_weight_that_is_unfrozen_in_the_last_round_leaves_the_target_met(self):
        module, pruner = Net(), half(target_remaining=0.25)
        module.net[0].requires_grad_(False)
        unfreeze = Watch(on_train_epoch_end=lambda t, m: m.net[0].requires_grad_(t.current_epoch == 2))
        fit(module, pruner, unfreeze, train=loader())
        assert survivors(pruner) == {"net.3.weight": 6}
