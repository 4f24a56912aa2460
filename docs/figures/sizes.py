"""Prints how large a pruned MLP 784-300-100-10 is on disk, stored in different ways.

`python docs/figures/sizes.py` in the root of the repository; takes a few seconds.
"""

import gzip
import io
import sys
import warnings

import numpy as np
import torch
from torch import nn

from lightning_sap import FixedFraction, prune_masks


def saved(state):
    """The bytes of a file that `torch.save` writes."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def main():
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    dense = model.state_dict()
    masks = prune_masks({n: w for n, w in dense.items() if w.dim() > 1}, policy=FixedFraction(0.9))
    pruned = {n: w.masked_fill(~masks[n], 0.0) if n in masks else w for n, w in dense.items()}

    def weights_as(form):
        return saved({n: form(w) if n in masks else w for n, w in pruned.items()})

    files = {
        "dense state_dict": saved(dense),
        "pruned state_dict": saved(pruned),
        "dense, gzip": gzip.compress(saved(dense)),
        "pruned, gzip": gzip.compress(saved(pruned)),
        "to_sparse()": weights_as(torch.Tensor.to_sparse),
        "to_sparse_csr()": weights_as(torch.Tensor.to_sparse_csr),
        "values and mask bits": weights_as(lambda w: (w[w != 0], torch.from_numpy(np.packbits(w != 0)))),
    }
    for title, file in files.items():
        sys.stdout.write(f"{title}: {len(file) / 1000:.0f} kB\n")


if __name__ == "__main__":
    main()
