"""Copies and pickles of the callback, before, during and after a fit."""

import copy
import io
import pickle
import pkgutil

import pytest
import torch
from helpers import (
    BATCHES,
    PRUNABLE,
    Net,
    Scheduled,
    Watch,
    all_masked_are_zero,
    copied,
    fit,
    half,
    loader,
    quiet_trainer,
    same,
    survivors,
)
from resuming import STATE_KEYS, STEPS_OF_A_PRUNING, records_of
from torch import nn
from torch.optim import SGD


def through_pickle(callback):
    return pickle.loads(pickle.dumps(callback))


def through_torch(callback):
    buffer = io.BytesIO()
    torch.save(callback, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle, through_torch])
class TestCopies:
    def options(self):
        return {"rewind_weights": "init", "include": ["*weight", nn.Linear], "exclude": ["net.1.*", "*bias"]}

    def test_copy_before_fit_prunes_by_itself(self, copy_of):
        original = half(**self.options())
        twin = copy_of(original)
        assert twin.options == original.options
        fit(Net(), twin)
        assert survivors(twin) == {"net.0.weight": 6, "net.3.weight": 3}
        assert original.masks == {}

    def test_copy_during_fit_holds_the_masks_of_that_moment(self, copy_of):
        twins, pruner, module = [], half(**self.options()), Net()
        look = Watch(on_train_batch_end=lambda t, m: twins.append((pruner.masks, copy_of(pruner))))
        fit(module, pruner, look)
        assert len(twins) == 4 * BATCHES
        for masks, twin in twins:
            assert same(twin.masks, masks)
        fit(module, twins[-1][1], max_epochs=2)  # it belongs to the same module: masks are kept
        assert sum(survivors(twins[-1][1]).values()) == 5
        assert sum(survivors(pruner).values()) == 9

    def test_copy_after_fit_holds_masks_and_history(self, copy_of):
        module, pruner = Net(), half(**self.options())
        fit(module, pruner)
        twin = copy_of(pruner)
        assert same(twin.masks, pruner.masks)
        assert records_of(twin) == records_of(pruner)
        assert twin.state_dict().keys() == STATE_KEYS
        first = []
        fit(module, twin, Watch(on_train_epoch_end=lambda t, m: first.append(twin.masks)), max_epochs=2)
        assert same(first[0], pruner.masks)
        assert sum(survivors(twin).values()) == 5

    def test_copy_does_not_carry_the_module(self, copy_of):
        module, pruner = Net(), half()
        module.lock = object()
        fit(module, pruner)
        twin = copy_of(pruner)
        assert "log" not in vars(twin)
        assert "log_dict" not in vars(twin)


HOOKS = [
    "setup", "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end", "on_validation_start", "on_validation_end", "on_train_epoch_end",
    "on_train_end", "on_fit_end", "teardown",
]  # fmt: skip


# but "mask", which is also the moment between an optimizer's step and the masking
@pytest.mark.parametrize("moment", [*HOOKS, *sorted(STEPS_OF_A_PRUNING.keys() - {"mask"})])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle])
def test_copy_at_any_moment_is_of_that_moment_and_goes_on_by_itself(monkeypatch, copy_of, moment):
    takes, pruner, module = [], half(rewind_weights="init"), Scheduled(optimizer=SGD)

    def take(*_):
        takes.append((copied(module.state_dict()), pruner.masks, copy_of(pruner), copy_of(module)))

    if moment in STEPS_OF_A_PRUNING:
        owner, _, name = STEPS_OF_A_PRUNING[moment].rpartition(".")
        step = getattr(pkgutil.resolve_name(owner), name)
        monkeypatch.setattr(STEPS_OF_A_PRUNING[moment], lambda *args, **options: (take(), step(*args, **options))[1])
    fit(module, Watch(**({moment: take} if moment in HOOKS else {})), pruner, val=loader())
    monkeypatch.undo()
    assert survivors(pruner) == {"net.0.weight": 6, "net.3.weight": 3}
    assert takes
    for state, masks, twin, other in takes:
        assert same(other.state_dict(), state)
        assert same(twin.masks, masks)
    (_, masks, twin, other), before = takes[len(takes) // 2], (copied(module.state_dict()), pruner.masks)
    fit(other.train(), twin, max_epochs=2)
    alive = {name: int(masks[name].sum()) if masks else size for name, size in PRUNABLE.items()}
    assert survivors(twin) == {name: n - n // 2 for name, n in alive.items()}
    assert all_masked_are_zero(quiet_trainer(twin), other)
    assert same(module.state_dict(), before[0])
    assert same(pruner.masks, before[1])
