"""Scores of what training shows: what is taken in the last part of each round, and what it says of a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sap.policies.base import Importance

MOST_CLASSES = 1 << 16
LEAST_WITHIN = 1e-6  # share of a unit's variance that counts as within the classes, so that no ratio is infinite
ROUNDING = 1e-10  # share of its mean square below which the variance of a unit is none


class Gathered(Importance):
    """A score of what training shows; only a :class:`PruningCallback` can take it.

    It is taken in the last epoch of each round, of rounds in steps in the last fifth of their steps.
    """

    def scores(self, name: str, weight: Tensor) -> Tensor:  # noqa: ARG002 (there are none)
        """None can be had of the weight alone.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{self!r} scores {name!r} by what is gathered while it is trained, and nothing was gathered here. Give it "
            "to PruningCallback(importance=...), or use importance='magnitude'."
        )


@dataclass(frozen=True)
class Taylor(Gathered):
    r"""How much the loss would change without a weight, to first order.

    .. math:: s = \frac{1}{T} \sum_{t=1}^{T} \left| w_t \cdot \frac{\partial L_t}{\partial w_t} \right|

    The sum is over the optimizer steps of the round's last epoch, of rounds in steps over the last fifth of them. The
    gradient is the one that the step uses: of all accumulated batches, the mean over all ranks, without the factor of
    a gradient scaler, and after clipping. A step that a gradient scaler skips does not count.

    Source: Molchanov et al., *Importance Estimation for Neural Network Pruning*, CVPR 2019.

    Example:
        >>> Taylor().term(torch.tensor([2.0, -3.0]), torch.tensor([0.5, 0.0]))
        tensor([1., 0.])
    """

    def term(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """What one step adds to the sum; weight, gradient and result have one shape, in float32 or float64."""
        return (weight * gradient).abs()

    def score(self, gathered: Mapping[str, Tensor]) -> Tensor:
        """The mean over the steps."""
        return gathered["sum"] / int(gathered["count"])


@dataclass(frozen=True)
class Wanda(Gathered):
    r"""The magnitude of a weight times the size of what it is multiplied by.

    .. math:: s_{ij} = |w_{ij}| \cdot \lVert x_j \rVert_2

    The norm is over all inputs of a layer in the round's last epoch, of rounds in steps in the last fifth of them: all
    samples, all tokens of a sequence, all positions of an image. A convolution has one norm for each input channel. An
    input counts once where a gradient flows back through the layer: not in validation, under ``torch.no_grad``, or in
    the second forward of gradient checkpointing.

    It can be had of Linear and Conv layers, ``ConvTranspose`` and transformers' ``Conv1D``.

    Source: Sun et al., *A Simple and Effective Pruning Approach for Large Language Models*, ICLR 2024.

    Example:
        >>> Wanda().score_of(torch.tensor([[1.0, -3.0]]), torch.tensor([[10.0, 1.0]]))
        tensor([[10.,  3.]])
    """

    def score_of(self, weight: Tensor, norms: Tensor) -> Tensor:
        """The scores of weights, and the norms of what they are multiplied by, in a shape that broadcasts to theirs."""
        return weight.abs() * norms


@dataclass(frozen=True)
class FisherRatio(Gathered):
    r"""How well a unit alone tells the classes apart; for ``structure="unit"``.

    .. math:: s = \frac{\sum_c n_c (\mu_c - \mu)^2}{\sum_c \sum_{i \in c} (x_i - \mu_c)^2}

    where ``x_i`` is the unit's activation for sample i: what the next layer reads of it, behind norm, nonlinearity and
    pooling, and the mean over positions where there are several. The samples are those of the round's last epoch, of
    rounds in steps of their last fifth. Where several layers read a unit, their ratios are added. The variance within
    the classes counts as a millionth of the unit's variance at least.

    Args:
        labels: Where the class of each sample is in a batch: an index or a key (by default the second entry), or a
            function of the batch. Whole numbers of at least 0; samples with a negative one are passed over.

    Source: Tian et al., *Deep LDA-Pruned Nets for Efficient Facial Gender Classification*, 2017, and *Grow-Push-Prune*,
    2021, without their deconvolution and push loss.

    Example:
        >>> FisherRatio().labels_of((torch.zeros(2, 3), torch.tensor([4, 1])))
        tensor([4, 1])
    """

    labels: int | str | Callable[[Any], Tensor] = 1

    def __post_init__(self) -> None:
        """Check the kind of the argument."""
        if isinstance(self.labels, bool) or not (isinstance(self.labels, int | str) or callable(self.labels)):
            raise TypeError(
                f"labels must say where the classes are in a batch: an index, a key, or a function of the batch; got "
                f"{self.labels!r}."
            )

    def labels_of(self, batch: Any) -> Tensor:
        """The classes of a batch.

        Raises:
            ValueError: If they are not there, or no classes.
        """
        how = f"FisherRatio(labels={self.labels!r})"
        try:
            found = self.labels(batch) if callable(self.labels) else batch[self.labels]
        except (LookupError, TypeError) as error:
            raise ValueError(
                f"{how} found no classes in a batch of type {type(batch).__name__} ({type(error).__name__}: {error}). "
                "Give the index or the key of the classes in the batch, or a function of it."
            ) from error
        whole = isinstance(found, Tensor) and not (found.is_floating_point() or found.is_complex())
        if not whole or found.dim() != 1 or (found.numel() and int(found.max()) >= MOST_CLASSES):
            got = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
            raise ValueError(
                f"{how} must give one class for each sample: a tensor of whole numbers below {MOST_CLASSES} of shape "
                f"(samples,), got {got}. Give a function of the batch, such as lambda batch: batch[1].argmax(1)."
            )
        return found.detach().long()

    def ratio(self, gathered: Mapping[str, Tensor]) -> Tensor:
        """The ratio of each unit.

        Args:
            gathered: ``count``: the samples of each class; ``sum``: of each class and unit the sum of the activations;
                ``square``: of each unit the sum of their squares.

        Example:
            >>> classes = torch.tensor([0, 0, 1, 1])
            >>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0], [10.0, 1.0], [12.0, 3.0]])
            >>> sums = torch.stack([x[classes == c].sum(0) for c in (0, 1)])
            >>> FisherRatio().ratio({"count": torch.tensor([2, 2]), "sum": sums, "square": x.square().sum(0)})
            tensor([25.,  0.])
        """
        count, sums = gathered["count"].to(gathered["sum"].dtype), gathered["sum"]
        of_classes = (sums.square() / count.clamp(min=1).unsqueeze(1)).sum(0)
        of_all = sums.sum(0).square() / count.sum().clamp(min=1)
        between, within = (of_classes - of_all).clamp(min=0), (gathered["square"] - of_classes).clamp(min=0)
        total = between + within
        varies = total > ROUNDING * gathered["square"]
        return torch.where(varies, between / torch.maximum(within, LEAST_WITHIN * total), torch.zeros_like(total))

    def of_units(self, rows: Tensor) -> Tensor:
        """The score of a unit is that of each of its weights."""
        return rows.abs().amax(1)


def needs_units(importance: object) -> bool:
    """Whether it scores whole units only."""
    return isinstance(importance, FisherRatio)
