"""Opening and closing: what a policy that takes turns does before training, after a round, and what is open now."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer

from lightning_sap.callbacks.logging import log_line
from lightning_sap.callbacks.pruning import agreement, emptied, messages
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.engine.decision import decide_turn
from lightning_sap.engine.floors import fewest
from lightning_sap.engine.groups import PrunableTensor
from lightning_sap.engine.masks import MaskSet
from lightning_sap.policies.base import Closing, Policy, Turn
from lightning_sap.policies.importance import Magnitude
from lightning_sap.policies.regrowth import GrowAndPrune
from lightning_sap.rounds.protocol import GoOn, TakeBack

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.held import HeldWeights
    from lightning_sap.callbacks.pruning.session import PruningSession


def started(session: PruningSession, trainer: Trainer, module: LightningModule, state: PruningState) -> PruningState:
    """The state in which training begins: by the magnitudes of the first weights all is closed but what is open first.

    A collective.
    """
    options, frozen = session.options, session.frozen(state)
    if state.plan.rounds == 0:
        return state
    if isinstance(options.policy, GrowAndPrune):
        _check_parts(options.policy, state)
    every = session.tensors(module, state.masks)
    turn = _turn(options, state, 0, frozen, every)
    if turn is None:
        return state
    tensors = {name: t._replace(importance=Magnitude()) for name, t in every.items() if name not in frozen}
    agreement.check_agreement(trainer, tensors)
    floors = options.floors({name: tensor.weight.numel() for name, tensor in tensors.items()})
    decision = decide_turn(tensors, turn, policy=options.policy, scope=options.group, floors=floors, round=0)
    masks = MaskSet({name: decision.masks.pruned.get(name, old) for name, old in state.masks.pruned.items()})
    decision = replace(decision, masks=masks, companions=state.companions)
    decision = agreement.broadcast_decision(trainer, decision, session.live())
    emptied.warn_of_empty_units(options, every, decision.masks)
    if decision.regrown:  # a second fit
        log_line(
            f"{options.name}: {decision.regrown:,} pruned weights come back as zeros, in "
            f"{messages.listed(list(turn.open))}: training begins with that part open. The rest keeps its masks."
        )
    return replace(state, masks=decision.masks, count=decision.count)


def next_turn(
    session: HeldWeights, tensors: Mapping[str, PrunableTensor], frozen: Collection[str], answer: GoOn | TakeBack
) -> Turn | None:
    """What is closed and opened after the round that ends now; None where the policy takes no turns.

    A collective where weights of which some always stay are sharded.

    Raises:
        ValueError: If a listener limits what is pruned, which is fixed here.
    """
    turn = _turn(session.options, session.state, session.state.round + 1, frozen, tensors)
    if turn is not None and answer.most is not None:
        raise ValueError(
            f"A listener answers {answer!r}, and {session.options.policy!r} says how many weights are kept. Let it "
            "answer GoOn() or Stop()."
        )
    return turn


def opened(options: Options, state: PruningState) -> list[str]:
    """The parameters that are open in the round that goes on."""
    turn = None if state.plan.rounds == 0 else _turn(options, state, state.round)
    kept = state.masks.survivors
    return [name for name in turn.open if kept[name] == state.masks.pruned[name].numel()] if turn else []


def lines(options: Options, state: PruningState) -> list[str]:
    """What the parts are, for the announcement."""
    policy, sizes = options.policy, {name: mask.numel() for name, mask in state.masks.pruned.items()}
    if not isinstance(policy, GrowAndPrune) or state.plan.rounds == 0:
        return []
    parts = [
        f"{sum(sizes[name] for name in part):,} weights in {messages.listed(list(part))}"
        for part in policy.split(sizes)
    ]
    return [f"  part {i}, open in one of every {len(parts)} rounds: {part}" for i, part in enumerate(parts)]


def _turn(
    options: Options,
    state: PruningState,
    round: int,
    frozen: Collection[str] = (),
    tensors: Mapping[str, PrunableTensor] | None = None,
) -> Turn | None:
    """A turn of the policy; what is frozen stays as it is, and the rest of its part makes up for it if it can.

    Without the tensors it is only asked what it opens.
    """
    if type(options.policy).turn is Policy.turn:
        return None
    kept, sizes = state.masks.survivors, {name: mask.numel() for name, mask in state.masks.pruned.items()}
    floors = _floors(options, tensors or {})
    turn = options.policy.turn(
        sizes, kept, round=round, rounds=state.plan.rounds, history=list(state.history), floors=floors
    )
    if turn is None or not frozen:
        return turn
    closing = []
    for part in turn.close:
        names, size = tuple(name for name in part.names if name not in frozen), sum(sizes[name] for name in part.names)
        held, own = sum(kept[name] for name in part.names if name in frozen), sum(sizes[name] for name in names)
        least, most = (n - held if n > held else n * own // max(1, size) for n in (part.least, part.most))
        closing.append(Closing(names, least, most))
    return Turn(tuple(closing), tuple(name for name in turn.open if name not in frozen))


def _floors(options: Options, tensors: Mapping[str, PrunableTensor]) -> dict[str, int]:
    """How many weights of each parameter stay, whatever is asked for: the same in every round."""
    always = fewest({name: tensor._replace(pruned=None) for name, tensor in tensors.items()})
    asked = options.floors({name: tensor.weight.numel() for name, tensor in tensors.items()})
    return {name: max(count, always[name]) for name, count in asked.items()}


def _check_parts(policy: GrowAndPrune, state: PruningState) -> None:
    """Raise if the parts do not fit the parameters."""
    sizes = {name: mask.numel() for name, mask in state.masks.pruned.items()}
    parts = policy.split(sizes)
    left = [name for name in sizes if not any(name in part for part in parts)]
    if left:
        raise ValueError(
            f"{policy!r} opens none of {messages.listed(left)}, which no glob of partitions matches. Add them to a "
            "part, or leave them out with exclude."
        )
    if not all(parts):
        number = next(i for i, part in enumerate(parts) if not part)
        what = (
            f"part {number} of partitions, {policy.partitions[number]!r},"
            if isinstance(policy.partitions, tuple)
            else ""
        )
        raise ValueError(
            f"{what or f'partitions={policy.parts}'} has nothing to open: the prunable parameters are "
            f"{messages.listed(list(sizes))}. Give at most {len(sizes)} partitions, and globs that match each of them "
            "once."
        )
