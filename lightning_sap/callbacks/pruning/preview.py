"""The plan of a module that is asked for at any time: in its fit, after it, or before one begins."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from lightning_sap.callbacks.pruning.first_masks import start
from lightning_sap.callbacks.pruning.inventory import Plan, plan_of
from lightning_sap.callbacks.pruning.trained import of_kind
from lightning_sap.callbacks.training import Training
from lightning_sap.policies.regrowth import GrowAndPrune

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.fit import Fit
    from lightning_sap.callbacks.pruning.session import PruningSession


def plan_for(session: PruningSession, module: nn.Module | None, fit: Fit) -> Plan:
    """The plan of a module that is asked for, or of the fit that goes on, or else of the latest one.

    Raises:
        ValueError: If there was no fit and no module is given, or a fit of the module could not start.
    """
    fitted = fit.module() if session.weights else None
    if fitted is not None and module in (None, fitted):
        measured = None if session.inventory is None else session.inventory.effective
        return replace(plan_of(session, fitted, Training.of(fit.trainer(), fitted)), effective=measured)
    if module is not None:
        return _before_fit(session, module)
    if session.inventory is None:
        raise ValueError("There was no fit yet: give the module, as in plan(model).")
    return session.inventory


def _before_fit(session: PruningSession, module: nn.Module) -> Plan:
    """The plan of a fit that would begin now, under the masks that it would start with."""
    options, begun = session.options, type(session)(session.options)
    every, training = of_kind(options, module), Training.of(None, module)
    begun.weights = {name: weight for name, weight in every.items() if training.untrained(weight.parameter) is None}
    begun.state.masks = session.state.masks
    begun.weights, begun.state.masks, _ = start(begun, every)
    undecided = isinstance(options.policy, GrowAndPrune) and options.rounds != 0
    return replace(plan_of(begun, module, training), undecided=undecided)
