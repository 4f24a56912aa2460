"""Carrying out a search: it is asked at the end of each round, and says at the end what it found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sap.callbacks.logging import log_line
from lightning_sap.callbacks.pruning import messages
from lightning_sap.engine.decision import Decision
from lightning_sap.policies.base import LARGEST_SCALED
from lightning_sap.rounds.protocol import Answer, GoOn, RoundEnd, RoundListener, TakeBack
from lightning_sap.rounds.search import RULE, Ended, Search, Tolerance

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.options import Options
    from lightning_sap.callbacks.pruning.session import PruningSession
    from lightning_sap.callbacks.pruning.state import PruningState


PATIENT = 8  # dense rounds without a known end, after which it is said that the reference is not reached


class Searcher(RoundListener):
    """Asked first at the end of a round: whether it keeps the tolerance, and what follows.

    Its search is a copy, which the run takes up together with the answer: a round that is asked about again, after an
    interrupt, is followed once.
    """

    may_take_back = True
    may_stop = False

    def __init__(self, session: PruningSession, tolerance: Tolerance) -> None:
        self.session, self.tolerance, self.search = session, tolerance, session.state.search

    def on_round_end(self, trainer: Any, pl_module: Any, event: RoundEnd) -> Answer:
        """Judge the round by the metric of rank 0."""
        session, record, before = self.session, event.record, self.session.state.search
        if before is None:
            raise RuntimeError("There is no search: the run of the checkpoint had no tolerance.")
        search = self.search = replace(before)
        metric = trainer.strategy.broadcast(record.metrics.get(self.tolerance.monitor))
        check_logged(session, trainer)
        if metric is None and search.unjudged == 0:
            _warn_of_no_metric(session.options, self.tolerance, record.round)
        elif metric is not None and search.validated not in (None, _steps(session.state)):
            _warn_of_early_validation(session.options, self.tolerance)
        own, passed = search.own, _passed(session.state)
        weights = sum(session.state.masks.survivors.values())
        answer = search.follow(self.tolerance, Ended(record.round, weights, metric, passed))
        if search.own and not own:
            _warn_of_reference(session.options, self.tolerance, search)
        elif passed is None and not search.started and search.tried == PATIENT:
            _warn_of_dense_rounds(session.options, self.tolerance, search)
        return answer


def begin(options: Options, state: PruningState) -> Search | None:
    """A search, where there is a tolerance and there are rounds."""
    if options.tolerance is None or state.plan.rounds == 0:
        return None
    sizes = {name: mask.numel() for name, mask in state.masks.pruned.items()}
    target = 0 if options.target_remaining is None else max(0, options.target(sizes, state.others))
    weights = sum(state.masks.survivors.values())
    return Search(weights=weights, dense=weights, target=target)


def resume(options: Options, state: PruningState) -> Search | None:
    """The search of the checkpoint, with the target of now; where there was none, one that begins with this round."""
    fresh = begin(options, state)
    if fresh is None or state.search is None:
        return fresh
    return replace(state.search, target=fresh.target)


def searcher(session: PruningSession) -> list[RoundListener]:
    """The listener that searches, if there is a tolerance."""
    tolerance = session.options.tolerance
    return [] if tolerance is None or session.state.search is None else [Searcher(session, tolerance)]


def searched(state: PruningState, listeners: Sequence[RoundListener]) -> Search | None:
    """The search, once these listeners have answered."""
    return next((each.search for each in listeners if isinstance(each, Searcher)), state.search)


def holds_another(state: PruningState) -> bool:
    """Whether the sparsest sound network is not that of the round that ends now."""
    search = state.search
    return search is not None and state.kept is not None and search.best != state.round


def goes_on(state: PruningState) -> GoOn:
    """What follows a round in which a listener ends training, where training goes on all the same."""
    return GoOn() if state.search is None else state.search.goes_on(state.round)


def fewest(kept: int, scale: float, most: int | None) -> int:
    """Fewest weights that a step on whole units takes: so few units have an index that often rounds to none.

    The share that is worth a round, times the scale, as far as the step may go.

    Example:
        >>> fewest(1000, 4.0, None), fewest(1000, 4.0, 50), fewest(1000, 0.0, None)
        (80, 49, 0)
    """
    least = math.ceil(min(scale * RULE.least, LARGEST_SCALED) * kept)
    return least if most is None else max(0, min(least, most - 1))


def is_stuck_(state: PruningState, answer: GoOn | TakeBack, decision: Decision) -> bool:
    """Whether the search is over since even one more unit has more weights than a step may take; it is noted."""
    search, most = state.search, answer.most
    if search is None or most is None or decision.count or decision.finest <= most:
        return False
    search.over = True
    return True


def values(session: PruningSession, trainer: Trainer) -> dict[str, float]:
    """What is logged of the search: where it stands, and whether the network of the moment is sound."""
    search, tolerance, state = session.state.search, session.options.tolerance, session.state
    if search is None or tolerance is None:
        return {}
    sound = search.sound(tolerance, session.metrics.of(trainer, state.round).get(tolerance.monitor))
    best = state.masks.remaining if search.best is None else search.weights / max(1, state.masks.total)
    return {"scale": search.scale, "sound": float(sound is not False), "best_remaining": best}


def see_validation(state: PruningState) -> None:
    """To be called after validation."""
    if state.search is not None:
        state.search.validated = _steps(state)


def check_logged(session: PruningSession, trainer: Trainer) -> None:
    """Raise, once validation has run, if the metric is never logged."""
    tolerance, metrics = session.options.tolerance, session.metrics
    known = metrics.known(trainer)
    looked = metrics.saw_validation or (bool(known) and not trainer.enable_validation)
    if tolerance is not None and looked and tolerance.monitor not in known:
        raise ValueError(
            f"Tolerance(monitor={tolerance.monitor!r}): no such metric is logged; those logged are {sorted(known)}. "
            f"Log it in validation: self.log({tolerance.monitor!r}, ...)."
        )


def _steps(state: PruningState) -> int:
    """Optimizer steps so far."""
    return state.first_step + state.steps


def _passed(state: PruningState) -> float | None:
    """Share of the training that has passed with the round that ends now, as it is planned."""
    plan = state.plan
    if plan.end is None:
        return None
    return (state.start + plan.planned(state.round) - plan.first) / max(1, plan.end - plan.first)


def _warn_of_no_metric(options: Options, tolerance: Tolerance, round: int) -> None:
    rank_zero_warn(
        f"{options.name}: in round {round} {tolerance.monitor!r} was not logged, so that it cannot be judged. Another "
        "follows under the same masks. Validate in each round: give longer rounds (every_n_epochs, every_n_steps), or "
        "a smaller check_val_every_n_epoch or val_check_interval of the Trainer."
    )


def _warn_of_reference(options: Options, tolerance: Tolerance, search: Search) -> None:
    rank_zero_warn(
        f"{options.name}: half of the training is over, and {tolerance.monitor!r} of the dense network is "
        f"{search.yardstick:.4g} at best, not within {tolerance.drop:g} of the reference {tolerance.reference:.4g}. "
        f"From now on {search.yardstick:.4g} is the yardstick. Give more epochs, longer rounds (every_n_epochs), or "
        "the reference of a network that was trained in the same way."
    )


def _warn_of_early_validation(options: Options, tolerance: Tolerance) -> None:
    rank_zero_warn(
        f"{options.name}: a round is judged by a {tolerance.monitor!r} that was measured before its last steps, since "
        "no validation stands at its end. Let every_n_epochs be a multiple of the Trainer's check_val_every_n_epoch, "
        "or every_n_steps one of its val_check_interval, which counts batches."
    )


def _warn_of_dense_rounds(options: Options, tolerance: Tolerance, search: Search) -> None:
    best = "was never finite" if search.yardstick is None else f"is {search.yardstick:.4g} at best"
    rank_zero_warn(
        f"{options.name}: after {search.tried} dense rounds {tolerance.monitor!r} {best}, not within "
        f"{tolerance.drop:g} of the reference ({tolerance.reference}), and nothing is pruned before. It is not known "
        "how long training takes, so that it goes on like this. Give max_steps or max_epochs, or the reference of a "
        "network that was trained in the same way."
    )


def tell(options: Options, state: PruningState, why: str, cure: str, *, cut: bool) -> None:
    """Say what was found."""
    tolerance, search = options.tolerance, state.search
    if tolerance is None or search is None:
        return
    if search.best is None or search.metric is None or search.yardstick is None:
        rank_zero_warn(
            f"{options.name}: no round was sound, since {tolerance.monitor!r} was never finite; the module stays as it "
            f"is: {state.masks.remaining:.2%} of {state.masks.total:,} weights."
        )
        return
    back = sum(record.taken_back for record in state.history)
    reached = (
        f"{state.masks.remaining:.2%} of {state.masks.total:,} weights remain at {tolerance.monitor}="
        f"{search.metric:.4g}, {against(tolerance, search)}; {back} of {messages.counted(len(state.history), 'round')} "
        "taken back"
    )
    if options.target_remaining is not None and search.weights > search.target + state.finest:
        rank_zero_warn(
            f"{options.name}: target_remaining={options.target_remaining} is missed: {reached}. Give a larger drop, "
            "more epochs, or longer rounds."
        )
    elif search.own and tolerance.reference is not None:
        rank_zero_warn(
            f"{options.name}: the reference was given up, and what is handed back is "
            f"{tolerance.loss(tolerance.reference, search.metric):.2g} worse than its {tolerance.reference:.4g}: "
            f"{reached}. Give more epochs or longer rounds, or train the dense network first and search in a fit from "
            "its weights."
        )
    elif search.weights >= search.dense:
        rank_zero_warn(
            f"{options.name}: no network that was pruned further kept the tolerance, and the first is handed back: "
            f"{reached}. Give a larger drop (now {tolerance.drop:g}), or longer rounds, to recover in."
        )
    elif cut and not search.over:
        rank_zero_warn(f"{options.name}: the search was cut off: {reached}, since {why}. {cure}.")
    else:
        log_line(f"{options.name}: {reached}.")


def against(tolerance: Tolerance, search: Search) -> str:
    """How far the sparsest sound network is from the yardstick, in words."""
    own, yardstick = search.own or tolerance.reference is None, search.held_against(tolerance) or 0.0
    loss = tolerance.loss(yardstick, search.metric or 0.0)
    side = "below" if (loss > 0) == (tolerance.better == "max") else "above"
    what = f"the {'best sound round' if own else 'reference'} ({yardstick:.4g}; drop={tolerance.drop:g})"
    return f"as good as {what}" if loss == 0 else f"{abs(loss):.2g} {side} {what}"
