"""The masks that a run starts under: those of the fit before, as far as they still hold, else those that are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sap.callbacks.pruning.given_masks import given_masks
from lightning_sap.callbacks.pruning.messages import listed
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.engine.floors import Floor
from lightning_sap.engine.masks import MaskSet
from lightning_sap.engine.weights import PrunableWeight
from lightning_sap.sharding import local, shards_of

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.session import PruningSession


class Start(NamedTuple):
    """What a run starts with.

    Attributes:
        weights: The weights that are prunable.
        masks: Their masks.
        goes_on: Whether masks of the fit before hold.
    """

    weights: dict[str, PrunableWeight]
    masks: MaskSet
    goes_on: bool


def start(session: PruningSession, every: Mapping[str, PrunableWeight]) -> Start:
    """What a run starts with: each mask of the fit before that still holds for its weight, trained now or not.

    Where none holds, the masks that are given, or the zeros that are kept, or all is dense.

    Args:
        session: The run, with the weights that are found in the module.
        every: All weights of that kind, trained or not.
    """
    options, old, found = session.options, session.state.masks, dict(session.weights)
    live = {name: weight.parameter.detach() for name, weight in every.items()}
    holding = {n: m for n, m in old.pruned.items() if n in live and MaskSet({n: m}).holds_for({n: live[n]})}
    pruned = [name for name in holding if old.survivors[name] < old.pruned[name].numel()]
    if not old.is_dense and pruned:
        lost = {n: m for n, m in old.pruned.items() if n not in holding and old.survivors[n] < m.numel()}
        _warn_of_lost(options, {name: _why(name, mask, live) for name, mask in lost.items()})
        kept = {name: weight for name, weight in every.items() if name in found or name in holding}
        return Start(kept, MaskSet(holding).matched({name: live[name] for name in kept}), True)
    if not old.is_dense and options.masks is None:
        _warn_of_another_module(options)
    return Start(found, afresh(options, found), False)


def afresh(options: Options, found: Mapping[str, PrunableWeight]) -> MaskSet:
    """The masks of a run that starts afresh: those given, the zeros that are kept, or dense ones."""
    weights = {name: weight.parameter.detach() for name, weight in found.items()}
    if options.masks is not None:
        return _given(options, found, weights)
    return zeros(options, weights) if options.keep_zeros else MaskSet.dense(weights)


def _why(name: str, mask: Tensor, live: Mapping[str, Tensor]) -> str:
    """Why a mask holds no longer."""
    if name not in live:
        return "it is no prunable parameter now"
    if live[name].shape != mask.shape:
        return f"its shape was {tuple(mask.shape)} and is {tuple(live[name].shape)}"
    return "what was pruned is no longer zero"


def zeros(options: Options, weights: Mapping[str, Tensor]) -> MaskSet:
    """Masks of the zeros in these weights, which are trained; one that is all zero has not begun, and starts dense."""
    masks = MaskSet.from_zeros(weights)
    empty = {name: weights[name] for name, count in masks.survivors.items() if count == 0 < weights[name].numel()}
    if not empty:
        return masks
    _warn_of_all_zero(options, list(empty))
    return MaskSet({**masks.pruned, **MaskSet.dense(empty).pruned})


def _given(options: Options, found: Mapping[str, PrunableWeight], weights: Mapping[str, Tensor]) -> MaskSet:
    """The masks that are given, where the weights are; the others are dense.

    Raises:
        ValueError: If none fits, or one leaves a row empty that its layer divides by its norm.
    """
    given = given_masks(options.masks, options.name)
    fitting = {
        name: ~given[name].cpu() for name in weights if name in given and given[name].shape == weights[name].shape
    }
    others = {name: _why(name, given[name], weights) for name in given if name not in fitting}
    if not fitting:
        raise ValueError(
            f"masks fits no prunable parameter of the module: {_told(others)}; the prunable ones are "
            f"{listed(list(weights))}."
        )
    for name, mask in fitting.items():
        axes = found[name].normalised
        if axes is not None and (empty := int(Floor(1, axes).rows(mask).all(1).sum())):
            raise ValueError(
                f"masks leaves {empty} rows of {name!r} without a weight, and its layer divides each by its norm, "
                "which would be zero. Keep a weight in each."
            )
    _warn_of_lost(options, others, given=True)
    return MaskSet(fitting).moved(weights).matched(weights)


def warn_of_zeros(options: Options, weights: Mapping[str, Tensor]) -> None:
    """Warn where a tenth and more of the weights are zero as training starts, and will not be for long.

    A tensor that is all zero has not begun, as that of a head or an adapter. Of sharded ones this is a collective.
    """
    if not weights:
        return
    here = [(local(weight) == 0).sum() for weight in weights.values()]
    counts = shards_of(weights.values()).sum(torch.stack([count.to(here[0].device) for count in here])).tolist()
    zeros = sum(count for count, weight in zip(counts, weights.values(), strict=True) if count < weight.numel())
    total = sum(weight.numel() for weight in weights.values())
    if 10 * zeros >= total:
        rank_zero_warn(
            f"{options.name}: {zeros:,} of {total:,} prunable weights are exactly zero as training starts, and are "
            "trained like the others. Zeros of a network that was pruned before stay with keep_zeros=True or masks=…; "
            "a pruner that is to go on has to load its state."
        )


def _warn_of_all_zero(options: Options, names: Sequence[str]) -> None:
    """Warn of trained weights that are all zero: a layer that has not begun, not one that was pruned."""
    rank_zero_warn(
        f"{options.name}: keep_zeros=True, and these are all zero and trained: {listed(list(names))}. They start "
        "dense, as a head or an adapter that begins at zero must. If all of such a weight was pruned, freeze it."
    )


def _warn_of_lost(options: Options, reasons: Mapping[str, str], *, given: bool = False) -> None:
    """Warn of masks that hold no longer, or of given ones that do not fit; the others are kept."""
    if reasons:
        whose = "given in masks" if given else "of the fit before"
        rank_zero_warn(
            f"{options.name}: these masks {whose} are left out, and their weights start dense: {_told(reasons)}."
        )


def _told(reasons: Mapping[str, str]) -> str:
    """The first of these names, each with its reason, and how many there are."""
    return listed([f"{name} ({reason})" for name, reason in reasons.items()])


def _warn_of_another_module(options: Options) -> None:
    """Warn that no mask of an earlier fit belongs to the module."""
    rank_zero_warn(
        f"{options.name}: this module is not the one that was pruned before; starting afresh. To start it under masks, "
        "give them as masks=."
    )
