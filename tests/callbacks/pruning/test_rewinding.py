"""Rewinding: from which weights each round starts."""

import pytest
import torch
from helpers import BATCHES, OPTIMIZERS, PRUNABLE, Net, Watch, all_masked_are_zero, copied, fit, half, loader, same


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
    def test_rewinding_to_init_starts_every_round_from_the_first_weights(self, optimizer, rewind):
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

    def test_rewinding_to_1_starts_rounds_from_the_weights_after_one_epoch(self):
        module, pruner, ends, masks = Net(), half(every_n_epochs=2, rewind_weights=1), [], []
        keep = Watch(
            on_train_epoch_start=lambda t, m: masks.append(pruner.masks),
            on_train_epoch_end=lambda t, m: ends.append(copied(m.state_dict())),
        )
        starts = first_batches(module, pruner, keep)
        for start, mask in zip(starts[1:], masks[2::2], strict=True):
            for name, tensor in ends[0].items():
                assert torch.equal(start[name], tensor * mask[name] if name in mask else tensor), name

    def test_rewinding_to_2_starts_rounds_from_the_first_rounds_end(self):
        module, pruner, ends = Net(), half(every_n_epochs=2, rewind_weights=2), []
        keep = Watch(on_train_epoch_end=lambda t, m: ends.append(copied(m.state_dict())))
        starts = first_batches(module, pruner, keep)
        for start in starts[1:]:
            for name, tensor in ends[1].items():
                alive = start[name] != 0 if name in PRUNABLE else torch.ones_like(tensor, dtype=torch.bool)
                assert torch.equal(start[name][alive], tensor[alive]), name
        assert [int((start["net.0.weight"] != 0).sum()) for start in starts] == [48, 24, 12]

    def test_no_rewinding_starts_rounds_from_the_weights_as_they_are(self):
        module, pruner, ends = Net(), half(every_n_epochs=2), []
        keep = Watch(on_train_epoch_end=lambda t, m: ends.append(copied(m.state_dict())))
        starts = first_batches(module, pruner, keep)
        for start, end in zip(starts[1:], ends[1::2], strict=False):
            for name, tensor in end.items():
                alive = start[name] != 0 if name in PRUNABLE else torch.ones_like(tensor, dtype=torch.bool)
                assert torch.equal(start[name][alive], tensor[alive]), name

    def test_first_weights_share_no_storage_with_the_module(self):
        module, pruner, apart = Net(), half(rewind_weights="init"), []
        first = copied(module.state_dict())

        def look(trainer, module):
            snapshot = pruner.session.state.first_weights
            if pruner.current_round() == 3:  # nothing goes back to them any more
                assert snapshot is None
                return
            live = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
            apart.append(live.isdisjoint(t.untyped_storage().data_ptr() for t in snapshot.values()))
            assert same(snapshot, first)

        fit(module, pruner, Watch(on_train_batch_end=look))
        assert apart == [True] * (3 * BATCHES)

    def test_rewinding_of_one_callback_keeps_what_another_pruned(self):
        for order in (1, -1):
            a = half(name="a", include="net.0.*", rewind_weights="init")
            b = half(name="b", include="net.3.*")
            clean = []
            look = Watch(on_train_batch_start=lambda t, m, clean=clean: clean.append(all_masked_are_zero(t, m)))
            fit(Net(), *[a, b][::order], look)
            assert clean == [True] * (4 * BATCHES)
