"""The plan of a run, parameter by parameter: what is pruned, and what is left out and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import nan, prod
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_sap.callbacks.logging import log_line
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.callbacks.training import Training
from lightning_sap.engine.groups import PrunableTensor
from lightning_sap.engine.used import effective_weights
from lightning_sap.engine.weights import PrunableWeight, parameter_names, verdicts_of
from lightning_sap.files import replacing
from lightning_sap.sharding import is_sharded

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.held import HeldWeights
    from lightning_sap.callbacks.pruning.session import PruningSession

UNTRAINED = "it had no gradient yet"


@dataclass(frozen=True)
class PlanRow:
    """What becomes of a parameter.

    Attributes:
        name: Its name.
        shape: Its shape; empty where it has none yet.
        weights: How many numbers it holds.
        kept: How many of them are kept.
        pruned: Whether it is pruned.
        trained: Whether it is trained.
        how: What forms a group in it, or why it is left out.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    kept: int
    pruned: bool
    trained: bool
    how: str


@dataclass(frozen=True)
class Plan:
    """What a run prunes of a module, and what it leaves out and why; ``str`` gives it as text.

    Attributes:
        rows: A row for each parameter, in the module's order.
        effective: Fraction of the weights that its layers computed the example with that is not zero, once training is
            over: ``example_input_array`` of the module, or ``example_inputs``; None where there is no example.
        undecided: Whether the policy prunes before training, and the fit that decides it has not begun.
    """

    rows: tuple[PlanRow, ...]
    effective: float | None = None
    undecided: bool = False

    @property
    def prunable(self) -> int:
        """Number of weights that are prunable."""
        return sum(row.weights for row in self.rows if row.pruned)

    @property
    def trained(self) -> int:
        """Number of all weights that are trained, prunable or not: matrices, biases, norms, embeddings."""
        return sum(row.weights for row in self.rows if row.trained)

    @property
    def remaining(self) -> float:
        """Fraction of the prunable weights that is kept; NaN where that is undecided."""
        return nan if self.undecided else _share(sum(row.kept for row in self.rows if row.pruned), self.prunable)

    @property
    def remaining_of_trained(self) -> float:
        """Fraction of all trained weights that is kept; NaN where that is undecided."""
        return nan if self.undecided else _share(sum(row.kept for row in self.rows if row.trained), self.trained)

    @property
    def head(self) -> str:
        """Both shares in one line, and what layers compute an example with."""
        used = (
            ""
            if self.effective is None
            else f"; of what layers compute the example with, {self.effective:.1%} is not 0"
        )
        of_prunable, of_trained, later = (
            ("", "", "; how many of them training starts with is decided when fit begins")
            if self.undecided
            else (f" ({self.remaining:.1%} remain)", f" ({self.remaining_of_trained:.1%} remain)", "")
        )
        return (
            f"{self.prunable:,} weights are prunable{of_prunable}, {_share(self.prunable, self.trained):.1%} of the "
            f"{self.trained:,} that are trained{of_trained}{used}{later}"
        )

    @property
    def largest_left_out(self) -> list[PlanRow]:
        """The three largest trained parameters of two or more axes that are left out."""
        left = [row for row in self.rows if row.trained and not row.pruned and len(row.shape) > 1]
        return sorted(left, key=lambda row: -row.weights)[:3]

    def markdown(self) -> str:
        """The head line and a table with a row for each parameter."""
        lines = ["| parameter | shape | weights | remain | plan |", "| --- | --- | --- | --- | --- |"]
        for row in self.rows:
            shape, remain = " × ".join(map(str, row.shape)), f"{_share(row.kept, row.weights):.2%}"
            remain = remain if row.pruned and not self.undecided else "–"
            cells = [f"`{row.name}`", shape, f"{row.weights:,}", remain, _plan(row)]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return "\n".join([f"{self.head}.", "", *lines, ""])

    def __str__(self) -> str:
        wide = max((len(row.name) for row in self.rows), default=0)
        return "\n".join([self.head, *(f"  {row.name:<{wide}}  {row.weights:>12,}  {_plan(row)}" for row in self.rows)])


def plan_of(session: HeldWeights, module: nn.Module, training: Training) -> Plan:
    """The plan of a module as it is now, and as it is trained."""
    options, masks, parameters = session.options, session.state.masks, parameter_names(module)
    verdicts = verdicts_of(module, options.include, options.exclude, training.untrained)
    reasons = {**dict.fromkeys(verdicts.found, UNTRAINED), **verdicts.others, **verdicts.refused}
    pattern = options.pattern
    misfits = [] if pattern is None else [name for name, weight in verdicts.found.items() if not pattern.fits(weight)]
    reasons |= dict.fromkeys(misfits, f"structure={options.structure!r} does not fit it")
    weights = session.weights or {name: w for name, w in verdicts.found.items() if name not in misfits}
    rows = []
    for name, parameter in parameters.items():
        lazy = isinstance(parameter, nn.UninitializedParameter)
        size, pruned = 0 if lazy else parameter.numel(), name in weights
        kept = masks.survivors.get(name, size) if pruned else size
        how = _groups(options, weights[name]) if pruned else reasons.get(name, UNTRAINED)
        is_trained = pruned or training.untrained(parameter) is None
        rows.append(PlanRow(name, () if lazy else tuple(parameter.shape), size, kept, pruned, is_trained, how))
    return Plan(tuple(rows))


def others_of(session: HeldWeights, names: Iterable[str]) -> int:
    """Number of the weights that are trained and are none of these parameters."""
    subject, names = session.subject, set(names)
    return sum(
        parameter.numel()
        for name, parameter in subject.parameters.items()
        if name not in names
        and not isinstance(parameter, nn.UninitializedParameter)
        and subject.training.untrained(parameter) is None
    )


def tell(session: PruningSession, trainer: Trainer, module: nn.Module, *, is_over: bool = False) -> Plan:
    """Make the plan anew, and write it where the logger writes; a collective.

    A file that cannot be written is warned of. When training is over, the share of all trained weights is said where
    less than half of them are prunable: the share of the prunable alone would mislead.
    """
    plan = plan_of(session, module, Training.of(trainer, module))
    if is_over:
        plan = replace(plan, effective=_effective(session, module))
    session.inventory = plan
    if is_over and 2 * plan.prunable < plan.trained:
        log_line(f"{session.options.name}: {plan.head}.")
    folder = trainer.log_dir
    if not trainer.loggers or trainer.fast_dev_run or not folder or "://" in folder:  # type: ignore[attr-defined]
        return plan
    if trainer.is_global_zero:
        path = Path(folder) / f"{session.options.name}-plan.md"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(f"# The plan of {session.options.name}\n\n{plan.markdown()}".encode())
        except OSError as error:
            rank_zero_warn(f"{session.options.name}: the plan is not written: {error}. Training goes on without it.")
    return plan


def _effective(session: PruningSession, module: nn.Module) -> float | None:
    """The fraction that is not zero of what layers compute the example with; None where that cannot be measured."""
    given = session.options.example_inputs
    example = getattr(module, "example_input_array", None) if given is None else given
    if example is None or any(map(is_sharded, module.parameters())):
        return None
    try:
        return effective_weights(module, example).remaining
    except Exception as error:  # training is over, and a forward may fail in any way
        log_line(f"{session.options.name}: what layers compute the example with was not measured: {error}")
        return None


def _groups(options: Options, weight: PrunableWeight) -> str:
    """What forms a group in a weight, in words."""
    tensor = PrunableTensor(weight.parameter.detach(), None, weight.units, layout=weight.layout)
    number = prod(weight.parameter.shape[: weight.layout.stack])
    if options.pattern is not None:
        kept = options.pattern
        found = f"{kept.kept} of every {kept.of} weights along the inputs are kept"
    elif options.structure == "unit":
        found = "whole output units"
    elif options.group == "global":
        found = "in one group with all others"
    elif not tensor.is_apart(options.group):
        found = "a group"
    else:
        found = (
            f"a group for each of its {number} matrices" if options.group == "layer" else "a group for each output unit"
        )
    if weight.normalised is not None:
        found += "; what is divided by a norm keeps a weight"
    return found


def _plan(row: PlanRow) -> str:
    return f"pruned: {row.how}" if row.pruned else f"left out: {row.how}"


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
