"""How far the defaults of `PhaseDetector` are fitted to the runs they were found on.

`python benchmarks/phase_halves.py --curves FILE` chooses the parameters on one half of measured pruning runs and scores
them on the other: random halves, both ways, and halves by what the runs have in common (architecture, policy, …). It
also moves each parameter alone, and adds noise. It prints Markdown tables and writes them to
`benchmarks/results/phase_halves.md`; one core needs a few minutes.

FILE is a JSON list of runs: `{"arch": …, "scope": …, "policy": …, "rewind": …, "rounds": [{"val_acc": …, "val_loss": …,
"pqi": …, "layers": {name: [index, surviving weights, weights]}}, …]}`.

A run is *degraded* from the first of three rounds in a row that lose more than 0.02 of the best accuracy of its first
three rounds, and *collapsed* from the first round that lost more than half of what that best has over chance. A stop
before the run is degraded is false. A run has a *turn* if the mean of its layers' indices stands 25 % above its lowest
value so far for three rounds in a row.
"""

import argparse
import itertools
import json
import math
import random
import statistics
from pathlib import Path

from lightning_sap.phases import PhaseDetector

DEFAULTS = {"rise": 0.25, "fall": 0.3, "patience": 2, "spare": 0.03}
GRID = {
    "rise": [0.15, 0.2, 0.25, 0.3, 0.4],
    "fall": [0.2, 0.25, 0.3, 0.35, 0.4],
    "patience": [1, 2, 3],
    "spare": [0.01, 0.02, 0.03, 0.05, 0.1],
}
ALONE = {**GRID, "floor": [0.003, 0.01, 0.02, 0.03], "metric_change": [0.05, 0.1, 0.2, 0.3, 0.4]}
RESULTS = Path(__file__).with_name("results") / "phase_halves.md"


def main():
    parser = argparse.ArgumentParser(description="Parameters chosen on half of the runs, scored on the other half.")
    parser.add_argument(
        "--curves", required=True, type=Path, help="JSON file of measured runs (not part of the project)"
    )
    parser.add_argument("--chance", type=float, default=0.1, help="accuracy of a guess, default 0.1")
    parser.add_argument("--splits", type=int, default=5, help="random halvings, default 5")
    args = parser.parse_args()
    if not args.curves.is_file():
        parser.error(f"no such file: {args.curves}; the measured runs are not part of the project, see the docstring")
    runs = json.loads(args.curves.read_text())
    for run in runs:
        run["degraded"], run["collapsed"] = ground_truth(run["rounds"], args.chance)
        run["turn"] = turns(run["rounds"])
    report = "\n\n".join(
        [
            f"# Parameters of `PhaseDetector`, chosen and scored on different runs\n\n{len(runs)} runs, "
            f"{sum(run['collapsed'] is not None for run in runs)} of which collapse. A score reads: collapsed runs "
            "caught / all, false stops, median delay in rounds.",
            halves(runs, args.splits),
            alone(runs),
            disturbed(runs),
        ]
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(report + "\n")
    print(report)


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
    """The round of the collapse, and those of the compression and from which it dates; None where there is none."""
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
    return collapse, compression, since


def stops(runs, found):
    """Collapsed runs caught, all collapsed runs, false stops, delays."""
    caught = false = 0
    delays = []
    for run, (stop, _, _) in zip(runs, found, strict=True):
        if stop is not None and (run["degraded"] is None or stop < run["degraded"]):
            false += 1
        elif stop is not None and run["collapsed"] is not None:
            caught += 1
            delays.append(max(0, stop - run["collapsed"]))
    return caught, sum(run["collapsed"] is not None for run in runs), false, delays


def in_words(score):
    caught, collapsed, false, delays = score
    return f"{caught}/{collapsed}, {false}, {statistics.median(delays) if delays else '–'}"


def turns_in_words(runs, found):
    """Turns found / all, flags without a turn, median accuracy lost at the round from which the turn dates."""
    lost = []
    for run, (_, flag, since) in zip(runs, found, strict=True):
        if run["turn"] and flag is not None:
            accuracy = [r["val_acc"] for r in run["rounds"]]
            lost.append(max(accuracy[: flag + 1]) - accuracy[since])
    without = sum(not run["turn"] and flag is not None for run, (_, flag, _) in zip(runs, found, strict=True))
    median = f"{statistics.median(lost):.4f}" if lost else "–"
    return f"{len(lost)}/{sum(run['turn'] for run in runs)}, {without}, {median}"


# -- tables -----------------------------------------------------------------------------------------------------------


def halves(runs, splits):
    """Chosen: fewest false stops and misses, then least delay, then nearest to the middle of the grid."""
    candidates = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    candidates.sort(key=off_middle)
    found = [[verdicts(run, **options) for run in runs] for options in candidates]
    default = [verdicts(run, **DEFAULTS) for run in runs]

    def row(name, chosen_on, scored_on):
        def score(verdict, part):
            return stops([runs[i] for i in part], [verdict[i] for i in part])

        best = min(range(len(candidates)), key=lambda c: cost(score(found[c], chosen_on)))
        cells = [
            in_words(score(verdict, part)) for verdict, part in cells_of(found[best], default, chosen_on, scored_on)
        ]
        return [name, ", ".join(f"{key} {value:g}" for key, value in candidates[best].items()), *cells]

    def cells_of(chosen, default, chosen_on, scored_on):
        return (chosen, chosen_on), (chosen, scored_on), (default, scored_on)

    everything = range(len(runs))
    rows = []
    for split in range(splits):
        half = set(random.Random(split).sample(everything, len(runs) // 2))
        for name, part in ((f"random {split}", half), (f"random {split}, turned round", set(everything) - half)):
            rows.append(row(name, sorted(part), [i for i in everything if i not in part]))
    for key in ("arch", "scope", "policy", "rewind"):
        for value in dict.fromkeys(run.get(key) for run in runs):
            part = [i for i in everything if runs[i].get(key) == value]
            rows.append(row(f"all but {key} {value}", [i for i in everything if i not in part], part))
    head = ["chosen on", "parameters chosen", "score there", "score on the others", "defaults on the others"]
    return "## Chosen on one part, scored on the other\n\n" + table(head, rows)


def cost(score):
    caught, collapsed, false, delays = score
    return collapsed - caught + false, sum(delays)


def off_middle(options):
    return sum(abs(GRID[key].index(value) - len(GRID[key]) // 2) for key, value in options.items())


def alone(runs):
    rows = []
    for key, values in ALONE.items():
        for value in values:
            by_index = [verdicts(run, **{key: value}) for run in runs]
            scores = [in_words(stops(runs, by_index)), turns_in_words(runs, by_index)]
            scores += [in_words(stops(runs, [verdicts(run, "val_acc", **{key: value}) for run in runs]))]
            rows.append([f"{key} {value:g}", scores[0], scores[2], scores[1]])
    head = [
        "parameter",
        "collapse by the index",
        "by index and accuracy",
        "turns (found / all, without one, accuracy lost)",
    ]
    return "## One parameter moved, the others at their defaults\n\n" + table(head, rows)


def disturbed(runs):
    """Noise is put on the index of every layer anew in every round; what is true of a run stays as measured."""
    rows = []
    for sigma in (0.0, 0.05, 0.1, 0.2):
        copies = [noisy(run, sigma, seed) for seed, run in enumerate(runs)]
        found = [verdicts(run) for run in copies]
        rows.append([f"noise of {sigma:.0%}", in_words(stops(runs, found)), turns_in_words(runs, found)])
    for scale in (0.5, 2.0):
        found = [verdicts(scaled(run, scale)) for run in runs]
        rows.append([f"indices times {scale:g}", in_words(stops(runs, found)), turns_in_words(runs, found)])
    head = ["change", "collapse by the index", "turns (found / all, without one, accuracy lost)"]
    return "## Defaults, with noise and scale on the indices\n\n" + table(head, rows)


def noisy(run, sigma, seed):
    generator = random.Random(seed)
    return with_indices(run, lambda index: index * math.exp(generator.gauss(0, sigma)))


def scaled(run, scale):
    return with_indices(run, lambda index: index * scale)


def with_indices(run, change):
    rounds = []
    for r in run["rounds"]:
        layers = {name: (change(index), left, size) for name, (index, left, size) in r["layers"].items()}
        rounds.append({**r, "layers": layers})
    return {**run, "rounds": rounds}


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    main()
