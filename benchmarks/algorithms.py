"""Which algorithm keeps most accuracy at the same number of epochs and of remaining weights.

``python benchmarks/algorithms.py`` takes two hours on one core; ``--images FOLDER_OR_TAR`` adds colour images in
``train/<class>/`` and ``test/<class>/``, which take some hours more. Every training is kept in ``--runs FILE`` as one
line of JSON, and the table is written anew after each, so that a run that was cut off goes on; ``--only TEXT`` trains
what has that text in its name. ``--quick`` trains three contenders for few epochs on the digits, and keeps nothing.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import common
from lightning.pytorch import Trainer, seed_everything
from tolerance import measure
from tolerance_tasks import TASKS, loaders

from lightning_sap import FixedFraction, GrowAndPrune, PruningCallback, SAPCallback, SparsityInformed
from lightning_sap.engine.weights import prunable_weights
from lightning_sap.rounds.plan import plan_rounds

REMAINING = (0.2, 0.1, 0.05, 0.02)
IMPORTANCES = ("magnitude", "taylor", "wanda")  # by which score gradual pruning picks; each is a row of the table
NAMES = ("digits, MLP", "digits, CNN", "images, MLP", "images, CNN")
SEEDS = 3
Make = Callable[[float, int, int], PruningCallback]  # from the share that remains, the epochs and the number of layers
NOTES = """Validation accuracy of the network after fit, mean of {seeds} seeds with the least and the most, by the share
of the weights that remains, which every method but one meets exactly in the same number of epochs; scope "global", the
schedule of a training (a cosine) in every round. Seeds that are missing are still to be trained.

- one shot: `FixedFraction`, pruned once, half-way.
- gradual: `FixedFraction` in as many rounds as the library plans by default; f meets the target by itself.
- SAP: `SAPCallback(target_remaining=…)`, in as many rounds.
- units: the same with `structure="unit"`, which keeps as many weights as whole units allow.
- GaP, 2 or 4 parts (3 in networks of 3 layers): `GrowAndPrune(remaining, partitions)`, two cycles; closed by the
  index: with `close=SparsityInformed()`.
- by layer: with scope "layer".
"""


def gradual(remaining: float, epochs: int, layers: int, importance: str = "magnitude") -> PruningCallback:
    rounds = plan_rounds(epochs).rounds or 1
    fraction = 1 - remaining ** (1 / rounds)
    return PruningCallback(
        FixedFraction(fraction), rounds=rounds, target_remaining=remaining, importance=importance, scope="global"
    )


def shot(remaining: float, epochs: int, layers: int) -> PruningCallback:
    options = {"rounds": 1, "every_n_epochs": epochs // 2, "target_remaining": remaining}
    return PruningCallback(FixedFraction(1 - remaining), scope="global", **options)


def opened(parts: int, scope: str = "global", **how: Any) -> Make:
    return lambda remaining, epochs, layers: PruningCallback(
        GrowAndPrune(remaining, min(parts, layers), **how), scope=scope
    )


CONTENDERS: dict[str, Make] = {
    "one shot": shot,
    **{
        "gradual" + (f", {name}" if name != "magnitude" else ""): lambda *given, name=name: gradual(*given, name)
        for name in IMPORTANCES
    },
    "SAP": lambda remaining, *_: SAPCallback(target_remaining=remaining, scope="global"),
    **{
        name: lambda remaining, *_, how=how: SAPCallback(target_remaining=remaining, structure="unit", **how)
        for name, how in {
            "units": {"scope": "global"},
            "units, by layer": {},
            "units, fisher": {"scope": "global", "importance": "fisher"},
        }.items()
    },
    "GaP, 2 parts": opened(2),
    "GaP, 4 parts": opened(4),
    "GaP, 2 parts, by layer": opened(2, "layer"),
    "GaP, 2 parts, closed by the index": opened(2, close=SparsityInformed()),
    "GaP, 2 parts, 1 cycle": opened(2, cycles=1),
    "GaP, 2 parts, 7 cycles": opened(2, cycles=7),
}


class Key(NamedTuple):
    """A training: what, how, and from which seed; of the dense network all remains."""

    task: str
    contender: str
    remaining: float
    seed: int


def run(key: Key, images: str, device: str, epochs: int) -> dict[str, Any]:
    """One training: what remains, and its accuracy on the part for validation and on the one held out."""
    common.hush()
    task = TASKS[key.task]
    layers = len(prunable_weights(task.network()))
    pruner = None if key.contender == "dense" else CONTENDERS[key.contender](key.remaining, epochs, layers)
    train, validate, held_out = loaders(task.data(images))
    seed_everything(key.seed, verbose=False)
    module = task.network()
    callbacks = [] if pruner is None else [pruner]
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, accelerator=device, devices=1, **common.QUIET)
    trainer.fit(module, train, validate)
    found = {
        "weights": 1.0 if pruner is None else pruner.remaining,
        "rounds": 0 if pruner is None else len(pruner.history),
    }
    scores = {"metric": measure(module, validate, "test_acc"), "held_out": measure(module, held_out, "test_acc")}
    return {**key._asdict(), "epochs": epochs, **found, **scores}


def rows_of(runs: list[dict[str, Any]]) -> list[list[str]]:
    """The table's rows: by task and method the accuracies at each share."""
    rows = []
    for name in NAMES:
        for contender in ("dense", *CONTENDERS):
            found = [each for each in runs if (each["task"], each["contender"]) == (name, contender)]
            cells = [_cell([r["metric"] for r in found if r["remaining"] in (share, 1.0)]) for share in REMAINING]
            if found:
                rows.append([f"{name}, {found[0]['epochs']} epochs", contender, *cells])
    return rows


def _cell(values: list[float]) -> str:
    """Mean, least and most; how many they are where seeds are missing."""
    if not values:
        return "–"
    told = [f"{min(values):.3f} to {max(values):.3f}"] if len(values) > 1 else []
    told += [f"{len(values)} of {SEEDS}"] if len(values) < SEEDS else []
    return f"{statistics.mean(values):.3f} ({', '.join(told)})"


def wanted(arguments) -> list[Key]:
    """The trainings: of the first seed all, before those of the second."""
    keys = []
    contenders = ("gradual", "GaP, 2 parts") if arguments.quick else tuple(CONTENDERS)
    for seed in range(1 if arguments.quick else SEEDS):
        for name in NAMES[:1] if arguments.quick else NAMES:
            if arguments.images or not name.startswith("images"):
                keys.append(Key(name, "dense", 1.0, seed))
                shares = REMAINING[:1] if arguments.quick else REMAINING
                keys += [Key(name, contender, share, seed) for share in shares for contender in contenders]
    return [key for key in keys if arguments.only in f"{key.task}: {key.contender}"]


def publish(runs: list[dict[str, Any]], *, keep: bool) -> None:
    head = ("task", "method", *(f"{share:.0%} remain" for share in REMAINING))
    common.publish("algorithms", f"{NOTES.format(seeds=SEEDS)}\n{common.table(head, rows_of(runs))}", keep=keep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_options(parser)
    parser.add_argument("--runs", default="outputs/algorithms.jsonl", help="where each training is kept")
    parser.add_argument("--images", default="", help="folder, or a tar of it, with train/<class>/ and test/<class>/")
    parser.add_argument("--only", default="", help="train only what has this text in 'task: contender'")
    parser.add_argument("--jobs", type=int, default=1, help="how many trainings at once")
    arguments = parser.parse_args()
    path, runs = Path(arguments.runs), []
    if not arguments.quick:
        path.parent.mkdir(parents=True, exist_ok=True)
        runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {tuple(each[name] for name in Key._fields) for each in runs}
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        waiting = [
            pool.submit(run, key, arguments.images, arguments.device, 8 if arguments.quick else TASKS[key.task].epochs)
            for key in wanted(arguments)
            if key not in done
        ]
        for each in as_completed(waiting):
            runs.append(each.result())
            if not arguments.quick:
                with path.open("a") as file:
                    file.write(json.dumps(runs[-1]) + "\n")
                publish(runs, keep=True)
    publish(runs, keep=not arguments.quick)


if __name__ == "__main__":
    main()
