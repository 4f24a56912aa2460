"""2:4 in sparse tensor cores: the forward of a transformer's feed-forward layers beside the dense one, and the error.

``python benchmarks/semi_structured.py --device cuda`` takes a minute; it needs compute capability 8.0. On the CPU,
which has no such kernels, only the pattern is checked.
"""

import argparse

import common
import torch
from torch import nn

from lightning_sap.engine.groups import dense_tensors
from lightning_sap.engine.patterns import Pattern, decide_pattern

TITLE = """Two Linears of {width} and {wider} with a GELU, 2:4 by `structure="2:4"`, fp16 (on the CPU fp32).
Time: a forward of so many rows by `torch.sparse.to_sparse_semi_structured` over the dense one's, taken in turns; median
and the middle half. Difference: the largest between both results under the same masks, over the largest result.
"""
WIDTH, CALLS = 1024, 50


def masked(network: nn.Module) -> None:
    """Keep two of each four weights."""
    decision = decide_pattern(dense_tensors(network), Pattern(2, 4), 0.5, 1.0)
    decision.masks.apply_(dict(network.named_parameters()))


def row(device: str, rows: int, quick: bool) -> list[str]:
    """The times and the difference of one number of rows."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    network = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)).to(device, dtype)
    masked(network)
    x = torch.randn(rows, WIDTH, device=device, dtype=dtype)
    left = sum(int(layer.weight.count_nonzero()) for layer in (network[0], network[2])) / (8 * WIDTH**2)
    if device == "cpu":
        return [f"{rows}", f"{left:.0%}", "–", "–"]
    with torch.inference_mode():
        dense = network(x)
        turns: list[list[float]] = []
        weights = {i: network[i].weight for i in (0, 2)}
        sparse = {
            i: nn.Parameter(torch.sparse.to_sparse_semi_structured(w), requires_grad=False) for i, w in weights.items()
        }
        for _ in range(5 if quick else CALLS):
            times = []
            for those in (weights, sparse):
                for i, weight in those.items():
                    network[i].weight = weight
                found = network(x)
                times.append(common.seconds(lambda: network(x), device))
            turns.append(times)
    difference = float((found - dense).abs().max() / dense.abs().max())
    return [f"{rows}", f"{left:.0%}", common.middle_half([b / a for a, b in turns]), f"{difference:.1e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_options(parser)
    arguments = parser.parse_args()
    sizes = (16,) if arguments.quick or arguments.device == "cpu" else (16, 256, 4096)
    rows = [row(arguments.device, size, arguments.quick) for size in sizes]
    head = ("rows", "weights left", "time, 2:4 over dense", "difference")
    text = f"{TITLE.format(width=WIDTH, wider=4 * WIDTH)}\n{common.table(head, rows)}"
    keep = not arguments.quick and arguments.device == "cuda"
    common.publish(f"semi_structured_{arguments.device}", text, keep=keep, device=arguments.device)


if __name__ == "__main__":
    main()
