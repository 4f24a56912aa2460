"""What a run does at the end of a round: what its listeners answer, and what its next pruning does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer

from lightning_sap.callbacks.pruning import agreement, checks, messages, regrowth, tolerance
from lightning_sap.engine.decision import Decision, decide, decide_turn
from lightning_sap.engine.groups import PrunableTensor
from lightning_sap.engine.masks import MaskSet
from lightning_sap.engine.patterns import decide_pattern
from lightning_sap.engine.unit_decision import decide_units
from lightning_sap.rounds.protocol import Answer, GoOn, RoundEnd, RoundListener, Stop, TakeBack

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.held import HeldWeights
    from lightning_sap.callbacks.pruning.session import PruningSession


def ask(
    trainer: Trainer,
    module: LightningModule,
    event: RoundEnd,
    listeners: Sequence[RoundListener],
    *,
    can_go_back: bool,
) -> Answer:
    """What the listeners of rank 0 answer: to take the round back, or else to stop, or else to go on; a collective.

    Those that may take a round back are asked first, so that the others hear of it.
    """
    answers: list[Answer] = []
    for listener in sorted(listeners, key=lambda listener: not listener.may_take_back):
        taken_back = any(isinstance(answer, TakeBack) for answer in answers)
        sound = all(_note(answer, event.record.round).get("sound") is not False for answer in answers)
        answers.append(listener.on_round_end(trainer, module, replace(event, taken_back=taken_back, sound=sound)))
    answers = trainer.strategy.broadcast(answers) if listeners else []
    checks.check_answers(answers, can_go_back)
    answers = sorted([*answers, GoOn()], key=lambda answer: (TakeBack, Stop, GoOn).index(type(answer)))
    notes: dict[int, dict[str, Any]] = {}
    for answer in reversed(answers):
        for round, fields in answer.notes.items():
            notes[round] = {**notes.get(round, {}), **fields}
    return replace(answers[0], notes=notes)


def _note(answer: object, round: int) -> Mapping[str, Any]:
    """What an answer, of any kind, notes of a round."""
    notes: Mapping[int, Mapping[str, Any]] = getattr(answer, "notes", {})
    return notes.get(round, {})


def decide_next(
    session: PruningSession, trainer: Trainer, module: LightningModule, answer: GoOn | TakeBack
) -> Decision:
    """What the next pruning does; nothing is changed; a collective."""
    checks.check_disjoint(session.options, trainer)
    tensors = session.tensors(module)
    agreement.check_agreement(trainer, tensors)
    scored = session.gathering.scored(session, module, tensors)
    frozen = [name for name in tensors if name not in scored or name not in session.state.trained]
    decision = decide_of(session, tensors | scored, frozen, answer, session.metrics.of(trainer, session.state.round))
    if frozen or session.gathering.gathers:  # a record tells the index of the weights, and of all of them
        session.gathering.tell(session, decision)
        decision = replace(decision, before=session.measure(module))
    return agreement.broadcast_decision(trainer, decision, session.live())


def decide_of(
    session: HeldWeights,
    tensors: Mapping[str, PrunableTensor],
    frozen: Sequence[str],
    answer: GoOn | TakeBack,
    metrics: Mapping[str, float],
) -> Decision:
    """What the next pruning does with these weights, of which those that are frozen stay as they are."""
    options, state = session.options, session.state
    trained = {name: tensor for name, tensor in tensors.items() if name not in frozen}
    sizes = {name: tensor.weight.numel() for name, tensor in trained.items()}
    kept = sum(count for name, count in state.masks.survivors.items() if name in trained)
    limits = options.limits(sizes, kept, state.prunings_left(), _target(session, frozen))
    if answer.most is not None:
        limits = limits._replace(most=answer.most if limits.most is None else min(answer.most, limits.most))
    if options.structure == "unit" and state.search is not None:
        limits = limits._replace(least=tolerance.fewest(kept, answer.scale, limits.most))
    how: dict[str, Any] = {
        "policy": options.policy.scaled(answer.scale),
        "scope": options.group,
        "round": state.round + 1,
        "limits": limits,
        "history": list(state.history),
        "metrics": metrics,
    }
    if options.structure == "unit":
        decision = decide_units(trained, session.subject.groups, state.companions, **how)
    elif options.pattern is not None and answer.scale > 0:
        decision = decide_pattern(trained, options.pattern, options.policy.p, options.policy.q)
    elif (turn := regrowth.next_turn(session, tensors, frozen, answer)) is not None:
        decision = decide_turn(trained, turn, floors=how.pop("limits").floors, **how)
    else:
        decision = decide(trained, **how)
    if options.structure != "unit":
        decision = replace(decision, companions=state.companions)
    if frozen:  # they stay under their masks
        masks = MaskSet({name: decision.masks.pruned.get(name, old) for name, old in state.masks.pruned.items()})
        decision = replace(decision, masks=masks)
    return decision


def _target(session: HeldWeights, frozen: Sequence[str]) -> int | None:
    """How many of the trained weights are kept at the end; None: that fraction of them, or no target."""
    options, masks = session.options, session.state.masks
    if options.target_remaining is None or options.tolerance is not None:
        return None
    whole = options.target({name: mask.numel() for name, mask in masks.pruned.items()}, session.state.others)
    if not frozen:
        return whole
    left = whole - sum(masks.survivors[name] for name in frozen)
    trained = {name: mask.numel() for name, mask in masks.pruned.items() if name not in frozen}
    if left >= max(1, sum(options.floors(trained).values())):
        return left
    subject = session.subject
    if news := [name for name in frozen if name not in session.state.replaced | subject.warned]:
        messages.warn_of_frozen(options, news)
        subject.warned.update(news)
    return None
