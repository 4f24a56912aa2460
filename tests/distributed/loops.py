"""What each rank does in `test_fabric.py`: a plain loop under Fabric."""

import warnings

import pytest
import torch
from helpers import copied, data, is_masked
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_sap import Pruner, SparsityInformed
from lightning_sap.sharding import whole


def one_epoch(fabric, net, optimizer, batches, look=lambda: None):
    for inputs, targets in batches:
        optimizer.zero_grad()
        fabric.backward((net(inputs) - targets).square().mean())
        fabric.clip_gradients(net, optimizer, max_norm=0.1)
        optimizer.step()
        look()


def build(fabric):
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    net = fabric.setup_module(net)
    optimizer = fabric.setup_optimizers(torch.optim.Adam(net.parameters(), lr=0.01))
    pruner = Pruner(SparsityInformed(), scope="global").attach(net, optimizer)
    batches = fabric.setup_dataloaders(DataLoader(data(32), 32 // fabric.world_size // 2))
    return net, optimizer, pruner, batches


def launched(**options):
    fabric = Fabric(accelerator="cpu", **options)
    fabric.launch()
    return fabric


def train(fabric, folder):
    """Three prunings, saved by Fabric after the second, and gone on with from there."""
    net, optimizer, pruner, batches = build(fabric)
    clean = []

    def look():
        clean.append(is_masked(wholes(dict(net.module.named_parameters())), wholes(pruner.masks)))

    def rounds(number):
        for _ in range(number):
            one_epoch(fabric, net, optimizer, batches, look)
            pruner.prune()
        one_epoch(fabric, net, optimizer, batches, look)

    rounds(2)
    fabric.save(folder / "loop.ckpt", {"net": net, "optimizer": optimizer, "pruner": pruner})
    pruner.prune()
    one_epoch(fabric, net, optimizer, batches, look)
    whole = found(net, pruner)
    net, optimizer, pruner, batches = build(fabric)
    state = {"net": net, "optimizer": optimizer, "pruner": pruner}
    fabric.load(folder / "loop.ckpt", state)
    if state["pruner"] is not pruner:  # of a file of shards Fabric gives the state, and leaves the loading to us
        pruner.load_state_dict(state["pruner"])
    pruner.prune()
    one_epoch(fabric, net, optimizer, batches, look)
    return {"whole": whole, "resumed": found(net, pruner), "clean": clean}


def found(net, pruner):
    return {
        "masks": wholes(pruner.masks),
        "weights": wholes(dict(net.module.named_parameters())),
        "pruned": [record.pruned for record in pruner.history],
        "steps": [record.last_step for record in pruner.history],
    }


def wholes(tensors):
    """All shards of each tensor, as they are now; a collective."""
    return copied({name: whole(tensor) for name, tensor in tensors.items()})


def sharded(module, mesh):
    for part in (*module, module):
        fully_shard(part, mesh=mesh["data_parallel"])
    return module


def under_fsdp2(rank, folder):
    """The loop on shards; then what is said where the state is not loaded."""
    fabric = launched(devices=2, strategy=ModelParallelStrategy(sharded, data_parallel_size=2, tensor_parallel_size=1))
    result = train(fabric, folder)
    net, optimizer, pruner, batches = build(fabric)
    with warnings.catch_warnings(record=True) as told:
        fabric.load(folder / "loop.ckpt", {"net": net, "optimizer": optimizer, "pruner": pruner})
        one_epoch(fabric, net, optimizer, batches)
    result["told"] = [str(each.message) for each in told if "exactly zero" in str(each.message)]
    return result


def under_ddp(rank, folder):
    """The loop; then one in which rank 1 strays, and one in which it decides otherwise."""
    fabric = launched(devices=2, strategy="ddp")
    result = train(fabric, folder)
    net, _, pruner, _ = build(fabric)
    with torch.no_grad():
        net.module[0].weight[0, 0] += rank
    try:
        pruner.prune()
    except ValueError as error:
        result["strayed"] = str(error)
    net, _, pruner, _ = build(fabric)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(SparsityInformed, "__call__", lambda self, sums, round: sums.count // 2)
        pruner.prune()
    result["rank 1 decides otherwise"] = pruner.masks
    return result
