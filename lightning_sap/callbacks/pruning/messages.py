"""What a run says of itself."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn

from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.callbacks.pruning.state import RunState
from lightning_sap.masks import MaskSet


def announcement(options: Options, state: RunState, schedules: list[str]) -> str:
    """What a run is going to do, in one line for each question."""
    plan, masks = state.plan, state.masks
    names = list(masks.pruned)
    shown = ", ".join(names[:8]) + (f", … ({len(names)} parameters)" if len(names) > 8 else "")
    rounds = "prunings after every round" if plan.rounds is None else f"{plan.rounds} prunings"
    rewind = "kept" if options.rewind_weights is None else f"rewound to {options.rewind_weights!r}"
    lines = [
        f"{options.name}: {rounds} in rounds of {plan.epochs} epochs from epoch {plan.first_epoch}, "
        f"scope {options.scope}, weights {rewind}, {options.policy}",
        f"  prunable: {masks.total:,} weights ({masks.remaining:.1%} remain) in {shown}",
        *(f"  learning rate: {line}" for line in schedules),
    ]
    return "\n".join(lines)


def farewell(options: Options, state: RunState) -> str:
    """What a run has reached, and how to go further."""
    masks = state.masks
    return (
        f"{options.name}: {masks.remaining:.2%} of {masks.total:,} weights remain after {state.round} prunings. "
        "For a sparser network give more rounds (rounds, max_epochs) or a target_remaining."
    )


def warn_of_emptied(options: Options, masks: MaskSet) -> None:
    """Warn of parameters that have no weights left."""
    empty = [name for name, count in masks.survivors.items() if count == 0]
    if empty:
        rank_zero_warn(f"{options.name}: no weights are left in {empty}; give min_remaining to keep some.")
