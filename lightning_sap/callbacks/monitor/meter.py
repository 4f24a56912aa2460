"""What is watched in a Trainer, and its values at a moment."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sap.callbacks.training import Training
from lightning_sap.engine.groups import PrunableTensor, dense_tensors
from lightning_sap.engine.measure import Measure, check_finite, summary, sums_of
from lightning_sap.engine.selection import check_patterns
from lightning_sap.functional.pqi import check_orders, gini_index
from lightning_sap.functional.scalars import as_plain
from lightning_sap.rounds.phases import Layers
from lightning_sap.rounds.protocol import PrunerView
from lightning_sap.sharding import check_placements, is_sharded

Moment: TypeAlias = tuple[tuple[int, ...], tuple[tuple[str, tuple[int, ...]], ...]]  # rounds, and what is watched


class IndexMeter:
    """Measures what the pruners of a Trainer prune; without one, what a pruner would prune by default."""

    def __init__(
        self, p: float | None, q: float | None, *, gini: bool, log_layers: bool | Sequence[str], name: str
    ) -> None:
        if (p is None) != (q is None):
            raise ValueError(f"Give both p and q, or neither to measure by the pruner's; got p={p}, q={q}.")
        if p is not None and q is not None:
            check_orders(p, q)
        self.p, self.q = as_plain(p), as_plain(q)
        self.gini = gini
        self.log_layers = [log_layers] if isinstance(log_layers, str) else log_layers
        self.name = name
        self._latest: tuple[Moment, Measure, float | None] | None = None  # when and of which, and what was measured
        self._masks: list[torch.Tensor | None] = []  # those that it was measured under

    def forget(self) -> None:
        """Let go of what was measured: weights may have changed since."""
        self._latest = None

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Raise for what cannot be measured."""
        tensors = self.tensors(trainer, module)
        if self.gini and any(is_sharded(piece.weight) for piece in tensors.values()):
            raise ValueError("PQIMonitor(gini=True) needs whole weights, and these are sharded; give gini=False.")
        check_placements({name: piece.weight for name, piece in tensors.items()})
        if not isinstance(self.log_layers, bool):
            check_patterns(self.log_layers, list(tensors))

    def check_ending(self, *, stopped: bool) -> None:
        """Raise if the weights measured last are not finite; warn if something else stopped the training."""
        try:
            if self._latest is not None:
                check_finite(self._latest[1])
        except ValueError:
            if not stopped:
                raise
            rank_zero_warn("Training was stopped with weights that are not finite.")

    def tensors(self, trainer: Trainer, module: LightningModule) -> dict[str, PrunableTensor]:
        """The weights that are watched, live, with their masks."""
        pruned = [pruner.tensors(module) for pruner in pruners(trainer)]
        return {name: piece for part in pruned for name, piece in part.items()} or dense_tensors(
            module, Training.of(trainer, module).untrained
        )

    def layers(self, trainer: Trainer, module: LightningModule) -> list[str]:
        """The parameters that are logged one by one."""
        names, wanted = list(self.tensors(trainer, module)), self.log_layers
        if isinstance(wanted, bool):
            return names if wanted else []
        return [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]

    def measure(self, trainer: Trainer, module: LightningModule) -> Measure:
        """Indices of the weights as they are, measured once until it is told to forget, or others are watched."""
        tensors = self.tensors(trainer, module)
        shapes = tuple((name, tuple(tensor.weight.shape)) for name, tensor in tensors.items())
        moment = (tuple(pruner.current_round() for pruner in pruners(trainer)), shapes)
        masks = [tensor.pruned for tensor in tensors.values()]
        if self._latest is None or self._latest[0] != moment or any(map(operator.is_not, self._masks, masks)):
            orders = self._orders(trainer)
            gini = _gini(tensors) if self.gini else None
            self._masks = masks
            self._latest = (moment, summary(sums_of(tensors, *orders), *orders), gini)
        return self._latest[1]

    def evidence(
        self, trainer: Trainer, module: LightningModule, metric: float | None
    ) -> tuple[float, Layers, float | None]:
        """What is known of the round that ends now; on all ranks what rank 0 knows, a collective."""
        measure = self.measure(trainer, module)
        layers = {name: (index, measure.survivors[name]) for name, index in measure.layers.items()}
        return trainer.strategy.broadcast((measure.overall, layers, metric))

    def values(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """What is logged of the weights, by key."""
        measure, tensors = self.measure(trainer, module), self.tensors(trainer, module)
        values = {f"{self.name}/global": measure.overall, f"{self.name}/layer_mean": measure.layer_mean}
        match pruners(trainer):  # of several, or in other orders, none was taken
            case [only] if only.orders() == self._orders(trainer) and (after := only.pqi_after_pruning()) is not None:
                values[f"{self.name}/global_pruned"] = after
        if self._latest is not None and self._latest[2] is not None:
            values["gini/global"] = self._latest[2]
        for name in self.layers(trainer, module):
            values[f"{self.name}/{name}"] = measure.layers[name]
            values[f"remaining/{name}"] = measure.survivors[name] / tensors[name].weight.numel()
        return values

    def _orders(self, trainer: Trainer) -> tuple[float, float]:
        p, q = next((pruner.orders() for pruner in pruners(trainer)), (0.5, 1.0))
        return (p, q) if self.p is None or self.q is None else (self.p, self.q)


def _gini(tensors: dict[str, PrunableTensor]) -> float:
    """Gini index of the weights that survive, as one vector."""
    kept = [p.weight.flatten() if p.pruned is None else p.weight[~p.pruned] for p in tensors.values()]
    return float(gini_index(torch.cat(kept)))


def pruners(trainer: Trainer) -> list[PrunerView]:
    """The Trainer's callbacks that prune or hold masks."""
    return [callback for callback in trainer.callbacks if isinstance(callback, PrunerView)]  # type: ignore[attr-defined]


def leader(trainer: Trainer) -> PrunerView | None:
    """The one whose rounds count: of several that prune, the first."""
    return next((pruner for pruner in pruners(trainer) if pruner.prunes()), None)


def ends_closed(pruner: PrunerView, trainer: Trainer) -> bool:
    """Whether the round ends with this epoch and nothing is open in it: only such rounds are judged."""
    return not pruner.opened() and pruner.ends_round(trainer)
