"""Where a network stands while it is pruned: regularization, compression, collapse."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from enum import Enum
from typing import Any, Literal

from lightning_sap.functional.scalars import is_real, make_plain_
from lightning_sap.schema import LARGEST, Fields, Maybe, MismatchError, Number, OneOf, Row, Series, Table, Whole, must

SCATTERS = 4.0  # a turn is more than this many times the noise of the index
SMALLEST = 1e-300  # stands for 0 where a logarithm is taken
LOWER_SCORE, LARGER_LOSS = 0.2, 9.0  # defaults of `metric_change`
NEAR_SCORE, NEAR_LOSS = 0.02, 0.05  # defaults of `tolerance`
SOUND = 0.25  # share of `metric_change` up to which the metric speaks against a collapse

Layers = Mapping[str, tuple[float, int]]
Finding = tuple[str, int, str]  # the phase, the round it dates from, and why


class Phase(str, Enum):
    """What pruning does to a network."""

    REGULARIZATION = "regularization"
    COMPRESSION = "compression"
    COLLAPSE = "collapse"

    def __str__(self) -> str:
        """The value, on every version of Python."""
        return self.value


@dataclass
class PhaseDetector:
    """Tell from the PQ Index, round by round, what pruning does to a network.

    The index falls while pruning regularizes, rises while it compresses, and falls again when the network collapses. It
    is the mean over the layers where they are given (the steadier witness), else that of all weights. Turns are counted
    from the running extremes, and are never less than four times the noise in the index. *Compression* dates from the
    lowest index. *Collapse* is final: a hard fact (an index that is not finite, a layer that lost its last weight, an
    index fallen to nothing), or seen for some rounds. In compression, the index falls from its peak; before it, a layer
    is exhausted: index times surviving weights, about what can go by the index, is next to 0. Neither is believed while
    the metric is near its best; and a metric far from its best is a collapse too, or one that is not finite.

    A round is *sound* while the metric is within the tolerance of its best; where there is none, while each layer could
    still spare a share, the reserve, of the most weights that it ever could.

    Args:
        mode: Whether the metric is better when larger (``"max"``) or smaller (``"min"``).
        rise: How far above its lowest the index must be: 0.25 is a quarter. Smaller is earlier, larger surer.
        fall: How far below its peak in compression: 0.3 is three tenths. Smaller is earlier, larger surer.
        patience: Rounds in a row in which it must be seen. Fewer are earlier, more outlast a bad round.
        spare: A layer is exhausted below this. Larger is earlier, smaller lets thin layers work on.
        floor: An index at this fraction of its highest is nothing. Larger is earlier, smaller suits linear models.
        metric_change: How far from its best, relative to it, the metric is bad. None: 0.2 for a score (``"max"``: a
            fifth is lost), 9 for a loss (ten times the best). Smaller is earlier, larger gives time to recover; for an
            error rate near 0 give a larger one, or the accuracy in its place.
        tolerance: How far from its best, relative to it, the metric of a sound round may be. None: 0.02 for a score,
            0.05 for a loss. Smaller holds on to more accuracy, larger to fewer weights.
        reserve: Without a metric, a layer must be able to spare this share of its most. Larger holds on to more
            accuracy, smaller to fewer weights.

    Attributes:
        since: The round from which the phase dates; the first update is round 0.
        reason: Why it is this phase, in one sentence.

    Raises:
        ValueError: If an argument is out of its range.

    Source: hypothesis of Diao et al., ICLR 2023; what shows a collapse beside the turns is measured.

    Example:
        >>> detector = PhaseDetector()
        >>> [detector.update(index).value for index in (0.20, 0.10, 0.06, 0.09, 0.11)][-2:]
        ['regularization', 'compression']
        >>> detector.since
        2
        >>> detector.update(0.0).value, detector.reason
        ('collapse', 'In round 5 the index fell to nothing: 0 after at most 0.2.')
    """

    mode: Literal["max", "min"] = "max"
    _: KW_ONLY
    rise: float = 0.25
    fall: float = 0.3
    patience: int = 2
    spare: float = 0.03
    floor: float = 0.01
    metric_change: float | None = None
    tolerance: float | None = None
    reserve: float = 0.05
    round: int = field(default=-1, init=False)  # from here on all that it remembers, in plain values
    phase: str = field(default=Phase.REGULARIZATION.value, init=False)
    since: int = field(default=0, init=False)
    reason: str = field(default="The index has not turned from falling to rising.", init=False)
    _curve: list[float] = field(default_factory=list, init=False, repr=False)  # the index, from its highest value on
    _rounds: list[int] = field(default_factory=list, init=False, repr=False)  # the rounds of its entries
    _names: list[str] = field(default_factory=list, init=False, repr=False)  # the layers whose mean it is
    _spared: dict[str, float] = field(default_factory=dict, init=False, repr=False)  # by layer, the most it could spare
    _best: float | None = field(default=None, init=False, repr=False)  # of the metric
    _near: bool = field(default=False, init=False, repr=False)  # whether it is near enough to its best to work on
    _sound: list[int] = field(default_factory=list, init=False, repr=False)  # the sound rounds
    _series: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False)  # witness: first round, number

    def __post_init__(self) -> None:
        make_plain_(self)
        if self.mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {self.mode!r}.")
        limits = dict.fromkeys(("rise", "patience", "spare", "metric_change", "tolerance"), math.inf)
        limits |= dict.fromkeys(("fall", "floor", "reserve"), 1.0)
        if not is_real(self.patience) or self.patience != int(self.patience):
            raise ValueError(f"patience must be a whole number of rounds, got {self.patience}; give 1 or more.")
        for name, limit in limits.items():
            if (value := getattr(self, name)) is not None and not 0 < value < limit:
                raise ValueError(f"{name} must be above 0 and below {limit}, got {value}.")

    def update(
        self, pqi: float, *, layers: Layers | None = None, metric: float | None = None, round: int | None = None
    ) -> Phase:
        """Take in one round, and say where the network stands.

        Args:
            pqi: PQ Index of all prunable weights after the round's training.
            layers: For each prunable parameter its index and the number of its surviving weights.
            metric: The validation metric; None where it is not known.
            round: Its number, above that of the round before; None: the next.
        """
        self.round = self.round + 1 if round is None else round
        if self.phase != Phase.COLLAPSE:
            pqi, metric = float(pqi), None if metric is None else float(metric)
            layers = {name: (float(index), int(weights)) for name, (index, weights) in (layers or {}).items()}
            self._remember(pqi, layers, metric)
            if self._is_sound(pqi, layers, metric):
                self._sound.append(self.round)
            turned = self.phase == Phase.COMPRESSION
            verdict = self._hard_fact(pqi, layers) or self._lost_metric(metric) or self._bad_metric(metric)
            verdict = verdict or (self._second_turn() if turned else self._exhausted(layers) or self._first_turn())
            self.phase, self.since, self.reason = verdict or (self.phase, self.since, self.reason)
        return Phase(self.phase)

    def preview(self, pqi: float, **options: Any) -> Phase:
        """What :meth:`update` would say of a round; nothing is taken in."""
        return copy.deepcopy(self).update(pqi, **options)

    @property
    def last_sound(self) -> int | None:
        """The last sound round; once the network collapsed, of those before it. None: there was none."""
        end = self.since if self.phase == Phase.COLLAPSE else self.round + 1
        return max((round for round in self._sound if round < end), default=None)

    def state_dict(self) -> dict[str, Any]:
        """Everything it remembers, as plain values."""
        return {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(self) if not f.init}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state; what it does not hold stays as it is.

        Raises:
            ValueError: If a value cannot be one; nothing changes then.
        """
        known = {name: state_dict[name] for name in self.state_dict().keys() & state_dict.keys()}
        try:
            check_detector(known)
        except MismatchError as mismatch:
            raise ValueError(f"This is no state of a PhaseDetector: {mismatch.path[1:]} {mismatch.text}.") from None
        for name, value in known.items():
            setattr(self, name, copy.deepcopy(value))

    def _remember(self, pqi: float, layers: Layers, metric: float | None) -> None:
        index = max(sum(i for i, _ in layers.values()) / len(layers) if layers else pqi, 0.0)
        curve = self._curve or [0.0]
        unfallen = self.phase == Phase.REGULARIZATION and not self._apart(max(curve), min(curve), 1 + self.rise)
        if sorted(layers) != self._names or (unfallen and index > max(curve)):
            self._names, self._curve, self._rounds = sorted(layers), [], []
        self._curve.append(index)
        self._rounds.append(self.round)
        self._spared |= {n: max(i * left, self._spared.get(n, 0.0)) for n, (i, left) in layers.items() if left}
        if metric is not None and math.isfinite(metric):
            better = max if self.mode == "max" else min
            self._best = metric if self._best is None else better(metric, self._best)

    def _is_sound(self, pqi: float, layers: Layers, metric: float | None) -> bool:
        if metric is not None and not math.isfinite(metric):
            return False
        if self._best is None:
            spare = {n: i * left >= self.reserve * self._spared.get(n, 0.0) for n, (i, left) in layers.items()}
            return math.isfinite(pqi) and all(spare.values())
        near = NEAR_SCORE if self._is_score() else NEAR_LOSS
        return metric is not None and abs(metric - self._best) <= (self.tolerance or near) * abs(self._best)

    def _is_score(self) -> bool:
        return self.mode == "max" and self._best is not None and self._best > 0

    def _hard_fact(self, pqi: float, layers: Layers) -> Finding | None:
        values = {**{f"the index of {n}": i for n, (i, _) in layers.items()}, "the index": pqi}
        facts = [f"{n} is {value}" for n, value in values.items() if not math.isfinite(value)]
        facts += [f"{n} lost its last weight" for n, (_, left) in layers.items() if not left and n in self._spared]
        index, top = self._curve[-1], max(self._curve)
        if top > 0 and index <= self.floor * top:
            facts.append(f"the index fell to nothing: {index:.3g} after at most {top:.3g}")
        return (Phase.COLLAPSE.value, self.round, f"In round {self.round} {facts[0]}.") if facts else None

    def _lost_metric(self, metric: float | None) -> Finding | None:
        """One alone may be an accident of the batch or of the metric: it is left to patience."""
        if metric is None:
            return None
        return self._if_lasting("lost metric", not math.isfinite(metric), f"the metric is {metric}")

    def _bad_metric(self, metric: float | None) -> Finding | None:
        if metric is None or not math.isfinite(metric) or not self._best:  # of nothing no change is far
            self._near = False
            return None
        best, default = self._best, LOWER_SCORE if self._is_score() else LARGER_LOSS
        change, bad = abs(metric - best), (self.metric_change or default) * abs(best)
        self._near = change <= SOUND * bad
        reason = f"the metric is far from its best: {metric:.3g} after {best:.3g}"
        return self._if_lasting("metric", change > bad, reason)

    def _exhausted(self, layers: Layers) -> Finding | None:
        able = [(i * left, i, left, name) for name, (i, left) in layers.items() if self._spared.get(name, 0) >= 1]
        spare, index, left, name = min(able, default=(math.inf, 0.0, 0, ""))
        reason = f"{name} has nothing to spare: {left} weights of index {index:.3g}"
        return self._if_lasting("exhausted", spare < self.spare and not self._near, reason)

    def _first_turn(self) -> Finding | None:
        index, low = self._curve[-1], min(self._curve)
        bound = low * (1 + min(self._noise(), self.rise))  # as low as the lowest, as far as the noise can tell
        since = next(round for round, value in zip(self._rounds, self._curve, strict=True) if value <= bound)
        reason = f"the index rises: {index:.3g} after {low:.3g} at its lowest"
        return self._if_lasting("rise", self._apart(index, low, 1 + self.rise), reason, since)

    def _second_turn(self) -> Finding | None:
        index, first = self._curve[-1], next((t for t, round in enumerate(self._rounds) if round >= self.since), 0)
        curve = self._curve[first:]
        peak = max(curve)
        since = self._rounds[first + curve.index(peak)]
        reason = f"the index falls: {index:.3g} after {peak:.3g} at its peak"
        fell = self._apart(peak, index, 1 / (1 - self.fall))
        return self._if_lasting("fall", fell and not self._near, reason, since)

    def _apart(self, high: float, low: float, factor: float) -> bool:
        ratio = math.log(max(high, SMALLEST) / max(low, SMALLEST))
        return ratio > max(math.log(factor), SCATTERS * self._noise())

    def _noise(self) -> float:
        """Standard deviation of the noise on the logarithm of the index, from its third differences."""
        logs = [math.log(max(index, SMALLEST)) for index in self._curve]
        jumps = [abs(d - a - 3 * (c - b)) for a, b, c, d in zip(logs, logs[1:], logs[2:], logs[3:], strict=False)]
        # their variance is 20 times that of independent noise; the median of |N(0, 1)| is 0.6745
        return statistics.median(jumps) / (0.6745 * math.sqrt(20)) if len(jumps) > 2 else 0.0

    def _if_lasting(self, witness: str, speaks: bool, reason: str, since: int | None = None) -> Finding | None:
        """What a witness says once it does so in `patience` rounds in a row; it dates from the first by default."""
        if not speaks:
            self._series.pop(witness, None)
            return None
        series = self._series.setdefault(witness, [self.round, 0])
        series[1] += 1
        phase, since = Phase.COMPRESSION if witness == "rise" else Phase.COLLAPSE, series[0] if since is None else since
        return (phase.value, since, f"Since round {since} {reason}.") if series[1] >= self.patience else None


OPTIONS = [f.name for f in fields(PhaseDetector) if f.init]
DETECTOR = Fields.of(
    PhaseDetector,
    {
        "round": Whole(-1),
        "phase": OneOf(tuple(phase.value for phase in Phase)),
        "_curve": Series(Number(0, nan=True)),
        "_spared": Table(Number(0)),
        "_best": Maybe(Number()),
        "_series": Table(Row((Whole(), Whole()))),
    },
    without=OPTIONS,
)


def check_detector(state: Any) -> None:
    """Raise for what is no state of a detector."""
    DETECTOR.check(state, strict=False)
    curve, rounds = state.get("_curve", []), state.get("_rounds", [])
    must(len(curve) == len(rounds), "._rounds", rounds, f"a list of {len(curve)} rounds, one for each index in _curve")
    collapsed = state.get("phase") == Phase.COLLAPSE.value
    must(collapsed or all(map(math.isfinite, curve)), "._curve", curve, "a list of finite numbers before a collapse")
    numbers, last = [*rounds, *state.get("_sound", []), state.get("since", 0)], state.get("round", LARGEST)
    must(
        max(numbers) <= max(last, 0),
        "._rounds",
        rounds,
        f"of at most {last}, the latest round, as are _sound and since",
    )
