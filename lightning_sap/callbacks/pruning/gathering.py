"""WHEN scores are gathered: in the last part of each round; and what the next pruning has of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_sap.callbacks.logging import log_line
from lightning_sap.callbacks.pruning.gatherers import Gatherer, OfGradients, OfInputs, Shapes, Sums
from lightning_sap.callbacks.pruning.kept_round import copied_sums
from lightning_sap.callbacks.pruning.schema import SCHEMA
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.callbacks.pruning.unit_gatherer import OfUnits
from lightning_sap.engine.decision import Decision
from lightning_sap.engine.groups import PrunableTensor
from lightning_sap.engine.weights import PrunableWeight
from lightning_sap.policies.base import Importance
from lightning_sap.policies.gathered import FisherRatio, Taylor, Wanda
from lightning_sap.policies.importance import NAMED, Magnitude, check_importance
from lightning_sap.rounds.plan import WORDS

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.session import PruningSession

PART = 5  # of a round in steps the last of so many parts


class Found(Importance):
    """Scores that are there, by parameter."""

    def __init__(self, importance: Importance, scores: Mapping[str, Tensor]) -> None:
        self.importance, self._scores = importance, scores

    def __repr__(self) -> str:
        """That of what they are by."""
        return repr(self.importance)

    def scores(self, name: str, weight: Tensor) -> Tensor:
        """Those of a parameter."""
        return self._scores[name]

    def of_units(self, rows: Tensor) -> Tensor:
        """As the importance says."""
        return self.importance.of_units(rows)


class Gathering:
    """Gathers what an importance needs, batch by batch; nothing for one that looks at the weights alone.

    The sums are in the run's state. Between batches nothing is left on the user's modules and optimizers.
    """

    def __init__(self, importance: Importance | str) -> None:
        self._given = importance
        self.importance = check_importance(importance)
        self._gatherer = _gatherer_of(self.importance)
        self._open, self._looked, self.is_eager = ExitStack(), False, False

    def __reduce__(self) -> tuple[type[Gathering], tuple[Importance | str]]:
        """Copies and pickles are new."""
        return Gathering, (self._given,)

    def fresh(self) -> Gathering:
        """The same without what it saw of a fit."""
        return Gathering(self._given)

    @property
    def gathers(self) -> bool:
        """Whether there is anything to gather."""
        return self._gatherer is not None

    @property
    def of_weights(self) -> Importance:
        """What is measured at any time: the importance, or the magnitudes where its scores are there at times only."""
        return self.importance if self._gatherer is None else Magnitude()

    def check(self, session: PruningSession, module: nn.Module) -> None:
        """Raise, before training, for weights that cannot be scored.

        Raises:
            ValueError: It names them, and why.
        """
        gatherer, self._looked = self._gatherer, False
        if gatherer is None or session.options.rounds == 0:
            return
        silent = frozenset[int]().union(*session.subject.training.unheard)
        why = "its optimizer does not tell of its steps, as one does whose __init__ calls super().__init__"
        found = {name: why for name, weight in session.weights.items() if id(weight.parameter) in silent}
        if found := gatherer.missing(session, module) | found:
            reasons = "; ".join(f"{name!r}: {why}" for name, why in found.items())
            raise ValueError(
                f"{self.importance!r} cannot score {reasons}. Leave them out with exclude={list(found)!r}, or give "
                "another importance, such as 'taylor' or 'magnitude'."
            )

    def taken_up(
        self, session: PruningSession, module: nn.Module, state: PruningState, weights: Mapping[str, PrunableWeight]
    ) -> PruningState:
        """A state of a checkpoint, with what was gathered for this importance, checked, and without any other.

        Raises:
            ValueError: If it does not fit the module.
        """
        gatherer, kept, own = self._gatherer, state.kept, {session.options.plain()["importance"]}
        own |= {name for name, kind in NAMED.items() if kind() == self.importance}
        same = state.options.get("importance", "magnitude") in own
        shapes = gatherer.shapes(session, module, weights) if gatherer is not None and same else {}
        kept = kept and replace(kept, gathered=_checked("kept.gathered", kept.gathered, shapes))
        return replace(state, kept=kept, gathered=_checked("gathered", state.gathered, shapes))

    def open(self, session: PruningSession, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Before a batch: watch it, if it is one of those that count."""
        self.close()
        gatherer, state = self._gatherer, session.state
        if gatherer is None or state.plan.rounds == 0:
            return
        if not self._looked:
            gatherer.check_batch(batch)
            self._looked = True
        if not is_on(state, trainer.current_epoch):
            return
        with torch.no_grad():
            for handle in gatherer.watch(session, trainer, module, batch):
                self._open.callback(handle.remove)
        others = [getattr(getattr(each, "session", None), "gathering", None) for each in trainer.callbacks]  # type: ignore[attr-defined]
        if gatherer.only_eager and not any(isinstance(other, Gathering) and other.is_eager for other in others):
            self.is_eager = True
            self._open.enter_context(torch.compiler.set_stance("force_eager"))

    def close(self) -> None:
        """After a batch, or an exception in it."""
        self._open.close()
        self.is_eager = False

    def scored(
        self, session: PruningSession, module: nn.Module, tensors: Mapping[str, PrunableTensor]
    ) -> dict[str, PrunableTensor]:
        """Those of the weights that can be compared now, with their scores; the others are warned of; a collective."""
        gatherer, trained = self._gatherer, session.state.trained
        if gatherer is None:
            return dict(tensors)
        shapes = gatherer.shapes(session, module, session.weights)
        fitting = {k: s for k, s in session.state.gathered.items() if k in shapes and _fit(s, shapes[k])}
        sums = {key: found for key, found in fitting.items() if int(found["count"].sum()) > 0}
        scores = gatherer.scores(session, module, sums)
        if unknown := [name for name in tensors if name in trained and name not in scores]:
            self._warn(session, unknown, nothing=not sums)
        found = Found(self.importance, scores)
        return {n: t._replace(importance=found, memory=None) for n, t in tensors.items() if n in scores}

    def tell(self, session: PruningSession, decision: Decision) -> None:
        """Say which index decided, for a record has that of the weights."""
        if self.gathers and decision.dropped and session.options.structure != "unit":
            kept, index = sum(decision.before.survivors.values()), decision.before.overall
            log_line(
                f"{session.options.name}: round {session.state.round} is pruned by {self.importance!r}: the PQ Index "
                f"of the scores of {kept:,} weights is {index:.4f}."
            )

    def _warn(self, session: PruningSession, names: list[str], *, nothing: bool) -> None:
        options, state, warned = session.options, session.state, session.subject.warned
        if nothing:
            part = "epoch" if state.plan.unit == "epoch" else f"{_steps(state)} steps"
            rank_zero_warn(
                f"{options.name}: nothing is pruned after round {state.round}: {self.importance!r} gathers its scores "
                f"in the last {part} of a round, and no optimizer step was seen there. Give longer rounds "
                f"({WORDS[state.plan.unit].every}), or importance='magnitude'."
            )
        elif new := [name for name in names if name not in warned]:
            warned.update(new)
            rank_zero_warn(
                f"{options.name}: {new} stay as they are: {self.importance!r} has no scores of them, since no gradient "
                "went through their layers while it gathered, or they joined since. Leave them out with "
                f"exclude={new!r}, or give another importance."
            )


def is_on(state: PruningState, epoch: int) -> bool:
    """Whether the next step is in the last part of a round that a pruning follows, in that epoch."""
    plan = state.plan
    if plan.rounds is not None and state.round >= plan.rounds:
        return False
    part = 1 if plan.unit == "epoch" else _steps(state)
    return state.elapsed(epoch) >= plan.planned(state.round) - part


def _steps(state: PruningState) -> int:
    """How many steps of a round in steps count."""
    return math.ceil(state.plan.planned(state.round) / PART)


def _checked(path: str, gathered: Mapping[str, Sums], shapes: Mapping[str, Shapes]) -> dict[str, Sums]:
    """Copies of those sums that there are shapes of."""
    found = {key: sums for key, sums in gathered.items() if key in shapes}
    for key, sums in found.items():
        wanted = shapes[key]
        got = {name: tuple(tensor.shape) for name, tensor in sums.items()}
        SCHEMA.must(_fit(sums, wanted), f"{path}[{key!r}]", got, f"tensors of the shapes {wanted}")
    return copied_sums(found)


def _fit(sums: Sums, wanted: Shapes) -> bool:
    """Whether sums are of these shapes."""
    shapes = {name: tensor.shape for name, tensor in sums.items()}
    return shapes.keys() == wanted.keys() and all(
        len(shape) == len(wanted[name]) and all(n in (None, m) for m, n in zip(shape, wanted[name], strict=True))
        for name, shape in shapes.items()
    )


def _gatherer_of(importance: Importance) -> Gatherer[Any] | None:
    """What gathers for an importance; None for one that looks at the weights alone."""
    if isinstance(importance, Taylor):
        return OfGradients(importance)
    if isinstance(importance, Wanda):
        return OfInputs(importance)
    return OfUnits(importance) if isinstance(importance, FisherRatio) else None
