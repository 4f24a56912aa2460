"""A slow, plain NumPy twin of the mathematics, written from its definitions and from nothing in the package.

Arrays are taken as float64, counts are Python ints, sums are exactly rounded, and nothing is clever:
a group is a list of (name, flat index) positions, and what goes is read off a stable sort.
"""

import math
from fractions import Fraction
from itertools import groupby

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


def drop_smallest(weights, masks, group, count, spare=None, held=()):
    """Clear the `count` smallest magnitudes of a group in `masks`; of equals, the one named first goes first.

    Where a name has nothing more to spare, or a position is held, the next smallest go instead.
    """
    positions = [(name, i) for name, i in group if masks[name].flat[i]]
    order = np.argsort([abs(float(weights[name].flat[i])) for name, i in positions], kind="stable")
    left = dict(spare or {})
    for name, i in (positions[k] for k in order):
        if count > 0 and left.get(name, 1) > 0 and (name, i) not in held:
            masks[name].flat[i] = False
            count -= 1
            if name in left:
                left[name] -= 1


def spread(total, shares, room):
    """Split a whole number in proportion to the shares, largest remainders first, ties to the one named first."""
    given, total = [0] * len(room), min(total, sum(room))
    while (left := total - sum(given)) > 0:
        space = [most - has for most, has in zip(room, given, strict=True)]
        weights = [share if most > 0 else 0 for share, most in zip(shares, space, strict=True)]
        weights = weights if any(weights) else space
        exact = [Fraction(left * weight, sum(weights)) for weight in weights]
        portion = [math.floor(x) for x in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: portion[i] - exact[i])
        for i in by_remainder[: left - sum(portion)]:
            portion[i] += 1
        given = [has + min(more, most) for has, more, most in zip(given, portion, space, strict=True)]
    return given


def limited_counts(counts, alive, sets, least, most):
    """Counts of the groups, kept to what each set of groups can spare, and all together to `least` and `most`."""
    wanted, room, a = [], [], 0
    for length, spare in sets:
        have = alive[a : a + length]
        want = [min(c, d) for c, d in zip(counts[a : a + length], have, strict=True)]
        if sum(want) > spare:
            want = spread(spare, want, want)
        free = [d - c for c, d in zip(want, have, strict=True)]
        wanted, room, a = wanted + want, room + spread(spare - sum(want), free, free), a + length
    if most is not None and sum(wanted) > most:
        return spread(most, wanted, wanted)
    if sum(wanted) < least:
        return [c + more for c, more in zip(wanted, spread(least - sum(wanted), wanted, room), strict=True)]
    return wanted


def limited_amounts(drops, grows, kept, pruned, sets, least, most):
    """Drops and growths of the groups; `least` and `most` are of dropped − grown. Too few drops make less grow."""
    grows = [min(grow, n) for grow, n in zip(grows, pruned, strict=True)]
    grown = sum(grows)
    if least == 0 and most is None:
        return limited_counts(drops, kept, sets, 0, None), grows
    drops = limited_counts(drops, kept, sets, least + grown, None if most is None else most + grown)
    if sum(drops) - grown < least:
        grows = spread(max(0, sum(drops) - least), grows, grows)
    return drops, grows


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


def prune_masks(
    weights,
    masks=None,
    *,
    amount,
    scope,
    units=None,
    floors=None,
    least=0,
    most=None,
    growth=lambda pruned: 0,
    sets=(),
    stay=0,
):
    """New masks. `amount` turns the surviving weights of a group into a count; `units` gives (unit, weight) arrays.

    `floors` is how many of each name stay, and `least` and `most` are by how many the kept become fewer in all;
    `growth` turns the number of pruned weights of a group into how many of them come back. `sets` are disjoint sets of
    (name, flat index), of which the `stay` largest are kept always, of equals the later ones.
    """
    masks = {name: np.ones(w.shape, bool) if masks is None else np.array(masks[name]) for name, w in weights.items()}
    groups = [group for group in groups_of(weights, scope, units) if group]
    surviving = [[weights[name].flat[i] for name, i in group if masks[name].flat[i]] for group in groups]
    counts = [amount(np.array(of_group, dtype=np.float64)) for of_group in surviving]
    alive = [[position for position in of if masks[position[0]].flat[position[1]]] for of in sets]
    held = {position for of in alive for position in sorted(of, key=lambda p: abs(weights[p[0]].flat[p[1]]))[-stay:]}
    always = {name: sum(n == name for n, _ in held) for name in masks}
    spare = {n: max(0, int(mask.sum()) - max((floors or {}).get(n, 0), always[n])) for n, mask in masks.items()}
    of_names = [(len(list(of_name)), spare[name]) for name, of_name in groupby(groups, lambda group: group[0][0])]
    if scope == "global":
        of_names = [(1, sum(spare.values()))]
    kept = [len(of_group) for of_group in surviving]
    pruned = [len(group) - n for group, n in zip(groups, kept, strict=True)]
    free = [n - sum(position in held for position in group) for group, n in zip(groups, kept, strict=True)]
    drops, grows = limited_amounts(counts, [growth(n) for n in pruned], free, pruned, of_names, least, most)
    was_pruned = [[(name, i) for name, i in group if not masks[name].flat[i]] for group in groups]
    for group, drop in zip(groups, drops, strict=True):
        drop_smallest(weights, masks, group, drop, spare if scope == "global" else None, held)
    for group, grow in zip(was_pruned, grows, strict=True):
        for name, i in group[:grow]:
            masks[name].flat[i] = True
    return masks
