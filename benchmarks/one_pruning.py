"""One pruning, from weights to masks: its time and its memory, beside PyTorch's ways to as many weights.

``python benchmarks/one_pruning.py`` takes half an hour and 16 GiB; ``--quick`` takes an MLP and two repeats, and keeps
nothing.
"""

import argparse
import copy
import ctypes
import gc
import multiprocessing
import statistics
from functools import partial
from pathlib import Path

import common
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

from lightning_sap import FixedFraction, SparsityInformed, prune_masks
from lightning_sap.engine.weights import prunable_weights

POLICIES = {"by the index": SparsityInformed(p=0.5, q=1.0), "half": FixedFraction(0.5)}
NOTES = """One pruning of freshly initialised float32 weights: as many as their index says (p = 0.5, q = 1), or half.
Ours measures, decides, picks exactly and returns new bool masks (what it takes to apply them is part of a training
step). The others are told how many weights we pruned.

- `global_unstructured` and `l1_unstructured` are those of `torch.nn.utils.prune`, the latter once for each layer (per
  neuron PyTorch has nothing). They also put float32 masks and copies of the weights into the module, and multiply.
- `sort` sorts the magnitudes of all weights in one vector and compares each tensor with the threshold it finds there;
  `partition` finds it by NumPy's `partition` instead (CPU only). Both return masks, and leave ties to chance.
- time: {clock}; the contenders in turn, each repeat beginning with another, {repeats} repeats ({large} of the
  transformer), median with the least and the most.
- reading: the median over that of reading the weights once (`sum` of each tensor).
- ours: the median over ours of the same scope; 8× takes eight times as long.
- memory: peak of what one pruning takes beyond the weights, as a multiple of their bytes: {memory}.
- –: not run; it might have taken more memory than the machine had left, or does not run on this device.
"""
MEMORY = {
    "cpu": "in a fresh process, `VmHWM` after it less `VmRSS` before it, the one reset and free memory returned;\n"
    "  the least of three prunings, for what a process touches for the first time counts as well",
    "cuda": "in a fresh process, `torch.cuda.max_memory_allocated` after it less `memory_allocated` before it",
}
LARGE, REPEATS_OF_LARGE = 200_000_000, 3
# What a contender might take, with its copy of the model, as a multiple of the weights' bytes.
GREED = {"ours": 2, "global_unstructured": 14, "sort": 9, "partition": 4, "l1_unstructured": 6}


class Transformer(nn.Module):
    """An encoder of the size of BERT large: 24 layers of width 1024 and an embedding, 354 million weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(50257, 1024, bias=False)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(1024, 16, 4096) for _ in range(24))


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)),
    "resnet18": torchvision.models.resnet18,
    "resnet50": torchvision.models.resnet50,
    "vit_b_16": torchvision.models.vit_b_16,
    "transformer350m": Transformer,
}


def build(model, device):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return MODELS[model]().to(device)


def weights_of(module):
    return {name: weight.parameter.detach() for name, weight in prunable_weights(module).items()}


def places_of(module):
    """The same weights as (module, name of the parameter)."""
    return [(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in weights_of(module)]


def ours(module, policy, counts, *, scope):
    prune_masks(weights_of(module), policy=policy, scope=scope)


def global_unstructured(module, policy, counts):
    prune.global_unstructured(places_of(module), pruning_method=prune.L1Unstructured, amount=sum(counts))


def l1_unstructured(module, policy, counts):
    for place, count in zip(places_of(module), counts, strict=True):
        prune.l1_unstructured(*place, amount=count)


def by_threshold(module, policy, counts, *, find):
    weights = weights_of(module)
    threshold = find(torch.cat([w.abs().flatten() for w in weights.values()]), sum(counts) - 1)
    return [torch.gt(w.abs(), threshold) for w in weights.values()]


def by_sort(magnitudes, k):
    return magnitudes.sort().values[k]


def by_partition(magnitudes, k):
    magnitudes.numpy().partition(k)
    return magnitudes[k]


CONTENDERS = {  # (scope, name): call; the first of a scope is ours
    ("global", "ours"): partial(ours, scope="global"),
    ("global", "global_unstructured"): global_unstructured,
    ("global", "sort"): partial(by_threshold, find=by_sort),
    ("global", "partition"): partial(by_threshold, find=by_partition),
    ("layer", "ours"): partial(ours, scope="layer"),
    ("layer", "l1_unstructured"): l1_unstructured,
    ("neuron", "ours"): partial(ours, scope="neuron"),
    ("neuron", "l1_unstructured"): l1_unstructured,
}


def counts_of(module, policy, scope):
    """How many weights of each parameter ours prunes."""
    masks = prune_masks(weights_of(module), policy=policy, scope=scope)
    return [mask.numel() - int(mask.count_nonzero()) for mask in masks.values()]


def read(weights):
    for w in weights:
        w.sum()


def times(model, policy, device, repeats):
    """Seconds of each contender, and of reading the weights, in every repeat; each has a copy of the model."""
    module = build(model, device)
    counts = {scope: counts_of(module, policy, scope) for scope in ("global", "layer", "neuron")}
    weights = weights_of(module).values()
    taken = {key: [] for key in ("reading", *CONTENDERS)}
    keys = [key for key in CONTENDERS if device == "cpu" or key[1] != "partition"]
    for repeat in range(repeats):
        reading = [common.seconds(partial(read, weights), device) for _ in range(5)]
        taken["reading"].append(statistics.median(reading))
        first = repeat % len(keys)
        for key in (*keys[first:], *keys[:first]):
            if fits(weights, key):
                fresh = copy.deepcopy(module)
                gc.collect()
                taken[key].append(common.seconds(partial(CONTENDERS[key], fresh, policy, counts[key[0]]), device))
                del fresh
    return taken, counts


def fits(weights, key):
    """Whether the contender surely has enough memory."""
    return GREED[key[1]] * sum(w.nbytes for w in weights) < common.available()


def peak(model, policy, device, key, results):
    """Put into a queue the bytes that a contender takes at its peak beyond what is there before it."""
    counts = counts_of(build(model, device), policy, key[0])
    CONTENDERS[key](nn.Linear(256, 256, device=device), policy, [1])  # what this loads is no cost of a pruning
    modules = (build(model, device) for _ in range(3))
    results.put(min(peak_of(partial(CONTENDERS[key], module, policy, counts), device) for module in modules))


def peak_of(call, device):
    """Bytes that a call takes at its peak beyond what is there before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be taken without being seen
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = common.resident("VmRSS")
    call()
    return common.resident("VmHWM") - before


def in_a_fresh_process(function, *arguments):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "lightning_sap"])  # imported once for all of them
    results = context.SimpleQueue()
    process = context.Process(target=function, args=(*arguments, results))
    process.start()
    process.join()
    return results.get() if process.exitcode == 0 else None


def rows_of(model, amount, device, repeats):
    policy = POLICIES[amount]
    weights = weights_of(build(model, device)).values()
    size, total = sum(w.nbytes for w in weights), sum(w.numel() for w in weights)
    taken, counts = times(model, policy, device, min(repeats, REPEATS_OF_LARGE) if total > LARGE else repeats)
    reading = statistics.median(taken.pop("reading"))
    for (scope, name), seconds in taken.items():
        known = f"{model} ({total / 1e6:.3g} M)", scope, f"{amount} ({sum(counts[scope]) / total:.0%})", name
        if not seconds:
            yield *known, "–", "–", "–", "–"
            continue
        median, own = statistics.median(seconds), statistics.median(taken[scope, "ours"])
        extra = in_a_fresh_process(peak, model, policy, device, (scope, name))
        yield (
            *known, f"{common.spread([1e3 * s for s in seconds], '{:.0f}')} ms", f"{median / reading:.0f}×",
            f"{median / own:.1f}×", "–" if extra is None else f"{extra / size:.2f}",
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_options(parser)
    parser.add_argument("--models", help=f"some of {','.join(MODELS)}; default: all but the mlp")
    arguments = parser.parse_args()
    models = arguments.models or ("mlp" if arguments.quick else ",".join(list(MODELS)[1:]))
    device, repeats = arguments.device, 2 if arguments.quick else 7
    amounts = list(POLICIES)[:1] if arguments.quick else POLICIES
    rows = [row for model in models.split(",") for amount in amounts for row in rows_of(model, amount, device, repeats)]
    head = ("model", "scope", "pruned", "what", "time", "of reading", "of ours", "memory")
    notes = NOTES.format(clock=common.CLOCK[device], memory=MEMORY[device], repeats=repeats, large=REPEATS_OF_LARGE)
    text = f"{notes}\n{common.table(head, rows)}"
    common.publish(f"one_pruning_{device}", text, keep=not arguments.quick, device=device)


if __name__ == "__main__":
    main()
