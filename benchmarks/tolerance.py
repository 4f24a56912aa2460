"""The sparsest network within a tolerance: found in one fit, beside tuned fixed fractions and one shot.

``python benchmarks/tolerance.py`` takes an hour on one core; ``--images FOLDER_OR_TAR`` adds colour images in
``train/<class>/`` and ``test/<class>/``, which take two hours more. Every training is kept in ``--runs FILE`` as one
line of JSON, so that a run that was cut off goes on; ``--only TEXT`` trains what has that text in its name.
``--quick`` trains two contenders for few epochs on the digits, and keeps nothing.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from tolerance_tasks import TASKS, Task, loaders

from lightning_sap import FixedFraction, GoOn, PruningCallback, RoundListener, SAPCallback, Tolerance
from lightning_sap.rounds import search

FRACTIONS = (0.1, 0.2, 0.35, 0.5, 0.7)
SHOTS = (0.5, 0.7, 0.8, 0.9, 0.95)
Make = Callable[[int, Tolerance, Tolerance], PruningCallback]  # from epochs, and with the reference and without
NOTES = """How many weights remain in the sparsest network that is worse than the dense one by at most 0.01 of accuracy
(characters: 0.02 nats), both trained from the same seed for as many epochs, judged on the part that is searched by.

- search: `SAPCallback(tolerance=Tolerance(metric, drop, reference=that of the dense network))`, untuned; the network
  is the one in the module after fit. "own yardstick": without the reference.
- best fixed: the least median of `PruningCallback(FixedFraction(f))` for f in {fractions}, by layer and global, with
  the library's default number of rounds; the sparsest of its rounds that is within. One shot: f in {shots}, global,
  pruned half-way.
- 100%: no pruned network was within. *: what a search hands back is not within.
- worst: by how much the network handed back is worse than the dense one, in the worst seed. held out: the same on a
  part that neither the search nor the choice of a round saw, mean of the seeds; below 0 it is better than the dense.
- taken back: rounds, of all rounds of all seeds.

The numbers of the search and its p, q = 1, 2 were chosen on {chosen}; the other tasks only score.
"""


class Data(NamedTuple):
    """Where the colour images are, and what trains."""

    images: str
    device: str


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
    for parts in loader:
        batch = [part.to(module.device) for part in parts]
        size = len(batch[0])
        found = module.loss(batch) if key == "test_loss" else (module(batch[0]).argmax(1) == batch[1]).float().mean()
        total, count = total + size * float(found), count + size
    module.train(was)
    return total / count


def fixed(f: float, scope: str) -> Make:
    return lambda epochs, *_: PruningCallback(FixedFraction(f), scope=scope)


def shot(f: float) -> Make:
    return lambda epochs, *_: PruningCallback(FixedFraction(f), scope="global", rounds=1, every_n_epochs=epochs // 2)


BASELINES: dict[str, Make] = {
    **{f"fixed {f}, {scope}": fixed(f, scope) for scope in ("layer", "global") for f in FRACTIONS},
    **{f"one shot {f}": shot(f) for f in SHOTS},
}

SEARCHES: dict[str, Make] = {
    "search": lambda epochs, given, own: SAPCallback(tolerance=given),
    "search, own yardstick": lambda epochs, given, own: SAPCallback(tolerance=own),
}
EQUAL = search.Rule(growth=1.0, shrink=0.5)
ABLATIONS: dict[str, tuple[Make, search.Rule]] = {
    "equal steps of a half, halved after a failure": (
        lambda epochs, given, own: PruningCallback(FixedFraction(0.5), tolerance=given), EQUAL
    ),
    "halving alone": (SEARCHES["search"], EQUAL),
    "without going back": (SEARCHES["search"], search.Rule(goes_back=False)),
    "without near misses": (SEARCHES["search"], search.Rule(chances=0)),
    "by layer": (lambda epochs, given, own: SAPCallback(tolerance=given, scope="layer"), search.RULE),
    "by neuron": (lambda epochs, given, own: SAPCallback(tolerance=given, scope="neuron"), search.RULE),
    "p, q = 0.5, 1": (lambda epochs, given, own: SAPCallback(0.5, 1.0, tolerance=given), search.RULE),
}  # fmt: skip
CONTENDERS = BASELINES | SEARCHES | {name: make for name, (make, _) in ABLATIONS.items()}


def fit(task: Task, data: Data, seed: int, epochs: int, callbacks: list) -> tuple[Trainer, Any]:
    """Train, from where the task says."""
    module = task.network()
    if task.network_before is not None:
        seed_everything(1000 + seed, verbose=False)
        before = task.network_before()
        train(task, data, before, task.pretrained, [])
        module.load_state_dict(before.state_dict())
    seed_everything(seed, verbose=False)
    if task.network_before is None:
        module = task.network()
    return train(task, data, module, epochs, callbacks), module


def train(task: Task, data: Data, module, epochs: int, callbacks: list) -> Trainer:
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, accelerator=data.device, devices=1, **common.QUIET)
    trainer.fit(module, *loaders(task.data(data.images))[:2])
    return trainer


def run(name: str, contender: str, seed: int, data: Data, epochs: int, reference: float | None) -> dict[str, Any]:
    """One training: its rounds, and what it hands back; a network as remaining weights, metric, and metric held out."""
    common.hush()
    task = TASKS[name]
    key = task.metric.replace("val", "test")
    held_out = loaders(task.data(data.images))[2]
    witness, pruner = Witness(held_out, key), None
    if contender != "dense":
        given, own = (Tolerance(task.metric, task.drop, task.mode, known) for known in (reference, None))
        search.RULE = ABLATIONS[contender][1] if contender in ABLATIONS else search.Rule()
        pruner = CONTENDERS[contender](epochs, given, own)
    trainer, module = fit(task, data, seed, epochs, [] if pruner is None else [pruner, witness])
    metric = trainer.validate(module, loaders(task.data(data.images))[1], verbose=False)[0][task.metric]
    result = {"task": name, "contender": contender, "seed": seed, "epochs": epochs}
    if pruner is None:
        return {**result, "rounds": [(1.0, metric, measure(module, held_out, key))]}
    rounds = [(r.remaining, r.metrics.get(task.metric, math.nan), witness.seen.get(r.round)) for r in pruner.history]
    if pruner.options.tolerance is None:
        return {**result, "rounds": rounds}
    back = sum(record.taken_back for record in pruner.history)
    found = (pruner.remaining, metric, measure(module, held_out, key))
    return {**result, "rounds": rounds, "found": found, "taken_back": back}


def sparsest(tolerance: Tolerance, dense: list[float], run: dict[str, Any]) -> list[float]:
    """The network of a run that counts: what a search hands back, or else the sparsest round within the tolerance.

    100% of the weights, as good as the dense network, if there is none.
    """
    if "found" in run:
        return run["found"]
    return min((n for n in run["rounds"] if tolerance.keeps(dense[1], n[1])), default=[1.0, *dense[1:]])


def rows_of(name: str, runs: list[dict[str, Any]]) -> list[list[str]]:
    """The table's rows of a task: the best fixed fraction and the best one shot, the searches, the ablations."""
    task = TASKS[name]
    tolerance, rows = Tolerance(task.metric, task.drop, task.mode), []
    dense = {run["seed"]: run["rounds"][0] for run in runs if run["contender"] == "dense"}
    of: dict[str, dict[int, list[float]]] = {}
    for each in runs:
        if each["contender"] != "dense" and each["seed"] in dense:
            of.setdefault(each["contender"], {})[each["seed"]] = sparsest(tolerance, dense[each["seed"]], each)
    best = {
        kind: min((c for c in of if c.startswith(kind)), key=lambda c: median(of[c]), default=None)
        for kind in ("fixed", "one shot")
    }

    def share(seed: int, network: list[float]) -> str:
        return f"{network[0]:.1%}" + "*" * (not tolerance.keeps(dense[seed][1], network[1]))

    for contender in [*filter(None, best.values()), *(c for c in of if c not in BASELINES)]:
        found = of[contender]
        back = [r for r in runs if r["contender"] == contender and "taken_back" in r]
        rows.append(
            [
                f"{name}, {runs[0]['epochs']} epochs",
                f"best {contender}" if contender in BASELINES else contender,
                f"{median(found):.1%}",
                ", ".join(share(seed, found[seed]) for seed in sorted(found)),
                f"{max(tolerance.loss(dense[s][1], n[1]) for s, n in found.items()):.3f}",
                f"{statistics.mean(tolerance.loss(dense[s][2], n[2]) for s, n in found.items()):.3f}",
                f"{sum(r['taken_back'] for r in back)} of {sum(len(r['rounds']) for r in back)}" if back else "–",
            ]
        )
    return rows


def median(found: dict[int, list[float]]) -> float:
    """Of the remaining weights."""
    return statistics.median(network[0] for network in found.values())


def wanted(arguments) -> list[tuple[str, str, int]]:
    """The trainings, the dense ones first; ablations on the tasks that train fast."""
    keys = []
    for name, task in TASKS.items():
        if (name.startswith("images") and not arguments.images) or (arguments.quick and name != "digits, MLP"):
            continue
        quick = name.startswith("digits") or task.chosen_on
        others = ["search", "fixed 0.5, global"] if arguments.quick else [*BASELINES, *SEARCHES]
        others += ABLATIONS if quick and not arguments.quick else []
        seeds = range(1 if arguments.quick else task.seeds)
        keys += [(name, contender, seed) for contender in ("dense", *others) for seed in seeds]
    return [key for key in keys if arguments.only in f"{key[0]}: {key[1]}"]


def train_all(arguments, path: Path | None) -> list[dict[str, Any]]:
    """All trainings that are not in the file, which each is added to."""
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path is not None and path.exists() else []
    done = {(r["task"], r["contender"], r["seed"]) for r in runs}
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for first in (True, False):  # the dense networks give the others their reference
            dense = {(r["task"], r["seed"]): r["rounds"][0][1] for r in runs if r["contender"] == "dense"}
            waiting = [
                pool.submit(
                    run,
                    *key,
                    Data(arguments.images, arguments.device),
                    16 if arguments.quick else TASKS[key[0]].epochs,
                    reference,
                )
                for key in wanted(arguments)
                for reference in [dense.get((key[0], key[2]))]
                if key not in done and (key[1] == "dense") is first
            ]
            for each in as_completed(waiting):
                runs.append(each.result())
                if path is not None:
                    with path.open("a") as file:
                        file.write(json.dumps(runs[-1]) + "\n")
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_options(parser)
    parser.add_argument("--runs", default="outputs/tolerance.jsonl", help="where each training is kept")
    parser.add_argument("--images", default="", help="folder, or a tar of it, with train/<class>/ and test/<class>/")
    parser.add_argument("--only", default="", help="train only what has this text in 'task: contender'")
    parser.add_argument("--jobs", type=int, default=1, help="how many trainings at once")
    arguments = parser.parse_args()
    path = None if arguments.quick else Path(arguments.runs)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    runs = train_all(arguments, path)
    rows = [row for name in TASKS for row in rows_of(name, [r for r in runs if r["task"] == name])]
    head = ("task", "method", "remaining, median", "of each seed", "worst", "held out", "taken back")
    chosen = " and ".join(f'"{name}"' for name, task in TASKS.items() if task.chosen_on)
    notes = NOTES.format(fractions=", ".join(map(str, FRACTIONS)), shots=", ".join(map(str, SHOTS)), chosen=chosen)
    common.publish("tolerance", f"{notes}\n{common.table(head, rows)}", keep=not (arguments.quick or arguments.only))


if __name__ == "__main__":
    main()
