"""Averaged copies inside the module: each shares the mask of what it averages, or is warned of.

They are parameters, or buffers. What is kept in plain attributes is the user's: it is warned of, and not written to
unless it is given by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_sap.callbacks.pruning import agreement, declared, messages
from lightning_sap.callbacks.pruning.compatibility import of_kind
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.engine.copies import averaged_copies, followers
from lightning_sap.engine.hidden import buffers, hidden_tensors
from lightning_sap.engine.masks import MaskSet, zero_
from lightning_sap.engine.weights import PrunableWeight
from lightning_sap.functional.fingerprint import fingerprints
from lightning_sap.rounds.protocol import RoundListener
from lightning_sap.sharding import is_sharded, local, placed_like, whole

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.held import HeldWeights
    from lightning_sap.callbacks.pruning.session import PruningSession


def find_(
    session: PruningSession, trainer: Trainer, module: LightningModule, every: Mapping[str, PrunableWeight]
) -> None:
    """Note, when training begins, the averages and the bits of all matrices: some may turn out to follow others."""
    state, subject = session.state, session.subject
    state.copies = {**state.copies, **averaged_copies(module, session.weights)}
    candidates = {n: w for n, w in every.items() if id(w.parameter) not in subject.training.averages}
    matrices = {name: p for name, p in subject.parameters.items() if is_matrix(p) and name not in every}
    note_bits_(session, {**matrices, **{name: weight.parameter for name, weight in candidates.items()}})
    _note_hidden_(session, trainer, module)
    if state.plan.rounds != 0:
        unmatched = [n for n, w in every.items() if id(w.parameter) in subject.training.averages]
        messages.warn_of_unmatched(session.options, [name for name in unmatched if name not in state.copies])
    bind_(session, module)


def note_bits_(session: HeldWeights, weights: Mapping[str, Tensor]) -> None:
    """Remember these weights as they are before they are trained."""
    if session.state.plan.rounds != 0:
        session.state.first_bits = {**session.state.first_bits, **bits_of(weights)}


def _note_hidden_(session: PruningSession, trainer: Trainer, module: LightningModule) -> None:
    """Remember what is no parameter, and equal to a weight before training: it may turn out to follow it."""
    first = session.state.first_bits
    shapes = {tuple(weight.parameter.shape) for weight in session.weights.values()}
    found = _hidden(session, trainer, module) if first else {}
    bits = bits_of({name: tensor for name, tensor in found.items() if tuple(tensor.shape) in shapes})
    equal = {name: number for name, number in bits.items() if number in first.values()}
    session.state.first_bits = {**first, **equal}


def _hidden(session: PruningSession, trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
    """What is no parameter of the module, or kept by another callback of the user's, and not given by name."""
    given = {id(tensor) for _, tensor in declared.averaged(session)}
    averaging = of_kind(trainer, "WeightAveraging")  # whose averages are masked with the module

    def is_known(callback: Any) -> bool:
        ours = isinstance(callback, RoundListener) or isinstance(getattr(callback, "options", None), Options)
        return ours or callback in averaging

    holders: dict[str, object] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not is_known(callback):
            name = type(callback).__name__
            alike = sum(key.partition("[")[0] == name for key in holders)
            holders[f"{name}[{alike}]" if alike else name] = callback
    return {n: tensor for n, tensor in hidden_tensors(module, holders).items() if id(tensor) not in given}


def follow_(
    session: PruningSession, trainer: Trainer, module: LightningModule, every: Mapping[str, PrunableWeight]
) -> None:
    """Find the weights that changed in training and were not trained; a collective."""
    state, subject = session.state, session.subject
    tensors = {**{name: weight.parameter for name, weight in every.items()}, **_hidden(session, trainer, module)}
    known = {n: tensor for n, tensor in tensors.items() if n in state.first_bits}
    still = {n: tensor for n, tensor in known.items() if n not in session.weights and n not in state.trained}
    now = bits_of(still)
    moved = agreement.union(trainer, [name for name, bits in now.items() if bits != state.first_bits[name]])
    if new := [name for name in still if name in moved and name not in state.copies and name not in subject.warned]:
        found = followers(tensors, new, list(session.weights), state.first_bits)
        kept = buffers(module).keys() | subject.parameters.keys()
        messages.warn_of_moved(session.options, [name for name in new if name not in found])
        messages.warn_of_hidden(session.options, {n: found[n] for n in new if n in found and n not in kept})
        state.copies = {**state.copies, **{n: found[n] for n in new if n in found and n in kept}}
        subject.warned.update(name for name in new if name not in state.copies)
    state.copies = {**state.copies, **averaged_copies(module, session.weights)}
    bind_(session, module)


def bind_(session: HeldWeights, module: nn.Module) -> None:
    """Find the live copies, after the parameters, or what is known of them, changed."""
    live = {**buffers(module), **session.subject.parameters}
    pairs = session.state.copies.items()
    masked = session.weights.keys() | session.state.companions.pruned.keys()
    session.subject.copies = [(live[copy], name) for copy, name in pairs if copy in live and name in masked]


def mask_(session: HeldWeights, *sets: MaskSet) -> None:
    """Zero in the copies what these masks prune in what they follow."""
    pruned = {name: mask for masks in sets for name, mask in masks.pruned.items()}
    given = ((tensor, name) for name, tensor in declared.averaged(session) if name in pruned)
    with torch.no_grad():
        for copy, name in (*session.subject.copies, *given):
            zero_(local(copy), local(placed_like(pruned[name], copy)))


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether it has two dimensions or more, and values that can be compared."""
    return (
        not isinstance(parameter, nn.UninitializedParameter) and parameter.dim() > 1 and parameter.is_floating_point()
    )


def bits_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Their fingerprints, of sharded ones those of all rows; a collective where weights are sharded."""
    tensors = {name: weight.detach() for name, weight in weights.items()}
    plain = {name: tensor for name, tensor in tensors.items() if not is_sharded(tensor)}
    found = dict(zip(plain, fingerprints(list(plain.values())), strict=True))
    for name, tensor in tensors.items():
        if name not in plain:  # one after the other: only one is ever whole
            found[name] = fingerprints([whole(tensor)])[0]
    return found
