"""What a run must not lose: masks, rounds, the weights to rewind to, and the history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_sap.engine.masks import MaskSet
from lightning_sap.engine.measure import Measure
from lightning_sap.rewind import place_weights
from lightning_sap.rounds.history import History, RoundRecord
from lightning_sap.rounds.plan import RoundPlan
from lightning_sap.sharding import whole


@dataclass
class PruningState:
    """The state of a pruning run, declared in this one place.

    Attributes:
        masks: Which weights are pruned.
        plan: How many rounds, and how long.
        round: Number of prunings so far.
        round_step: ``trainer.global_step`` when the round started.
        count: Weights that the latest pruning took.
        pqi_after_pruning: PQ Index of all weights right after it, or at the start of training.
        first_weights: Parameters and buffers to rewind to, on the CPU; None until they are taken.
        history: The rounds that ended.
        lr: Learning rate of the first parameter group in the latest step.
        metrics: The metrics logged when the run was saved; Lightning forgets them.
        validated: The round in which validation ran last; None: it never did.
        validation_keys: The metrics that validation logs.
        folder: Where the rounds are saved; None: they are not.
        note: What its record says of the round that goes on beside what is measured: phase and reason, and its path.
        schedules: Where the learning-rate schedules stood when the run was saved.
        options: The options of that run, as texts.
    """

    masks: MaskSet = field(default_factory=lambda: MaskSet({}))
    plan: RoundPlan = field(default_factory=lambda: RoundPlan(0, 1))
    round: int = 0
    round_step: int = 0
    count: int = 0
    pqi_after_pruning: float | None = None
    first_weights: dict[str, Tensor] | None = None
    history: History = field(default_factory=History)
    lr: float | Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    validated: int | None = None
    validation_keys: list[str] = field(default_factory=list)
    folder: str | None = None
    note: dict[str, Any] = field(default_factory=dict)
    schedules: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)

    def pack(self) -> dict[str, Any]:
        """As plain values and CPU tensors, one bit per weight for the masks; a collective where weights are sharded."""
        first = self.first_weights
        return {
            **{key: value for key, value in vars(self).items() if key not in ("masks", "plan", "history")},
            "lr": None if self.lr is None else float(self.lr),
            "first_weights": None if first is None else {name: whole(tensor) for name, tensor in first.items()},
            "masks": self.masks.pack(),
            "plan": asdict(self.plan),
            "history": [asdict(record) for record in self.history],
        }

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> PruningState:
        """The state from :meth:`pack`; what an older version did not store keeps its default."""
        known = {key: packed[key] for key in cls.__dataclass_fields__ if key in packed}
        return cls(
            **{
                **known,
                "masks": MaskSet.unpack(packed["masks"]),
                "plan": RoundPlan(**packed["plan"]),
                "history": History(RoundRecord(**record) for record in packed["history"]),
            }
        )

    def place(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Put what :meth:`unpack` made where the live tensors are, sharded as they are.

        Raises:
            ValueError: If the masks do not belong to these weights.
        """
        self.masks = self.masks.like(weights)
        if self.first_weights is not None:
            self.first_weights = place_weights(module, self.first_weights)

    def reopen(self) -> None:
        """Go on with a round at whose present end training ended once: it gets its record when it ends again."""
        closed = [record for record in self.history if record.round >= self.round]
        if closed and self.history.restored is None:
            self.history = History(record for record in self.history if record.round < self.round)
            self.note = {"phase": closed[0].phase, "reason": closed[0].reason}  # judged once; saved again

    def prunings_left(self) -> int | None:
        """How many prunings are still to come; None if there is no end to them."""
        return None if self.plan.rounds is None else self.plan.rounds - self.round

    def is_due(self, epoch: int, global_step: int) -> bool:
        """Whether a round ended before this epoch and was trained at all."""
        return self.plan.due(epoch) > self.round and global_step > self.round_step

    def record(self, before: Measure, last_epoch: int, metrics: dict[str, float]) -> RoundRecord:
        """The record of the round that ends now, as it was trained."""
        return RoundRecord(
            round=self.round,
            first_epoch=self.plan.start(self.round),
            last_epoch=last_epoch,
            remaining=self.masks.remaining,
            layers_remaining={name: n / self.masks.pruned[name].numel() for name, n in self.masks.survivors.items()},
            pqi=before.overall,
            layers_pqi=before.layers,
            lr=None if self.lr is None else float(self.lr),
            metrics=metrics,
            weights=sum(self.masks.survivors.values()),
            **self.note,
        )
