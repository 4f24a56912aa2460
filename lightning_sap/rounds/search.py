"""Tolerance, and the search for the sparsest network that keeps it: what follows each round. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lightning_sap.functional.scalars import is_real, make_plain_
from lightning_sap.rounds.metric_names import Mode, better
from lightning_sap.rounds.protocol import GoOn, TakeBack

SLACK = 1e-6  # of the yardstick: metrics are float32
LARGEST_SCALE = 2.0**20


@dataclass(frozen=True)
class Tolerance:
    """How much worse than its yardstick a pruned network may be; what a pruning callback then searches by.

    The yardstick is ``reference``, or else the best metric of the rounds that were sound so far, the dense one first. A
    round is sound if its metric is worse by at most ``drop``. The search prunes further after a sound round, goes back
    after one that is not, and hands back the sparsest network that was sound.

    Args:
        monitor: A metric that the module logs in validation, such as ``"val_acc"``.
        drop: Greatest loss, in the unit of the metric, at least 0: 0.01 is one point of an accuracy in [0, 1].
        mode: Whether the metric is better when larger (``"max"``) or smaller (``"min"``). None: ``"min"`` where its
            name ends in loss, error, perplexity or the like, else ``"max"``.
        reference: The metric of your dense network, trained as long. None: the dense rounds of this run are the
            yardstick; after a quarter of the training they are worse than they would be in the end.

    Raises:
        ValueError: If an argument is out of its range.

    Source: the search is this project's own; ``docs/tolerance.md`` has the benchmark that chose it.

    Example:
        >>> tolerance = Tolerance("val_acc", drop=0.01)
        >>> round(tolerance.loss(0.97, 0.965), 6), tolerance.keeps(0.97, 0.965), tolerance.keeps(0.97, 0.955)
        (0.005, True, False)
    """

    monitor: str
    drop: float = 0.01
    mode: Mode | None = None
    reference: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        make_plain_(self)
        monitor: object = self.monitor
        if not (isinstance(monitor, str) and monitor):
            raise ValueError(f"monitor must be the name of a logged metric, such as 'val_acc', got {self.monitor!r}.")
        if not (is_real(self.drop) and 0 <= self.drop < math.inf):
            raise ValueError(
                f"drop must be a finite number of at least 0, in the unit of {self.monitor!r}, got {self.drop!r}."
            )
        if self.mode not in (None, "max", "min"):
            raise ValueError(f"mode must be None (by the metric's name), 'max' or 'min', got {self.mode!r}.")
        if self.reference is not None and not (is_real(self.reference) and math.isfinite(self.reference)):
            raise ValueError(f"reference must be None or a finite number, got {self.reference!r}.")

    @property
    def better(self) -> Mode:
        """Whether the metric is better when larger (``"max"``) or smaller (``"min"``)."""
        return self.mode or better(self.monitor) or "max"

    def loss(self, yardstick: float, metric: float) -> float:
        """By how much a metric is worse than a yardstick; below 0 where it is better."""
        return yardstick - metric if self.better == "max" else metric - yardstick

    def keeps(self, yardstick: float, metric: float) -> bool:
        """Whether a metric is worse than a yardstick by at most ``drop``; one that is not finite always is."""
        return math.isfinite(metric) and self.loss(yardstick, metric) <= self.drop + SLACK * max(1.0, abs(yardstick))


@dataclass(frozen=True)
class Rule:
    """The numbers of the search, chosen by ``benchmarks/tolerance.py``.

    Attributes:
        start: The first scale.
        growth: What the scale is multiplied by after a sound round.
        shrink: Of the step that failed, how much the next one takes.
        way: Of the way to the sparsest failure, in the logarithm of what remains, how much a step takes at most.
        chances: Further rounds under the same masks for a near miss.
        near: A near miss is worse by at most so many drops.
        least: Share of the weights below which a step is not worth a round.
        dense: Share of the training that dense rounds take at most, where the reference is not reached.
        goes_back: Whether an unsound round is taken back.
    """

    start: float = 1.0
    growth: float = 2.0
    shrink: float = 0.25
    way: float = 0.5
    chances: int = 2
    near: float = 2.0
    least: float = 0.02
    dense: float = 0.5
    goes_back: bool = True


RULE = Rule()


@dataclass(frozen=True)
class Ended:
    """A round that has ended.

    Attributes:
        round: Its number.
        weights: Weights that it trained.
        metric: The monitored metric of the latest validation in it; None if there was none.
        passed: Share of the training that has passed; None if its end is not known.
    """

    round: int
    weights: int
    metric: float | None
    passed: float | None = None


@dataclass
class Search:
    """Where the search stands, as plain values.

    Attributes:
        yardstick: What metrics are held against; None before the first.
        best: Round of the sparsest sound network; None before there is one.
        weights: Its weights.
        metric: Its metric.
        scale: What the policy's counts are multiplied by.
        failed: Weights of the sparsest network that was not sound; None before there is one.
        tried: Further rounds that a near miss, or the dense network, has had.
        dense: Weights with which it began.
        unjudged: Rounds whose metric was not logged.
        validated: Optimizer steps before the latest validation; None before there was one.
        target: Weights at which the search is over, where they are sound; 0: there is no target.
        own: Whether the reference was given up for the best dense round.
        started: Whether anything was pruned.
        over: Whether nothing is pruned any more.
    """

    yardstick: float | None = None
    best: int | None = None
    weights: int = 0
    metric: float | None = None
    scale: float = 1.0
    failed: int | None = None
    tried: int = 0
    dense: int = 0
    unjudged: int = 0
    validated: int | None = None
    target: int = 0
    own: bool = False
    started: bool = False
    over: bool = False

    def sound(self, tolerance: Tolerance, metric: float | None) -> bool | None:
        """Whether a network with this metric is sound; None where that is not known."""
        if metric is None:
            return None
        held = self.held_against(tolerance)
        return math.isfinite(metric) if held is None else tolerance.keeps(held, metric)

    def held_against(self, tolerance: Tolerance) -> float | None:
        """The yardstick of the moment: the reference, or the best metric of a sound round; None before the first."""
        return self.yardstick if self.own or tolerance.reference is None else tolerance.reference

    def follow(self, tolerance: Tolerance, ended: Ended, rule: Rule | None = None) -> GoOn | TakeBack:
        """Take in how a round ended, and say what follows."""
        rule, own = rule or RULE, self.own
        sound = self.sound(tolerance, ended.metric)
        if sound is None:
            self.unjudged += 1
            answer: GoOn | TakeBack = GoOn(0.0, keep=False)
        elif not self.started:
            answer = self._dense(tolerance, ended, rule, sound)
        elif sound:
            answer = self._further(tolerance, ended, rule)
        elif not rule.goes_back or self._is_near(tolerance, ended, rule):
            self.tried += 1
            answer = GoOn(0.0 if rule.goes_back else self.scale, keep=False)
        else:
            answer = self._back(ended, rule)
        held = self.held_against(tolerance)
        if self.own != own:
            sound = self.sound(tolerance, ended.metric)
        bound = None if held is None else held - tolerance.drop if tolerance.better == "max" else held + tolerance.drop
        notes = {"sound": sound, "metric": ended.metric, "yardstick": held, "bound": bound}
        return replace(answer, notes={ended.round: notes})

    def goes_on(self, round: int) -> GoOn:
        """What follows a round that was followed already and not taken back, if that is asked for again."""
        if self.best != round or not self.started:
            return GoOn(0.0, keep=self.best == round)
        return GoOn(0.0, last=True) if self.over else GoOn(self.scale, most=self._most(room=self._room(RULE)))

    def _dense(self, tolerance: Tolerance, ended: Ended, rule: Rule, sound: bool) -> GoOn | TakeBack:
        """After a dense round: prune if it is sound; else train on, for a share of the training."""
        metric = math.nan if ended.metric is None else ended.metric
        self.tried += 1
        if not sound and math.isfinite(metric) and ended.passed is not None and ended.passed >= rule.dense:
            self.own = True
            sound = self.sound(tolerance, metric) is True
        if not sound and not self.own:
            known = self.yardstick
            keep = math.isfinite(metric) and (known is None or tolerance.loss(known, metric) < 0)
            if keep:
                self.yardstick, self.best, self.weights, self.metric = metric, ended.round, ended.weights, metric
            return GoOn(0.0, keep=keep)
        self.started, self.scale, self.tried = True, rule.start, 0
        if not sound:  # an earlier dense round was better
            return TakeBack(self.scale, most=self._most())
        return self._further(tolerance, ended, replace(rule, growth=1.0))

    def _further(self, tolerance: Tolerance, ended: Ended, rule: Rule) -> GoOn:
        """After a sound round: keep it, and take a larger step."""
        metric = math.nan if ended.metric is None else ended.metric
        if self.best is not None and ended.weights > self.weights:  # weights came back
            return GoOn(self.scale, keep=False, most=self._most(ended.weights))
        if self.yardstick is None or tolerance.loss(self.yardstick, metric) < 0 or self.best is None:
            self.yardstick = metric
        if self.tried == 0 and not self.over:
            self.scale = min(rule.growth * self.scale, LARGEST_SCALE)
        self.best, self.weights, self.metric, self.tried = ended.round, ended.weights, metric, 0
        most = self._room(rule)
        self.over = self.over or ended.weights <= self.target or (most is not None and most < rule.least * self.weights)
        return GoOn(0.0, last=True) if self.over else GoOn(self.scale, most=self._most(room=most))

    def _back(self, ended: Ended, rule: Rule) -> TakeBack:
        """After an unsound round: go back, and take a smaller step."""
        self.tried, taken = 0, self.weights - ended.weights
        if taken > 0 and not self.over:
            self.scale *= rule.shrink
            self.failed = max(ended.weights, 1) if self.failed is None else min(max(ended.weights, 1), self.failed)
        smaller = math.floor(rule.shrink * taken) if taken > 0 else None
        most = min((limit for limit in (self._room(rule), smaller) if limit is not None), default=None)
        self.over = self.over or (most is not None and most < rule.least * self.weights)
        return TakeBack(0.0, last=True) if self.over else TakeBack(self.scale, most=self._most(room=most))

    def _is_near(self, tolerance: Tolerance, ended: Ended, rule: Rule) -> bool:
        """Whether an unsound round gets another under the same masks."""
        if self.over or ended.metric is None or self.tried >= rule.chances:
            return False
        held, near = self.held_against(tolerance), replace(tolerance, drop=rule.near * tolerance.drop)
        return held is not None and near.keeps(held, ended.metric)

    def _room(self, rule: Rule) -> int | None:
        """Most weights that a step from the sparsest sound network takes, for what failed; None: no limit."""
        if self.failed is None or self.failed >= self.weights:
            return None
        left: float = float(self.weights) ** (1 - rule.way) * float(self.failed) ** rule.way
        return math.floor(self.weights - left)

    def _most(self, weights: int | None = None, room: int | None = None) -> int | None:
        """Most weights that the next step takes: none below the target."""
        above = (weights or self.weights) - self.target if self.target else None
        return min((max(0, limit) for limit in (above, room) if limit is not None), default=None)
