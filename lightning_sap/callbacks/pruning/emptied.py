"""Warnings of parameters and layers of which a pruning leaves little or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from lightning.pytorch.utilities import rank_zero_warn

from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.engine.groups import PrunableTensor, empty_units
from lightning_sap.engine.masks import MaskSet

Tensors: TypeAlias = Mapping[str, PrunableTensor]


def warn_of_empty_units(options: Options, tensors: Tensors, masks: MaskSet) -> None:
    """Warn of parameters that a pruning leaves without weights, or of whose output units it leaves few with weights."""
    pruned = {name: tensor._replace(pruned=masks.pruned[name]) for name, tensor in tensors.items()}
    if options.structure == "unit":  # which is to empty units, and leaves one in each layer
        return _warn_of_bottlenecks(options, tensors, pruned, masks)
    emptied = [name for name, count in masks.survivors.items() if count == 0]
    empty = {name: (n, units) for name, (n, units) in empty_units(pruned).items() if 2 * n > units}
    before = empty_units({name: tensor for name, tensor in tensors.items() if name in empty})
    news = [f"no weights are left in {name!r}" for name in emptied if before[name] != empty[name]]
    news += [
        f"{n} of {units} output units of {name!r} have no weights left"
        for name, (n, units) in empty.items()
        if name not in emptied and 2 * before[name][0] <= units
    ]
    if news:
        rank_zero_warn(
            f"{options.name}: after pruning {masks.remaining:.2%} remain, and {'; '.join(news)}. Give min_remaining "
            f"(now {options.min_remaining}) to keep a fraction of every parameter, min_per_unit=1 to keep a weight in "
            "every output unit, or exclude these."
        )


def _warn_of_bottlenecks(options: Options, before: Tensors, after: Tensors, masks: MaskSet) -> None:
    """Warn of layers of 16 units and more that keep one of 64, or one alone: all that is computed goes through them."""

    def narrow(tensors: Tensors) -> dict[str, str]:
        left = {name: (units - empty, units) for name, (empty, units) in empty_units(tensors).items() if units >= 16}
        return {n: f"{few} of {units} units of {n!r}" for n, (few, units) in left.items() if few <= max(1, units // 64)}

    if news := [text for name, text in narrow(after).items() if name not in narrow(before)]:
        compete = ", scope='layer' (the units of all layers compete now)" if options.scope == "global" else ""
        rank_zero_warn(
            f"{options.name}: after pruning {masks.remaining:.2%} remain, {', '.join(news)}. Give min_remaining (now "
            f"{options.min_remaining}) to keep a fraction of every layer{compete}, or exclude these."
        )
