"""What :class:`FisherRatio` is made of: what the next layers read of each unit, by class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_sap.callbacks.pruning.gatherers import (
    AfterLayer,
    Gatherer,
    Shapes,
    Sums,
    add_,
    finite,
    hook_gradient,
    input_of,
    over_ranks,
    wide,
    within,
)
from lightning_sap.engine.inputs import channels_last, sum_type
from lightning_sap.engine.unit_groups import Place, UnitGroup
from lightning_sap.engine.weights import COMPILE_PREFIX, PrunableWeight
from lightning_sap.policies.gathered import FisherRatio
from lightning_sap.rewind import hook_steps

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.session import PruningSession


@dataclass(frozen=True)
class Reading:
    """A layer that reads the units of a group, and where."""

    group: UnitGroup
    place: Place
    layer: nn.Module

    def activations(self, x: Tensor) -> Tensor:
        """Of each sample and unit what the layer reads, the mean over positions: ``(samples, units)``."""
        rows = wide(channels_last(self.layer, x.detach()))
        rows = rows.reshape(len(rows), -1, rows.shape[-1]).mean(1)[:, self.place.indices.to(x.device)]
        units, size = self.place.units.to(x.device), self.group.size
        return rows.new_zeros(len(rows), size).index_add(1, units, rows) / units.bincount(minlength=size)


class OfUnits(Gatherer[FisherRatio]):
    """For each layer that reads units, by class the sums of what it reads, and for all classes of the squares."""

    def __init__(self, importance: FisherRatio) -> None:
        super().__init__(importance)
        self._seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._classes = 0  # of the batches since the last step
        self._known: tuple[object, dict[str, Reading]] = (None, {})

    def _readings(self, session: PruningSession, module: nn.Module) -> dict[str, Reading]:
        groups = session.subject.groups
        if self._known[0] is not groups:
            layers = {name.replace(COMPILE_PREFIX, ""): layer for name, layer in module.named_modules()}
            found = {
                f"{i} {place.name}": Reading(group, place, layers[place.name.rpartition(".")[0]])
                for i, group in enumerate(groups)
                for place in group.columns
            }
            self._known = groups, found
        return self._known[1]

    def missing(self, session: PruningSession, module: nn.Module) -> dict[str, str]:
        read = {id(reading.group) for reading in self._readings(session, module).values()}
        unread = [group for group in session.subject.groups if id(group) not in read]
        return {name: "no layer is known to read its units" for group in unread for name in group.names}

    def check_batch(self, batch: Any) -> None:
        self.importance.labels_of(batch)

    def shapes(
        self, session: PruningSession, module: nn.Module, weights: Mapping[str, PrunableWeight]
    ) -> dict[str, Shapes]:
        sizes = {key: reading.group.size for key, reading in self._readings(session, module).items()}
        return {key: {"count": (None,), "sum": (None, n), "square": (n,)} for key, n in sizes.items()}

    def watch(
        self, session: PruningSession, trainer: Trainer, module: LightningModule, batch: Any
    ) -> Iterator[RemovableHandle]:
        labels = self.importance.labels_of(batch)
        self._classes = max(self._classes, int(labels.max()) + 1 if len(labels) else 0)
        for key, reading in self._readings(session, module).items():
            see = within(trainer, module, partial(self._see, key, reading, labels))
            yield reading.layer.register_forward_hook(AfterLayer(see), with_kwargs=True)
        keep = within(trainer, module, lambda _: self._keep(session, trainer, module))
        yield from hook_steps(trainer.optimizers, keep)

    def _see(
        self, key: str, reading: Reading, labels: Tensor, _: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        x = input_of(args, kwargs)
        if x is None or not isinstance(output, Tensor) or not output.requires_grad:
            return
        if len(x) != len(labels):
            raise ValueError(
                f"{self.importance!r}: the layer of {reading.place.name!r} reads an input of shape {tuple(x.shape)}, "
                f"and the batch has {len(labels)} classes. Its first axis must be that of the samples: give a function "
                "as `labels` that returns one class for each entry of it, or another importance."
            )
        seen = labels.to(x.device), reading.activations(x)
        hook_gradient(output, lambda: self._seen.setdefault(key, []).append(seen))

    def _keep(self, session: PruningSession, trainer: Trainer, module: nn.Module) -> None:
        """After a step: add up what all ranks saw before it."""
        seen, own, self._seen, self._classes = self._seen, self._classes, {}, 0
        readings, gathered = self._readings(session, module), session.state.gathered
        known = (len(gathered[key]["count"]) for key in readings if key in gathered)
        classes = max(1, _largest(trainer, max([own, *known])))
        like = next(iter(session.weights.values())).parameter
        tables = []
        for key, reading in readings.items():
            table = torch.zeros(classes + 1, reading.group.size + 1, dtype=sum_type(like), device=like.device)
            for labels, rows in seen.get(key, ()):
                _count_(table, labels.to(table.device), rows.to(table))
            tables.append(finite(table))
        for key, table in zip(readings, over_ranks(trainer, tables), strict=True):
            if key in gathered:
                gathered[key] = _padded(gathered[key], classes)
            sums, squares = table[:-1, :-1].clone(), table[-1, :-1].clone()
            add_(gathered, key, {"count": table[:-1, -1].long(), "sum": sums, "square": squares})

    def scores(self, session: PruningSession, module: nn.Module, sums: Mapping[str, Sums]) -> dict[str, Tensor]:
        """Each of a unit's layers has its share of the unit's ratio; units that cannot go have none, and score 0."""
        ratios: dict[int, Tensor] = {}
        for key, reading in self._readings(session, module).items():
            if key in sums:
                group, ratio = id(reading.group), self.importance.ratio(sums[key]).double().cpu()
                ratios[group] = ratios[group] + ratio if group in ratios else ratio
        found = {}
        for name, weight in session.weights.items():
            groups = [group for group in session.subject.groups if name in group.names]
            if all(id(group) in ratios for group in groups):
                found[name] = _of_rows(name, weight.parameter.detach(), groups, ratios)
        return found


def _of_rows(name: str, weight: Tensor, groups: list[UnitGroup], ratios: Mapping[int, Tensor]) -> Tensor:
    """The scores of a weight, whose rows belong to units: the same for all weights of a row."""
    places = [(group, place) for group in groups for place in group.rows if place.name == name]
    axis = places[0][1].axis if places else 0
    rows = torch.zeros(weight.shape[axis], dtype=torch.float64)
    for group, place in places:
        rows[place.indices] += ratios[id(group)][place.units] / len(group.rows)
    shape = [-1 if i == axis else 1 for i in range(weight.dim())]
    return rows.to(sum_type(weight)).to(weight.device).view(shape).expand(weight.shape)


def _count_(table: Tensor, labels: Tensor, rows: Tensor) -> None:
    """Add samples to a table: a row for each class and one for the squares, a column for each unit and one to count.

    Samples of no class count as zeros, for to leave them out a GPU would have to be waited for.
    """
    known = labels >= 0
    rows, labels = torch.where(known.unsqueeze(1), rows, 0.0), labels.clamp(min=0)
    table[:-1, :-1].index_add_(0, labels, rows)
    table[:-1, -1].index_add_(0, labels, known.to(table))
    table[-1, :-1] += rows.square().sum(0)


def _padded(sums: Sums, classes: int) -> Sums:
    """Sums with a row for each of so many classes."""
    lacking = classes - len(sums["count"])
    of_classes = {key: sums[key] for key in ("count", "sum")}
    return {**sums, **{k: torch.cat([t, t.new_zeros(lacking, *t.shape[1:])]) for k, t in of_classes.items()}}


def _largest(trainer: Trainer, number: int) -> int:
    """The largest of the numbers of all ranks; a collective."""
    if trainer.world_size == 1:
        return number
    sent = torch.tensor(number, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(sent, reduce_op="max"))
