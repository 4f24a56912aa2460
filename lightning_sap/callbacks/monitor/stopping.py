"""When to stop, and what to go back to: the phases of the rounds, and a verdict."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning_sap.rounds.history import RoundRecord
from lightning_sap.rounds.phases import Layers, Phase, PhaseDetector

StopOn = Literal["collapse", "compression"] | None
STOPS = {None: (), "collapse": (Phase.COLLAPSE,), "compression": (Phase.COMPRESSION, Phase.COLLAPSE)}


@dataclass(frozen=True)
class Verdict:
    """Why training stops, and what is worth going back to.

    Attributes:
        phase: The phase that was reached.
        round: The round at whose end this was seen.
        reason: Why, in one sentence.
        restore: The last sound round, or the one that a compression dates from; None: there was none.
    """

    phase: str
    round: int
    reason: str
    restore: int | None

    def __str__(self) -> str:
        """One line."""
        return f"Stopped after round {self.round}: {self.phase}. {self.reason}"


class StoppingRule:
    """Tells the phase of each round once, and comes to a verdict in the phase to stop on."""

    def __init__(self, stop_on: StopOn, detector: PhaseDetector) -> None:
        if stop_on not in STOPS:
            raise ValueError(f"stop_on must be 'collapse', 'compression' or None, got {stop_on!r}.")
        self.stop_on = stop_on
        self.detector = detector
        self.verdict: Verdict | None = None

    @property
    def phase(self) -> Phase:
        """That of the latest round."""
        return Phase(self.detector.phase)

    def catch_up(
        self, records: Sequence[RoundRecord], end: int, sizes: Mapping[str, int], monitor: str | None
    ) -> dict[int, tuple[str, str]]:
        """Take in the rounds before `end` that it was not there to see; returns phase and reason of each."""
        told = {}
        for record in records:
            if (
                not self.detector.round < record.round < end
                or record.taken_back
                or record.opened
                or record.sound is False
            ):
                continue
            left = {name: round(share * sizes.get(name, 0)) for name, share in record.layers_remaining.items()}
            layers = {name: (index, left[name]) for name, index in record.layers_pqi.items()}
            self.detector.update(
                record.pqi, layers=layers, metric=record.metrics.get(monitor or ""), round=record.round
            )
            told[record.round] = (str(self.phase), self.detector.reason)
        return told

    def preview(self, pqi: float, layers: Layers, metric: float | None, round: int) -> Phase:
        """The phase that the round would get if it ended now."""
        return self.detector.preview(pqi, layers=layers, metric=metric, round=round)

    def update(self, pqi: float, layers: Layers, metric: float | None, round: int | None = None) -> Phase:
        """Take in the round that ends now, of that number; None: the next. An interrupt leaves all of it or nothing."""
        detector, verdict = copy.deepcopy(self.detector), self.verdict
        phase = detector.update(pqi, layers=layers, metric=metric, round=round)
        if verdict is None and phase in STOPS[self.stop_on]:
            dated = detector.since if phase is Phase.COMPRESSION else detector.last_sound
            verdict = Verdict(str(phase), detector.round, detector.reason, dated)
        self.detector, self.verdict = detector, verdict
        return phase

    def state_dict(self) -> dict[str, Any]:
        """Everything it remembers, as plain values."""
        verdict = None if self.verdict is None else asdict(self.verdict)
        return {"detector": self.detector.state_dict(), "verdict": verdict}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state; a verdict counts only where there is something to stop on."""
        self.detector.load_state_dict(state_dict["detector"])
        verdict = state_dict["verdict"] if self.stop_on is not None else None
        self.verdict = None if verdict is None else Verdict(**verdict)
