"""The sparsest network within a tolerance: found in one fit, beside tuned fixed fractions and one shot.

``python benchmarks/tolerance.py`` takes half an hour on one core; ``--images FOLDER_OR_TAR`` adds colour images in
``train/<class>/`` and ``test/<class>/``, which take two hours more. Every training is kept in ``--runs FILE`` as one
line of JSON, so that a run that was cut off goes on; ``--only TEXT`` trains what has that text in its name.
``--quick`` trains a few epochs of the digits, and keeps nothing.
"""

import argparse
import json
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from tolerance_tasks import TASKS, Task, loaders

from lightning_sap import FixedFraction, GoOn, PruningCallback, RoundListener

FRACTIONS = (0.1, 0.2, 0.35, 0.5, 0.7)
SHOTS = (0.5, 0.7, 0.8, 0.9, 0.95)
Make = Callable[[int], PruningCallback]


class Witness(RoundListener, Callback):
    """What the held-out part says of each round."""

    may_stop = False

    def __init__(self, loader, key: str) -> None:
        self.loader, self.key, self.seen = loader, key, {}

    @torch.no_grad()
    def on_round_end(self, trainer, pl_module, event):
        self.seen[event.record.round] = measure(pl_module, self.loader, self.key)
        return GoOn()


@torch.no_grad()
def measure(module, loader, key: str) -> float:
    """Mean loss, or share of right answers, over a part."""
    was, total, count = module.training, 0.0, 0
    module.eval()
    for batch in loader:
        size = len(batch[0])
        found = module.loss(batch) if key == "test_loss" else (module(batch[0]).argmax(1) == batch[1]).float().mean()
        total, count = total + size * float(found), count + size
    module.train(was)
    return total / count


def fixed(f: float, scope: str) -> Make:
    return lambda epochs: PruningCallback(FixedFraction(f), scope=scope)


def shot(f: float) -> Make:
    return lambda epochs: PruningCallback(FixedFraction(f), scope="global", rounds=1, every_n_epochs=epochs // 2)


BASELINES: dict[str, Make] = {
    **{f"fixed {f}, {scope}": fixed(f, scope) for scope in ("layer", "global") for f in FRACTIONS},
    **{f"one shot {f}": shot(f) for f in SHOTS},
}


def fit(task: Task, images: str, seed: int, epochs: int, callbacks: list) -> tuple[Trainer, Any]:
    """Train, from where the task says."""
    module = task.network()
    if task.network_before is not None:
        seed_everything(1000 + seed, verbose=False)
        before = task.network_before()
        train(task, images, before, task.pretrained, [])
        module.load_state_dict(before.state_dict())
    seed_everything(seed, verbose=False)
    if task.network_before is None:
        module = task.network()
    return train(task, images, module, epochs, callbacks), module


def train(task: Task, images: str, module, epochs: int, callbacks: list) -> Trainer:
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, accelerator="cpu", **common.QUIET)
    trainer.fit(module, *loaders(task.data(images))[:2])
    return trainer


def run(name: str, contender: str, seed: int, images: str, epochs: int, reference: float | None) -> dict[str, Any]:
    """One training: its rounds, and what it hands back."""
    common.hush()
    task = TASKS[name]
    key = task.metric.replace("val", "test")
    held_out = loaders(task.data(images))[2]
    witness = Witness(held_out, key)
    pruner = None if contender == "dense" else BASELINES[contender](epochs)
    trainer, module = fit(task, images, seed, epochs, [] if pruner is None else [pruner, witness])
    rounds = (
        [(r.remaining, r.metrics.get(task.metric, math.nan), witness.seen.get(r.round)) for r in pruner.history]
        if pruner
        else [(1.0, float(trainer.callback_metrics[task.metric]), measure(module, held_out, key))]
    )
    return {"task": name, "contender": contender, "seed": seed, "epochs": epochs, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default="outputs/tolerance.jsonl")
    parser.add_argument("--images", default="")
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    path = Path(arguments.runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = (
        {(r["task"], r["contender"], r["seed"]) for r in map(json.loads, path.read_text().splitlines())}
        if path.exists()
        else set()
    )
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        waiting = []
        for name, task in TASKS.items():
            for seed in range(task.seeds):
                for contender in ("dense", *BASELINES):
                    key = (name, contender, seed)
                    if key in done or arguments.only not in f"{name}: {contender}":
                        continue
                    if name.startswith("images") and not arguments.images:
                        continue
                    waiting.append(pool.submit(run, *key, arguments.images, task.epochs, None))
        for each in as_completed(waiting):
            with path.open("a") as file:
                file.write(json.dumps(each.result()) + "\n")


if __name__ == "__main__":
    main()
