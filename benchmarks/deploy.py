"""What deploying brings: bytes and seconds of packed files, speed of Linears that skip zeros, networks without units.

``python benchmarks/deploy.py`` takes some minutes; ``--quick`` takes small networks.
"""

import argparse
import copy
import os
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import common
import torch
import torch_pruning
import torchvision
from torch import nn

from lightning_sap.deploy import load_sparse, save_sparse, shrink, sparse_linears

REPEATS = 5
FILES = """### Files

{name} of torchvision, untrained, its weights pruned to zero by magnitude over the whole network; bytes as a share of
the {dense:.1f} MB of its dense `state_dict` saved by `torch.save`. "raw" is `compress=False`. MB/s are of dense weights
with `values="same"`, wall time, best of {repeats}, the file on the disk included.
"""
LINEARS = """### Linears

{layers} Linears 768 to 3072 and back with GELU between them, one thread: dense time by time of `sparse_linears`, best
of {repeats} each, taken in turns. In brackets how many of the Linears run as CSR.
"""
UNITS = """### Whole units

Every second unit of each group of coupled layers pruned, with bias and norm, outputs left out; one image of {side} by
{side} pixels, one thread. Times are wall time, the best of {repeats}, taken in turns.
"""


def prune(module, share):
    """Set this share of all weights of two and more dimensions to zero, the smallest."""
    weights = [parameter.data for parameter in module.parameters() if parameter.dim() > 1]
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    threshold = magnitudes.kthvalue(max(1, int(share * magnitudes.numel()))).values
    for weight in weights:
        weight.masked_fill_(weight.abs() <= threshold, 0)


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def best(*calls):
    """The best times of each, taken in turns."""
    rounds = [[seconds(call) for call in calls] for _ in range(REPEATS)]
    return [min(times) for times in zip(*rounds, strict=True)]


def files(quick):
    module = torchvision.models.resnet18() if quick else torchvision.models.resnet50()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path, dense = Path(folder) / "packed", Path(folder) / "dense"
        for share in (0.9,) if quick else (0.5, 0.8, 0.9, 0.95, 0.98):
            prune(module, share)
            state = module.state_dict()
            torch.save(state, dense)
            size = os.path.getsize(dense)
            row = [f"{share:.0%}", f"{len(zlib.compress(dense.read_bytes(), 6)) / size:.3f}"]
            for values in ("same", "float16", "int8"):
                for compress in (False, True):
                    save_sparse(state, path, values=values, compress=compress)
                    row.append(f"{os.path.getsize(path) / size:.3f}")
            for compress in (False, True):

                def write(compress=compress, state=state):
                    save_sparse(state, path, compress=compress)

                write()
                assert all(torch.equal(tensor, state[name]) for name, tensor in load_sparse(path).items())
                row.append(" / ".join(f"{size / 1e6 / s:.0f}" for s in best(write, lambda: load_sparse(path))))
            rows.append(row)
    kinds = [f"{values}{raw}" for values in ("`same`", "`float16`", "`int8`") for raw in (" raw", "")]
    head = ["pruned", "zlib-6 of the dense file", *kinds, "write / read, raw, MB/s", "write / read, MB/s"]
    text = FILES.format(name="ResNet-18" if quick else "ResNet-50", dense=size / 1e6, repeats=REPEATS)
    return f"{text}\n{common.table(head, rows)}"


@torch.no_grad()
def linears(quick):
    pairs, rows = 1 if quick else 6, []
    counts = (1, 16) if quick else (1, 16, 64, 197)
    for share in (0.8, 0.9, 0.95):
        parts = [p for _ in range(pairs) for p in (nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768), nn.GELU())]
        net, row = nn.Sequential(*parts), [f"{share:.0%}"]
        for part in net[::2]:
            prune(part, share)
        for count in counts:
            x = torch.randn(count, 768)
            found = sparse_linears(net, x)
            dense, sparse = best(lambda x=x, net=net: net(x), lambda x=x, found=found: found(x))
            used = sum(type(part).__name__ == "SparseLinear" for part in found)
            assert float((net(x) - found(x)).abs().max()) <= 1e-6
            row.append(f"{dense / sparse:.2f} ({used})")
        rows.append(row)
    head = ["pruned", *(f"{count} row{'s' * (count > 1)}" for count in counts)]
    return f"{LINEARS.format(layers=2 * pairs, repeats=REPEATS)}\n{common.table(head, rows)}"


def prune_units(module, inputs):
    """Every second unit of each group of coupled layers."""
    graph = torch_pruning.DependencyGraph().build_dependency(copy.deepcopy(module), inputs, verbose=False)
    names = {part: name for name, part in graph.model.named_modules()}
    for group in list(graph.get_all_groups()):
        writes = [item for item in group if graph.is_out_channel_pruning_fn(item.dep.handler)]
        if all(item.dep.target.outputs for item in writes):
            for item in (item for item in writes if item.dep.target.module in names):
                units = [i for i, root in zip(item.idxs, item.root_idxs, strict=True) if root % 2 == 0]
                for parameter in module.get_submodule(names[item.dep.target.module]).parameters(recurse=False):
                    parameter.data[units] = 0


@torch.no_grad()
def units(quick):
    side, rows = 64 if quick else 224, []
    for name in ("resnet18",) if quick else ("resnet18", "resnet50", "mobilenet_v3_small", "vgg11", "densenet121"):
        module, x, kept = getattr(torchvision.models, name)().eval(), torch.randn(1, 3, side, side), []
        with torch.enable_grad():
            prune_units(module, x)
        took = seconds(lambda module=module, x=x, kept=kept: kept.append(shrink(module, x)))
        [small] = kept
        before, after = best(lambda module=module, x=x: module(x), lambda small=small, x=x: small(x))
        counts = [sum(parameter.numel() for parameter in of.parameters()) / 1e6 for of in (module, small)]
        distance = float((module(x) - small(x)).abs().max() / module(x).abs().max().clamp(min=1))
        cells = ["{:.2f} to {:.2f}".format(*counts), f"{1e3 * before:.0f} to {1e3 * after:.0f}"]
        rows.append([name, *cells, f"{before / after:.2f}", f"{distance:.0e}", f"{took:.1f}"])
    head = ["network", "parameters, millions", "ms", "times as fast", "largest difference", "seconds to shrink"]
    return f"{UNITS.format(side=side, repeats=REPEATS)}\n{common.table(head, rows)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small networks; nothing is kept")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    common.publish("deploy", "\n\n".join(part(quick) for part in (files, linears, units)), keep=not quick)


if __name__ == "__main__":
    main()
