"""Random configurations: whatever is asked for, of whatever network, ended and resumed anywhere."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import helpers
import oracle
import pytest
from helpers import Net, Watch, all_masked_are_zero, fit, same, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from resuming import equal
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR, StepLR
from torch.utils.data import DataLoader

from lightning_sap import FixedFraction, PruningCallback, SparsityInformed

STEPS = 2  # in an epoch


class Configuration(NamedTuple):
    policy: SparsityInformed | FixedFraction
    options: dict
    layers: tuple  # hidden widths; the first of a convolution if `convolutional`
    convolutional: bool
    normed: bool
    optimizer: str
    schedule: str
    clip: float | None
    epochs: int
    end: tuple[str, int]


@st.composite
def policies(draw):
    if draw(st.booleans()):
        return FixedFraction(draw(st.floats(0, 0.8)))
    p = draw(st.floats(0.2, 1.0))
    q = p + draw(st.floats(0.1, 1.5))
    eta_r, gamma = draw(st.floats(0, 1)), draw(st.floats(0.2, 2))
    return SparsityInformed(p, q, eta_r, gamma, beta=draw(st.floats(0.1, 0.9)))


@st.composite
def configurations(draw):
    rounds, every = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    epochs = (rounds + 1) * every + draw(st.integers(0, 1))
    least = draw(st.sampled_from([0.0, 0.0, 0.05, 0.3]))
    options = {
        "scope": draw(st.sampled_from(["neuron", "layer", "global"])),
        "rounds": rounds,
        "every_n_epochs": every,
        "rewind_weights": draw(st.sampled_from([None, "init", *range(1, every + 1)])),
        "lr_schedule": draw(st.sampled_from(["auto", "restart", "squeeze", "keep"])),
        "reset_optimizer": draw(st.booleans()),
        "min_remaining": least,
        "target_remaining": draw(
            st.sampled_from([0.05, 0.35, 0.6, 1.0, None, None]).filter(lambda x: x is None or x >= least)
        ),
        "include": draw(st.sampled_from([None, ["*weight", "*bias"]])),
    }
    hook = draw(st.sampled_from(["step", "validation-end", "train-epoch-end"]))
    return Configuration(
        policy=draw(policies()),
        options=options,
        layers=tuple(draw(st.lists(st.integers(2, 7), min_size=1, max_size=2))),
        convolutional=draw(st.booleans()),
        normed=draw(st.booleans()),
        optimizer=draw(st.sampled_from(["SGD", "AdamW"])),
        schedule=draw(st.sampled_from(["none", "cosine", "steps", "warm-up and cosine", "one cycle"])),
        clip=draw(st.sampled_from([None, 0.5])),
        epochs=epochs,
        end=(hook, draw(st.integers(1, (STEPS if hook == "step" else 1) * epochs - 1))),
    )


def network(layers, convolutional, normed):
    parts, width = [], 6
    for i, units in enumerate(layers):
        if convolutional and i == 0:
            norm = [nn.BatchNorm1d(units)] if normed else []
            parts += [nn.Unflatten(1, (2, 3)), nn.Conv1d(2, units, 2), *norm, nn.ReLU(), nn.Flatten()]
            width = 2 * units
        else:
            parts += [nn.Linear(width, units), *([nn.LayerNorm(units)] if normed else []), nn.ReLU()]
            width = units
    return nn.Sequential(*parts, nn.Linear(width, 3))


class Random(Net):
    def __init__(self, config, seed):
        super().__init__(seeded(lambda: network(config.layers, config.convolutional, config.normed), seed))
        self.config = config

    def configure_optimizers(self):
        config = self.config
        rate = {"SGD": 0.05, "AdamW": 0.01}[config.optimizer]
        optimizer = {"SGD": lambda p: SGD(p, rate, momentum=0.9), "AdamW": lambda p: AdamW(p, rate)}[config.optimizer](
            self.parameters()
        )
        if config.schedule == "none":
            return optimizer
        if config.schedule == "one cycle":
            schedule = OneCycleLR(optimizer, rate, total_steps=STEPS * config.epochs)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        schedule = {
            "cosine": lambda: CosineAnnealingLR(optimizer, config.epochs),
            "steps": lambda: StepLR(optimizer, 2, 0.5),
            "warm-up and cosine": lambda: SequentialLR(
                optimizer, [LinearLR(optimizer, 0.2, total_iters=1), CosineAnnealingLR(optimizer, config.epochs)], [1]
            ),
        }[config.schedule]()
        return [optimizer], [schedule]


class Kept:
    """What is seen of a run at every pruning and after every step."""

    def __init__(self, config):
        self.pruner = PruningCallback(config.policy, **config.options)
        self.before, self.prunings, self.remaining, self.all_zero = None, [], [], []
        self.callbacks = [
            Watch(on_train_epoch_start=self.look),
            self.pruner,
            Watch(on_train_epoch_start=self.compare, on_train_batch_end=self.step),
        ]

    def look(self, trainer, module):
        weights = {name: piece.weight.numpy().copy() for name, piece in self.pruner.tensors(module).items()}
        self.before = weights, self.masks(), len(self.pruner.history)

    def masks(self):
        return {name: mask.numpy() for name, mask in self.pruner.masks.items()}

    def compare(self, trainer, module):
        weights, masks, rounds = self.before
        if len(self.pruner.history) > rounds:
            self.prunings.append((weights, masks, self.masks()))

    def step(self, trainer, module):
        self.remaining.append(self.pruner.remaining)
        self.all_zero.append(all_masked_are_zero(trainer, module))


def run(config, folder, seed=1, ckpt_path=None):
    module, kept = Random(config, seed), Kept(config)
    hook, when = config.end
    every = {"every_n_train_steps": when} if hook == "step" else {"every_n_epochs": when}
    at_end = {} if hook == "step" else {"save_on_train_epoch_end": hook == "train-epoch-end"}
    saver = ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **every, **at_end)
    alike = [helpers.data(6)[i] for i in range(6)] * STEPS
    trainer = fit(
        module,
        *kept.callbacks,
        saver,
        train=DataLoader(alike, 6),
        val=helpers.loader(6, seed=3),
        max_epochs=config.epochs,
        gradient_clip_val=config.clip,
        ckpt_path=ckpt_path,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
    )
    return module, kept, trainer


def limits(config, masks, left):
    """How many stay of each parameter, and how many go at least and at most, with so many prunings left."""
    floors = {name: oracle.ceil(config.options["min_remaining"] * mask.size) for name, mask in masks.items()}
    target, alive = config.options["target_remaining"], sum(int(mask.sum()) for mask in masks.values())
    if target is None or alive == 0:
        return {"floors": floors}
    kept = min(alive, round(target * sum(mask.size for mask in masks.values())))
    share = max(kept, oracle.floor(alive * (kept / alive) ** (1 / left)))
    return {"floors": floors, "least": alive - share, "most": alive - kept}


def amount_of(policy):
    if isinstance(policy, FixedFraction):
        return lambda w: oracle.fraction_count(w, policy.fraction)
    return lambda w: oracle.prune_count(w, policy.p, policy.q, policy.eta_r, policy.gamma, policy.beta)


def check_counts(config, kept):
    """Exactly those weights went that the plain twin of the mathematics picks."""
    rounds, scope = config.options["rounds"], config.options["scope"]
    assert len(kept.prunings) == rounds
    for i, (weights, masks, after) in enumerate(kept.prunings):
        wanted = oracle.prune_masks(
            weights, masks, amount=amount_of(config.policy), scope=scope, **limits(config, masks, rounds - i)
        )
        for name, mask in wanted.items():
            assert (after[name] == mask).all(), (i, name)
        assert kept.pruner.history[i].pruned == sum(int((masks[n] & ~after[n]).sum()) for n in masks)
    sizes, target = {name: mask.size for name, mask in masks.items()}, config.options["target_remaining"]
    if target is not None and sum(limits(config, masks, 1)["floors"].values()) <= round(target * sum(sizes.values())):
        assert kept.pruner.remaining * sum(sizes.values()) == pytest.approx(round(target * sum(sizes.values())))


def check(config):
    with tempfile.TemporaryDirectory() as folder:
        module, kept, trainer = run(config, Path(folder, "whole"))
        assert kept.all_zero == [True] * STEPS * config.epochs
        assert kept.remaining == sorted(kept.remaining, reverse=True)
        check_counts(config, kept)
        hook, when = config.end
        file = min(Path(folder, "whole").iterdir(), key=lambda path: int(path.stem.rpartition("=")[2]))
        twin, resumed, again = run(config, Path(folder, "resumed"), seed=99, ckpt_path=file)
    assert len(resumed.all_zero) == STEPS * config.epochs - (when if hook == "step" else STEPS * when)
    assert all(resumed.all_zero)
    assert same(twin.state_dict(), module.state_dict())
    assert same(resumed.pruner.masks, kept.pruner.masks)
    assert equal(again.optimizers[0].state_dict(), trainer.optimizers[0].state_dict())
    cut_short = hook == "step" and when % STEPS == 0  # Lightning does not run that epoch's validation any more
    histories = [
        [{**vars(r), "seconds": None, **({"metrics": None} if cut_short else {})} for r in pruner.history]
        for pruner in (kept.pruner, resumed.pruner)
    ]
    assert histories[0] == histories[1]


EMPTIED = pytest.mark.filterwarnings("ignore:sap. after pruning .* no weights")
SHORT = pytest.mark.filterwarnings("ignore:.* the learning rate of a round is")  # rounds of an epoch, of long schedules


@pytest.mark.slow
@EMPTIED
@SHORT
@settings(max_examples=25)
@given(configurations())
def test_random_configuration_prunes_as_the_oracle_does(config):
    check(config)


@pytest.mark.full
@EMPTIED
@SHORT
@pytest.mark.timeout(600)
@settings(max_examples=100)
@given(configurations())
def test_many_random_configurations_prune_as_the_oracle_does(config):
    check(config)
