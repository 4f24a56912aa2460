"""Copies of the weights to go back to: of what training changes, and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_sap.callbacks.pruning import averages
from lightning_sap.callbacks.pruning.messages import listed
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.rewind import copy_of, restore_weights_, take_weights

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.held import HeldWeights


def take(session: HeldWeights, module: nn.Module) -> dict[str, Tensor]:
    """Copies of what training may change; what turns out to be trained later joins before its first step.

    Left out are frozen matrices, as those of a teacher, unless they are averages, changed since training began, or
    began as copies of others, as a momentum encoder does; a collective where weights are sharded.
    """
    first, parameters = session.state.first_bits, session.subject.parameters
    frozen = {
        n: p for n, p in parameters.items() if n in first and not p.requires_grad and n not in session.state.copies
    }
    others = {number for name, number in first.items() if name not in frozen}
    now = averages.bits_of(frozen)
    still = {name: frozen[name] for name, bits in now.items() if bits == first[name] and bits not in others}
    session.subject.still = {**session.subject.still, **still}
    return take_weights(module, still)


def watch(session: HeldWeights) -> None:
    """After a resume: what is frozen and was not copied has not changed."""
    if snapshots := _snapshots(session):
        parameters = session.subject.parameters.items()
        missing = {n: p for n, p in parameters if not p.requires_grad and all(n not in each for each in snapshots)}
        session.subject.still = missing


def add_thawed(session: HeldWeights) -> None:
    """Before a step: what is trained from now on, and was not copied, is as it was then."""
    still = session.subject.still
    for name in [n for n, p in still.items() if p.requires_grad or p.grad is not None]:
        copy = copy_of(still.pop(name))
        for snapshot in _snapshots(session):
            snapshot.setdefault(name, copy)


def _snapshots(session: HeldWeights) -> list[dict[str, Tensor]]:
    first, kept = session.state.first_weights, session.state.kept
    return [*([] if first is None else [first]), *([] if kept is None else [kept.weights, *kept.averages])]


def restore_(session: HeldWeights, module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Write copies back, and say what stays as it is though training changed it."""
    subject, first = session.subject, session.state.first_bits
    left = [name for name in restore_weights_(module, weights) if name not in subject.warned]
    subject.warned.update(left)
    bits = averages.bits_of({name: parameter for name, parameter in subject.still.items() if name in first})
    moved = [name for name, number in bits.items() if number != first[name]]
    for name in moved:
        del subject.still[name]
    warn_of_left_buffers(session.options, left)
    warn_of_moved_frozen(session.options, moved)


def warn_of_left_buffers(options: Options, names: Sequence[str]) -> None:
    """Warn of buffers that do not go back with the weights."""
    if names:
        rank_zero_warn(
            f"{options.name}: these buffers changed their shape since the weights to go back to were copied, as "
            f"those of observers do in their first batch: {listed(list(names))}. They stay as they are, and the "
            "weights go back."
        )


def warn_of_moved_frozen(options: Options, names: Sequence[str]) -> None:
    """Warn of frozen parameters that changed and do not go back with the weights."""
    if names:
        rank_zero_warn(
            f"{options.name}: these are frozen, had no gradient, and changed all the same: {listed(list(names))}. "
            "There is no copy of them to go back to. Let them begin as copies of the weights that they follow, or "
            "require gradients when fit starts."
        )
