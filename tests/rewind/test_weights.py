"""Weight rewinding: parameters and buffers come back as they were, in place."""

import re

import pytest
import torch
from helpers import copied, same
from torch import nn

from lightning_sap.rewind import restore_weights_, take_weights


def network():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module.register_buffer("saved", torch.arange(3.0))
    module.register_buffer("not_saved", torch.arange(3.0), persistent=False)
    return module


def train(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        module(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    module.saved += 1
    module.not_saved += 1


class TestTakeAndRestore:
    def test_restored_weights_and_buffers_equal_the_snapshot(self):
        module = network()
        before, addresses = copied(module.state_dict()), [p.data_ptr() for p in module.parameters()]
        snapshot = take_weights(module)
        train(module)
        assert not same(module.state_dict(), before)
        restore_weights_(module, snapshot)
        assert same(module.state_dict(), before)
        assert module[1].num_batches_tracked == 0
        assert module.saved.tolist() == [0.0, 1.0, 2.0]
        assert module.not_saved.tolist() == [1.0, 2.0, 3.0]  # the module's own business, as for a state_dict
        assert set(snapshot) == set(module.state_dict())
        assert [p.data_ptr() for p in module.parameters()] == addresses
        assert all(p.is_leaf and p.requires_grad for p in module.parameters())

    def test_a_snapshot_shares_no_storage(self):
        module = network()
        snapshot = take_weights(module)
        live = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
        assert live.isdisjoint(t.untyped_storage().data_ptr() for t in snapshot.values())
        assert not any(t.requires_grad for t in snapshot.values())
        before = copied(snapshot)
        restore_weights_(module, snapshot)
        train(module)
        assert same(snapshot, before)  # nor after it was written back

    def test_a_tied_parameter_is_kept_once_and_stays_tied(self):
        module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        module[1].weight = module[0].weight
        snapshot = take_weights(module)
        assert sorted(snapshot) == ["0.bias", "0.weight", "1.bias"]
        restore_weights_(module, snapshot)
        assert module[1].weight is module[0].weight

    def test_names_do_not_depend_on_compilation(self):
        module = network()
        snapshot = take_weights(torch.compile(module))
        assert set(snapshot) == set(take_weights(module))
        train(module)
        restore_weights_(torch.compile(module), snapshot)
        assert same(take_weights(module), snapshot)

    def test_restored_weights_keep_their_dtypes(self):
        module = nn.Linear(2, 2).to(torch.bfloat16)
        snapshot = take_weights(module)
        assert snapshot["weight"].dtype == torch.bfloat16
        module.to(torch.float32)
        restore_weights_(module, snapshot)
        assert module.weight.dtype == torch.float32
        assert torch.equal(module.weight, snapshot["weight"].float())


class TestWhatDiffers:
    def test_restore_leaves_tensors_the_snapshot_does_not_know(self):
        module = network()
        snapshot = take_weights(module)
        module.append(nn.Linear(2, 2))
        with torch.no_grad():
            module[3].weight.fill_(7.0)
        restore_weights_(module, snapshot)
        assert module[3].weight.unique().tolist() == [7.0]

    def test_restore_passes_over_tensors_that_were_removed(self):
        module = network()
        snapshot = take_weights(module)
        del module.saved
        restore_weights_(module, snapshot)
        assert same({n: snapshot[n] for n in module.state_dict()}, dict(module.state_dict()))

    def test_named_parameters_are_left_out(self):
        module = network()
        snapshot = take_weights(module, without=["0.weight"])
        assert set(module.state_dict()) - set(snapshot) == {"0.weight"}

    def test_buffers_that_changed_their_shape_are_left_and_named(self):
        module = network()
        snapshot = take_weights(module)
        train(module)
        module.saved = torch.ones(5)
        assert restore_weights_(module, snapshot) == ["saved"]
        assert module.saved.tolist() == [1.0] * 5
        assert torch.equal(module[0].weight, snapshot["0.weight"])
        assert restore_weights_(module, take_weights(module)) == []

    def test_restore_refuses_a_changed_shape_before_anything_is_written(self):
        module = network()
        snapshot = take_weights(module)
        train(module)
        module[2] = nn.Linear(4, 5)
        before = copied(module.state_dict())
        message = "Cannot rewind '2.weight': its shape was (2, 4) and is (5, 4) now."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            restore_weights_(module, snapshot)
        assert same(module.state_dict(), before)
