"""Averages that are no modules, given by a method ``averaged_weights`` of whoever keeps them.

As diffusers' ``EMAModel``, which keeps a list of tensors. The method returns them by the names of the parameters that
they average; it is asked whenever weights are masked, since such lists are made anew at each update.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.held import HeldWeights

HOOK = "averaged_weights"


def keepers(module: nn.Module, others: Iterable[object] = ()) -> list[Any]:
    """The parts of a module, and the other objects, that have the method."""
    return [each for each in (*module.modules(), *others) if callable(getattr(each, HOOK, None))]


def averaged(session: HeldWeights) -> Iterator[tuple[str, Tensor]]:
    """The averages of weights that can be pruned: the name of the weight, and the tensor.

    Raises:
        ValueError: If one is of no parameter, or of another shape.
        TypeError: If the method returns something else.
    """
    parameters = session.subject.parameters
    for keeper in session.subject.keepers:
        of = f"{type(keeper).__name__}.{HOOK}()"
        found = getattr(keeper, HOOK)()
        if not isinstance(found, Mapping):
            raise TypeError(f"{of} must return a mapping from names of parameters to tensors, got {found!r}.")
        for name, tensor in found.items():
            if name not in parameters:
                closest = difflib.get_close_matches(str(name), list(parameters), n=3, cutoff=0.0)
                raise ValueError(
                    f"{of} names {name!r}, which is no parameter of the module; the closest are {closest}."
                )
            if not isinstance(tensor, Tensor) or tensor.shape != parameters[name].shape:
                got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                shape = tuple(parameters[name].shape)
                raise ValueError(f"{of} must give a tensor of shape {shape} for {name!r}, got {got}.")
            yield name, tensor
