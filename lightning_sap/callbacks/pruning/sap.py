"""SAPCallback: the paper's algorithm."""

from __future__ import annotations

from typing import Any

from lightning_sap.callbacks.pruning.callback import PruningCallback
from lightning_sap.callbacks.pruning.signatures import takes_options
from lightning_sap.policies.amounts import SparsityInformed

PAPERS, SEARCHING = (0.5, 1.0), (1.0, 2.0)  # orders p and q; the latter chosen by benchmarks/tolerance.py


@takes_options
class SAPCallback(PruningCallback):
    r"""Sparsity-informed Adaptive Pruning: prune as far as the PQ Index of the trained weights says.

    .. math:: c = \max(0, \min(\lfloor \gamma\,(d - \lceil r \rceil) \rfloor, \lfloor \beta d \rfloor)), \quad
              r = d\,(1 + \eta_r)^{-\frac{q}{q-p}}\,(1 - I)^{\frac{pq}{q-p}}

    It is :class:`PruningCallback` with the policy ``SparsityInformed(p, q, eta_r, gamma, beta)``, and takes the same
    options.

    Args:
        p: Order of the smaller norm of the index, ``0 < p < q``. None: 0.5, the paper's.
        q: Order of the larger norm. None: 1.0, the paper's. Beside a ``tolerance``, where neither is given, p is 1 and
            q is 2: the search does better with them.
        eta_r: Slack in the bound on how many weights to keep, at least 0: the larger, the more is pruned.
        gamma: Scale of the amount, at least 0.
        beta: Largest fraction of a group pruned at once, in ``[0, 1)``.
        **options: Those of :class:`PruningCallback`.

    Raises:
        ValueError: If an option is out of its range.
        TypeError: If there is no option of that name.

    Source: Diao et al., *Pruning Deep Neural Networks from a Sparsity Perspective*, ICLR 2023, Algorithm 1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_sap import PQIMonitor, SAPCallback
        >>> trainer = Trainer(max_epochs=60, callbacks=[SAPCallback(p=0.5, q=1.0), PQIMonitor()], logger=False)
    """

    def __init__(
        self,
        p: float | None = None,
        q: float | None = None,
        *,
        eta_r: float = 0.0,
        gamma: float = 1.0,
        beta: float = 0.9,
        **options: Any,
    ) -> None:
        orders = SEARCHING if p is None and q is None and options.get("tolerance") is not None else PAPERS
        p, q = (default if given is None else given for given, default in zip((p, q), orders, strict=True))
        super().__init__(SparsityInformed(p, q, eta_r, gamma, beta), **options)
