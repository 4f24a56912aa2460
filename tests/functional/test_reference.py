"""What the paper's authors computed on trained networks, and what the package computes on the same weights.

Their counts floor d·(1 − r/d) in floating point and so prune one weight fewer in about a fifth of the groups.
"""

import json
from functools import cache

import numpy as np
import oracle
import pytest
import torch

from lightning_sap import SparsityInformed, pq_index, prune_masks

CASES = 48


@cache
def load(folder):
    cases = json.loads((folder / "sap_reference.json").read_text())
    with np.load(folder / "sap_reference_masks.npz") as masks, np.load(folder / "weights.npz") as weights:
        return cases, dict(masks), dict(weights)


@pytest.fixture(params=range(CASES))
def case(request, shared):
    """One case and, for each of its rounds, (weights, masks before it, the authors' numbers)."""
    cases, bits, arrays = load(shared / "reference")
    assert len(cases) == CASES
    case = cases[request.param]
    net = case["net"] + "."
    weights = {n.removeprefix(net): torch.from_numpy(w).double() for n, w in arrays.items() if n.startswith(net)}
    rounds = []
    for record in case["rounds"]:
        masks = {}
        for name, w in weights.items():
            flat = np.unpackbits(bits[f"{record['mask_before']}.{name}"], count=w.numel())
            masks[name] = torch.from_numpy(flat.astype(bool)).reshape(w.shape)
        rounds.append((weights, masks, record))
    assert len(rounds) == 3
    return case, rounds


def flat(per_parameter):
    return np.concatenate([np.atleast_1d(v) for v in per_parameter.values()])


def indices(weights, masks, scope, p, q):
    if scope == "global":
        vector, mask = (torch.cat([t.flatten() for t in tensors.values()]) for tensors in (weights, masks))
        return pq_index(vector, p, q, mask=mask).reshape(1).numpy()
    if scope == "layer":
        return np.array([pq_index(w, p, q, mask=masks[n]).item() for n, w in weights.items()])
    return torch.cat([pq_index(w.flatten(1), p, q, mask=masks[n].flatten(1), dim=1) for n, w in weights.items()])


def kept(masks, scope):
    per_unit = {n: np.asarray(m).reshape(m.shape[0], -1).sum(1) for n, m in masks.items()}
    if scope == "neuron":
        return flat(per_unit)
    per_layer = flat({n: units.sum() for n, units in per_unit.items()})
    return per_layer if scope == "layer" else per_layer.sum(keepdims=True)


def test_indices_equal_the_papers_reference(case):
    case, rounds = case
    for weights, masks, record in rounds:
        ours = indices(weights, masks, case["scope"], case["p"], case["q"])
        np.testing.assert_allclose(ours, flat(record["pqi"]), rtol=0, atol=1e-9)


def test_kept_counts_equal_the_papers_reference(case):
    case, rounds = case
    options = {key: case[key] for key in ("p", "q", "eta_r", "gamma", "beta")}
    for weights, masks, record in rounds:
        ours = prune_masks(weights, masks, policy=SparsityInformed(**options), scope=case["scope"])
        twin = oracle.prune_masks(
            {n: w.numpy() for n, w in weights.items()},
            {n: m.numpy() for n, m in masks.items()},
            amount=lambda w: oracle.prune_count(w, **options),
            scope=case["scope"],
        )
        for name in weights:
            np.testing.assert_array_equal(ours[name].numpy(), twin[name], err_msg=name)
        authors = flat(record["kept_after"])
        authors = authors.sum(keepdims=True) if case["scope"] == "global" else authors
        surplus = authors - kept({n: m.numpy() for n, m in ours.items()}, case["scope"])
        assert set(surplus.tolist()) <= {0, 1}
