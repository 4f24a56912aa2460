"""SAPCallback: the paper's algorithm."""

from __future__ import annotations

from pathlib import Path

from lightning_sap.callbacks.pruning.callback import PruningCallback
from lightning_sap.callbacks.pruning.options import RewindWeights, Schedule
from lightning_sap.engine.groups import Scope
from lightning_sap.engine.weights import Selection
from lightning_sap.policies.amounts import SparsityInformed


class SAPCallback(PruningCallback):
    r"""Sparsity-informed Adaptive Pruning: prune as far as the PQ Index of the trained weights says.

    .. math:: c = \max(0, \min(\lfloor \gamma\,(d - \lceil r \rceil) \rfloor, \lfloor \beta d \rfloor)), \quad
              r = d\,(1 + \eta_r)^{-\frac{q}{q-p}}\,(1 - I)^{\frac{pq}{q-p}}

    It is :class:`PruningCallback` with the policy ``SparsityInformed(p, q, eta_r, gamma, beta)``; all other options
    are described there.

    Args:
        p: Order of the smaller norm of the index, ``0 < p < q``.
        q: Order of the larger norm.
        eta_r: Slack in the bound on how many weights to keep, at least 0: the larger, the more is pruned.
        gamma: Scale of the amount, at least 0.
        beta: Largest fraction of a group pruned at once, in ``[0, 1)``.
        scope: See :class:`PruningCallback`, as all that follow.
        rounds: How many prunings.
        every_n_epochs: Length of a round in epochs.
        rewind_weights: None, ``"init"`` or a number of completed epochs.
        lr_schedule: ``"auto"``, ``"restart"``, ``"squeeze"`` or ``"keep"``.
        reset_optimizer: Forget optimizer state at each pruning.
        target_remaining: Fraction that survives at the end.
        min_remaining: Fraction that every parameter keeps.
        include: What alone is prunable.
        exclude: What is not prunable.
        keep_zeros: Zeros at the start count as pruned.
        save_rounds: Which rounds' trained models are kept on disk.
        dirpath: Folder for them.
        name: Tells two callbacks apart.

    Raises:
        ValueError: If an option is out of its range.

    Source: Diao et al., *Pruning Deep Neural Networks from a Sparsity Perspective*, ICLR 2023, Algorithm 1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_sap import PQIMonitor, SAPCallback
        >>> trainer = Trainer(max_epochs=60, callbacks=[SAPCallback(p=0.5, q=1.0), PQIMonitor()], logger=False)
    """

    def __init__(
        self,
        p: float = 0.5,
        q: float = 1.0,
        *,
        eta_r: float = 0.0,
        gamma: float = 1.0,
        beta: float = 0.9,
        scope: Scope = "layer",
        rounds: int | None = None,
        every_n_epochs: int | None = None,
        rewind_weights: RewindWeights = None,
        lr_schedule: Schedule = "auto",
        reset_optimizer: bool = True,
        target_remaining: float | None = None,
        min_remaining: float = 0.0,
        include: Selection = None,
        exclude: Selection = None,
        keep_zeros: bool = False,
        save_rounds: bool | int | None = None,
        dirpath: str | Path | None = None,
        name: str = "sap",
    ) -> None:
        super().__init__(
            SparsityInformed(p, q, eta_r, gamma, beta),
            scope=scope,
            rounds=rounds,
            every_n_epochs=every_n_epochs,
            rewind_weights=rewind_weights,
            lr_schedule=lr_schedule,
            reset_optimizer=reset_optimizer,
            target_remaining=target_remaining,
            min_remaining=min_remaining,
            include=include,
            exclude=exclude,
            keep_zeros=keep_zeros,
            save_rounds=save_rounds,
            dirpath=dirpath,
            name=name,
        )
