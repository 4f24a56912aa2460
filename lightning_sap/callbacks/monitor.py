"""PQIMonitor: watches the PQ Index of any training, and logs it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_sap.functional.pqi import check_orders, gini_index
from lightning_sap.pruner import Measure, MonitoredPruner, Piece, dense_pieces, summary, sums_of
from lightning_sap.sharding import is_sharded

CHART = "lightning-sap"


class PQIMonitor(Callback):
    r"""Log the PQ Index of the weights every epoch, of any training, and draw it over the rounds.

    .. math:: I_{p,q}(w) = 1 - d^{1/q - 1/p} \frac{\|w\|_p}{\|w\|_q}

    Beside a pruner it measures the weights that survive in what the pruner prunes; without one, the weights that a
    pruner would prune by default.

    Logs ``pqi/global`` (all weights as one vector) and ``pqi/layer_mean`` (mean over the parameters), beside a pruner
    ``pqi/global_pruned`` (right after the latest pruning, before retraining; in the first round, at its start), where
    asked for ``gini/global``, and ``pqi/<parameter>`` and ``remaining/<parameter>``. With a ``TensorBoardLogger``, a
    custom-scalar layout puts the curves of the layers into one chart, and, where matplotlib is installed, the figure
    of the rounds is among the images.

    Args:
        p: Order of the smaller norm, ``0 < p < q``. None: the pruner's, else 0.5.
        q: Order of the larger norm. None: the pruner's, else 1.0. Give both or neither.
        monitor: A logged metric to draw beside the index, such as ``"val_acc"``.
        mode: Whether that metric is better when larger (``"max"``) or smaller (``"min"``).
        gini: Log the Gini index too; it sorts a copy of all weights, and cannot be had of sharded ones.
        log_layers: Which parameters are logged one by one: False none, True all, or globs on their names.
        name: Tells two monitors apart, in checkpoints and as the first part of the keys ``pqi/…``.

    Raises:
        ValueError: If not ``0 < p < q``, or the mode is unknown; in training, if ``monitor`` is never logged.

    Source: Diao et al., *Pruning Deep Neural Networks from a Sparsity Perspective*, ICLR 2023.

    Example:
        >>> from lightning_sap import PQIMonitor
        >>> monitor = PQIMonitor(monitor="val_acc", log_layers=["encoder.*"])
    """

    def __init__(
        self,
        p: float | None = None,
        q: float | None = None,
        *,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        gini: bool = False,
        log_layers: bool | Sequence[str] = False,
        name: str = "pqi",
    ) -> None:
        super().__init__()
        if (p is None) != (q is None):
            raise ValueError(f"Give both p and q, or neither to measure by the pruner's; got p={p}, q={q}.")
        if p is not None and q is not None:
            check_orders(p, q)
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {mode!r}.")
        self.p, self.q = p, q
        self.monitor, self.mode = monitor, mode
        self.gini = gini
        self.log_layers = log_layers
        self.name = name
        self._rows: list[dict[str, Any]] = []
        self._validated = False
        self._saved_metrics: dict[str, float] = {}  # of the epoch that was interrupted; Lightning forgets them
        self._cache: tuple[tuple[int, ...], Measure] | None = None  # when measured, and what

    # -- hooks --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._cache = None
        self._validated = False
        if self.gini and any(is_sharded(piece.weight) for piece in self._pieces(trainer, pl_module).values()):
            raise ValueError("PQIMonitor(gini=True) needs whole weights, and these are sharded; give gini=False.")
        if trainer.current_epoch == 0:
            self._rows = []
        for writer in _tensorboards(trainer):
            writer.add_custom_scalars(self._layout(trainer, pl_module))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_row(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """For callbacks that look at validation end; the loggers get the values at the end of the epoch."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validated = True
            self._log(trainer, pl_module, logger=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, logger=True)
        measure, pruner = self._measure(trainer, pl_module), _pruners(trainer)[:1]
        total = sum(piece.weight.numel() for piece in self._pieces(trainer, pl_module).values())
        row = {
            "epoch": trainer.current_epoch,
            "round": pruner[0].current_round() if pruner else None,
            "pqi": measure.overall,
            "layer_mean": measure.layer_mean,
            "remaining": sum(measure.survivors.values()) / total,
            "metric": None,
        }
        self._rows = [*(r for r in self._rows if r["epoch"] != row["epoch"]), row]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_row(trainer)
        if self._rows and importlib.util.find_spec("matplotlib") is not None:
            for writer in _tensorboards(trainer):
                writer.add_figure(f"{self.name}/rounds", self.plot(), global_step=trainer.global_step)

    def _finish_row(self, trainer: Trainer) -> None:
        """Add the monitored metric to the last epoch's row, now that every hook had the time to log it."""
        if self.monitor is None or not self._rows or self._rows[-1]["metric"] is not None:
            return
        metrics = self._saved_metrics | {key: float(value) for key, value in trainer.callback_metrics.items()}
        self._saved_metrics = {}
        if self.monitor in metrics:
            self._rows[-1]["metric"] = metrics[self.monitor]
        elif self._validated or not trainer.enable_validation:
            raise ValueError(
                f"PQIMonitor(monitor={self.monitor!r}): no such metric is logged; those logged are {sorted(metrics)}."
            )

    # -- values -------------------------------------------------------------------------------------------------------

    def _pieces(self, trainer: Trainer, module: LightningModule) -> dict[str, Piece]:
        pruned = [pruner.pieces(module) for pruner in _pruners(trainer)]
        return {name: piece for part in pruned for name, piece in part.items()} or dense_pieces(module)

    def _orders(self, trainer: Trainer) -> tuple[float, float]:
        p, q = next((pruner.orders() for pruner in _pruners(trainer)), (0.5, 1.0))
        return (p, q) if self.p is None or self.q is None else (self.p, self.q)

    def _measure(self, trainer: Trainer, module: LightningModule) -> Measure:
        """Indices of the weights as they are, measured once after a step."""
        moment = (trainer.global_step, *(pruner.current_round() for pruner in _pruners(trainer)))
        if self._cache is None or self._cache[0] != moment:
            orders = self._orders(trainer)
            self._cache = (moment, summary(sums_of(self._pieces(trainer, module), *orders), *orders))
        return self._cache[1]

    def _log(self, trainer: Trainer, module: LightningModule, *, logger: bool) -> None:
        if trainer.barebones:
            return
        to = None if logger else False  # True would warn where there is no logger
        measure, pieces = self._measure(trainer, module), self._pieces(trainer, module)
        values = {f"{self.name}/global": measure.overall, f"{self.name}/layer_mean": measure.layer_mean}
        after = [pruner.index_after_pruning() for pruner in _pruners(trainer)]
        if after and after[0] is not None:
            values[f"{self.name}/global_pruned"] = after[0]
        if self.gini:
            values["gini/global"] = float(_gini(pieces))
        for name in filter(self._wants, pieces):
            values[f"{self.name}/{name}"] = measure.layers[name]
            values[f"remaining/{name}"] = measure.survivors[name] / pieces[name].weight.numel()
        for key, value in values.items():
            module.log(key, value, on_step=False, on_epoch=True, logger=to)

    def _wants(self, name: str) -> bool:
        if isinstance(self.log_layers, bool):
            return self.log_layers
        return any(fnmatchcase(name, pattern) for pattern in self.log_layers)

    def _layout(self, trainer: Trainer, module: LightningModule) -> dict[str, dict[str, list[Any]]]:
        """One chart for the index, and one each for the curves of the layers; TensorBoard takes tags as regexes."""
        own = re.escape(self.name)
        charts = {"PQ Index": ["Multiline", [f"{own}/{key}$" for key in ("global", "layer_mean", "global_pruned")]]}
        names = [re.escape(name) for name in self._pieces(trainer, module) if self._wants(name)]
        if names:
            charts["PQ Index of the layers"] = ["Multiline", [f"{own}/{name}$" for name in names]]
            charts["Remaining weights of the layers"] = ["Multiline", [f"remaining/{name}$" for name in names]]
        return {CHART: charts}

    # -- picture ------------------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """The last epoch of each round (without a pruner, each epoch).

        Keys: epoch, round, pqi, layer_mean, remaining, metric.
        """
        last = {row["epoch"] if row["round"] is None else row["round"]: row for row in self._rows}
        return [dict(row) for row in last.values()]

    def plot(self) -> Any:
        """Matplotlib figure of index, remaining weights and monitored metric over the rounds (no pruner: the epochs).

        Raises:
            ModuleNotFoundError: If matplotlib is not installed (``pip install "lightning-sap[plot]"``).
            ValueError: If no epoch has been seen yet.
        """
        from lightning_sap.plot import plot_rounds

        return plot_rounds(self.rows(), metric=self.monitor)

    # -- checkpoints and copies ---------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The name alone: changed options must not lose the state."""
        return f"lightning_sap.monitor/{self.name}"

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self._rows], "metrics": self._saved_metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = [dict(row) for row in state_dict["rows"]]
        self._saved_metrics = dict(state_dict["metrics"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the monitored metric of this moment: Lightning does not."""
        metrics = trainer.callback_metrics
        if self.monitor in metrics:
            state = checkpoint.get("callbacks", {}).get(self.state_key, {})
            state["metrics"] = {self.monitor: float(metrics[self.monitor])}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out the module, which Lightning hangs on every callback as `log`."""
        return {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}


def _pruners(trainer: Trainer) -> list[MonitoredPruner]:
    return [callback for callback in trainer.callbacks if isinstance(callback, MonitoredPruner)]  # type: ignore[attr-defined]


def _tensorboards(trainer: Trainer) -> list[SummaryWriter]:
    """What writes to TensorBoard in this process, whichever logger has it."""
    experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    return [experiment for experiment in experiments if isinstance(experiment, SummaryWriter)]


def _gini(pieces: dict[str, Piece]) -> Tensor:
    alive = [p.weight.flatten() if p.pruned is None else p.weight[~p.pruned] for p in pieces.values()]
    return gini_index(torch.cat(alive))
