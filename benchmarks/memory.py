"""Memory over the rounds of a training: ours, and Lightning's `ModelPruning`, beside a dense training.

``python benchmarks/memory.py`` takes some minutes; ``--quick`` takes a small network and three rounds.
"""

import argparse
import gc
import multiprocessing
import os

import common
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.utils.data import DataLoader

from lightning_sap import FixedFraction, PruningCallback

NOTES = """A perceptron of {layers} layers of {width}, SGD with momentum, {rounds} prunings of 5% of what survives, one
after each epoch, in global scope; each training in a process of its own. As multiples of the model's {mib:.0f} MiB:

- round n: storages of all live tensors at the end of the round, each once; weights, gradients and momenta are 3. In
  brackets the peak of the process up to then: `VmHWM` less the `VmRSS` from before the model was built.
- checkpoint: bytes of the file written after training.
"""


class Perceptron(LightningModule):
    def __init__(self, layers, width):
        super().__init__()
        self.net = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def ours(rounds, **options):
    return PruningCallback(FixedFraction(0.05), rounds=rounds, scope="global", **options)


CONTENDERS = {
    "dense": lambda rounds: [],
    "ours": lambda rounds: [ours(rounds)],
    'ours, `rewind_weights="init"`': lambda rounds: [ours(rounds, rewind_weights="init")],
    "`ModelPruning`": lambda rounds: [
        ModelPruning("l1_unstructured", amount=0.05, use_lottery_ticket_hypothesis=False)
    ],
    "`ModelPruning`, lottery ticket": lambda rounds: [ModelPruning("l1_unstructured", amount=0.05)],
}


def tensor_bytes():
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    gradients = [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = [t.untyped_storage() for t in tensors + gradients]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Look(Callback):
    """Notes tensors and peak at the end of the epochs asked for, before anyone prunes."""

    def __init__(self, epochs):
        self.epochs, self.seen = epochs, {}
        self.tensors, self.resident = tensor_bytes(), common.resident("VmRSS")

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch in self.epochs:
            self.seen[trainer.current_epoch] = (tensor_bytes() - self.tensors, common.resident("VmHWM") - self.resident)


def measure(name, layers, width, looks, sender):
    common.hush()
    rounds, look = max(looks), Look(looks)
    module = Perceptron(layers, width)
    callbacks = [*CONTENDERS[name](rounds), look]
    trainer = Trainer(accelerator="cpu", max_epochs=rounds + 1, callbacks=callbacks, **common.QUIET)
    trainer.fit(module, DataLoader(torch.ones(4, width), 2))
    trainer.save_checkpoint("memory.ckpt")
    size = os.path.getsize("memory.ckpt")
    os.remove("memory.ckpt")
    sender.send((look.seen, size))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small network, three rounds; nothing is kept")
    quick = parser.parse_args().quick
    layers, width, looks = (2, 256, (1, 3)) if quick else (8, 1024, (1, 2, 5, 10, 20, 30))
    model = 4 * layers * (width * width + width)
    context, rows = multiprocessing.get_context("spawn"), []
    for name in CONTENDERS:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=measure, args=(name, layers, width, looks, sender))
        process.start()
        sender.close()
        seen, size = receiver.recv()
        process.join()
        cells = [f"{tensors / model:.2f} ({peak / model:.1f})" for tensors, peak in seen.values()]
        rows.append([name, *cells, f"{size / model:.2f}"])
    head = ["", *(f"round {n}" for n in looks), "checkpoint"]
    notes = NOTES.format(layers=layers, width=width, rounds=max(looks), mib=model / 2**20)
    common.publish("memory", f"{notes}\n{common.table(head, rows)}", keep=not quick)


if __name__ == "__main__":
    main()
