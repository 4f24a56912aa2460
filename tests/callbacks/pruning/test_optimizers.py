"""Whole fits with optimizers that keep something beside the weights, wrap another one, or are stepped by hand."""

import warnings
from functools import partial

import pytest
import torch
from helpers import Crash, Watch, crash, fit, same, seeded
from lightning.pytorch import LightningModule
from optimizers import REAL, SCHEDULE_FREE, SHARP, SLOW_FIRST, slow_first, slow_later
from prodigyopt import Prodigy
from pytorch_optimizer import SAM, SOAP, SPlus
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_sap import FixedFraction, PruningCallback
from lightning_sap.rewind import base_optimizers

BATCHES = 8
KEPT = 93  # of 464 weights: a fifth


def points():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 10, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, :3] + 0.5 * x[:, 3:6]).argmax(1)), 8)


class Classifier(LightningModule):
    """Three classes from ten numbers; its optimizer stands in training mode while it trains."""

    def __init__(self, build, *, by_hand=False, cosine=False):
        super().__init__()
        self.net = seeded(lambda: nn.Sequential(*_layers()))
        self.build, self.cosine, self.automatic_optimization = build, cosine, not by_hand
        self.seen = []  # weights that are not zero, in validation

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return self.loss(batch)
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        optimizer.first_step(zero_grad=True)
        self.manual_backward(self.loss(batch))
        optimizer.second_step(zero_grad=True)
        return None

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())
        if batch_idx == 0:
            self.seen.append(nonzero(self))

    def configure_optimizers(self):
        optimizer = self.build(list(self.parameters()))
        if not self.cosine:
            return optimizer
        return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, 40 * BATCHES), "interval": "step"}]

    def switch(self, mode):
        for optimizer in self.trainer.optimizers:
            getattr(optimizer, mode, lambda: None)()

    def on_train_epoch_start(self):
        self.switch("train")

    def on_validation_start(self):
        self.switch("eval")

    def on_train_end(self):
        self.switch("eval")


def _layers():
    return nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)


def nonzero(module):
    return sum(int(p.count_nonzero()) for p in module.parameters() if p.dim() == 2)


def pruner(**options):
    given = {"scope": "global", "rounds": 2, "every_n_epochs": 2, "target_remaining": 0.2}
    return PruningCallback(FixedFraction(0.5), **{**given, **options})


def train(module, *callbacks, **options):
    return fit(module, *callbacks, train=points(), val=points(), num_sanity_val_steps=0, **{"max_epochs": 6, **options})


def classifier(name, **options):
    return Classifier(REAL[name], by_hand=name in SHARP, **options)


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("name", REAL)
def test_pruned_weights_are_zero_in_validation_files_and_at_the_end(tmp_path, name, reset):
    module, sap = classifier(name), pruner(reset_optimizer=reset)
    file = tmp_path / "weights.ckpt"
    save = Watch(on_train_epoch_end=lambda trainer, module: trainer.save_checkpoint(file, weights_only=True))
    train(module, sap, save)
    assert sum(int(mask.sum()) for mask in sap.masks.values()) == KEPT
    assert [record.last_step - record.first_step + 1 for record in sap.history] == [16, 16, 16]
    assert module.seen[:2] == [464, 464]
    assert max(module.seen[4:]) <= KEPT
    assert nonzero(module) <= KEPT
    saved = torch.load(file, weights_only=True)["state_dict"]
    assert sum(int(t.count_nonzero()) for t in saved.values() if t.dim() == 2) <= KEPT


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("name", sorted({*REAL} - {"Adagrad", *SLOW_FIRST}))
def test_state_of_the_optimizer_and_of_the_one_it_wraps_is_fresh_in_every_round_or_stays(name, reset):
    module, seen = classifier(name), []

    def look(trainer, module):
        if trainer.current_epoch in (2, 4) and trainer.fit_loop.batch_idx == 0:
            states = [state for each in base_optimizers(trainer.optimizers[0]) for state in each.state.values()]
            seen.append({key for state in states for key in state})

    train(module, pruner(reset_optimizer=reset), Watch(on_train_batch_start=look))
    assert len(seen) == 2
    assert [keys == set() for keys in seen] == [reset, reset]


def test_slow_weights_from_the_start_become_the_weights_of_the_round():
    module, seen = Classifier(slow_first), []
    initial = [p.detach().clone() for p in module.parameters()]

    def look(trainer, module):
        if trainer.current_epoch in (2, 4) and trainer.fit_loop.batch_idx == 0:
            slow = [trainer.optimizers[0].state[p]["slow_params"] for p in module.parameters()]
            seen.append([torch.equal(s, p) for s, p in zip(slow, module.parameters(), strict=True)])
            assert not any(torch.equal(s, p) for s, p in zip(slow, initial, strict=True))
            assert not trainer.optimizers[0].optimizer.state

    train(module, pruner(), Watch(on_train_batch_start=look))
    assert seen == [[True] * 6, [True] * 6]


@pytest.mark.parametrize("build", [slow_first, slow_later])
def test_rewound_weights_are_not_pulled_away_by_slow_weights_from_before(build):
    """The second round equals a fit that starts from the rewound weights under its masks."""
    module, sap = Classifier(build), pruner(rounds=1, rewind_weights="init")
    train(module, sap, max_epochs=4, limit_val_batches=0)
    other = Classifier(build)
    with torch.no_grad():
        for name, mask in sap.masks.items():
            other.get_parameter(name).mul_(mask)
    holder = pruner(rounds=0, every_n_epochs=None, target_remaining=None, keep_zeros=True)
    train(other, holder, max_epochs=2, limit_val_batches=0)
    assert same(module.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_average_equals_the_training_weights_at_pruned_places(name):
    """Both are zero: what the optimizer keeps there is, so that no switch between them brings a weight back."""
    module, sap, kept = classifier(name), pruner(reset_optimizer=False), []

    def look(trainer, module):
        if sap.remaining < 1:
            state = trainer.optimizers[0].state
            live = dict(module.named_parameters())
            kept.append(sum(int(state[live[n]]["z"][~mask].count_nonzero()) for n, mask in sap.masks.items()))

    train(module, sap, Watch(on_train_batch_end=look))
    assert kept == [0] * 32


@pytest.mark.parametrize("reset", [True, False])
def test_step_size_estimate_of_prodigy_is_fresh_or_stays(reset):
    module, starts, ends = Classifier(Prodigy, cosine=True), [], []

    def look(into, at):
        def see(trainer, module):
            if trainer.fit_loop.batch_idx == at and trainer.current_epoch in ((10, 20) if at == 0 else (9, 19)):
                into.append(float(trainer.optimizers[0].param_groups[0]["d"]))

        return see

    sap = pruner(reset_optimizer=reset, every_n_epochs=10)
    watch = Watch(on_train_batch_start=look(starts, 0), on_train_batch_end=look(ends, BATCHES - 1))
    trainer = train(module, sap, watch, max_epochs=30)
    assert all(end > 1e-4 for end in ends)
    assert starts == ([1e-6, 1e-6] if reset else ends)
    if not reset:
        dense = train(Classifier(Prodigy, cosine=True), max_epochs=30)
        assert trainer.callback_metrics["val_acc"] > dense.callback_metrics["val_acc"] - 0.1


class Adversaries(LightningModule):
    """Two optimizers by hand, one step of each in every batch; which is frozen for the other's step, as in a GAN."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(10, 16), nn.Linear(16, 3)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.second(self.first(batch[0])), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return Adam(self.first.parameters()), slow_later(self.second.parameters())


def test_steps_of_two_optimizers_are_counted_by_real_steps():
    sap = pruner(target_remaining=None)
    fit(Adversaries(), sap, train=points(), max_epochs=6)
    assert [record.last_step - record.first_step + 1 for record in sap.history] == [32, 32, 32]


def test_rounds_in_steps_count_the_steps_that_sharpness_aware_minimization_takes_by_hand():
    sap = pruner(every_n_epochs=None, every_n_steps=20)
    train(Classifier(REAL["SAM"], by_hand=True), sap)
    assert [record.first_step for record in sap.history] == [0, 20, 40]
    assert sap.remaining == pytest.approx(KEPT / 464)


def test_sharpness_aware_minimization_with_a_closure_counts_its_steps_once():
    class Closure(Classifier):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()

            def closure():
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            closure()
            optimizer.step(closure)

    sap = pruner()
    train(Closure(partial(SAM, base_optimizer=Adam, lr=0.01), by_hand=True), sap)
    assert [record.last_step - record.first_step + 1 for record in sap.history] == [16, 16, 16]


@pytest.mark.parametrize(
    "name", ["schedule-free AdamW", "timm's Lookahead", "pytorch_optimizer's Lookahead", "Prodigy"]
)
@pytest.mark.parametrize("reset", [True, False])
def test_killed_in_a_round_and_resumed_equals_the_unbroken_run(tmp_path, name, reset):
    def run(module, *callbacks, **options):
        fit(module, pruner(reset_optimizer=reset), *callbacks, train=points(), max_epochs=6, **options)

    def stop(trainer, module):
        if trainer.current_epoch == 3:
            trainer.save_checkpoint(tmp_path / "killed.ckpt")
            crash()

    whole, resumed = classifier(name), classifier(name)
    run(whole)
    with pytest.raises(Crash):
        run(classifier(name), Watch(on_train_epoch_end=stop))
    run(resumed, ckpt_path=tmp_path / "killed.ckpt")
    assert same(whole.state_dict(), resumed.state_dict())


class Box:
    def __init__(self):
        self.content = torch.ones(2)


class Hiding(Adam):
    def __init__(self, parameters):
        super().__init__(parameters)
        self.box = Box()


@pytest.mark.parametrize("reset", [True, False])
def test_an_optimizer_that_cannot_be_reset_is_named_at_fit_start(reset):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(Classifier(Hiding), pruner(reset_optimizer=reset))
    said = [str(w.message) for w in caught if "Hiding keeps tensors in its attribute 'box' (Box)" in str(w.message)]
    assert len(said) == reset


@pytest.mark.parametrize("reset", [True, False])
def test_an_average_inside_such_an_optimizer_is_masked_in_validation_and_at_the_end(reset):
    """SPlus turns the axes and, for validation, puts an average into the weights."""
    module = Classifier(partial(SPlus, lr=0.1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "sap: SPlus mixes the places")
        train(module, pruner(reset_optimizer=reset))
    assert module.seen[:2] == [464, 464]
    assert max(module.seen[4:]) <= KEPT
    assert nonzero(module) <= KEPT


@pytest.mark.parametrize("reset", [True, False])
def test_an_optimizer_that_mixes_the_places_of_weights_is_named_where_it_goes_on(reset):
    module, sap = Classifier(partial(SOAP, lr=0.01)), pruner(reset_optimizer=reset)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(module, sap)
    said = [w for w in caught if "SOAP mixes the places of a weight by the matrices in 'state.GG'" in str(w.message)]
    assert bool(said) != reset
    assert max(module.seen[4:]) <= KEPT
