"""Where a network stands while it is pruned: regularization, compression, collapse."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any, Literal

ONE_WEIGHT = 1.0  # a layer can only run out of weights to spare if it once had one
LARGER_LOSS = 9.0  # default `metric_change` where less is better: ten times the best
LOWER_SCORE = 0.2  # and where more is better: a fifth below the best


class Phase(str, Enum):
    """What pruning does to a network; the order is that of the paper's hypothesis."""

    REGULARIZATION = "regularization"
    COMPRESSION = "compression"
    COLLAPSE = "collapse"

    def __str__(self) -> str:
        """The value, on every version of Python."""
        return self.value


_Layers = Mapping[str, tuple[float, int]]
_Verdict = tuple[Phase, int, str]  # since which round, and why


@dataclass
class _State:
    """All that a detector remembers, in plain values."""

    round: int = -1
    phase: str = Phase.REGULARIZATION.value
    since: int = 0
    reason: str = "The index has not turned from falling to rising."
    names: list[str] = field(default_factory=list)  # the layers whose mean index is followed; none: the overall index
    top: float = -math.inf  # the highest index, and the lowest since then
    low: float = math.inf
    low_round: int = 0
    peak: float = -math.inf  # the highest index since the turn from falling to rising
    peak_round: int = 0
    layers: dict[str, list[float]] = field(default_factory=dict)  # most weights that each had, and had to spare
    first_metric: float | None = None
    best_metric: float | None = None
    series: dict[str, list[int]] = field(default_factory=dict)  # first and number of the rounds in which a witness spoke


class PhaseDetector:
    """Tell from the PQ Index, round by round, what pruning does to a network.

    The index falls while pruning regularizes, rises while it compresses, and falls again when the network collapses.
    What is followed is the mean over the layers where their indices are given (it is the steadier one), else the
    overall index. **Compression** begins at the lowest index once a rise from it is sure. **Collapse** is final and has
    these witnesses:

    - hard facts, believed at once: a value that is not finite, a layer that lost its last weight, an index fallen to
      nothing;
    - the second turn: the index falls from the peak that it reached in compression;
    - exhaustion: index times surviving weights, about the number of weights that the index says can go, is nothing in
      a layer that once had weights to spare;
    - the metric, far below its best.

    The second turn and exhaustion are not believed while the metric is as good as in its first round.

    Args:
        mode: Whether the metric is better when larger (``"max"``) or smaller (``"min"``).
        hysteresis: How far the index must rise above its lowest value, or fall below its peak, to have turned; 0.25 is
            a factor of 1.25. Smaller sees turns earlier and takes noise for turns.
        patience: Rounds in a row a witness must speak to be believed. Fewer is earlier, more outlasts noise; hard facts
            need none.
        spare: A layer is exhausted where index times surviving weights is below this. Smaller waits longer; larger
            takes a thin layer that still works for an exhausted one.
        floor: The index has fallen to nothing at this fraction of its highest value. Larger is earlier, and wrong for
            a model such as a linear one, whose index falls far without harm.
        metric_change: How far, relative to its best value, the metric may worsen. None: 0.2 with ``"max"`` (a fifth is
            lost), 9 with ``"min"`` (a loss is ten times its lowest). Smaller is earlier, and stops a run that would
            have recovered.

    Raises:
        ValueError: If an argument is out of its range.

    Source: the hypothesis of Diao et al., ICLR 2023, Section 3.3; the other witnesses, for runs on which the second
    turn comes late or never, are measured on small networks.

    Example:
        >>> detector = PhaseDetector()
        >>> [detector.update(index).value for index in (0.20, 0.10, 0.06, 0.09, 0.11)][-2:]
        ['regularization', 'compression']
        >>> detector.since
        2
        >>> detector.update(0.0), detector.reason
        (<Phase.COLLAPSE: 'collapse'>, 'The index fell to nothing: 0 in round 5, 0.2 at its highest.')
    """

    def __init__(
        self,
        mode: Literal["max", "min"] = "max",
        *,
        hysteresis: float = 0.25,
        patience: int = 2,
        spare: float = 0.03,
        floor: float = 0.01,
        metric_change: float | None = None,
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {mode!r}.")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}; with 1 a single round is believed.")
        if metric_change is None:
            metric_change = LOWER_SCORE if mode == "max" else LARGER_LOSS
        for name, value in (("hysteresis", hysteresis), ("metric_change", metric_change)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {value}.")
        for name, value in (("spare", spare), ("floor", floor)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}; with 0 the index must be exactly 0.")
        self.mode, self.hysteresis, self.patience = mode, hysteresis, patience
        self.spare, self.floor, self.metric_change = spare, floor, metric_change
        self._state = _State()

    @property
    def phase(self) -> Phase:
        """The phase as of the last update."""
        return Phase(self._state.phase)

    @property
    def since(self) -> int:
        """The round the phase dates from, counted in updates from 0; the turn itself, not the round that proved it."""
        return self._state.since

    @property
    def reason(self) -> str:
        """Why it is this phase, in one sentence."""
        return self._state.reason

    def update(
        self, pqi: float, *, layers: Mapping[str, tuple[float, int]] | None = None, metric: float | None = None
    ) -> Phase:
        """Take in one round and say where the network stands.

        Args:
            pqi: PQ Index of all prunable weights after the round's training.
            layers: For each prunable parameter its index and the number of its surviving weights.
            metric: The validation metric; None where it is not known.
        """
        state = self._state
        state.round += 1
        if state.phase != Phase.COLLAPSE.value:
            now = {name: (float(index), int(weights)) for name, (index, weights) in (layers or {}).items()}
            value = None if metric is None else float(metric)
            verdict = self._hard_fact(float(pqi), now, value) or self._weigh(float(pqi), now, value)
            if verdict is not None:
                phase, state.since, state.reason = verdict
                state.phase = phase.value
        return self.phase

    def state_dict(self) -> dict[str, Any]:
        """Everything it remembers, as plain values."""
        return asdict(self._state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state; what it does not know keeps its first value."""
        known = {f.name for f in fields(_State)}
        self._state = _State(**copy.deepcopy({name: v for name, v in state_dict.items() if name in known}))

    # -- witnesses ----------------------------------------------------------------------------------------------------

    def _hard_fact(self, pqi: float, layers: _Layers, metric: float | None) -> _Verdict | None:
        """What needs no second look."""
        state, t = self._state, self._state.round
        values = {"The index": pqi, "The metric": metric, **{f"The index of {n}": i for n, (i, _) in layers.items()}}
        for name, value in values.items():
            if value is not None and not math.isfinite(value):
                return Phase.COLLAPSE, t, f"{name} is {value} in round {t}."
        for name, (_, weights) in layers.items():
            if weights == 0 and name in state.layers and state.layers[name][0] > 0:
                return Phase.COLLAPSE, t, f"The layer {name} lost its last weight in round {t}."
        return None

    def _weigh(self, pqi: float, layers: _Layers, metric: float | None) -> _Verdict | None:
        """Remember the round, and say what changes by it."""
        state = self._state
        index = sum(i for i, _ in layers.values()) / len(layers) if layers else pqi
        self._remember(index, layers, metric)
        if index <= self.floor * state.top:
            where = f"{index:.3g} in round {state.round}, {state.top:.3g} at its highest"
            return Phase.COLLAPSE, state.round, f"The index fell to nothing: {where}."
        sound = metric is not None and self._worse_by(metric, state.first_metric) <= 0
        return (
            self._lost_metric(metric)
            or self._exhausted(layers, sound)
            or (self._second_turn(index, sound) if state.phase == Phase.COMPRESSION.value else self._first_turn(index))
        )

    def _remember(self, index: float, layers: _Layers, metric: float | None) -> None:
        """Update the extremes."""
        state, t = self._state, self._state.round
        anew = sorted(layers) != state.names
        if anew or (index > state.top and state.phase == Phase.REGULARIZATION.value):
            state.names, state.top, state.low, state.low_round = sorted(layers), index, math.inf, t
        if index < state.low:
            state.low, state.low_round, state.peak = index, t, -math.inf
        if anew or index > state.peak:
            state.peak, state.peak_round = index, t
        for name, (i, weights) in layers.items():
            most, spare = state.layers.get(name, (0.0, 0.0))
            state.layers[name] = [max(most, weights), max(spare, i * weights)]
        if metric is not None:
            if state.first_metric is None or state.best_metric is None:
                state.first_metric = state.best_metric = metric
            if self._worse_by(metric, state.best_metric) < 0:
                state.best_metric = metric

    def _worse_by(self, metric: float, than: float | None) -> float:
        return 0.0 if than is None else (than - metric) * (1 if self.mode == "max" else -1)

    def _lasts(self, witness: str, speaks: bool) -> bool:
        """Whether it has spoken in `patience` rounds in a row."""
        if not speaks:
            self._state.series.pop(witness, None)
            return False
        series = self._state.series.setdefault(witness, [self._state.round, 0])
        series[1] += 1
        return series[1] >= self.patience

    def _first_turn(self, index: float) -> _Verdict | None:
        state = self._state
        if not self._lasts("rise", index > (1 + self.hysteresis) * state.low):
            return None
        reason = f"The index rose to {index:.3g} in round {state.round} from its lowest, {state.low:.3g} in round"
        return Phase.COMPRESSION, state.low_round, f"{reason} {state.low_round}."

    def _second_turn(self, index: float, sound: bool) -> _Verdict | None:
        state = self._state
        if not self._lasts("fall", not sound and index < state.peak / (1 + self.hysteresis)):
            return None
        reason = f"The index fell to {index:.3g} in round {state.round} from its peak, {state.peak:.3g} in round"
        return Phase.COLLAPSE, state.peak_round, f"{reason} {state.peak_round}."

    def _exhausted(self, layers: _Layers, sound: bool) -> _Verdict | None:
        verdict = None
        for name, (index, weights) in layers.items():
            nothing = index * weights < self.spare and self._state.layers[name][1] >= ONE_WEIGHT
            if self._lasts(f"spare/{name}", nothing and not sound) and verdict is None:
                since = self._state.series[f"spare/{name}"][0]
                reason = f"The layer {name} has nothing to spare since round {since}: {weights} weights of index {index:.3g}."
                verdict = Phase.COLLAPSE, since, reason
        return verdict

    def _lost_metric(self, metric: float | None) -> _Verdict | None:
        state = self._state
        if metric is None or state.best_metric is None:
            return None
        lost = self._worse_by(metric, state.best_metric) > self.metric_change * abs(state.best_metric)
        if not self._lasts("metric", lost):
            return None
        since = state.series["metric"][0]
        return Phase.COLLAPSE, since, f"The metric is far from its best since round {since}: {metric:.3g}, best {state.best_metric:.3g}."
