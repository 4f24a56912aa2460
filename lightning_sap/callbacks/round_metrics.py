"""Which of the logged metrics belong to a round (without a pruner, to an epoch).

Lightning keeps old metrics, and forgets them when a run is resumed. A metric that validation logs belongs to the rounds
in which validation ran.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sap.schema import ANY_NUMBER, TEXT, Fields, Maybe, Series, Table, Whole

METRICS = Fields(  # what `RoundMetrics.state_dict` holds
    {
        "metrics": Table(ANY_NUMBER),
        "validated": Maybe(Whole()),
        "validation_keys": Series(TEXT),
        "logged": Series(TEXT),
    }
)


class RoundMetrics:
    """The metrics of the moment, a round or an epoch, which callers name by its number."""

    def __init__(self) -> None:
        self._saved: dict[str, float] = {}  # of the moment that was interrupted
        self._logged: set[str] = set()  # names that were logged before a resume
        self._validated: int | None = None  # the moment in which validation ran last
        self._of_validation: dict[str, int | None] = {}  # the metrics that validation logs, by the moment it did last
        self._at_start: dict[str, Tensor] = {}
        self._before_validation: dict[str, Tensor] = {}
        self.saw_validation = False  # in this fit

    @property
    def has_validated(self) -> bool:
        """Whether validation has run."""
        return self._validated is not None

    def begin(self, trainer: Trainer) -> None:
        """Remember the metrics with which an epoch or a round begins: what is logged in it is another tensor."""
        self._at_start = dict(trainer.callback_metrics)

    def begin_validation(self, trainer: Trainer) -> None:
        """To be called before validation: what is new after it was logged by it."""
        self._before_validation = dict(trainer.callback_metrics)

    def validate(self, moment: int) -> None:
        """Validation runs in this moment."""
        self._validated = moment

    def end_validation(self, trainer: Trainer, moment: int) -> None:
        """To be called after validation."""
        before, after = self._before_validation, trainer.callback_metrics
        new = (key for key in after if key not in before or after[key] is not before[key])
        self._of_validation |= dict.fromkeys(new, moment)
        self._validated, self._before_validation, self.saw_validation = moment, {}, True

    def known(self, trainer: Trainer) -> set[str]:
        """The names of all metrics that were ever logged, before a resume too."""
        return self._logged | self._saved.keys() | trainer.callback_metrics.keys()

    def of(self, trainer: Trainer, moment: int) -> dict[str, float]:
        """Every metric that was logged in this moment."""
        metrics = trainer.callback_metrics
        stale = {key for key, logged in self._of_validation.items() if logged != moment}
        stale = {key for key in stale if metrics.get(key) is self._at_start.get(key)}  # not logged in training
        return self._saved | {key: float(value) for key, value in metrics.items() if key not in stale}

    def end(self, trainer: Trainer) -> None:
        """The moment is over: what was saved of it counts no more, and the next begins."""
        self._saved = {}
        self.begin(trainer)

    def forget_fit(self) -> None:
        """Let go of the tensors of a fit."""
        self._at_start, self._before_validation, self.saw_validation = {}, {}, False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values; :meth:`for_checkpoint` has what is known of the moment."""
        keys, logged = sorted(self._of_validation), sorted(self._logged)
        saved = dict(self._saved)
        return {"metrics": saved, "validated": self._validated, "validation_keys": keys, "logged": logged}

    def for_checkpoint(self, trainer: Trainer, moment: int) -> dict[str, Any]:
        """The metrics of this moment, which Lightning does not keep, and the names of all.

        What training logs per epoch comes when the epoch ends. Until then the value of the epoch before stands in its
        place, which a run that is resumed from here would take for its own: it is left out.
        """
        now, start = trainer.callback_metrics, self._at_start
        before = {key for key in now if key not in self._of_validation and now[key] is start.get(key)}
        fresh = {key: value for key, value in self.of(trainer, moment).items() if key not in before}
        return {"metrics": fresh, "logged": sorted(self.known(trainer))}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self._saved = dict(state_dict.get("metrics", {}))
        self._logged = set(state_dict.get("logged", ()))
        self._validated = state_dict.get("validated")
        self._of_validation = dict.fromkeys(state_dict.get("validation_keys", ()))
