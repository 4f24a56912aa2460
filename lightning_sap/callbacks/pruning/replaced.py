"""Layers that are replaced or removed while training goes on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_sap.callbacks.pruning import averages, messages, units
from lightning_sap.callbacks.pruning.trained import candidates
from lightning_sap.callbacks.training import NO_OPTIMIZER, Training
from lightning_sap.engine.masks import MaskSet
from lightning_sap.engine.weights import PrunableWeight, parameter_names

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.session import PruningSession


def look_(session: PruningSession, module: nn.Module) -> None:
    """See whether parameters were replaced since the last look: new ones join, dense; a collective if one was.

    They are pruned from the next round on, whenever in this one they were seen. A weight that is zero wherever the old
    one is pruned goes on under the old mask.
    """
    live, known, masks = parameter_names(module), session.subject.parameters, session.state.masks.pruned
    changed = {name for name in live.keys() | known.keys() if live.get(name) is not known.get(name)}
    changed |= {name for name, mask in masks.items() if name in live and live[name].shape != mask.shape}
    if not changed:
        return
    _forget_snapshots_(session, {name for name in changed if name in known})
    every = candidates(session.options, module, session.subject.training)
    affected = [name for name in session.weights if name in changed]
    same = _renew_(session, every, affected) if affected else set()
    session.state.trained -= changed - same
    session.subject.see(live, session.state.trained)
    session.watch_again()
    averages.note_bits_(session, {n: weight.parameter for n, weight in every.items() if n in changed})
    units.renew_(session, module)
    averages.bind_(session, module)


def _renew_(session: PruningSession, every: Mapping[str, PrunableWeight], names: list[str]) -> set[str]:
    """Take the new parameters of these names in, and let go of what is gone; which go on under their masks."""
    state = session.state
    new = {n: weight for n, weight in every.items() if n in names and weight.parameter.requires_grad}
    session.weights = {n: new.get(n, w) for n, w in session.weights.items() if n not in names or n in new}
    old, weights = state.masks, session.live()
    stays = {n: old.pruned[n] for n in weights if n not in names or MaskSet({n: old.pruned[n]}).holds_for(weights)}
    state.masks = MaskSet(stays).matched(weights)
    if state.kept is not None:
        kept = {name: mask for name, mask in state.kept.masks.pruned.items() if name not in names}
        state.kept = replace(state.kept, masks=MaskSet(kept).matched(weights))
    counts = state.masks.survivors
    dense = {name: counts[name] for name in new if counts[name] == weights[name].numel()}
    messages.warn_of_replaced(session.options, dense, [name for name in names if name not in new])
    state.replaced |= dense.keys()
    return new.keys() - dense.keys()


def _forget_snapshots_(session: PruningSession, names: Collection[str]) -> None:
    """Parameters and buffers of replaced layers are not rewound: there is nothing of them to go back to."""
    owners = {name.rpartition(".")[0] for name in names}

    def without(snapshot: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in snapshot.items() if name.rpartition(".")[0] not in owners}

    state = session.state
    if names and state.first_weights is not None:
        state.first_weights = without(state.first_weights)
    if names and state.kept is not None:
        state.kept = replace(state.kept, weights=without(state.kept.weights))


def check_trained(session: PruningSession, trainer: Trainer, module: nn.Module, *, is_over: bool = False) -> None:
    """Look, and raise for weights that were replaced and that no optimizer holds, though they require gradients.

    Args:
        session: The run.
        trainer: Its Trainer.
        module: Its module.
        is_over: Whether training is over: then it is too late for an error, and they are warned of.

    Raises:
        ValueError: It names them.
    """
    look_(session, module)
    if not session.state.replaced:
        return
    training, replaced = Training.of(trainer, module), session.state.replaced & session.weights.keys()
    if lost := sorted(n for n in replaced if training.untrained(session.weights[n].parameter) == NO_OPTIMIZER):
        message = messages.of_lost_parameters(session.options, lost)
        if not is_over:
            raise ValueError(message)
        rank_zero_warn(message)
