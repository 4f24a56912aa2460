"""Averaged copies inside the module: each shares the mask of what it averages, or is warned of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_sap.callbacks.pruning import agreement, messages
from lightning_sap.engine.copies import averaged_copies, followers
from lightning_sap.engine.masks import MaskSet, zero_
from lightning_sap.engine.weights import PrunableWeight
from lightning_sap.functional.fingerprint import fingerprints
from lightning_sap.sharding import is_sharded, local, placed_like, whole

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.session import PruningSession


def find_(session: PruningSession, module: nn.Module, every: Mapping[str, PrunableWeight]) -> None:
    """Note, when training begins, the averages and the bits of all weights that may turn out to follow others."""
    state, subject = session.state, session.subject
    state.copies = {**state.copies, **averaged_copies(module)}
    note_bits_(session, {n: w for n, w in every.items() if id(w.parameter) not in subject.training.averages})
    if state.plan.rounds != 0:
        unmatched = [n for n, w in every.items() if id(w.parameter) in subject.training.averages]
        messages.warn_of_unmatched(session.options, [name for name in unmatched if name not in state.copies])
    bind_(session)


def note_bits_(session: PruningSession, weights: Mapping[str, PrunableWeight]) -> None:
    """Remember these weights as they are before they are trained."""
    if session.state.plan.rounds != 0:
        session.state.first_bits = {**session.state.first_bits, **_bits(weights)}


def follow_(
    session: PruningSession, trainer: Trainer, module: LightningModule, every: Mapping[str, PrunableWeight]
) -> None:
    """Find the weights that changed in training and were not trained; a collective."""
    state, subject = session.state, session.subject
    still = {n: w for n, w in every.items() if n not in session.weights and n not in state.trained}
    now = _bits({name: weight for name, weight in still.items() if name in state.first_bits})
    moved = agreement.union(trainer, [name for name, bits in now.items() if bits != state.first_bits[name]])
    if new := [name for name in every if name in moved and name not in state.copies]:
        found = followers(every, new, list(session.weights), state.first_bits)
        unknown = [name for name in new if name not in found and name not in subject.warned]
        messages.warn_of_moved(session.options, unknown)
        subject.warned.update(unknown)
        state.copies = {**state.copies, **found}
    state.copies = {**state.copies, **averaged_copies(module)}
    bind_(session)


def bind_(session: PruningSession) -> None:
    """Find the live copies, after the parameters, or what is known of them, changed."""
    live = session.subject.parameters
    pairs = session.state.copies.items()
    session.subject.copies = [(live[copy], name) for copy, name in pairs if copy in live and name in session.weights]


def mask_(session: PruningSession, masks: MaskSet) -> None:
    """Zero in the copies what these masks prune in the weights that they follow."""
    with torch.no_grad():
        for copy, name in session.subject.copies:
            zero_(local(copy), local(placed_like(masks.pruned[name], copy)))


def _bits(weights: Mapping[str, PrunableWeight]) -> dict[str, int]:
    """Their fingerprints, of sharded ones those of all rows; a collective where weights are sharded."""
    tensors = {name: weight.parameter.detach() for name, weight in weights.items()}
    plain = {name: tensor for name, tensor in tensors.items() if not is_sharded(tensor)}
    found = dict(zip(plain, fingerprints(list(plain.values())), strict=True))
    for name, tensor in tensors.items():
        if name not in plain:  # one after the other: only one is ever whole
            found[name] = fingerprints([whole(tensor)])[0]
    return found
