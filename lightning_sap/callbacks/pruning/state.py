"""What a run must not lose: masks, rounds, the weights to go back to, and the history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from lightning_sap.callbacks.pruning.decided import DecidedPruning, without_folder
from lightning_sap.callbacks.pruning.kept_round import KeptRound, placed, whole_sums, whole_tensors
from lightning_sap.callbacks.pruning.schema import ANSWERS, SCHEMA, check_tensors
from lightning_sap.callbacks.round_metrics import RoundMetrics
from lightning_sap.engine.decision import Decision
from lightning_sap.engine.masks import MaskSet, check_shapes
from lightning_sap.engine.measure import Measure
from lightning_sap.rewind import live_tensors, place_weights
from lightning_sap.rounds.history import History, RoundRecord
from lightning_sap.rounds.plan import RoundPlan
from lightning_sap.rounds.protocol import GoOn, Stop, TakeBack
from lightning_sap.rounds.search import Search


@dataclass
class PruningState:
    """The state of a pruning run, declared in this one place.

    Attributes:
        masks: Which weights are pruned.
        plan: How many rounds, and how long.
        companions: Which entries of biases and norms go with whole units; they are not counted as weights.
        finest: How many weights one more unit would have taken in the latest pruning of whole units.
        others: How many weights are trained and not prunable, as far as is known.
        round: Number of the round that goes on: so many prunings lie before it.
        first_epoch: Epoch in which it started.
        first_step: Optimizer steps of the Trainer before it.
        steps: Optimizer steps in it.
        epoch: Epoch in which the latest step was taken.
        epoch_steps: Optimizer steps in that epoch.
        trained: Names of the parameters of two or more dimensions that had a gradient in it.
        replaced: Names of the weights that were replaced in it, and are pruned from the next one on.
        first_bits: Fingerprints of all weights that could be pruned, trained or not, when training began.
        copies: By name of an average in the module the name of what it averages.
        count: Weights that the latest pruning took.
        pqi_after_pruning: PQ Index of all weights right after it, or at the start of training.
        gathered: What the scores of the next pruning are made of, by key several sums; empty unless the importance
            gathers them, and in the last part of a round.
        first_weights: Parameters and buffers to rewind to, on the CPU; None until they are taken.
        kept: The latest round that can be gone back to; None where nothing may ask for it. It stays after training: the
            last round goes on if the run is resumed with a later end.
        search: Where the search for the sparsest sound network stands; None: there is none.
        answer: What follows the round that has ended; None while it goes on.
        undone: The record of a round that is being taken back.
        pruning: The pruning that follows it, from its decision on until it is carried out.
        stop: The answer that ended training.
        history: The rounds that ended.
        lr: Learning rate of the first parameter group in the latest step.
        metrics: The state of the metrics of the round.
        run: Identity of the run; empty before any fit.
        parent: Identity of the run that this one branched off from; None if it began by itself.
        folder: Where its rounds are saved, inside of what options and Trainer name; None: they are not.
        note: What its record says of the round that goes on beside what is measured: phase and reason, and its path.
        schedules: Where the learning-rate schedules stood when the run was saved.
        options: The options of that run, as texts.
    """

    masks: MaskSet = field(default_factory=lambda: MaskSet({}))
    plan: RoundPlan = field(default_factory=lambda: RoundPlan(0, 1))
    companions: MaskSet = field(default_factory=lambda: MaskSet({}))
    finest: int = 0
    others: int = 0
    round: int = 0
    first_epoch: int = 0
    first_step: int = 0
    steps: int = 0
    epoch: int = 0
    epoch_steps: int = 0
    trained: set[str] = field(default_factory=set)
    replaced: set[str] = field(default_factory=set)
    first_bits: dict[str, int] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    count: int = 0
    pqi_after_pruning: float | None = None
    gathered: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    first_weights: dict[str, Tensor] | None = None
    kept: KeptRound | None = None
    search: Search | None = None
    answer: GoOn | Stop | TakeBack | None = None
    undone: RoundRecord | None = None
    pruning: DecidedPruning | None = None
    stop: Stop | None = None
    history: History = field(default_factory=History)
    lr: float | Tensor | None = None
    metrics: dict[str, Any] = field(default_factory=lambda: RoundMetrics().state_dict())
    run: str = ""
    parent: str | None = None
    folder: str | None = None
    note: dict[str, Any] = field(default_factory=dict)
    schedules: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)

    def pack(self) -> dict[str, Any]:
        """As plain values and CPU tensors, one bit per weight for the masks; a collective where weights are sharded."""
        first, kept = self.first_weights, self.kept
        return {
            **SCHEMA.stamp,
            **vars(self),
            "waiting": False,
            "lr": None if self.lr is None else float(self.lr),
            "trained": sorted(self.trained),
            "replaced": sorted(self.replaced),
            "gathered": whole_sums(self.gathered),
            "first_weights": None if first is None else whole_tensors(first),
            "kept": kept and kept.pack(),
            "search": self.search and asdict(self.search),
            "answer": _packed_answer(self.answer),
            "undone": self.undone and without_folder(asdict(self.undone)),
            "pruning": self.pruning and self.pruning.pack(),
            "stop": _packed_answer(self.stop),
            "masks": self.masks.pack(),
            "companions": self.companions.pack(),
            "plan": asdict(self.plan),
            "history": [without_folder(asdict(record)) for record in self.history],
            "note": without_folder(self.note),
        }

    @classmethod
    def live(
        cls, packed: Mapping[str, Any], module: nn.Module, weights: Mapping[str, Tensor] | None = None
    ) -> PruningState:
        """The state from :meth:`pack`, its tensors where those of the module are and sharded as they are.

        Args:
            packed: What :meth:`pack` made; what an older version did not store keeps its default.
            module: The module that is pruned.
            weights: Its prunable weights; None: those of the masks.

        Raises:
            ValueError: If it is not as the schema says, or does not fit the module; nothing is unpacked then.
        """
        packed, names = SCHEMA.read(packed), live_tensors(module)
        every = [packed, *(packed[key] for key in ("kept", "pruning") if packed.get(key))]
        weights = {n: names[n] for n in packed["masks"] if n in names} if weights is None else weights
        for part in every:
            check_shapes({name: entry["shape"] for name, entry in part["masks"].items()}, weights)
            biases = {name: entry["shape"] for name, entry in part.get("companions", {}).items() if name in names}
            check_shapes(biases, {name: names[name] for name in biases})
        state = cls._unpacked(packed)
        first, kept, pruning = state.first_weights, state.kept, state.pruning
        check_tensors("first_weights", first or {}, names)
        if kept is not None:
            for i, tensors in enumerate([kept.weights, *kept.averages]):
                check_tensors(f"kept.averages[{i - 1}]" if i else "kept.weights", tensors, names)
        return replace(
            state,
            masks=state.masks.like(weights),
            companions=placed(state.companions, names),
            pruning=pruning and pruning.placed(weights, names),
            first_weights=None if first is None else place_weights(module, first),
            kept=kept and kept.placed(module, weights),
        )

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> PruningState:
        """The state from :meth:`pack` on the CPU, for looking at; a run goes on with :meth:`live`.

        Raises:
            ValueError: If it is not as the schema says.
        """
        return cls._unpacked(SCHEMA.read(packed))

    @classmethod
    def _unpacked(cls, packed: Mapping[str, Any]) -> PruningState:
        known = {key: packed[key] for key in cls.__dataclass_fields__ if key in packed}
        kept, undone, pruning = packed.get("kept"), packed.get("undone"), packed.get("pruning")
        return cls(
            **{
                **known,
                "masks": MaskSet.unpack(packed["masks"]),
                "companions": MaskSet.unpack(packed.get("companions", {})),
                "trained": set(packed.get("trained", packed["masks"])),
                "replaced": set(packed.get("replaced", ())),
                "plan": RoundPlan(**packed["plan"]),
                "history": History(RoundRecord(**record) for record in packed["history"]),
                "kept": kept and KeptRound.unpack(kept),
                "search": Search(**packed["search"]) if packed.get("search") else None,
                "answer": _unpacked_answer(packed.get("answer")),
                "undone": undone and RoundRecord(**undone),
                "pruning": pruning and DecidedPruning.unpack(pruning),
                "stop": _unpacked_answer(packed.get("stop")),
            }
        )

    def next_round(
        self, decision: Decision | DecidedPruning, pqi_after_pruning: float, record: RoundRecord, epoch: int
    ) -> PruningState:
        """The state in which the next round starts, in that epoch, after a pruning; this one stays as it is."""
        return replace(
            self,
            history=History([*self.history, record]),
            masks=decision.masks,
            companions=decision.companions,
            finest=decision.finest,
            round=self.round + 1,
            first_epoch=epoch,
            first_step=self.first_step + self.steps,
            steps=0,
            trained=set(),
            replaced=set(),
            gathered={},
            count=decision.count,
            pqi_after_pruning=pqi_after_pruning,
            answer=None,
            undone=None,
            pruning=None,
            note={},
        )

    def holding(self, history: History) -> PruningState:
        """The state of a run that is over, and only holds its masks."""
        plan = RoundPlan(0, 1)
        of_run: dict[str, Any] = dict.fromkeys(
            ("first_weights", "kept", "search", "answer", "undone", "pruning", "stop")
        )
        return replace(self, plan=plan, history=history, note={}, gathered={}, **of_run)

    def reopen(self) -> set[str | None]:
        """Go on with a round at whose present end training ended once: it gets its record when it ends again.

        Returns: SHA-256 of its file of then, in the place of which it is saved again.
        """
        closed = [record for record in self.history if record.round >= self.round]
        if closed or not self.plan.is_over(
            self.round, self.plan.planned(self.round)
        ):  # the last round has no pruning after it
            self.answer = None
        if closed and (self.history.restored is None or closed[-1].taken_back):
            before = [record for record in self.history if record.round < self.round]
            self.history = History(replace(record, restored=False) for record in before)
            self.note = {"phase": closed[0].phase, "reason": closed[0].reason}  # judged once; saved again
            return {record.sha256 for record in closed}
        return set()

    def prunings_left(self) -> int | None:
        """How many prunings are still to come; None if there is no end to them."""
        return None if self.plan.rounds is None else self.plan.rounds - self.round

    def prunings_lost(self) -> int:
        """How many prunings do not come before the end that is planned."""
        if self.plan.rounds is None or self.plan.end is None:
            return 0
        return self.plan.rounds - self.plan.prunings_before(self.round, self.start, self.plan.end - 1)

    def end_needed(self, now: int | None = None) -> int:
        """The least end of training that all prunings lie before, or the next where there is no end to them.

        Args:
            now: Where training stands, if that is later than where the round would be over by its length.
        """
        left = 1 if self.plan.rounds is None else self.plan.rounds - self.round
        over = max(self.start + self.plan.planned(self.round), now or 0)
        return over + (left - 1) * self.plan.length + 1

    @property
    def start(self) -> int:
        """Where the round started, in what the plan counts."""
        return self.first_epoch if self.plan.unit == "epoch" else self.first_step

    def elapsed(self, epochs: int) -> int:
        """How long the round has lasted, in what the plan counts, once so many epochs of training are completed."""
        return epochs - self.first_epoch if self.plan.unit == "epoch" else self.steps

    def is_due(self, epochs: int) -> bool:
        """Whether the round is over, once so many epochs are completed, and was trained at all."""
        return self.plan.is_over(self.round, self.elapsed(epochs)) and self.steps > 0

    def record(self, before: Measure, last_epoch: int, metrics: dict[str, float]) -> RoundRecord:
        """The record of the round that ends now, as it was trained."""
        return RoundRecord(
            round=self.round,
            first_epoch=self.first_epoch,
            last_epoch=last_epoch,
            remaining=self.masks.remaining,
            layers_remaining={name: n / self.masks.pruned[name].numel() for name, n in self.masks.survivors.items()},
            pqi=before.overall,
            layers_pqi=before.layers,
            lr=None if self.lr is None else float(self.lr),
            metrics=metrics,
            weights=sum(self.masks.survivors.values()),
            first_step=self.first_step,
            last_step=self.first_step + self.steps - 1,
            unit=self.plan.unit,
            run=self.run or None,
            parent=self.parent,
            **self.note,
        )


def _packed_answer(answer: GoOn | Stop | TakeBack | None) -> dict[str, Any] | None:
    return None if answer is None else {**asdict(answer), "kind": type(answer).__name__, "notes": {}}


def _unpacked_answer(packed: Mapping[str, Any] | None) -> Any:
    if packed is None:
        return None
    return ANSWERS[packed["kind"]](**{key: value for key, value in packed.items() if key != "kind"})
