"""How far the defaults of `PhaseDetector` are fitted to the runs they were found on.

`python benchmarks/phase_halves.py --curves FILE` chooses the parameters on one half of measured pruning runs and scores
them on the other: random halves, both ways, and halves by what the runs have in common (architecture, policy, …). It
also moves each parameter alone, and adds noise. One core needs a minute or two.

FILE is a JSON list of runs: `{"arch": …, "scope": …, "policy": …, "rewind": …, "rounds": [{"val_acc": …, "val_loss": …,
"pqi": …, "remaining": …, "layers": {name: [index, surviving weights, weights]}}, …]}`.

A run is *degraded* from the first of three rounds in a row that lose more than 0.02 of the best accuracy of its first
three rounds, and *collapsed* from the first round that lost more than half of what that best has over chance. A stop
before the run is degraded is false. A run has a *turn* if the mean of its layers' indices stands 25% above its lowest
value so far for three rounds in a row.
"""

import argparse
import itertools
import json
import math
import random
import statistics
from pathlib import Path

from common import publish, table

from lightning_sap.rounds.phases import PhaseDetector

GRID = {
    "rise": [0.15, 0.2, 0.25, 0.3, 0.4],
    "fall": [0.2, 0.25, 0.3, 0.35, 0.4],
    "patience": [1, 2, 3],
    "spare": [0.01, 0.02, 0.03, 0.05, 0.1],
}
RESERVES = {"reserve": [0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3]}
ALONE = {**GRID, "floor": [0.003, 0.01, 0.02, 0.03], "metric_change": [0.05, 0.1, 0.3, 0.4]}


def main():
    parser = argparse.ArgumentParser(description="Parameters chosen on half of the runs, scored on the other half.")
    parser.add_argument(
        "--curves", required=True, type=Path, help="JSON file of measured runs (not part of the project)"
    )
    parser.add_argument("--chance", type=float, default=0.1, help="accuracy of a guess, default 0.1")
    parser.add_argument("--splits", type=int, default=5, help="random halvings, default 5")
    parser.add_argument("--quick", action="store_true", help="every eighth run, one halving, nothing kept")
    args = parser.parse_args()
    if not args.curves.is_file():
        parser.error(f"no such file: {args.curves}; the measured runs are not part of the project, see the docstring")
    runs = json.loads(args.curves.read_text(encoding="utf-8"))[:: 8 if args.quick else 1]
    for run in runs:
        run["degraded"], run["collapsed"] = ground_truth(run["rounds"], args.chance)
        run["turn"] = turns(run["rounds"])
    collapsed = sum(run["collapsed"] is not None for run in runs)
    report = [
        "# Parameters of `PhaseDetector`, chosen and scored on different runs",
        f"{len(runs)} runs, {collapsed} of which collapse. A score of collapse reads: collapsed runs caught / all, "
        "false stops, median delay in rounds; one of turns: turns found / all, flags without one, median accuracy lost "
        "at the round from which they date; one of sound rounds: stopped runs whose last sound round is within 0.02 of "
        "the best accuracy / all, median accuracy lost there, median fraction of the weights there. A parameter that "
        "is not named has its default.",
        halves(runs, 1 if args.quick else args.splits, "Collapse", GRID, stops),
        halves(runs, 1 if args.quick else args.splits, "Turns", {"rise": GRID["rise"], "patience": [1, 2, 3]}, flags),
        halves(runs, 1 if args.quick else args.splits, "Sound rounds", RESERVES, restored),
        restored_by(runs),
        alone(runs),
        disturbed(runs),
    ]
    publish("phase_halves", "\n\n".join(report), keep=not args.quick)


# -- what is true of a run --------------------------------------------------------------------------------------------


def ground_truth(rounds, chance):
    """Rounds from which the run is degraded and collapsed, or None."""
    accuracy = [r["val_acc"] for r in rounds]
    dense = max(accuracy[:3])
    degraded = next((i for i in range(len(accuracy)) if max(accuracy[i : i + 3]) < dense - 0.02), None)
    return degraded, next((i for i, a in enumerate(accuracy) if a < chance + (dense - chance) / 2), None)


def turns(rounds):
    mean = [layer_mean(r) for r in rounds]
    return any(min(mean[i : i + 3]) > 1.25 * min(mean[: i + 1]) for i in range(len(mean) - 2))


def layer_mean(r):
    return statistics.fmean(index for index, _, _ in r["layers"].values())


# -- what a detector says of it ---------------------------------------------------------------------------------------


def verdicts(run, metric=None, **options):
    """Rounds of the collapse, of the compression, from which that dates, and the last sound one; None: none."""
    detector = PhaseDetector("min" if metric == "val_loss" else "max", **options)
    collapse = compression = since = None
    for i, r in enumerate(run["rounds"]):
        layers = {name: (index, left) for name, (index, left, _) in r["layers"].items()}
        phase = detector.update(r["pqi"], layers=layers, metric=r[metric] if metric else None).value
        if phase == "compression" and compression is None:
            compression, since = i, detector.since
        if phase == "collapse":
            collapse = i
            break
    return collapse, compression, since, detector.last_sound


def stops(runs, found):
    """Cost of what is said of collapse (errors, then delay), and the score in words."""
    caught = false = 0
    delays = []
    for run, (stop, *_) in zip(runs, found, strict=True):
        if stop is not None and (run["degraded"] is None or stop < run["degraded"]):
            false += 1
        elif stop is not None and run["collapsed"] is not None:
            caught += 1
            delays.append(max(0, stop - run["collapsed"]))
    collapsed = sum(run["collapsed"] is not None for run in runs)
    median = f"{statistics.median(delays):g}" if delays else "–"
    return (collapsed - caught + false, sum(delays)), f"{caught}/{collapsed}, {false}, {median}"


def flags(runs, found):
    """Cost of what is said of compression (errors, then accuracy lost), and the score in words."""
    lost, without = [], 0
    for run, (_, flag, since, _) in zip(runs, found, strict=True):
        if flag is not None and run["turn"]:
            accuracy = [r["val_acc"] for r in run["rounds"]]
            lost.append(max(accuracy[: flag + 1]) - accuracy[since])
        without += flag is not None and not run["turn"]
    with_turn = sum(run["turn"] for run in runs)
    median = statistics.median(lost) if lost else math.nan
    return (with_turn - len(lost) + without, median), f"{len(lost)}/{with_turn}, {without}, {median:.4f}"


def restored(runs, found):
    """Cost of where a stopped run goes back to (too much accuracy lost, then weights), and the score in words."""
    lost, left = [], []
    for run, (stop, _, _, sound) in zip(runs, found, strict=True):
        if stop is not None:
            rounds = run["rounds"]
            lost.append(max(r["val_acc"] for r in rounds[: stop + 1]) - rounds[sound or 0]["val_acc"])
            left.append(rounds[sound or 0]["remaining"])
    if not lost:
        return (0, 0.0), "0/0, –, –"
    near, weights = sum(loss <= 0.02 for loss in lost), statistics.median(left)
    return (len(lost) - near, weights), f"{near}/{len(lost)}, {statistics.median(lost):.4f}, {weights:.2%}"


# -- tables -----------------------------------------------------------------------------------------------------------


def halves(runs, splits, what, grid, judge):
    """Of the parameters that cost least on the chosen part, those nearest to the middle of the grid are scored."""
    candidates = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    candidates.sort(key=lambda c: sum(abs(grid[key].index(value) - len(grid[key]) // 2) for key, value in c.items()))
    found = [[verdicts(run, **options) for run in runs] for options in candidates]
    default = [verdicts(run) for run in runs]

    def score(said, part):
        return judge([runs[i] for i in part], [said[i] for i in part])

    def row(name, chosen_on, scored_on):
        best = min(range(len(candidates)), key=lambda c: score(found[c], chosen_on)[0])
        options = ", ".join(f"{key} {value:g}" for key, value in candidates[best].items())
        scored = ((found[best], chosen_on), (found[best], scored_on), (default, scored_on))
        return [name, options, *(score(said, part)[1] for said, part in scored)]

    everything = set(range(len(runs)))
    rows = []
    for split in range(splits):
        half = set(random.Random(split).sample(sorted(everything), len(runs) // 2))
        rows.append(row(f"random half {split}", sorted(half), sorted(everything - half)))
        rows.append(row(f"its other half {split}", sorted(everything - half), sorted(half)))
    for key in ("arch", "scope", "policy", "rewind"):
        for value in dict.fromkeys(run.get(key) for run in runs):
            part = {i for i in everything if runs[i].get(key) == value}
            if part != everything:
                rows.append(row(f"all but {key} {value}", sorted(everything - part), sorted(part)))
    head = ["chosen on", "parameters chosen", "score there", "score on the others", "defaults on the others"]
    return f"## {what}: chosen on one part of the runs, scored on the others\n\n" + table(head, rows)


def restored_by(runs):
    rows = []
    for metric, key, values in (
        (None, "reserve", RESERVES["reserve"]),
        ("val_acc", "tolerance", [0.01, 0.02, 0.03, 0.05]),
        ("val_loss", "tolerance", [0.02, 0.05, 0.1, 0.2, 0.5]),
    ):
        for value in values:
            score = restored(runs, [verdicts(run, metric, **{key: value}) for run in runs])[1]
            default = value == {None: 0.05, "val_acc": 0.02, "val_loss": 0.05}[metric]
            rows.append([metric or "the index", f"{key} {value:g}" + " (default)" * default, score])
    return "## Sound rounds, by what a run is judged\n\n" + table(["judged by", "parameter", "sound rounds"], rows)


def alone(runs):
    rows = []
    for key, values in ALONE.items():
        for value in values:
            found = [verdicts(run, **{key: value}) for run in runs]
            beside = [verdicts(run, "val_acc", **{key: value}) for run in runs]
            name = f"{key} {value:g}" + " (default)" * (value == getattr(PhaseDetector(), key))
            rows.append([name, stops(runs, found)[1], stops(runs, beside)[1], flags(runs, found)[1]])
    head = ["parameter", "collapse by the index", "by index and accuracy", "turns"]
    return "## One parameter moved, the others at their defaults\n\n" + table(head, rows)


def disturbed(runs):
    """Noise is put on the index of every layer anew in every round; what is true of a run stays as measured."""
    changed = {"as measured": runs}
    for sigma in (0.05, 0.1, 0.2):
        changed[f"noise of {sigma:.0%}"] = [noisy(run, sigma, seed) for seed, run in enumerate(runs)]
    for scale in (0.5, 2.0):
        changed[f"indices times {scale:g}"] = [with_indices(run, lambda index, c=scale: c * index) for run in runs]
    rows = []
    for name, copies in changed.items():
        found = [verdicts(run) for run in copies]
        beside = [verdicts(run, "val_acc") for run in copies]
        rows.append([name, stops(runs, found)[1], stops(runs, beside)[1], flags(runs, found)[1]])
    head = ["change", "collapse by the index", "by index and accuracy", "turns"]
    return "## Defaults, with noise and scale on the indices of the layers\n\n" + table(head, rows)


def noisy(run, sigma, seed):
    generator = random.Random(seed)
    return with_indices(run, lambda index: index * math.exp(generator.gauss(0, sigma)))


def with_indices(run, change):
    rounds = []
    for r in run["rounds"]:
        layers = {name: (change(index), left, size) for name, (index, left, size) in r["layers"].items()}
        rounds.append({**r, "layers": layers})
    return {**run, "rounds": rounds}


if __name__ == "__main__":
    main()
