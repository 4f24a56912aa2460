"""What pruning adds to a checkpoint: bytes, and seconds to write and to read it, with and without rewound weights.

``python benchmarks/checkpoints.py`` takes a minute; ``--quick`` takes a small MLP, and keeps nothing.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import common
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet50
from training_step import Net, mlp

from lightning_sap import SAPCallback
from lightning_sap.callbacks.pruning import saving

NOTES = """A checkpoint of `trainer.save_checkpoint` after one pruning: weights, momenta of SGD, and what the callback
keeps. Bytes are those of the file; {clock}; it is read with `weights_only=True`; the contenders in turn, median of
{repeats} with the least and the most; added is the median difference to the dense one's of the same turn.
"""
ROUNDS = """What the file of a round costs, flushed to the disk and with its SHA-256, beside Lightning's own file of the
same training, which is neither; the two in turn, and the median ratio of the turns.
"""
MODELS = {"resnet50": (resnet50, (2, 3, 32, 32)), "mlp": (mlp, (2, 784))}
CONTENDERS = {
    "dense": list,
    "pruned": lambda: [SAPCallback(every_n_epochs=1)],
    'pruned, `rewind_weights="init"`': lambda: [SAPCallback(every_n_epochs=1, rewind_weights="init")],
}


def fitted(model, contender, device):
    make, shape = MODELS[model]
    data = TensorDataset(torch.randn(shape), torch.randint(10, shape[:1]))
    callbacks = CONTENDERS[contender]()
    trainer = Trainer(max_epochs=-1, max_steps=2, callbacks=callbacks, accelerator=device, devices=1, **common.QUIET)
    trainer.fit(Net(make()), DataLoader(data, shape[0]))
    return trainer


def rows_of(model, device, repeats):
    with tempfile.TemporaryDirectory() as folder:
        trainers = {contender: fitted(model, contender, device) for contender in CONTENDERS}
        files = {contender: Path(folder) / f"{i}.ckpt" for i, contender in enumerate(CONTENDERS)}
        writing, reading = ({contender: [] for contender in CONTENDERS} for _ in range(2))
        for _ in range(repeats):
            for contender, trainer in trainers.items():
                file = files[contender]
                writing[contender].append(common.seconds(lambda t=trainer, f=file: t.save_checkpoint(f), device))
                reading[contender].append(common.seconds(lambda f=file: torch.load(f, weights_only=True), device))
        dense = files["dense"].stat().st_size
        for contender, file in files.items():
            size = file.stat().st_size
            added = f"{(size - dense) / 1e6:.2f} MB ({size / dense - 1:.1%})" if contender != "dense" else "–"
            more = [
                statistics.median(a - b for a, b in zip(t[contender], t["dense"], strict=True))
                for t in (writing, reading)
            ]
            yield (
                model, contender, f"{size / 1e6:.2f} MB", added,
                *(f"{common.spread([1e3 * s for s in t[contender]], '{:.0f}')} ms" for t in (writing, reading)),
                *(f"{1e3 * s:.0f} ms" if contender != "dense" else "–" for s in more),
            )  # fmt: skip


def save_round(trainer, folder):
    """Save a round as it is saved between two rounds, and delete its file; returns CPU seconds and wall seconds."""
    session = next(callback for callback in trainer.callbacks if isinstance(callback, SAPCallback)).session
    session.archive, session.state.note = folder, {}
    cpu, wall = time.process_time(), time.perf_counter()
    saving.save_round(trainer, session)
    taken = time.process_time() - cpu, time.perf_counter() - wall
    Path(session.state.note["path"]).unlink()
    return taken


def save_plainly(trainer, folder):
    file = Path(folder) / "plain.ckpt"
    cpu, wall = time.process_time(), time.perf_counter()
    trainer.save_checkpoint(file)
    taken = time.process_time() - cpu, time.perf_counter() - wall
    file.unlink()
    return taken


def rows_of_rounds(model, device, repeats):
    """Rounds are hashed and flushed to the disk, Lightning's own files are not."""
    trainer = fitted(model, "pruned", device)
    ways = {"a round": save_round, "`trainer.save_checkpoint`": save_plainly}
    with tempfile.TemporaryDirectory() as folder:
        taken = [{way: save(trainer, folder) for way, save in ways.items()} for _ in range(repeats)]
    for way in ways:
        for i, clock in enumerate(("CPU time", "wall time")):
            ratio = statistics.median(turn[way][i] / turn["`trainer.save_checkpoint`"][i] for turn in taken)
            yield model, way, clock, f"{common.spread([1e3 * t[way][i] for t in taken], '{:.0f}')} ms", f"{ratio:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_options(parser)
    arguments = parser.parse_args()
    common.hush()
    device, repeats = arguments.device, 2 if arguments.quick else 7
    rows = list(rows_of("mlp" if arguments.quick else "resnet50", device, repeats))
    head = ("model", "what", "file", "added", "writing", "reading", "writing, added", "reading, added")
    text = f"{NOTES.format(clock=common.CLOCK[device], repeats=repeats)}\n{common.table(head, rows)}"
    rows = list(rows_of_rounds("mlp" if arguments.quick else "resnet50", device, repeats))
    text += f"\n\n{ROUNDS}\n{common.table(('model', 'what is saved', 'clock', 'writing', 'ratio'), rows)}"
    common.publish(f"checkpoints_{device}", text, keep=not arguments.quick, device=device)


if __name__ == "__main__":
    main()
