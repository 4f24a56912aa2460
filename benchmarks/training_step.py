"""A training step under masks: dense, ours, and Lightning's ModelPruning, all in a Trainer; time and memory.

``python benchmarks/training_step.py`` takes a quarter of an hour; ``--quick`` takes the MLP and few steps, and
keeps nothing.
"""

import argparse
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import common
import torch
import torchvision
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_sap import FixedFraction, PruningCallback
from lightning_sap.engine.weights import prunable_weights

NOTES = """Training steps of `Trainer.fit` with SGD and momentum, 90% of the weights of every layer pruned.

- time: {clock}, from the start of one batch to the start of the next. The three trainings take
  turns step by step in one process, in one order and then in the other: a step over that of the dense network in the
  same turn; median of all turns after the first {warm_up}, with the middle half.
- memory: bytes of parameters, buffers and masks (all storages that the module and the callbacks hold, each once;
  neither gradients nor optimizer state) over those of the dense module, after the first and after the tenth pruning.
- `ModelPruning` is Lightning's, `l1_unstructured` on the same weights, one pruning for the time and ten for the memory.
"""
HOLDERS = ("torch.nn", "torchvision", "lightning.pytorch.callbacks", "lightning_sap", "__main__")  # of tensors


class Block(nn.Module):
    """Attention and two linear layers, each layer called as a module: else `ModelPruning` fails."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.inputs, self.outputs = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.linears = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        parts = self.inputs(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.outputs(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return x + self.linears(self.norms[1](x))


class Encoder(nn.Module):
    """A small transformer: 4 layers of width 256, the mean of their outputs, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Block(256, 4) for _ in range(4)))
        self.head = nn.Linear(256, 10)

    def forward(self, x):
        return self.head(self.layers(x).mean(1))


def mlp():
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def resnet18():
    network = torchvision.models.resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


MODELS = {  # network, shape of a batch, steps of a run
    "mlp": (mlp, (128, 784), 1000),
    "resnet18": (resnet18, (32, 3, 32, 32), 60),
    "resnet18_few_images": (resnet18, (4, 3, 32, 32), 150),
    "transformer": (Encoder, (32, 32, 256), 100),
}


class Net(LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch):
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Relay(Callback):
    """Seconds of each step of a training that takes turns, step by step, with others in threads beside it."""

    def __init__(self, mine: threading.Semaphore, following: threading.Semaphore) -> None:
        self.mine, self.following = mine, following
        self.start: float | None = None
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.give_way(pl_module.device.type)
        if not self.mine.acquire(timeout=600):
            raise TimeoutError("The training before this one in the ring has stopped.")
        self.start = common.now(pl_module.device.type)

    def on_train_end(self, trainer, pl_module):
        self.give_way(pl_module.device.type)

    def give_way(self, device):
        if self.start is not None:
            self.seconds.append(common.now(device) - self.start)
            self.following.release()


class Held(Callback):
    """Bytes that module and callbacks hold, at the start of every epoch."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        storages: dict[int, int] = {}
        seen: set[int] = set()
        todo = [pl_module.network, *(c for c in trainer.callbacks if isinstance(c, PruningCallback | ModelPruning))]
        while todo:
            thing = todo.pop()
            if id(thing) in seen:
                continue
            seen.add(id(thing))
            if isinstance(thing, torch.Tensor):
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
            elif isinstance(thing, dict):
                todo += thing.values()
            elif isinstance(thing, list | tuple | set):
                todo += thing
            elif type(thing).__module__.startswith(HOLDERS) and hasattr(thing, "__dict__"):
                todo += vars(thing).values()
        self.bytes.append(sum(storages.values()))


def ours(network, amount, rounds, **options):
    return [PruningCallback(FixedFraction(amount), rounds=rounds, every_n_epochs=1, **options)]


def model_pruning(network, amount, rounds, *, lottery=False):
    places = [(network.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in prunable_weights(network)]
    return [
        ModelPruning(
            "l1_unstructured", places, amount=amount, use_global_unstructured=False,
            apply_pruning=lambda epoch: epoch < rounds, make_pruning_permanent=False,
            use_lottery_ticket_hypothesis=lottery,
        )
    ]  # fmt: skip


CONTENDERS = {
    "dense": lambda network, amount, rounds: [],
    "ours": ours,
    "ours, weights rewound": partial(ours, rewind_weights="init"),
    "ModelPruning": model_pruning,
    "ModelPruning, weights rewound": partial(model_pruning, lottery=True),
}
WARM_UP = 3  # steps that do not count
REWOUND = "weights rewound"  # the same step, so only the memory is of interest


def fit(model, contender, device, *, amount, rounds, steps, watch):
    """Train for one epoch more than there are prunings, under the eye of a callback."""
    torch.set_num_threads(1)  # counts for one thread only
    seed_everything(0, verbose=False)
    make, shape, _ = MODELS[model]
    network = make()
    batch = torch.randn(shape), torch.randint(10, shape[:1])
    data = TensorDataset(*(part.repeat(steps, *[1] * (part.dim() - 1)) for part in batch))
    callbacks = [*CONTENDERS[contender](network, amount, rounds), watch]
    trainer = Trainer(max_epochs=rounds + 1, callbacks=callbacks, accelerator=device, devices=1, **common.QUIET)
    trainer.fit(Net(network), DataLoader(data, shape[0]))
    return watch


def times(model, device, steps, names):
    """Seconds of the steps of trainings that take turns in this order, after they were pruned."""
    turns = [threading.Semaphore(number == 0) for number in range(len(names))]
    relays = {name: Relay(turns[i], turns[(i + 1) % len(names)]) for i, name in enumerate(names)}
    with ThreadPoolExecutor(len(names)) as threads:
        fits = [
            threads.submit(fit, model, name, device, amount=0.9, rounds=1, steps=steps, watch=relay)
            for name, relay in relays.items()
        ]
        for done in fits:
            done.result()
    return {name: relay.seconds[steps + WARM_UP : -1] for name, relay in relays.items()}


def rows_of(model, device, steps):
    names = [contender for contender in CONTENDERS if REWOUND not in contender]
    steps = steps or MODELS[model][2]
    both_ways = [times(model, device, steps, order) for order in (names, names[::-1])]
    taken = {name: [s for one in both_ways for s in one[name]] for name in names}
    held = {c: fit(model, c, device, amount=0.2, rounds=10, steps=1, watch=Held()).bytes for c in CONTENDERS}
    for contender, sizes in held.items():
        time = "–"
        if contender in taken:
            time = common.middle_half([s / d for s, d in zip(taken[contender], taken["dense"], strict=True)], "{:.3f}")
        if contender == "dense":
            time = f"1 ({1e3 * statistics.median(taken['dense']):.1f} ms)"
        first, last = (sizes[i] / held["dense"][0] for i in (1, 10))
        yield f"{model}, batches of {MODELS[model][1]}", contender, time, f"{first:.2f}", f"{last:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_options(parser)
    parser.add_argument("--models", help=f"some of {','.join(MODELS)}; default: all")
    arguments = parser.parse_args()
    models = arguments.models or ("mlp" if arguments.quick else ",".join(MODELS))
    device, steps = arguments.device, 2 * WARM_UP if arguments.quick else None
    common.hush()
    rows = [row for model in models.split(",") for row in rows_of(model, device, steps)]
    head = ("model", "what", "time of a step", "memory after 1 pruning", "after 10")
    text = f"{NOTES.format(clock=common.CLOCK[device], warm_up=WARM_UP)}\n{common.table(head, rows)}"
    common.publish(f"training_step_{device}", text, keep=not arguments.quick, device=device)


if __name__ == "__main__":
    main()
