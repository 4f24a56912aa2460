"""What a user may ask of a pruning callback, checked at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeAlias

import torch

from lightning_sap.engine.decision import Limits
from lightning_sap.engine.groups import Scope, check_scope
from lightning_sap.engine.weights import Selection, check_selection
from lightning_sap.functional.amount import ceil, floor
from lightning_sap.policies.base import Policy, check_policy

Schedule: TypeAlias = Literal["auto", "restart", "squeeze", "keep"]
RewindWeights: TypeAlias = Literal["init"] | int | None

SAME = {"init": "0"}  # as `rewind_weights`
OF_THE_PLAN = ("rounds", "every_n_epochs", "keep_zeros")  # what counts only where a run begins


@dataclass(frozen=True)
class Options:
    """The options of :class:`lightning_sap.PruningCallback`, see there.

    Raises:
        ValueError: If one is out of its range.
        TypeError: If the policy is none.
    """

    policy: Policy
    scope: Scope
    rounds: int | None
    every_n_epochs: int | None
    rewind_weights: RewindWeights
    lr_schedule: Schedule
    reset_optimizer: bool
    target_remaining: float | None
    min_remaining: float
    include: Selection
    exclude: Selection
    keep_zeros: bool
    save_rounds: bool | int | None
    dirpath: str | None
    name: str

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_policy(self.policy)
        check_scope(self.scope)
        check_selection("include", self.include)
        check_selection("exclude", self.exclude)
        _check(self.rounds is None or _whole(self.rounds, 0), "rounds", self.rounds, "a whole number of at least 0")
        fits = self.every_n_epochs is None or _whole(self.every_n_epochs, 1)
        _check(fits, "every_n_epochs", self.every_n_epochs, "a whole number of at least 1")
        rewind = self.rewind_weights
        _check(
            rewind is None or rewind == "init" or _whole(rewind, 0),
            "rewind_weights",
            rewind,
            "None (keep the weights), 'init' or a number of completed epochs",
        )
        schedules = ("auto", "restart", "squeeze", "keep")
        _check(self.lr_schedule in schedules, "lr_schedule", self.lr_schedule, f"one of {schedules}")
        target = self.target_remaining
        fits = target is None or (_fraction(target) and target > 0)
        _check(fits, "target_remaining", target, "None or a fraction in (0, 1]")
        fits = _fraction(self.min_remaining) and self.min_remaining < 1
        _check(fits, "min_remaining", self.min_remaining, "a fraction in [0, 1)")
        if target is not None and self.min_remaining > target:
            raise ValueError(
                f"min_remaining={self.min_remaining} is above target_remaining={target}: the target could not be "
                "reached. Lower min_remaining or raise target_remaining."
            )
        fits = self.save_rounds is None or isinstance(self.save_rounds, bool) or _whole(self.save_rounds, 1)
        _check(fits, "save_rounds", self.save_rounds, "None, True, False or a whole number of at least 1")
        _check(bool(self.name) and "/" not in self.name, "name", self.name, "a non-empty text without '/'")

    @property
    def snapshot_epoch(self) -> int | None:
        """After how many completed epochs the weights to rewind to are taken; None: never."""
        return 0 if self.rewind_weights == "init" else self.rewind_weights

    def plain(self) -> dict[str, str]:
        """The options as texts, to be stored and compared; without addresses, which every process has anew."""
        texts = {key: value if isinstance(value, str) else repr(value) for key, value in vars(self).items()}
        return {key: re.sub(r" at 0x[0-9a-fA-F]+", "", text) for key, text in texts.items()}

    def changed(self, key: str, stored: Mapping[str, str]) -> bool:
        """Whether an option differs from the one stored; what was not stored did not change."""
        now = self.plain()[key]
        return SAME.get(stored.get(key, now), stored.get(key, now)) != SAME.get(now, now)

    def floors(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Fewest weights that must survive in each parameter."""
        return {name: int(ceil(_exact(self.min_remaining * n))) for name, n in sizes.items()}

    def target(self, sizes: Mapping[str, int]) -> int:
        """How many weights survive at the end, where there is a target."""
        return round((self.target_remaining or 0.0) * sum(sizes.values()))

    def limits(self, sizes: dict[str, int], alive: int, prunings_left: int | None, target: int | None = None) -> Limits:
        """What the next pruning must keep to, from the sizes of the parameters, their survivors and prunings left.

        Args: ``target``: how many survive at the end; None: that fraction of the sizes.
        """
        floors = self.floors(sizes)
        if self.target_remaining is None or prunings_left is None or alive == 0:
            return Limits(floors)
        target = min(alive, self.target(sizes) if target is None else target)
        share = (target / alive) ** (1 / max(1, prunings_left))
        most_kept = max(target, int(floor(_exact(alive * share))))
        return Limits(floors, least=alive - most_kept, most=alive - target)


def _exact(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _fraction(value: Any) -> bool:
    return isinstance(value, Real) and 0 <= float(value) <= 1


def _check(fits: bool, name: str, value: Any, allowed: str) -> None:
    if not fits:
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")
