"""How one pruning grows with the number of weights, and with a second process.

``python benchmarks/growth.py`` takes some minutes and 7 GiB; ``--quick`` takes up to 4 M weights, and keeps nothing.
"""

import argparse
import gc
import json
import statistics
import tempfile
from pathlib import Path

import common
import torch
from lightning.pytorch import Callback, Trainer
from one_pruning import in_a_fresh_process, peak_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_step import Net

from lightning_sap import FixedFraction, PruningCallback, SparsityInformed, prune_masks

MILLIONS = (1, 3, 10, 30, 100, 300, 1000)
WIDTH = 1000  # of the matrices, which have 1 M weights, or 10 M where there are more than 100 M
BYTES = 7  # of memory that a weight takes at most: itself, its mask, and what picking needs
NOTES = """One pruning by the index (p = 0.5, q = 1) of normal float32 weights in matrices of 1 M (from 300 M on, 10 M)
weights. {clock}; median of {repeats} repeats (3 above 100 M) in a row, after one that does not count, with the least
and the most. Memory: peak beyond the weights, and as a multiple of their bytes; the masks are a byte for each.
"""
RANKS = """Three prunings of {millions} M weights from inside `Trainer.fit` with `strategy="ddp_spawn"` on the CPU, as
`history` has their seconds: by wall clock, one thread for each process. Two processes prune each its own copy, compare
weights and masks before, and take the masks of the first.
"""


def weights_of(millions, device):
    generator = torch.Generator(device).manual_seed(0)
    height = 10 * WIDTH if millions > 100 else WIDTH
    count = millions * 1_000_000 // (height * WIDTH)
    return {f"w{i}": torch.randn(height, WIDTH, generator=generator, device=device) for i in range(count)}


def prune(weights, scope):
    prune_masks(weights, policy=SparsityInformed(p=0.5, q=1.0), scope=scope)


def times(millions, scope, device, repeats):
    weights = weights_of(millions, device)
    gc.collect()
    prune(weights, scope)
    count = repeats if millions <= 100 else min(3, repeats)
    return [common.seconds(lambda: prune(weights, scope), device) for _ in range(count)]


def peak(millions, scope, device, results):
    """Put into a queue the bytes that a pruning takes beyond the weights, and as a multiple of theirs."""
    prune(weights_of(1, device), scope)
    weights = weights_of(millions, device)
    extra = peak_of(lambda: prune(weights, scope), device)
    results.put((extra, extra / sum(w.nbytes for w in weights.values())))


def rows_of(device, largest, repeats):
    for scope in ("global", "layer"):
        for millions in (m for m in MILLIONS if m <= largest):
            if BYTES * millions * 1e6 > common.available():
                yield scope, f"{millions} M", "–", "–", "–", "–"
                continue
            taken = times(millions, scope, device, repeats)
            each = [s / millions * 1e3 for s in taken]  # ns for a weight
            extra = in_a_fresh_process(peak, millions, scope, device)
            memory = ("–", "–") if extra is None else (f"{extra[0] / 1e6:.1f} MB", f"{extra[1]:.2f}")
            yield scope, f"{millions} M", f"{1e3 * statistics.median(taken):.1f} ms", common.spread(each), *memory


class Keep(Callback):
    """Writes how long the prunings took."""

    def __init__(self, pruner, file) -> None:
        self.pruner, self.file = pruner, file

    def on_fit_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            self.file.write_text(json.dumps([r.seconds for r in self.pruner.history if r.seconds is not None]))


def of_ranks(devices, layers):
    """Seconds of each pruning in a fit with so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        pruner, file = PruningCallback(FixedFraction(0.2), rounds=3, every_n_epochs=1), Path(folder) / "seconds.json"
        network = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        trainer = Trainer(
            max_epochs=4, callbacks=[pruner, Keep(pruner, file)], accelerator="cpu", devices=devices,
            strategy="ddp_spawn", **common.QUIET,
        )  # fmt: skip
        data = TensorDataset(torch.randn(4, WIDTH), torch.randint(10, (4,)))
        trainer.fit(Net(network), DataLoader(data, 2))
        return json.loads(file.read_text())


def rows_of_ranks(millions):
    taken = {devices: of_ranks(devices, millions) for devices in (1, 2)}
    for devices, seconds in taken.items():
        ratio = statistics.median(seconds) / statistics.median(taken[1])
        yield devices, f"{common.spread([1e3 * s for s in seconds], '{:.0f}')} ms", f"{ratio:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_options(parser)
    parser.add_argument("--largest", type=int, default=1000, help="most weights, in millions")
    arguments = parser.parse_args()
    common.hush()
    device, quick = arguments.device, arguments.quick
    rows = list(rows_of(device, 3 if quick else arguments.largest, 2 if quick else 7))
    head = ("scope", "weights", "time", "ns for a weight", "memory", "of the weights")
    text = f"{NOTES.format(clock=common.CLOCK[device], repeats=7)}\n{common.table(head, rows)}"
    if device == "cpu":
        millions = 1 if quick else 10
        of_processes = common.table(("processes", "time", "of one"), list(rows_of_ranks(millions)))
        text += f"\n\n{RANKS.format(millions=millions)}\n{of_processes}"
    common.publish(f"growth_{device}", text, keep=not quick, device=device)


if __name__ == "__main__":
    main()
