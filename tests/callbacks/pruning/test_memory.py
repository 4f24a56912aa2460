"""How much a run holds: the model, its gradients, the optimizer's state and the masks, and no more after 30 rounds."""

import gc

import pytest
import torch
from helpers import Net, Watch, fit
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_sap import FixedFraction, PQIMonitor, PruningCallback

ROUNDS = 30
LOOKS = (1, 2, 3, 10, 20, 29, 30)  # looking at every object takes its time
WIDTH = 64
WEIGHTS = 2 * WIDTH * WIDTH  # that are prunable; there are 2 * WIDTH biases besides
BYTES = 4 * (WEIGHTS + 2 * WIDTH)  # of the model
SMALL = 2_000  # losses, metrics and counters

pytestmark = pytest.mark.slow


def bytes_of_tensors():
    """Of all storages that live tensors stand on, each once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]  # no fakes of `torch.compile`
    gradients = [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = [t.untyped_storage() for t in tensors + gradients if t.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def network():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


class Runs(Net):
    def loss(self, batch):
        return self.net(batch).square().mean()


def by_round(*callbacks):
    """Bytes beyond those before the fit, at the end of some rounds of one epoch each."""
    before, seen = bytes_of_tensors(), []

    def look(trainer, module):
        if trainer.current_epoch in LOOKS:
            seen.append(bytes_of_tensors() - before)

    module = Runs(network(), lambda p: SGD(p, lr=0.01, momentum=0.9))
    train = DataLoader(torch.ones(4, WIDTH), 2)
    fit(module, *callbacks, Watch(on_train_epoch_end=look), train=train, max_epochs=ROUNDS + 1)
    return seen


@pytest.mark.parametrize(
    ("scope", "rewind", "copies"), [("neuron", None, 0), ("layer", "init", 1), ("global", 1, 1), ("global", None, 0)]
)
def test_memory_is_flat_over_30_rounds(scope, rewind, copies):
    pruner = PruningCallback(FixedFraction(0.05), rounds=ROUNDS, scope=scope, rewind_weights=rewind)
    seen = by_round(pruner, PQIMonitor())
    assert pruner.current_round() == ROUNDS
    dense = 3 * BYTES  # weights, gradients, momenta
    assert seen[0] == pytest.approx(dense + WEIGHTS + copies * BYTES, abs=SMALL)
    assert max(seen[:-1]) - min(seen[:-1]) <= 64  # a scalar more or less
    assert seen[-1] == pytest.approx(seen[0] - copies * BYTES, abs=64)  # after the last pruning nothing is rewound


def test_memory_without_a_pruner_is_model_gradients_and_momenta():
    assert by_round()[-1] == pytest.approx(3 * BYTES, abs=SMALL)
