"""Which weights of a module a run prunes: those that an optimizer holds and that get gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_sap.callbacks.pruning import agreement, averages, checks, messages, units
from lightning_sap.callbacks.pruning.inventory import others_of
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.callbacks.training import NO_OPTIMIZER, Training
from lightning_sap.engine.unit_groups import UnitGroup
from lightning_sap.engine.weights import PrunableWeight, left_out, parameter_names, prunable_weights
from lightning_sap.sharding import local

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.session import PruningSession


class Gradients:
    """Notes which parameters get a gradient, until all of them have had one.

    Example:
        >>> import torch
        >>> net, seen = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), set()
        >>> gradients = Gradients(dict(net.named_parameters()))
        >>> net[1](torch.ones(2)).sum().backward()
        >>> gradients.note(seen)
        >>> seen
        {'1.weight'}
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter] | None = None) -> None:
        named = (parameters or {}).items()
        self._all = {n: p for n, p in named if isinstance(p, nn.UninitializedParameter) or p.dim() > 1}
        self._waiting = dict(self._all)

    def watch(self, seen: Iterable[str]) -> None:
        """Wait for the gradients of all but these."""
        before = set(seen)
        self._waiting = {name: parameter for name, parameter in self._all.items() if name not in before}

    def note(self, seen: set[str]) -> None:
        """Add the names of those that have a gradient now."""
        found = [name for name, parameter in self._waiting.items() if _has_gradient(parameter)]
        seen.update(found)
        for name in found:
            del self._waiting[name]


def _has_gradient(parameter: nn.Parameter) -> bool:
    """Whether it has one; zeros that ``zero_grad(set_to_none=False)`` left in a frozen one are none."""
    gradient = parameter.grad
    if gradient is None or parameter.requires_grad or gradient.is_sparse:
        return gradient is not None
    return bool(local(gradient).any())


@dataclass
class Subject:
    """The live parameters that a run is about, as they were seen last; neither copied nor pickled.

    Attributes:
        parameters: All parameters of the module by name.
        gradients: What notes their gradients.
        training: What the optimizers hold of them.
        outside: By name the sizes of the weights that no optimizer holds.
        copies: Averages of prunable weights, and the name of the weight whose mask each shares.
        keepers: What gives averages by the names of what they average.
        warned: Names of weights that were warned of.
        groups: For ``structure="unit"`` the units that go together.
        looked: The round in whose first step gradients were looked at.
        still: Frozen parameters that were left out of the copies to go back to.
    """

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    gradients: Gradients = field(default_factory=Gradients)
    training: Training = field(default_factory=Training)
    outside: dict[str, int] = field(default_factory=dict)
    copies: list[tuple[Tensor, str]] = field(default_factory=list)
    keepers: list[Any] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)
    groups: list[UnitGroup] = field(default_factory=list)
    looked: int = 0
    still: dict[str, nn.Parameter] = field(default_factory=dict)

    def see(self, parameters: dict[str, nn.Parameter], seen: Iterable[str]) -> None:
        """Take these for the parameters of the module; some had a gradient in this round."""
        self.parameters, self.gradients = parameters, Gradients(parameters)
        self.gradients.watch(seen)
        self.still = {name: p for name, p in self.still.items() if parameters.get(name) is p}


def of_kind(options: Options, module: nn.Module) -> dict[str, PrunableWeight]:
    """What can be pruned by its name, kind and shape, trained or not, averages too, in the module's order."""
    checks.check_torch_pruning(module)
    found = prunable_weights(module, options.include, options.exclude, may_be_none=True, untrained=lambda _: None)
    if options.pattern is not None:
        found = {name: weight for name, weight in found.items() if options.pattern.fits(weight)}
    return {name: found[name] for name in parameter_names(module) if name in found}


def candidates(options: Options, module: nn.Module, training: Training) -> dict[str, PrunableWeight]:
    """What can be pruned if it is trained, in the module's order."""
    return {n: w for n, w in of_kind(options, module).items() if id(w.parameter) not in training.averages}


def select(options: Options, module: nn.Module, trainer: Trainer | None) -> tuple[dict[str, PrunableWeight], Subject]:
    """The weights that are prunable when a fit starts: all that may be trained."""
    return select_of(options, module, Training.of(trainer, module), couples=trainer is not None)


def select_of(
    options: Options, module: nn.Module, training: Training, *, couples: bool
) -> tuple[dict[str, PrunableWeight], Subject]:
    """The weights that are prunable in this training; where asked for, with the units that go together."""
    parameters = parameter_names(module)
    lazy = [name for name, parameter in parameters.items() if isinstance(parameter, nn.UninitializedParameter)]
    if couples:
        checks.check_lazy(options, lazy)
    every, untrained = candidates(options, module, training), training.untrained
    prunable = prunable_weights(module, options.include, options.exclude, may_be_none=bool(lazy), untrained=untrained)
    found = {name: weight for name, weight in every.items() if name in prunable}
    if prunable:
        checks.check_pattern(options, prunable, found)
    checks.check_sharding(options, found)
    outside = {n: w.parameter.numel() for n, w in every.items() if training.untrained(w.parameter) == NO_OPTIMIZER}
    messages.warn_of_left_out(options, left_out(module, options.include, options.exclude, training.untrained))
    groups = units.couple(options, module, found) if couples else []
    return found, Subject(parameters, Gradients(parameters), training, outside, groups=groups)


def settle_(session: PruningSession, trainer: Trainer, module: LightningModule) -> None:
    """Settle at the end of a round what was trained in it; a collective.

    What has had its first gradient joins, dense. What has had none since training began is left out until it has one.
    """
    state, subject, before = session.state, session.subject, session.weights
    subject.training = Training.of(trainer, module)
    every = {**candidates(session.options, module, subject.training), **before}
    state.trained = agreement.union(trainer, _trained(session, every)) - state.replaced
    joined = [name for name in every if name in state.trained and name not in before and state.prunings_left() != 0]
    left = []
    if state.round == 0 and state.plan.rounds != 0 and state.trained & before.keys():
        kept = state.masks.survivors
        known = before.keys() - state.trained - state.replaced
        left = [name for name in before if name in known and kept[name] == before[name].parameter.numel()]
    if joined or left:
        chosen = (before.keys() | set(joined)) - set(left)
        session.weights = {name: every[name] for name in subject.parameters if name in chosen}
        checks.check_sharding(session.options, session.weights)
        state.masks = state.masks.matched(session.live())
        state.others = others_of(session, [*state.masks.pruned, *left])
        if state.kept is not None:
            state.kept = replace(state.kept, masks=state.kept.masks.matched(session.live()))
        messages.tell_settled(
            session.options, *({n: every[n].parameter.numel() for n in some} for some in (joined, left))
        )
    averages.follow_(session, trainer, module, every)


def _trained(session: PruningSession, every: Mapping[str, PrunableWeight]) -> set[str]:
    """Those that had a gradient, and that an optimizer holds; where that cannot be told, those that are not frozen."""
    training, seen = session.subject.training, session.state.trained
    free = {name for name, weight in every.items() if training.untrained(weight.parameter) is None}
    if training.held is None:
        return free
    found = {name for name in seen if name in every and training.holds(every[name].parameter)}
    for ids in training.unheard:
        names = {name for name, parameter in session.subject.parameters.items() if id(parameter) in ids}
        if not names & seen:  # its steps, and so its gradients, were missed
            found |= names & free
    return found
