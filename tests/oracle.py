"""A slow, plain NumPy twin of the mathematics, written from its definitions and from nothing in the package.

Arrays are taken as float64, counts are Python ints, sums are exactly rounded, and nothing is clever:
a group is a list of (name, flat index) positions, and what goes is read off a stable sort.
"""

import math

import numpy as np


def ceil(x):
    """Upwards, but a whole number that rounding error lifted a little stays that whole number."""
    return math.ceil(x - 1e-9 * max(x, 1.0))


def floor(x):
    """Downwards, but a whole number that rounding error lowered a little stays that whole number."""
    return math.floor(x + 1e-9 * max(x, 1.0))


def power_sum(w, power):
    """Sum of |w|^power in units of 2^(power · e), where 2^e is the power of two just above the largest |w|."""
    mantissa, exponent = np.frexp(np.abs(np.asarray(w, dtype=np.float64)).ravel())
    mantissa, exponent = mantissa[mantissa > 0], exponent[mantissa > 0].astype(np.float64)
    if mantissa.size == 0:
        return 0.0
    return math.fsum(mantissa**power * np.exp2(power * (exponent - exponent.max())))


def pq_index(w, p, q):
    """1 − (power mean of order p) / (power mean of order q)."""
    d = np.size(w)
    if d == 0 or not np.any(w):
        return 0.0
    mean_p, mean_q = (power_sum(w, p) / d) ** (1 / p), (power_sum(w, q) / d) ** (1 / q)
    return max(0.0, 1.0 - mean_p / mean_q)


def gini_index(w):
    """Σ (2i − d − 1)·|w|_(i) / (d · Σ|w|) with the magnitudes in ascending order."""
    magnitudes = sorted(abs(float(x)) for x in np.ravel(w))
    d = len(magnitudes)
    if d == 0 or magnitudes[-1] == 0.0:
        return 0.0
    scaled = [x / magnitudes[-1] for x in magnitudes]
    return math.fsum((2 * i - d - 1) * x for i, x in enumerate(scaled, start=1)) / (d * math.fsum(scaled))


def retained_lower_bound(w, p, q, eta_r=0.0):
    """d·(1 + η)^(−q/(q−p))·(1 − I)^(pq/(q−p)) from the sums: d cancels, and 1 − I loses no digits."""
    if np.size(w) == 0 or not np.any(w):
        return float(np.size(w))
    log_r = (q * math.log(power_sum(w, p)) - p * math.log(power_sum(w, q)) - q * math.log1p(eta_r)) / (q - p)
    return math.exp(log_r)


def prune_count(w, p, q, eta_r=0.0, gamma=1.0, beta=0.9):
    """How many of the surviving weights w go by the PQ Index."""
    d = np.size(w)
    if d == 0 or not np.any(w):
        return 0
    kept = ceil(retained_lower_bound(w, p, q, eta_r))
    return max(0, min(floor(gamma * (d - kept)), floor(beta * d)))


def fraction_count(w, fraction):
    """How many of the surviving weights w go by a fixed fraction."""
    return floor(fraction * np.size(w)) if np.any(w) else 0


def drop_smallest(weights, masks, group, count):
    """Clear the `count` smallest magnitudes of a group in `masks`; of equals, the one named first goes first."""
    positions = [(name, i) for name, i in group if masks[name].flat[i]]
    order = np.argsort([abs(float(weights[name].flat[i])) for name, i in positions], kind="stable")
    for k in order[:count]:
        name, i = positions[k]
        masks[name].flat[i] = False


def groups_of(weights, scope, units=None):
    """Every group as a list of (name, flat index), in parameter order, then by flat index."""
    layers = [[(name, i) for i in range(w.size)] for name, w in weights.items()]
    if scope == "global":
        return [[position for layer in layers for position in layer]]
    if scope == "layer":
        return layers
    groups = []
    for name, w in weights.items():
        unit_rows = (units or {}).get(name, lambda a: [np.ravel(row) for row in a])
        rows = unit_rows(np.arange(w.size).reshape(w.shape))
        groups += [[(name, int(i)) for i in sorted(np.ravel(row))] for row in rows]
    return groups


def prune_masks(weights, masks=None, *, amount, scope, units=None):
    """New masks. `amount` turns the surviving weights of a group into a count; `units` gives (unit, weight) arrays."""
    masks = {name: np.ones(w.shape, bool) if masks is None else np.array(masks[name]) for name, w in weights.items()}
    for group in groups_of(weights, scope, units):
        surviving = [weights[name].flat[i] for name, i in group if masks[name].flat[i]]
        drop_smallest(weights, masks, group, amount(np.array(surviving, dtype=np.float64)))
    return masks
