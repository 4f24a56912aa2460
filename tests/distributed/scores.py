"""What each rank does in `test_scores.py`, and the same in one process."""

import copy

import torch
from distributed.replicas import trainer
from helpers import Net
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from scoring import Scores
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader

from lightning_sap import FixedFraction, PruningCallback
from lightning_sap.sharding import whole

STEPS = 3  # of an epoch


def network():
    """Convolutions in groups and transposed: rows of their weights read different inputs. No norm of a batch."""
    return nn.Sequential(
        nn.Conv1d(4, 6, 3, groups=2),
        nn.ReLU(),
        nn.ConvTranspose1d(6, 5, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(30, 7),
        nn.ReLU(),
        nn.Linear(7, 3),
    )


def chain():
    return nn.Sequential(nn.Flatten(), nn.Linear(24, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))


class Classes(Net):
    def __init__(self, build, sharded):
        torch.manual_seed(4)
        super().__init__(build())
        self.sharded = sharded

    def configure_model(self):
        if self.sharded and not isinstance(self.net, FSDPModule):
            for part in (self.net[0], self.net[2], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def batches(rank, world):
    """The rank's share of each batch of eight, whose classes are not spread evenly; all batches are alike."""
    torch.manual_seed(2)
    x, classes = torch.randn(8, 4, 6), torch.tensor([0, 0, 0, 1, 2, 1, 2, 2])
    own = slice(rank * 8 // world, (rank + 1) * 8 // world)
    return DataLoader([*zip(x[own], classes[own], strict=True)] * STEPS, 8 // world)


def fit(folder, importance, engine=None, rank=0, ckpt_path=None):
    """One pruning of half of the weights after the second epoch."""
    unit = importance == "fisher"
    module = Classes(chain if unit else network, engine == "fsdp2")
    options = {"structure": "unit"} if unit else {"scope": "global"}
    pruner = PruningCallback(FixedFraction(0.5), importance=importance, every_n_epochs=2, **options)
    saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    how = {"devices": 1}
    if engine is not None:
        sharding = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        how = {"devices": 2, "strategy": "ddp" if engine == "ddp" else sharding}
    scores = Scores(pruner)
    run = trainer(folder, callbacks=[pruner, scores, saver], max_epochs=4, **how)
    run.fit(module, batches(rank, how["devices"]), ckpt_path=ckpt_path)
    return {
        "scores": {n: copy.deepcopy(s) for n, s in scores.found.get(1, {}).items()},
        "masks": {name: whole(mask) for name, mask in pruner.masks.items()},
        "weights": {name: whole(tensor.detach()).clone() for name, tensor in module.state_dict().items()},
    }


def everything(rank, folder):
    """For each way a fit, and one resumed in the midst of what counts, at its second of three steps."""
    found = {}
    for engine, importance in torch.load(folder / "ways.pt"):
        place = folder / f"{engine}-{importance}"
        through = fit(place, importance, engine, rank)
        path = place / f"step={STEPS + 2}.ckpt"
        found[engine, importance] = through, fit(place / "again", importance, engine, rank, path)
    return found
