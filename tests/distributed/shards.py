"""What each rank does in `test_sharding.py`, and the same without sharding."""

import copy
import os

import helpers
import torch
from distributed.replicas import trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from lightning_sap import (
    Amounts,
    FixedFraction,
    GrowAndPrune,
    Importance,
    Magnitude,
    Policy,
    PQIMonitor,
    PruningCallback,
    SAPCallback,
    SparsityInformed,
)
from lightning_sap.engine.decision import Limits, decide
from lightning_sap.engine.floors import Floor, fewest
from lightning_sap.engine.groups import PrunableTensor, empty_units
from lightning_sap.engine.masks import MaskSet
from lightning_sap.engine.matrices import Layout
from lightning_sap.engine.patterns import Pattern, decide_pattern
from lightning_sap.sharding import check_placements, placed_like, shard_like, whole

RUNS = {
    "neuron": {"scope": "neuron", "eta_r": 0.3},
    "layer": {"scope": "layer", "rewind_weights": 1, "target_remaining": 0.3, "min_remaining": 0.1},
    "global": {"scope": "global", "rewind_weights": "init"},
    "unit floors": {"scope": "global", "min_per_unit": 1, "eta_r": 0.3},
    "opened": {"policy": GrowAndPrune(0.3, partitions=2, cycles=1), "scope": "global"},
    "opened by layer": {"policy": GrowAndPrune(0.3, partitions=2, cycles=1, close=SparsityInformed())},
}
FLOORS = [(), (Floor(1),), (Floor(1, (1,)),), (Floor(2, ()), Floor(2)), (Floor(1, (0,)), Floor(1, (1,)))]
CLIPPED = {"gradient_clip_val": 0.05}  # by the norm of the gradients of the weights that survive
RESUMED = {"scope": "global", "rewind_weights": "init", "eta_r": 0.3}


class DropAndGrow(Policy):
    regrows = True

    def __call__(self, sums, round, standing):
        return Amounts((0.4 * sums.count).long(), (0.6 * standing.pruned).long())


class Inverse(Importance):
    """Of float16, and so that the largest weights go first."""

    def scores(self, name, weight):
        return (1 / (1 + weight.abs())).half()


def layers():
    """Their rows do not divide by two, one has a single row, and there are buffers."""
    return nn.Sequential(
        nn.Conv1d(3, 7, 3),
        nn.BatchNorm1d(7),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(28, 9),
        nn.ReLU(),
        nn.Linear(9, 5),
        nn.ReLU(),
        nn.Linear(5, 1),
    )


class Net(helpers.Net):
    def __init__(self, sharded, network=None):
        super().__init__(network or helpers.seeded(layers))
        self.sharded, self.parts = sharded, ()

    def configure_model(self):
        if self.sharded and not isinstance(self.net, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for part in self.parts or (*self.net[4:7:2], self.net):
                fully_shard(part, mesh=mesh)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)]


class Enforced(Callback):
    """Counts, after each step, the weights that should be zero and are not."""

    def __init__(self, pruner):
        self.pruner = pruner
        self.alive, self.pruned = 0, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        parameters = dict(pl_module.named_parameters())
        for name, mask in self.pruner.masks.items():
            gone = ~whole(mask)
            self.pruned += int(gone.sum())
            self.alive += int(whole(parameters[name].detach())[gone].count_nonzero())


def data():
    """Two batches alike: a run that is resumed in mid-epoch starts with the first one again."""
    torch.manual_seed(2)
    return DataLoader(TensorDataset(torch.randn(8, 3, 6).repeat(2, 1, 1), torch.randn(8, 1).repeat(2, 1)), batch_size=8)


def strategy(sharded, **options):
    if not sharded:
        return {"devices": 1, **options}
    full, world = options.pop("full", False), options.pop("devices", 2)
    sizes = {"data_parallel_size": world, "tensor_parallel_size": 1}
    parallel = ModelParallelStrategy(**sizes, save_distributed_checkpoint=not full)
    return {"devices": world, "strategy": parallel, **options}


def whole_state(module):
    return {name: whole(tensor.detach()).clone() for name, tensor in module.state_dict().items()}


def fit(folder, sharded, options, extra=(), ckpt_path=None, **of_trainer):
    module = Net(sharded)
    callback = (PruningCallback if "policy" in options else SAPCallback)(every_n_epochs=1, **options)
    enforced, monitor = Enforced(callback), PQIMonitor(stop_on=None)
    run = trainer(
        folder, callbacks=[callback, monitor, enforced, *extra], **strategy(sharded, max_epochs=4, **of_trainer)
    )
    run.fit(module, data(), data(), ckpt_path=ckpt_path)
    assert all(isinstance(mask, DTensor) == sharded for mask in callback.masks.values())
    return {
        "masks": {name: whole(mask) for name, mask in callback.masks.items()},
        "weights": whole_state(module),
        "history": [(r.pqi, r.pqi_pruned, r.pruned, r.layers_pqi, r.layers_remaining) for r in callback.history],
        "monitored": [(row["pqi"], row["layer_mean"], row["remaining"]) for row in monitor.rows()],
        "remaining": callback.remaining,
        "total": sum(mask.numel() for mask in callback.masks.values()),
        "revived": enforced.alive,
        "enforced": enforced.pruned,
        "state": callback.state_dict(),
    }


def everything(rank, folder):
    """One start of the processes for all that is to be seen."""
    return {
        "fits": {name: fit(folder, True, options) for name, options in RUNS.items()},
        "clipped": fit(folder, True, RESUMED, **CLIPPED),
        "decisions": decisions(),
        "resumed": {full: resumed(folder / str(full), full) for full in (False, True)},
        "again": again(folder),
        "following": following(folder, True),
        "averaging": following(folder, True, averages=True),
        "refusals": refusals(folder),
    }


def on_gpus(rank, folder):
    """A fit and a resumed one, over as many ranks as there are."""
    keep, world = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=3), int(os.environ["WORLD_SIZE"])
    options = {"devices": world, "accelerator": "gpu"}
    through = fit(folder, True, RESUMED, [keep], **options)
    return {"through": through, "end": fit(folder, True, RESUMED, ckpt_path=folder / "step=3.ckpt", **options)}


def resumed(folder, full):
    """The state in the file of a step in the midst of the second round; how the whole run ends, and a resumed one."""
    keep = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    through = fit(folder, True, RESUMED, [keep], full=full)
    ends = [
        fit(folder, True, RESUMED, ckpt_path=folder / f"step={step}.ckpt", full=full)
        for step in ((3,) if full else (3, 4))
    ]
    file = folder / "step=3.ckpt"
    saved = torch.load(file if full else file / "meta.pt", weights_only=True)
    saved = saved["callbacks"]["lightning_sap/sap"]
    return {"through": through, "ends": ends, "saved": saved, "folder": str(folder)}


def again(folder):
    """A second fit of the same module keeps the masks."""
    module, callback = Net(True), SAPCallback(rounds=1, every_n_epochs=1)
    for _ in range(2):
        run = trainer(folder, callbacks=[callback], **strategy(True, max_epochs=2))
        run.fit(module, data(), data())
    return [record.remaining for record in callback.history]


class Following(Net):
    """A copy of the network follows it, sharded as it is, and so may an average."""

    def __init__(self, sharded, averages):
        super().__init__(sharded)
        self.momentum = copy.deepcopy(self.net).requires_grad_(False)
        self.average = AveragedModel(self.net) if averages else None

    def configure_model(self):
        super().configure_model()
        copies = [self.momentum] if self.average is None else [self.momentum, self.average]
        for part in copies:
            if self.sharded and not isinstance(part, FSDPModule):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def optimizer_step(self, *arguments, **options):
        super().optimizer_step(*arguments, **options)
        if self.average is not None:
            self.average.update_parameters(self.net)
        with torch.no_grad():
            for slow, fast in zip(self.momentum.parameters(), self.net.parameters(), strict=True):
                slow.mul_(0.5).add_(fast, alpha=0.5)


def following(folder, sharded, averages=False):
    """Masks and weights of a run with a momentum encoder, or an average too, in the module."""
    module, callback = Following(sharded, averages), helpers.half()
    trainer(folder, callbacks=[callback], **strategy(sharded, max_epochs=4)).fit(module, data(), data())
    return {"masks": {name: whole(mask) for name, mask in callback.masks.items()}, "weights": whole_state(module)}


def decisions():
    """For many small cases, what is wrong with the decision on shards beside the one on whole weights."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,))
    faults = [fault for case in range(130) if (fault := fault_of_decision(case, mesh))]
    return faults + [fault for fault in [fault_of_pattern(mesh)] if fault]


def fault_of_decision(case, mesh):
    scope = ("neuron", "layer", "global")[case % 3]
    policy = FixedFraction(0.4) if case % 2 else SparsityInformed(eta_r=0.2)
    importance = Magnitude()
    if case >= 60:
        policy, importance = DropAndGrow(), Inverse() if case % 2 else Magnitude()
    plain, sharded = {}, {}
    for name in "abc"[: 1 + case % 4]:
        shape = torch.randint(1, 8, (2 + case % 2,)).tolist()
        # few magnitudes, and so ties on both sides of the cut and of the border between the processes
        weight = (torch.randint(-3, 4, shape) / 4).to(torch.bfloat16 if case % 5 else torch.float32)
        pruned = (torch.rand(shape) < 0.2) if case % 7 else None
        how = {"importance": importance, "floors": FLOORS[case % len(FLOORS)] if case >= 90 else ()}
        if case >= 110 and len(shape) == 3:  # experts, each a group in scope "layer"
            how |= {"layout": Layout(stack=1), "units": lambda tensor: tensor.flatten(0, 1)}
        plain[name] = PrunableTensor(weight, pruned, **how)
        placed = distribute_tensor(weight, mesh, [Shard(0)])
        placed_mask = None if pruned is None else placed_like(pruned, placed)
        sharded[name] = PrunableTensor(placed, placed_mask, **how)
    floors = {name: int(piece.weight.numel() * (case % 4) / 5) for name, piece in plain.items()}
    most = int(torch.randint(0, 60, ()))
    limits = Limits(floors, least=min(most, case % 11), most=most if case % 2 else None)
    one, many = (decide(p, policy=policy, scope=scope, round=1, limits=limits) for p in (plain, sharded))
    same = all(torch.equal(whole(many.masks.pruned[name]), mask) for name, mask in one.masks.pruned.items())
    dead = [
        empty_units({name: piece._replace(pruned=step.masks.pruned[name]) for name, piece in pieces.items()})
        for pieces, step in ((plain, one), (sharded, many))
    ]
    same = same and dead[0] == dead[1]
    same = same and (one.dropped, one.grown, one.short) == (many.dropped, many.grown, many.short)
    same = same and fewest(plain) == fewest(sharded) and come_back_alike(plain, one, many)
    if not same or one.before.survivors != many.before.survivors:
        return f"case {case}: {one} {many}"
    return None


def fault_of_pattern(mesh):
    """The same of a pattern over columns that are normalised, of which the first would be empty."""
    weight = torch.cat([torch.zeros(5, 2), torch.rand(5, 2)], 1)
    pieces = [
        PrunableTensor(w, floors=(Floor(1, (1,)),)) for w in (weight, distribute_tensor(weight, mesh, [Shard(0)]))
    ]
    one, many = (decide_pattern({"w": piece}, Pattern(2, 4), 0.5, 1.0).masks.kept["w"] for piece in pieces)
    return None if torch.equal(whole(many), one) and one.any(0).all() else f"{one} {whole(many)}"


def come_back_alike(plain, one, many):
    """Whether the same weights come back, also seen from masks that are not sharded."""
    older = MaskSet({name: piece.pruned for name, piece in plain.items() if piece.pruned is not None})
    back = [{name: whole(where) for name, where in step.masks.grown_since(older)} for step in (one, many)]
    counts = {name: int(where.sum()) for name, where in back[0].items()}
    return helpers.same(*back) and all(counts.get(name, 0) == n for name, n in one.grown.items())


def refusals(folder):
    """Messages by case."""
    mesh, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    weight = torch.zeros(4, 4)
    rows = distribute_tensor(weight, mesh, [Shard(0)])
    placed = {
        "columns": {"w": distribute_tensor(weight, mesh, [Shard(1)])},
        "replicated": {"w": distribute_tensor(weight, mesh, [Replicate()])},
        "hybrid": {"w": distribute_tensor(weight, square, [Replicate(), Shard(0)])},
        "mixed": {"w": rows, "v": weight},
        "rows": {"w": rows, "v": shard_like(torch.zeros(2, 4), rows)},
    }
    fitted = {
        "transposed": [SAPCallback(scope="neuron", every_n_epochs=1)],
        "partly sharded": [SAPCallback(every_n_epochs=1)],
        "averaged": [SAPCallback(every_n_epochs=1), EMAWeightAveraging()],
        "gini": [PQIMonitor(stop_on=None, gini=True)],
    }
    found = {case: message(check_placements, weights) for case, weights in placed.items()}
    for case, callbacks in fitted.items():
        found[case] = message(refused_fit, folder, case, callbacks)
    return found


def refused_fit(folder, case, callbacks):
    first = nn.ConvTranspose1d(3, 7, 3) if case == "transposed" else nn.Conv1d(3, 7, 5)
    module = Net(True, nn.Sequential(first, nn.Flatten(), nn.LazyLinear(5), nn.Linear(5, 1)))
    module.net(torch.zeros(1, 3, 6))
    if case == "partly sharded":
        module.parts = [module.net[2]]
    trainer(folder, callbacks=callbacks, **strategy(True)).fit(module, data(), data())


def message(function, *arguments):
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return None
