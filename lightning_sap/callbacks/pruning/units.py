"""Whole units: which go together, and the biases and norms that go with them."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lightning_sap.callbacks.logging import log_line
from lightning_sap.callbacks.pruning.messages import listed
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.engine.masks import MaskSet
from lightning_sap.engine.unit_decision import pruned_units
from lightning_sap.engine.unit_groups import UnitGroup, flagged, unit_groups
from lightning_sap.sharding import is_sharded

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.held import HeldWeights
    from lightning_sap.callbacks.pruning.state import PruningState


def couple(options: Options, module: nn.Module, weights: Collection[str]) -> list[UnitGroup]:
    """The units of a module that can go, for ``structure="unit"``; else none.

    Raises:
        ValueError: If the module cannot be traced, or no unit can go.
    """
    if options.structure != "unit":
        return []
    given = options.example_inputs
    example = getattr(module, "example_input_array", None) if given is None else given
    groups = unit_groups(module, weights, example)
    if not groups:
        raise ValueError(
            f"structure='unit': no unit of {listed(list(weights))} can go: outputs of the network stay, and what a "
            "layer such as LayerNorm, attention or a grouped convolution computes together. Give structure='weight'."
        )
    named = {name for group in groups for name in group.names}
    if whole := [name for name in weights if name not in named]:
        log_line(
            f"{options.name}: {sum(group.size for group in groups)} units of {listed(sorted(named))} can go. The units "
            f"of {listed(whole)} stay: outputs of the network, or computed together; they lose what reads other units."
        )
    return groups


def live(session: HeldWeights) -> dict[str, Tensor]:
    """The biases and norms that go with units."""
    parameters = session.subject.parameters
    return {name: parameters[name].detach() for name in session.state.companions.pruned if name in parameters}


def companions(session: HeldWeights, before: MaskSet, masks: MaskSet) -> MaskSet:
    """The masks of biases and norms: those before, where there are; dense, but for units that are zero at the start."""
    parameters, groups = session.subject.parameters, session.subject.groups
    tensors = {p.name: parameters[p.name].detach() for group in groups for p in group.companions}
    known = {n: mask for n, mask in before.pruned.items() if n in parameters and parameters[n].shape == mask.shape}
    if session.options.keep_zeros and not known and not masks.is_dense:
        zeros = {**masks.pruned, **MaskSet.from_zeros(tensors).pruned}
        gone = [(group, pruned_units(group, zeros)) for group in groups]
        found = flagged(gone, {name: tensor.shape for name, tensor in tensors.items()})
        return MaskSet(found).moved(tensors)
    return MaskSet(known).extended(tensors)


def mask_(session: HeldWeights, masks: MaskSet, biases: MaskSet) -> None:
    """Zero what these masks prune in weights, and in biases and norms."""
    masks.apply_({name: weight.parameter for name, weight in session.weights.items()})
    biases.apply_(live(session))


def move_masks_(session: HeldWeights) -> None:
    """The module has been moved: the masks are where it is."""
    state = session.state
    state.masks, state.companions = state.masks.moved(session.live()), state.companions.moved(live(session))


def mask_gradients(session: HeldWeights) -> None:
    """Pruned weights have no gradient, nor have their biases and norms."""
    state, parameters = session.state, session.subject.parameters
    weights = {name: weight.parameter for name, weight in session.weights.items()}
    for masks, tensors in ((state.masks, weights), (state.companions, parameters)):
        if not masks.is_dense:
            masks.apply_({n: p.grad for n in masks.pruned if (p := tensors.get(n)) is not None and p.grad is not None})


def unmasked_gradients(session: HeldWeights) -> list[str]:
    """Pruned weights that have gradients all the same; not asked are sharded and sparse ones."""
    pruned, found = session.state.masks.pruned, []
    for name, weight in session.weights.items():
        gradient = weight.parameter.grad
        plain = gradient is not None and not gradient.is_sparse and not is_sharded(gradient)
        if plain and gradient is not None and bool(gradient[pruned[name]].any()):
            found.append(name)
    return found


def pruned_parameters(session: HeldWeights, state: PruningState) -> dict[Tensor, Tensor]:
    """By parameter where it is pruned, in a state of the run."""
    parameters = session.subject.parameters
    found: dict[Tensor, Tensor] = {w.parameter: state.masks.pruned[name] for name, w in session.weights.items()}
    return found | {parameters[name]: mask for name, mask in state.companions.pruned.items() if name in parameters}


def renew_(session: HeldWeights, module: nn.Module) -> None:
    """Look again which units go together, where layers were replaced."""
    if session.options.structure == "unit":
        session.subject.groups = couple(session.options, module, session.weights)
        shapes = {name: parameter.shape for name, parameter in session.subject.parameters.items()}
        fitting = {n: m for n, m in session.state.companions.pruned.items() if shapes.get(n) == m.shape}
        session.state.companions = companions(session, MaskSet(fitting), session.state.masks)
